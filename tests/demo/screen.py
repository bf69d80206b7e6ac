"""Output of the demo: headings, bars and rules. Colored on a terminal, plain text in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from rich.console import Console
from rich.text import Text

BAR = 40
COLORS = ("cyan", "magenta", "yellow", "green", "blue")
TOLERANCE = 5
"""Standard deviations that a pod's share may differ from an equal share. More is not chance but a wrong rule."""


def is_balanced(counts: Mapping[str, int], pods: Sequence[str]) -> bool:
    """Return whether exactly these pods replied, and each to an equal share of the requests."""
    total, share = sum(counts.values()), 1 / len(pods)
    margin = TOLERANCE * sqrt(share * (1 - share) / total) if total else 0
    return set(counts) == set(pods) and all(abs(count / total - share) <= margin for count in counts.values())


class Screen:
    """Prints the demo. Rich omits colors and cursor movements if the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._colors: dict[str, str] = {}
        self._step = 0
        self._block = "█" if _can_encode("█", console.encoding) else "#"

    def heading(self, text: str) -> None:
        """Print the title."""
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def step(self, text: str) -> None:
        """Start the next numbered step."""
        self._step += 1
        self._console.print()
        self._console.print(Text.assemble((f"{self._step}. ", "bold green"), (text, "bold")), soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """Print a line of the current step."""
        self._console.print(Text(f"   {text}", style=style), soft_wrap=True)

    def result(self, passed: bool, text: str) -> None:
        """Print the result of a check."""
        mark, style = ("ok", "bold green") if passed else ("FAILED", "bold red")
        self._console.print(Text.assemble("   ", (mark, style), f": {text}"), soft_wrap=True)

    def bars(self, counts: Mapping[str, int], pods: Sequence[str]) -> None:
        """Draw a bar for the number of replies of each pod. A pod has the same color in every drawing."""
        total = sum(counts.values()) or 1
        for pod in dict.fromkeys([*pods, *counts]):
            color = self._colors.setdefault(pod, COLORS[len(self._colors) % len(COLORS)])
            count = counts.get(pod, 0)
            bar = self._block * round(BAR * count / total)
            figures = f"{count:5d}  {count / total:4.0%}"
            self._console.print(Text.assemble(f"   {pod:8}", (f"{bar:{BAR}}", color), figures), soft_wrap=True)

    def rules(self, chains: Sequence[Sequence[str]]) -> None:
        """Print rules, chain by chain. Comments, chains and jumps are highlighted on a terminal."""
        for number, rules in enumerate(chains):
            if number:
                self._console.print()
            for rule in rules:
                text = Text(f"   {rule}")
                text.highlight_regex(r'--comment "[^"]*"', "dim")
                text.highlight_regex(r"(?<=-A )\S+", "bold")
                text.highlight_regex(r"-j \S+.*$", "green")
                self._console.print(text, soft_wrap=True)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
