"""Commands on a documentation page, and their output."""

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
_NAMESPACE = re.compile(r"(?<= deleted) from \S+ namespace$")
"""kubectl prints the namespace since 1.34."""


class CommandOutput(NamedTuple):
    """A command without its prompt, and its output."""

    command: str
    output: str


def section(page: Path, heading: str) -> str:
    """Return the text between a heading on a page and the next heading; "" if the heading does not exist."""
    return re.split(r"^#+ ", page.read_text().partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def transcript(text: str) -> list[CommandOutput]:
    """Return the commands in all console blocks. A backslash at the end of a line continues a command."""
    return [CommandOutput(*groups) for block in _BLOCK.findall(text) for groups in _COMMAND.findall(block)]


def inline_commands(text: str) -> list[str]:
    """Return the kubectl commands in code spans outside of console blocks."""
    return _SPAN.findall(_BLOCK.sub("", text))


def console_block(outputs: Sequence[CommandOutput]) -> str:
    """Format a transcript as the content of a console block."""
    return "".join(f"$ {each.command}\n{each.output}" for each in outputs)


def run(command: str, checkout: Path, kubeconfig: Path, home: Path) -> CommandOutput:
    """Run a command in the root of a checkout. Raises `RuntimeError` with its output if it fails."""
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
    return CommandOutput(command, done.stdout)


def comparable(outputs: Sequence[CommandOutput]) -> list[CommandOutput]:
    """Return a transcript without the parts that vary: Pod names, progress lines, and text added by newer kubectls."""
    return [CommandOutput(each.command, "\n".join(_lines(each.output))) for each in outputs]


def _lines(output: str) -> Iterator[str]:
    lines = (_NAMESPACE.sub("", _POD.sub(r"\1-*", line)) for line in output.splitlines())
    return (line for line in lines if not _WAITING.fullmatch(line))
