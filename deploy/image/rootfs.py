"""`python3 rootfs.py FOLDER`: create the image's root file system from the Debian packages installed in this stage.

The root contains the files of `PACKAGES`, the virtual environment `VENV`, and the shared libraries that they load, as
`ldd` reports them. It has no shell, no package manager and no compiler. All files come from one Debian release, whose
iptables and nftables are tested together. This script uses only the standard library.
"""
# ruff: noqa: S603, S607 - runs fixed programs of the build stage, never through a shell

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "iptables",
    "kmod",  # iptables-legacy loads modules through it
    "libip4tc2",  # this and the next two are loaded by name, so ldd does not report them
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
    "/usr/sbin/ldconfig",  # Python finds libraries by name through it
)
VENV = Path("/opt/kproxy")
VARIANTS = Path("usr/lib/kproxy/iptables")
"""Directory with both iptables variants under their plain command names. kproxy selects one at startup."""

PROGRAMS = ("iptables", "ip6tables")
ACTIONS = ("", "-save", "-restore")

UNUSED_FOLDERS = ("/usr/share/doc", "/usr/share/man", "/usr/share/lintian", "/usr/share/bug", "/usr/share/initramfs")
UNUSED_MODULES = ("curses", "dbm", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3", "turtledemo", "tkinter")
UNUSED_EXTENSIONS = ("_curses", "_curses_panel", "_dbm", "_sqlite3", "nis", "readline")
API_CLASSES = ("kubernetes/aio", "kubernetes/client/api", "kubernetes/client/models")
"""Generated API classes of the `kubernetes` package, 120 MB, which kproxy never loads."""

COMMANDS = ("kproxy", "python", "python3", "python3.11")
"""Commands to keep in the `bin` directory of the virtual environment; the others belong to dependencies."""

LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "var/run": "/run"}
FOLDERS = ("dev", "proc", "run", "sys", "tmp", "var")
ACCOUNTS = {"etc/passwd": "root:x:0:0:root:/:/usr/sbin/nologin\n", "etc/group": "root:x:0:\n"}


def main(root: Path) -> None:
    """Create the root file system in a new folder."""
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
    """Yield the files and links of an installed package that are needed at run time."""
    listed = subprocess.run(["dpkg", "-L", package], check=True, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        path = Path(line)
        is_license = path.name == "copyright"
        if (path.is_file() or path.is_symlink()) and (is_license or not line.startswith(UNUSED_FOLDERS)):
            yield path


def note(package: str, root: Path) -> None:
    """Record a package in `status.d`, where vulnerability scanners look in images without dpkg."""
    folder = root / "var/lib/dpkg/status.d"
    folder.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(["dpkg", "-s", package], check=True, capture_output=True, text=True).stdout
    (folder / package).write_text(status)


def copy(path: Path, root: Path) -> None:
    """Copy a file to the same path below `root`, and the target of a link too."""
    # Debian packages still list files below /lib and /sbin, which are links into /usr.
    real = Path(os.path.realpath(path.parent)) / path.name
    target = root / real.relative_to("/")
    if os.path.lexists(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(real, target, follow_symlinks=False)
    if real.is_symlink() and real.exists():
        copy(real.parent / os.readlink(real), root)


def prune(root: Path) -> None:
    """Remove files that kproxy never loads."""
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
    """Copy the dynamic loader and the shared libraries that the ELF files below `root` load."""
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
    """Yield the shared libraries that an ELF file loads, directly or indirectly."""
    output = subprocess.run(["ldd", str(path)], check=False, capture_output=True, text=True).stdout
    for line in output.splitlines():
        if "not found" in line:
            raise SystemExit(f"{path}: {line.strip()}")
        found = next((word for word in line.split() if word.startswith("/")), None)
        if found and not found.startswith(str(VENV)):
            yield Path(found)


def owner(library: Path) -> str:
    """Return the package that owns a library, or ""."""
    for name in (str(library), os.path.realpath(library), os.path.realpath(library).removeprefix("/usr")):
        done = subprocess.run(["dpkg", "-S", name], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.split(":")[0]
    return ""


def add_variants(root: Path) -> None:
    """Link both iptables variants under their plain command names, and make nf_tables the default."""
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
    """Compile all Python modules. In a read-only root, Python would otherwise compile them again at every start."""
    for folder in ("usr/lib/python3.11", VENV.relative_to("/")):
        # Copying an image may change modification times, so the byte code must not depend on them.
        options = ["-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"]
        subprocess.run([sys.executable, "-m", "compileall", *options, str(root / folder)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
