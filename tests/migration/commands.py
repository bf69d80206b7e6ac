"""The commands of a page, and what they print."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HANG_GUARD = 120.0

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_SPAN = re.compile(r"`(kubectl [^`]+)`")
_WAITING = re.compile(r"Waiting for daemon set .*")
_POD = re.compile(r"\b(pod/[a-z-]+)-[a-z0-9]{5}\b")
_PLACE = re.compile(r"(?<= deleted) from \S+ namespace$")
"""kubectl says it from 1.34 on."""


class Said(NamedTuple):
    """A command as a page has it, without the prompt, and what it prints."""

    command: str
    output: str


def section(page: Path, heading: str) -> str:
    """Return what stands below a heading of a page, up to the next one; "" if there is no such heading."""
    return re.split(r"^#+ ", page.read_text().partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def transcript(text: str) -> list[Said]:
    """Return the commands of all console blocks; one that ends its line with a backslash goes on in the next."""
    return [Said(*found) for block in _BLOCK.findall(text) for found in _COMMAND.findall(block)]


def mentioned(text: str) -> list[str]:
    """Return the calls of kubectl within the sentences of a text."""
    return _SPAN.findall(_BLOCK.sub("", text))


def shown(found: Sequence[Said]) -> str:
    """Return a transcript as a console block shows it."""
    return "".join(f"$ {each.command}\n{each.output}" for each in found)


def run(command: str, checkout: Path, kubeconfig: Path, home: Path) -> Said:
    """Run a command in the root of a checkout; raise with what it said if it fails."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=os.environ | {"KUBECONFIG": str(kubeconfig), "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stdout}")
    return Said(command, done.stdout)


def comparable(found: Sequence[Said]) -> list[Said]:
    """Return a transcript without what differs: Pods' names, how often one waited, words of new kubectls."""
    return [Said(each.command, "\n".join(_lines(each.output))) for each in found]


def _lines(output: str) -> Iterator[str]:
    lines = (_PLACE.sub("", _POD.sub(r"\1-*", line)) for line in output.splitlines())
    return (line for line in lines if not _WAITING.fullmatch(line))
