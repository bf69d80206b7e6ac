"""The threat model names tests that exist, and covers every input."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text()


@cache
def all_tests() -> frozenset[str]:
    """Return the names of all test functions of the project."""
    files = (ROOT / "tests").rglob("test_*.py")
    return frozenset(name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))


def rows(heading: str) -> list[str]:
    """Return the rows of the table below a heading, without its header."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][2:]


def test_named_tests_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 25
    assert named <= all_tests()


def test_each_input_has_a_test() -> None:
    inputs = rows("Inputs")
    assert len(inputs) >= 12
    assert [row for row in inputs if not re.search(r"`test_\w+`", row)] == []
