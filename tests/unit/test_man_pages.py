"""The manual pages are made from the help of the commands, and man can print them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from kproxy.cli.parser import COMMANDS
from tests.man_pages import FOLDER, pages


def test_committed_pages_are_those_of_the_help() -> None:
    committed = {path.name: path.read_text() for path in FOLDER.glob("*.1")}
    assert committed == pages(), "run `python -m tests.man_pages`"
    assert committed.keys() == {"kproxy.1", *(f"kproxy-{name}.1" for name in COMMANDS)}


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("name", pages())
def test_pages_are_valid(name: str) -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", "-z", str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
