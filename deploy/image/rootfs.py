"""`python3 rootfs.py FOLDER`: lay out the root of the image, out of what Debian's packages installed here.

Taken is what runs: the files of `PACKAGES`, the interpreter's environment below `VENV`, and the shared libraries that
either of them loads, which `ldd` names. There is no shell in it, no package manager and no compiler. Everything comes
from one distribution, so iptables and nftables are versions that were tested together. Only the standard library is
needed to run this.
"""
# ruff: noqa: S603, S607 - runs fixed programs of the stage that builds the image, never through a shell

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "iptables",
    "kmod",  # iptables-legacy asks it for modules
    "libip4tc2",  # and the next two: found by name, so that ldd does not see them
    "libip6tc2",
    "libxtables12",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "netbase",
    "nftables",
    "python3-minimal",
    "python3.11-minimal",
)
FILES = (
    "/etc/debian_version",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/usr/lib/os-release",
    "/usr/sbin/ldconfig",  # by which Python finds libraries by name
)
VENV = Path("/opt/kproxy")
VARIANTS = Path("usr/lib/kproxy/iptables")
"""Where kproxy finds both variants of iptables under their plain names; which one counts is decided at start."""

PROGRAMS = ("iptables", "ip6tables")
ACTIONS = ("", "-save", "-restore")

UNUSED_FOLDERS = ("/usr/share/doc", "/usr/share/man", "/usr/share/lintian", "/usr/share/bug", "/usr/share/initramfs")
UNUSED_MODULES = ("curses", "dbm", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3", "turtledemo", "tkinter")
UNUSED_EXTENSIONS = ("_curses", "_curses_panel", "_dbm", "_sqlite3", "nis", "readline")
API_CLASSES = ("kubernetes/aio", "kubernetes/client/api", "kubernetes/client/models")
"""The API classes of the `kubernetes` package, which kproxy never loads: 120 MB."""

COMMANDS = ("kproxy", "python", "python3", "python3.11")
"""What stays of the environment's `bin`; the rest is commands and shell scripts that dependencies bring along."""

LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "var/run": "/run"}
FOLDERS = ("dev", "proc", "run", "sys", "tmp", "var")
ACCOUNTS = {"etc/passwd": "root:x:0:0:root:/:/usr/sbin/nologin\n", "etc/group": "root:x:0:\n"}


def main(root: Path) -> None:
    """Lay out the root of the image in a new folder."""
    for name in (*FOLDERS, "etc", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        (root / name).mkdir(parents=True)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    for name, line in ACCOUNTS.items():
        (root / name).write_text(line)
    for package in PACKAGES:
        for path in package_files(package):
            copy(path, root)
        note(package, root)
    for name in FILES:
        copy(Path(name), root)
    shutil.copytree(VENV, root / VENV.relative_to("/"), symlinks=True)
    prune(root)
    add_libraries(root)
    add_variants(root)
    compile_modules(root)
    subprocess.run(["ldconfig", "-r", str(root)], check=True)


def package_files(package: str) -> Iterator[Path]:
    """Yield the files and links of an installed package that are of use at run time."""
    listed = subprocess.run(["dpkg", "-L", package], check=True, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        path = Path(line)
        is_licence = path.name == "copyright"
        if (path.is_file() or path.is_symlink()) and (is_licence or not line.startswith(UNUSED_FOLDERS)):
            yield path


def note(package: str, root: Path) -> None:
    """Say that a package is in the image, where scanners for known vulnerabilities look in images without dpkg."""
    folder = root / "var/lib/dpkg/status.d"
    folder.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(["dpkg", "-s", package], check=True, capture_output=True, text=True).stdout
    (folder / package).write_text(status)


def copy(path: Path, root: Path) -> None:
    """Copy a file, and if it is a link what it leads to, to the same place below `root`."""
    # Debian's packages still name files below /lib and /sbin, which are links into /usr.
    real = Path(os.path.realpath(path.parent)) / path.name
    target = root / real.relative_to("/")
    if os.path.lexists(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(real, target, follow_symlinks=False)
    if real.is_symlink() and real.exists():
        copy(real.parent / os.readlink(real), root)


def prune(root: Path) -> None:
    """Remove what no part of kproxy loads."""
    library = root / "usr/lib/python3.11"
    for name in UNUSED_MODULES:
        shutil.rmtree(library / name, ignore_errors=True)
    for name in UNUSED_EXTENSIONS:
        for path in (library / "lib-dynload").glob(f"{name}.*"):
            path.unlink()
    venv = root / VENV.relative_to("/")
    for name in API_CLASSES:
        for path in (venv / "lib/python3.11/site-packages" / name).rglob("*.py*"):
            if path.name != "__init__.py":
                path.unlink()
    for path in (venv / "bin").iterdir():
        if path.name not in COMMANDS:
            path.unlink()


def add_libraries(root: Path) -> None:
    """Copy the shared libraries that programs and libraries below `root` load, and the dynamic loader."""
    packages = set()
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.open("rb").read(4) != b"\x7fELF":
            continue
        for library in libraries(path):
            copy(library, root)
            packages.add(owner(library))
    for package in sorted(packages - {""}):
        note(package, root)


def libraries(path: Path) -> Iterator[Path]:
    """Yield the shared libraries that a program or library loads, with those that these load."""
    said = subprocess.run(["ldd", str(path)], check=False, capture_output=True, text=True).stdout
    for line in said.splitlines():
        if "not found" in line:
            raise SystemExit(f"{path}: {line.strip()}")
        found = next((word for word in line.split() if word.startswith("/")), None)
        if found and not found.startswith(str(VENV)):
            yield Path(found)


def owner(library: Path) -> str:
    """Return the package that a library is from, "" if it is from none."""
    for name in (str(library), os.path.realpath(library), os.path.realpath(library).removeprefix("/usr")):
        done = subprocess.run(["dpkg", "-S", name], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.split(":")[0]
    return ""


def add_variants(root: Path) -> None:
    """Give each variant of iptables a folder with the plain names, and make nf_tables the usual one."""
    for variant in ("nft", "legacy"):
        folder = root / VARIANTS / variant
        folder.mkdir(parents=True)
        for name in (program + action for program in PROGRAMS for action in ACTIONS):
            (folder / name).symlink_to(f"/usr/sbin/xtables-{variant}-multi")
    for name in (program + action for program in PROGRAMS for action in ACTIONS):
        link = root / "usr/sbin" / name
        link.unlink(missing_ok=True)
        link.symlink_to("xtables-nft-multi")


def compile_modules(root: Path) -> None:
    """Compile all of Python's modules: nobody can write them down later, and each start would do it again."""
    for folder in ("usr/lib/python3.11", VENV.relative_to("/")):
        # Unchecked: what copies images may change times of files.
        options = ["-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"]
        subprocess.run([sys.executable, "-m", "compileall", *options, str(root / folder)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
