"""How commands print reports: as text for people, or as JSON or YAML for programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from textwrap import wrap

from msgspec import Struct

from kproxy.cli.console import show
from kproxy.diagnose.report import Report, document

WIDTH = 100
"""Text for people has lines of at most this many characters."""
FORMATS = ("text", "json", "yaml")
OUTPUT_HELP = "format of the output: text (default), json or yaml; see docs/output.md"


class ExitCode(IntEnum):
    """The exit codes of the commands that print reports."""

    WORKS = 0
    """What the command was asked about works."""
    BROKEN = 1
    """It is broken or degraded, or the command failed."""
    USAGE = 2
    """The command line or the configuration is invalid."""
    UNKNOWN = 3
    """The command could not find out."""


class Style(Struct, frozen=True):
    """Colors for text on a terminal. Without `colored`, all methods return the text unchanged."""

    colored: bool = False

    def good(self, text: str) -> str:
        """Return text about something that works, in green."""
        return self._paint(text, "32")

    def warning(self, text: str) -> str:
        """Return text about something that deserves attention, in yellow."""
        return self._paint(text, "33")

    def bad(self, text: str) -> str:
        """Return text about something that is broken, in bold red."""
        return self._paint(text, "1;31")

    def bold(self, text: str) -> str:
        """Return important text in bold."""
        return self._paint(text, "1")

    def dim(self, text: str) -> str:
        """Return unimportant text in gray."""
        return self._paint(text, "2")

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colored and text else text


def terminal_style() -> Style:
    """Return the style of standard output: colors only on a terminal, and never if NO_COLOR is set (no-color.org)."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return Style(on_terminal and not os.environ.get("NO_COLOR"))


def add_output_flag(parser: argparse.ArgumentParser) -> None:
    """Add `-o` to the flags of a command."""
    parser.add_argument("-o", "--output", choices=FORMATS, default="text", metavar="FORMAT", help=OUTPUT_HELP)


def show_report(report: Report, output: str, text: Callable[[Style], Iterable[str]]) -> None:
    """Print a report in one of `FORMATS`.

    `text` yields its lines for people, without newlines. Long lines are wrapped.
    """
    if output == "text":
        show("".join(f"{part}\n" for line in text(terminal_style()) for part in fit(line)))
    elif output == "json":
        import json

        show(f"{json.dumps(document(report), indent=2, ensure_ascii=False)}\n")
    else:
        import yaml

        show(yaml.safe_dump(document(report), sort_keys=False, allow_unicode=True, width=WIDTH))


def table(rows: Iterable[Sequence[str]], *, indent: str = "", gap: str = "  ") -> list[str]:
    """Return rows as lines with aligned columns. The last column is not padded. Escape sequences have no width."""
    every = [list(row) for row in rows]
    widths = [
        max((width(row[column]) for row in every if column < len(row)), default=0) for column in range(_columns(every))
    ]
    lines = []
    for row in every:
        cells = [cell + " " * (widths[column] - width(cell)) for column, cell in enumerate(row)]
        lines.append((indent + gap.join(cells)).rstrip())
    return lines


def fit(line: str) -> list[str]:
    """Return a line, wrapped if it is longer than `WIDTH`."""
    if width(line) <= WIDTH:
        return [line]
    indent = " " * (len(line) - len(line.lstrip(" ")) + 4)
    return wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def width(text: str) -> int:
    """Return the number of characters of a text that are visible, without the escape sequences of a `Style`."""
    total, inside = 0, False
    for character in text:
        if character == "\x1b":
            inside = True
        elif inside:
            inside = character != "m"
        else:
            total += 1
    return total


def _columns(rows: Sequence[Sequence[str]]) -> int:
    return max(map(len, rows), default=0)
