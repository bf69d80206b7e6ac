"""tests/packages.sh: what `make` installs before anything else, or asks an ordinary user to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "packages.sh"
TESTS = SCRIPT.read_text().partition("\ntests() {\n")[2].partition("\n}\n")[0]
PYTHON = """#!/bin/sh
case "$2" in
*CC*) echo our-gcc ;;
*Python.h*) [ -e headers ] ;;
esac
"""
"""An interpreter that has everything but its headers. It is asked by `-c CODE`."""

APT = """#!/bin/sh
echo "$@" >>apt.log
case "$*" in
*update) echo 'E: a third party is gone' >&2; exit 100 ;;
*) {install} ;;
esac
"""
NEEDED = dict[str, str](re.findall(r"^    need ([a-z0-9-]+) program (\w+)", TESTS, re.MULTILINE))
"""Packages of the demo and the tests, with the program by which each is known."""

INSTALLS = f"for name in {' '.join(NEEDED.values())} our-gcc; do ln -sf /bin/true bin/$name; done; touch headers"
"""What the packages bring."""


PACKAGES = {*NEEDED, "iptables", "iproute2", "nftables", "gcc", "python3-dev"}
"""All of them but libc6-dev, which is known by a file of this machine, and those that come with Python."""


class Machine:
    """A machine that has no more than a shell, `id`, Python and `apt-get`."""

    def __init__(self, folder: Path, *, user: int, install: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        sh = shutil.which("sh")
        assert sh is not None
        (folder / "bin/sh").symlink_to(sh)
        self._program("id", f"#!/bin/sh\necho {user}\n")
        self._program("python3", PYTHON)
        self._program("apt-get", APT.format(install=install))

    def _program(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "bin/sh"), str(SCRIPT), "tests"],
            cwd=self.folder,
            env={"PATH": str(self.folder / "bin"), "SBIN": "/nonexistent"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def asked(self) -> list[str]:
        """Return what apt-get was called with."""
        log = self.folder / "apt.log"
        return log.read_text().splitlines() if log.exists() else []


def machine(folder: Path, *, user: int = 0, install: str = INSTALLS) -> Machine:
    path = os.environ["PATH"]
    return Machine(folder, user=user, install=f"PATH={path}; {install}")


def test_root_gets_a_compiler_and_headers_though_a_source_is_gone(tmp_path: Path) -> None:
    fresh = machine(tmp_path)
    done = fresh.run()
    assert done.returncode == 0, done.stderr
    update, install = fresh.asked()
    assert update.endswith("update")
    assert set(install.split()) >= PACKAGES
    assert "E: a third party is gone" in done.stderr
    assert fresh.run().stdout == ""
    assert len(fresh.asked()) == 2


def test_an_ordinary_user_is_given_the_command_in_one_line(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    done = fresh.run()
    assert done.returncode == 1
    assert (done.stdout, fresh.asked()) == ("", [])
    (line,) = done.stderr.splitlines()
    said, _, command = line.partition(" with: ")
    assert said == "missing packages; install them as root"
    assert command.startswith("apt-get update; apt-get install ")
    assert set(command.split()) >= PACKAGES


def test_an_ordinary_user_with_sudo_is_told_to_use_it(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    (tmp_path / "bin/sudo").symlink_to("/bin/true")
    assert "packages; install them with: sudo apt-get update; sudo apt-get install " in fresh.run().stderr


def test_no_compiler_is_needed_once_everything_is_installed(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready").touch()
    named = fresh.run().stderr.split()
    assert "openssl" in named
    assert {"gcc", "python3-dev"} & set(named) == set()


@pytest.mark.parametrize(
    ("install", "says"),
    [
        ("echo 'E: no such package' >&2; exit 100", "E: no such package"),
        ("true", "still missing after installation: "),
    ],
)
def test_what_cannot_be_installed_is_an_error(tmp_path: Path, install: str, says: str) -> None:
    done = machine(tmp_path, install=install).run()
    assert done.returncode == 1
    assert says in done.stderr


@pytest.mark.parametrize("arguments", [[], ["apt"], ["Tests"]])
def test_what_else_it_is_asked_for_is_an_error(arguments: list[str]) -> None:
    done = subprocess.run(["/bin/sh", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: packages.sh tests|image|fresh\n")


def test_another_python_has_packages_of_its_own(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    (tmp_path / "bin/python3").rename(tmp_path / "bin/other")
    named = set(fresh.run(PYTHON="python3.14").stderr.split())
    assert {"python3.14", "python3.14-venv", "python3.14-dev"} <= named
    assert "python3" not in named
