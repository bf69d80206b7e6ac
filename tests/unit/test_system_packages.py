"""tests/packages.sh, which installs the system packages that `make` needs or prints the command that does."""

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
"""A fake interpreter for calls with `-c CODE`. Python.h exists once a file `headers` exists."""

APT = """#!/bin/sh
echo "$@" >>apt.log
case "$*" in
*update) echo 'E: a third party is gone' >&2; exit 100 ;;
*) {install} ;;
esac
"""
NEEDED = dict[str, str](re.findall(r"^    need ([a-z0-9-]+) program (\w+)", TESTS, re.MULTILINE))
"""The packages for the demo and the tests that are detected by a program, with this program."""

INSTALLS = f"for name in {' '.join(NEEDED.values())} our-gcc; do ln -sf /bin/true bin/$name; done; touch headers"
"""A script that installs the files of the packages."""


PACKAGES = {*NEEDED, "iptables", "iproute2", "nftables", "gcc", "python3-dev"}
"""All packages, except libc6-dev, which is detected by a file of the real machine, and those of Python."""


class Machine:
    """A machine whose PATH has only a shell, `id`, Python and `apt-get`."""

    def __init__(self, directory: Path, *, user: int, install: str) -> None:
        self.directory = directory
        (directory / "bin").mkdir()
        sh = shutil.which("sh")
        assert sh is not None
        (directory / "bin/sh").symlink_to(sh)
        self._program("id", f"#!/bin/sh\necho {user}\n")
        self._program("python3", PYTHON)
        self._program("apt-get", APT.format(install=install))

    def _program(self, name: str, text: str) -> None:
        file = self.directory / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def run(self, purpose: str = "tests", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.directory / "bin/sh"), str(SCRIPT), purpose],
            cwd=self.directory,
            env={"PATH": str(self.directory / "bin"), "SBIN": "/nonexistent"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def apt_get_calls(self) -> list[str]:
        """Return the arguments of each call of apt-get."""
        log = self.directory / "apt.log"
        return log.read_text().splitlines() if log.exists() else []


def machine(directory: Path, *, user: int = 0, install: str = INSTALLS) -> Machine:
    path = os.environ["PATH"]
    return Machine(directory, user=user, install=f"PATH={path}; {install}")


def test_root_installs_all_packages_even_if_apt_get_update_fails(tmp_path: Path) -> None:
    fresh = machine(tmp_path)
    done = fresh.run()
    assert done.returncode == 0, done.stderr
    update, install = fresh.apt_get_calls()
    assert update.endswith("update")
    assert set(install.split()) >= PACKAGES
    assert "E: a third party is gone" in done.stderr
    assert fresh.run().stdout == ""
    assert len(fresh.apt_get_calls()) == 2


def test_ordinary_user_gets_the_install_command_in_one_line(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    done = fresh.run()
    assert done.returncode == 1
    assert (done.stdout, fresh.apt_get_calls()) == ("", [])
    (line,) = done.stderr.splitlines()
    problem, _, command = line.partition(" with: ")
    assert problem == "missing packages; install them as root"
    assert command.startswith("apt-get update; apt-get install ")
    assert set(command.split()) >= PACKAGES


def test_ordinary_user_with_sudo_gets_a_sudo_command(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    (tmp_path / "bin/sudo").symlink_to("/bin/true")
    assert "packages; install them with: sudo apt-get update; sudo apt-get install " in fresh.run().stderr


def test_packages_of_make_kernels_are_named(tmp_path: Path) -> None:
    command = machine(tmp_path, user=1000).run("kernels").stderr.partition(" with: ")[2].split()
    assert {"qemu-system-x86", "ipvsadm", "kmod"} <= set(command)
    assert "gcc" not in command


def test_compiler_is_not_needed_with_an_existing_virtual_environment(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready").touch()
    named = fresh.run().stderr.split()
    assert "openssl" in named
    assert {"gcc", "python3-dev"} & set(named) == set()


@pytest.mark.parametrize(
    ("install", "message"),
    [
        ("echo 'E: no such package' >&2; exit 100", "E: no such package"),
        ("true", "still missing after installation: "),
    ],
)
def test_failed_installation_is_an_error(tmp_path: Path, install: str, message: str) -> None:
    done = machine(tmp_path, install=install).run()
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("arguments", [[], ["apt"], ["Tests"]])
def test_unknown_arguments_are_a_usage_error(arguments: list[str]) -> None:
    done = subprocess.run(["/bin/sh", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: packages.sh tests|image|fresh|kernels\n")


def test_python_version_selects_its_packages(tmp_path: Path) -> None:
    fresh = machine(tmp_path, user=1000)
    (tmp_path / "bin/python3").rename(tmp_path / "bin/other")
    named = set(fresh.run(PYTHON="python3.14").stderr.split())
    assert {"python3.14", "python3.14-venv", "python3.14-dev"} <= named
    assert "python3" not in named
