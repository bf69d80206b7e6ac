"""Distinguish kproxy's own nf_tables commits from those of other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kproxy.model.drift import CommitAuthor
from kproxy.model.types import Family
from kproxy.nftables.kernel import OwnGenerations


class OwnCommits:
    """The nf_tables tables that kproxy programs, and what distinguishes kproxy's commits from those of others.

    `generations` contains only the commits that kproxy makes itself, without a program.
    """

    def __init__(self) -> None:
        self.tables: list[tuple[Family, str]] = []
        self.generations = OwnGenerations()
        self._owns: list[tuple[Callable[[int], bool], Callable[[CommitAuthor], bool]]] = []

    def add(
        self,
        tables: Iterable[tuple[Family, str]],
        owns: Callable[[int], bool],
        confirms: Callable[[CommitAuthor], bool],
    ) -> None:
        """Add tables. `owns` returns whether commits with a netlink port ID are made by kproxy.

        If it returns True, `confirms` returns whether a certain commit was made by kproxy.
        """
        self.tables += tables
        self._owns.append((owns, confirms))

    def owns(self, port: int) -> bool:
        """Return whether a commit with this netlink port ID was made by kproxy, or by a program that kproxy ran."""
        return any(owns(port) for owns, _ in self._owns)

    def confirms(self, commit: CommitAuthor) -> bool:
        """Return whether a commit was made by kproxy, if `owns` has returned True for its netlink port ID."""
        # The program may be unknown by now, if it is a child process of a program that kproxy ran.
        candidates = [confirms for owns, confirms in self._owns if owns(commit.port)]
        return any(confirms(commit) for confirms in candidates or [each for _, each in self._owns])
