"""Telling own changes of tables from those of others, by the number that the kernel gives to each. Pure.

There is one count for all tables of a network namespace: each change is one more, whoever makes it.
"""

from __future__ import annotations


def following(generation: int) -> int:
    """Return the generation after one's own change (nf_tables counts in 32 bits and leaves out 0)."""
    return generation + 1 & 0xFFFFFFFF or 1


class OwnChanges:
    """The latest unbroken series of generations that this process has made, whichever of its backends did.

    Without it, each family's changes would look to the other like those of a stranger.
    """

    def __init__(self) -> None:
        self._begin = self._end = 0

    def made(self, before: int) -> int:
        """Note that a change was made right after a generation; return its own."""
        if before != self._end:
            self._begin = before
        self._end = following(before)
        return self._end

    def since(self, generation: int) -> int:
        """Return the last generation up to which all changes after the given one are our own."""
        return self._end if self._begin <= generation <= self._end else generation
