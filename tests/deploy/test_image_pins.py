"""The image's dependencies: every file is pinned by hash, and the lists agree with the declared dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "deploy/image"
LISTS = ("requirements.txt", "build-requirements.txt")
IMAGE_PYTHON = {"extra": "", "python_version": "3.11", "python_full_version": "3.11.2"}
"""The Python of the image, which decides the dependencies that depend on the version."""
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.]+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)")


def pins(name: str) -> dict[str, str]:
    """Return the version of each package in a list. Fails unless each line is a version with hashes."""
    text = re.sub(r" \\\n +", " ", (IMAGE / name).read_text())
    found = {}
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        match = PIN.fullmatch(line)
        assert match, f"{name}: no version with hashes: {line[:80]}"
        assert match["name"] not in found
        found[match["name"]] = match["version"]
    return found


def constraints() -> dict[str, str]:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    return {canonicalize_name(name): version for name, version in lines}


def declared() -> list[Requirement]:
    """Return the dependencies that pyproject.toml declares for the image."""
    command = [sys.executable, str(IMAGE / "requirements.py"), str(ROOT / "pyproject.toml")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Requirement(line) for line in lines]


def needed() -> set[str]:
    """Return the names of all packages that the image's dependencies need, as the installed packages declare."""
    pending = declared()
    found: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate(IMAGE_PYTHON)):
            continue
        found.add(name)
        try:
            pending += [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed; run make setup")
    return found


@pytest.mark.parametrize("name", LISTS)
def test_every_package_has_the_version_of_the_constraints_and_hashes(name: str) -> None:
    pinned = pins(name)
    assert pinned
    assert pinned == {package: constraints()[package] for package in pinned}, "run make image-pins"


def test_lists_contain_exactly_what_the_image_needs() -> None:
    assert set(pins("requirements.txt")) == needed(), "run make image-pins"
    assert set(pins("build-requirements.txt")) == {"setuptools"}


def test_pins_are_in_the_declared_ranges() -> None:
    pinned = pins("requirements.txt")
    for requirement in declared():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_image_installs_only_files_with_hashes() -> None:
    dockerfile = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    installs = re.findall(r"pip install ([^&\n]*)", dockerfile)
    assert len(installs) == 3
    for arguments in installs:
        own = arguments.rstrip().endswith("--no-deps /src") or "--no-deps /src " in arguments
        assert own or "--require-hashes" in arguments
        assert "--no-build-isolation" in arguments or "-r /src/build-requirements.txt" in arguments
