"""tests/fresh: `make fresh` and CI name only existing checks. The checks take minutes and need network access."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/fresh/fresh.sh"
CHECKS = set(re.findall(r"^check_([a-z]+)\(\)", (ROOT / "tests/fresh/checks.sh").read_text(), re.MULTILINE))


def test_every_check_is_documented() -> None:
    assert set(re.findall(r"^#   ([a-z]+) ", SCRIPT.read_text(), re.MULTILINE)) == CHECKS


def test_make_and_ci_run_checks_that_exist() -> None:
    (default,) = re.findall(r"^CHECKS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bCHECKS=([a-z]+)", "".join((ROOT / name).read_text() for name in (".ci/run", "Makefile")))
    assert named
    assert {*default.split(), *named} <= CHECKS


def test_test_files_of_the_short_check_exist() -> None:
    (files,) = re.findall(r'TESTS="(.*)"', (ROOT / "tests/fresh/checks.sh").read_text())
    assert [name for name in files.split() if not (ROOT / name).exists()] == []


def test_commands_to_try_by_hand_are_found() -> None:
    section = (ROOT / "docs" / "local.md").read_text().partition("\n## Try it by hand\n")[2].partition("\n## ")[0]
    assert re.search(r"`apt-get install (.*)`", section)
    assert len(re.findall(r"^\$ ", section, re.MULTILINE)) == 2
    assert len(re.findall(r"^# ", section, re.MULTILINE)) > 5


def test_unknown_check_is_rejected_at_start() -> None:
    if os.geteuid() != 0:
        pytest.skip("fresh.sh needs root privileges")
    done = subprocess.run(["sh", str(SCRIPT), "bookworm", "nosuch"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith('fresh: unknown check "nosuch": choose from ')
    assert all(name in done.stderr for name in CHECKS)
