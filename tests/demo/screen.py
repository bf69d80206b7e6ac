"""What the demo draws: headings, bars and rules, in colour on a terminal and as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from rich.console import Console
from rich.text import Text

BAR = 40
COLOURS = ("cyan", "magenta", "yellow", "green", "blue")
TOLERANCE = 5
"""Standard deviations that a share may be off: beyond that it is no chance, but a wrong rule."""


def as_expected(counts: Mapping[str, int], pods: Sequence[str]) -> bool:
    """Tell whether exactly these pods have answered, each as often as a fair die would have it."""
    total, share = sum(counts.values()), 1 / len(pods)
    margin = TOLERANCE * sqrt(share * (1 - share) / total) if total else 0
    return set(counts) == set(pods) and all(abs(count / total - share) <= margin for count in counts.values())


class Screen:
    """Writes the story. Rich leaves out colours and cursor movements where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._colours: dict[str, str] = {}
        self._step = 0
        self._block = "█" if _can_write("█", console.encoding) else "#"

    def heading(self, text: str) -> None:
        """Say what this is."""
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def step(self, text: str) -> None:
        """Begin the next step with one line."""
        self._step += 1
        self._console.print()
        self._console.print(Text.assemble((f"{self._step}. ", "bold green"), (text, "bold")), soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Add a line to the step."""
        self._console.print(Text(f"   {text}", style=style), soft_wrap=True)

    def verdict(self, good: bool, text: str) -> None:
        """Say how a step went."""
        mark, style = ("ok", "bold green") if good else ("WRONG", "bold red")
        self._console.print(Text.assemble("   ", (mark, style), f": {text}"), soft_wrap=True)

    def bars(self, counts: Mapping[str, int], pods: Sequence[str]) -> None:
        """Draw how often each pod answered; a pod keeps its colour from picture to picture."""
        total = sum(counts.values()) or 1
        for pod in dict.fromkeys([*pods, *counts]):
            colour = self._colours.setdefault(pod, COLOURS[len(self._colours) % len(COLOURS)])
            count = counts.get(pod, 0)
            bar = self._block * round(BAR * count / total)
            figures = f"{count:5d}  {count / total:4.0%}"
            self._console.print(Text.assemble(f"   {pod:8}", (f"{bar:{BAR}}", colour), figures), soft_wrap=True)

    def rules(self, chains: Sequence[Sequence[str]]) -> None:
        """Show rules, chain by chain; comments and jumps stand out on a terminal."""
        for number, rules in enumerate(chains):
            if number:
                self._console.print()
            for rule in rules:
                text = Text(f"   {rule}")
                text.highlight_regex(r'--comment "[^"]*"', "dim")
                text.highlight_regex(r"(?<=-A )\S+", "bold")
                text.highlight_regex(r"-j \S+.*$", "green")
                self._console.print(text, soft_wrap=True)


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
