"""The wheel built from this checkout: content, metadata, dependencies, and the installed command."""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email.message import Message
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

import kproxy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("kproxy", "tests", "docs", "deploy", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
MIN_SETUPTOOLS = 77


def checkout(directory: Path) -> Path:
    """Copy the checkout to a directory: a build leaves files behind."""
    for name in SOURCES:
        subprocess.run(["cp", "-R", str(ROOT / name), str(directory)], check=True)
    return directory


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network access."""
    if int(version("setuptools").partition(".")[0]) < MIN_SETUPTOOLS:
        pytest.skip(f"the build needs setuptools {MIN_SETUPTOOLS} or newer")
    source = checkout(tmp_path_factory.mktemp("source"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*command, f"--wheel-dir={target}", str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` directory of a virtual environment with the wheel and this environment's dependencies."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    command = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, str(wheel)], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    # Python does not read .pth files in directories added by a .pth file, so the editable install is not visible.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return directory / "bin"


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"kproxy-{kproxy.__version__}.dist-info/{name}").decode()


def test_wheel_has_only_the_package_its_manual_pages_and_the_license(wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kproxy").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"kproxy-{kproxy.__version__}.dist-info"
    data = f"kproxy-{kproxy.__version__}.data/data/share/man/man1"
    manual = {f"{data}/{path.name}" for path in (ROOT / "docs/man").glob("*.1")}
    assert {name for name in names if not name.startswith(f"{info}/")} == sources | manual
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_wheel_is_for_any_platform_and_python_3(wheel: Path) -> None:
    assert wheel.name == f"kproxy-{kproxy.__version__}-py3-none-any.whl"


def test_commands_of_the_wheel_are_kproxy_and_its_kubectl_plugin(wheel: Path) -> None:
    entries = ConfigParser()
    entries.read_string(metadata(wheel, "entry_points.txt"))
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {
            "kproxy": "kproxy.__main__:main",
            "kubectl-kproxy": "kproxy.cli.kubectl_plugin:main",
        }
    }


def test_metadata_match_the_project(wheel: Path) -> None:
    fields: Message = email.message_from_string(metadata(wheel, "METADATA"))
    assert fields["Version"] == kproxy.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == PROJECT["requires-python"]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload() == (ROOT / "README.md").read_text()
    needed = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {requirement(line) for line in needed} == {requirement(line) for line in PROJECT["dependencies"]}


def test_installed_command_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run([str(installed / "python"), "-c", "import kproxy; print(kproxy.__file__)"], tmp_path)
    assert where.stdout.startswith(str(installed.parent))
    command = str(installed / "kproxy")
    assert run([command, "--version"], tmp_path).stdout == f"kproxy {kproxy.__version__}\n"
    rules = run([command, "render", f"--objects={ROOT}/tests/golden/clusterip", "--family=ipv4"], tmp_path).stdout
    assert "--to-destination 10.244.1.1:8080" in rules


def test_newest_changelog_entry_is_this_version() -> None:
    entries = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == kproxy.__version__
    assert len(set(entries)) == len(entries)


def requirement(line: str) -> str:
    """Return the normalized package name of a requirement specifier."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~; \[]", line)[0]).lower()


def imported() -> Iterator[str]:
    """Yield the top-level names of all modules that kproxy imports."""
    for path in (ROOT / "kproxy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


EXTRAS = PROJECT["optional-dependencies"]


def test_dependencies_are_the_imported_packages() -> None:
    providers = packages_distributions()
    used = {requirement(name) for module in set(imported()) for name in providers.get(module, [])} - {"kproxy"}
    assert used == {requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS["completion"]]}
    assert set(EXTRAS["completion"]) <= set(EXTRAS["dev"])


LOAD_ALL_MODULES = """
import pkgutil, sys
for name in ("rich", "shtab"):
    sys.modules[name] = None
import kproxy
for module in pkgutil.walk_packages(kproxy.__path__, "kproxy."):
    if module.name != "kproxy.__main__":
        __import__(module.name)
from kproxy.cli.main import main
assert main(["completion", "bash"]) == 1
print(len([name for name in sys.modules if name.startswith("kproxy.")]))
"""


def test_all_modules_load_without_rich_and_shtab() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD_ALL_MODULES], capture_output=True, text=True, check=False)
    need = "completion requires the Python package shtab; install it with: pip install 'kproxy[completion]'"
    assert (done.returncode, done.stderr) == (0, f"kproxy: {need}\n")
    assert int(done.stdout) > 100
