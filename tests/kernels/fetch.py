"""Debian's stock kernels: downloaded by apt with a configuration of its own, and unpacked without being installed.

apt verifies the signature of the release, and the checksums of its indexes and packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIRROR = "http://deb.debian.org/debian"
"""Debian's own mirror, which the variable MIRROR replaces."""

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
META_PACKAGE = "linux-image-amd64"
"""The package that depends on the newest stock kernel of a release."""

WITHOUT_SECURITY = {"sid", "unstable", "experimental"}
"""Suites without a security suite of their own."""

_KERNEL_PACKAGE = re.compile(r"linux-(image|base|binary|modules)-\d\S*-amd64")


class FetchError(Exception):
    """A kernel cannot be downloaded or unpacked. The message names the release and the reason, in one line."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its release as `uname -r` prints it, its image, and the directory with its modules."""

    release: str
    image: Path
    modules: Path


def fetch(suite: str, folder: Path, mirror: str = MIRROR) -> Kernel:
    """Return the newest stock kernel of a Debian suite. An earlier download of the same kernel is used again.

    Raises `FetchError`.
    """
    apt = _Apt(suite, folder.absolute(), mirror)
    apt.run("apt-get", "--quiet", "update")
    packages = [name for name in apt.closure(META_PACKAGE) if _KERNEL_PACKAGE.fullmatch(name)]
    if not packages:
        raise FetchError(f"Debian {suite} has no package {META_PACKAGE}")
    versions = [f"{name}={apt.version(name)}" for name in packages]
    downloads = folder / "packages"
    unpacked = folder / "unpacked"
    stamp = unpacked / "versions"
    if not stamp.exists() or stamp.read_text() != "\n".join(versions):
        shutil.rmtree(downloads, ignore_errors=True)
        shutil.rmtree(unpacked, ignore_errors=True)
        downloads.mkdir(parents=True)
        apt.run("apt-get", "--quiet", "download", *versions, cwd=downloads)
        for package in downloads.iterdir():
            apt.run("dpkg-deb", "--extract", str(package), str(unpacked))
        shutil.rmtree(downloads)
        _index_modules(suite, unpacked)
        stamp.write_text("\n".join(versions))
    return _kernel(suite, unpacked)


def _index_modules(suite: str, unpacked: Path) -> None:
    """Write `modules.dep` and the other indexes of modprobe. In newer releases, /lib is a link to /usr/lib."""
    if not (unpacked / "lib").exists():
        (unpacked / "lib").symlink_to("usr/lib")
    kernel = _kernel(suite, unpacked)
    _run(suite, ["depmod", "--basedir", str(unpacked), kernel.release], dict(os.environ), None)


def _kernel(suite: str, unpacked: Path) -> Kernel:
    """Find the kernel in the unpacked packages. From Debian 14 on, the image is in the directory of the modules."""
    found = [path for path in (unpacked / "lib" / "modules").glob("*") if path.is_dir()]
    if len(found) != 1:
        raise FetchError(f"the kernel packages of Debian {suite} contain {len(found)} directories of modules, not one")
    modules, release = found[0], found[0].name
    images = [path for path in (unpacked / "boot" / f"vmlinuz-{release}", modules / "vmlinuz") if path.exists()]
    if not images:
        raise FetchError(f"the kernel packages of Debian {suite} contain no image of Linux {release}")
    return Kernel(release, images[0], modules)


class _Apt:
    """apt with the indexes of one suite. It neither reads nor writes the package database of this machine."""

    def __init__(self, suite: str, folder: Path, mirror: str) -> None:
        self._suite = suite
        own = folder / "apt"
        for name in ("lists/partial", "cache/archives/partial"):
            (own / name).mkdir(parents=True, exist_ok=True)
        (own / "status").touch()
        (own / "sources.list").write_text("".join(f"{line}\n" for line in _sources(suite, mirror)))
        (own / "apt.conf").write_text(_configuration(own))
        self._environment = os.environ | {"APT_CONFIG": str(own / "apt.conf"), "LC_ALL": "C.UTF-8"}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command and return its output. Raises `FetchError` with the first error that it prints."""
        return _run(self._suite, command, self._environment, cwd)

    def version(self, package: str) -> str:
        """Return the newest version of a package."""
        return self._field(package, "Version")

    def closure(self, package: str) -> list[str]:
        """Return the kernel packages that a package depends on, and those that they depend on."""
        found: list[str] = []
        pending = [package]
        while pending:
            depends = re.split(r"[,|]", self._field(pending.pop(), "Depends"))
            names = [each.split()[0] for each in depends if each.strip()]
            new = [name for name in names if _KERNEL_PACKAGE.fullmatch(name) and name not in found]
            found += new
            pending += new
        return found

    def _field(self, package: str, name: str) -> str:
        shown = self.run("apt-cache", "show", "--no-all-versions", package)
        found = re.search(rf"^{name}: (.*)$", shown, re.MULTILINE)
        return found[1] if found else ""


def _sources(suite: str, mirror: str) -> list[str]:
    options = f"[arch=amd64 signed-by={KEYRING}]"
    lines = [f"deb {options} {mirror} {suite} main"]
    if suite not in WITHOUT_SECURITY:
        lines.append(f"deb {options} {mirror.rstrip('/')}-security {suite}-security main")
    return lines


def _configuration(own: Path) -> str:
    return f"""\
Dir::Etc::SourceList "{own}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists "{own}/lists";
Dir::State::Status "{own}/status";
Dir::Cache "{own}/cache";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "{"root" if os.geteuid() == 0 else ""}";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "1";
"""


def _run(suite: str, command: list[str] | tuple[str, ...], environment: dict[str, str], cwd: Path | None) -> str:
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(
            f"cannot get the kernel of Debian {suite}: {' '.join(command[:2])}: {_first_error(done.stderr)}; "
            "make kernels needs a Debian mirror, which MIRROR=... selects"
        )
    return done.stdout


def _first_error(text: str) -> str:
    """Return the first error that apt printed, or the first line, without apt's prefixes."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no error message"]
    line = next((line for line in lines if line.startswith(("E: ", "Err:"))), lines[0])
    return " ".join(line.removeprefix("E: ").split())
