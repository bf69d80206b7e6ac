"""Packets that are one packet with different luck, each with its probability.

Wherever a rule hits by chance, the flock divides in proportion. So following it to the end gives every way that a
packet may go, with its exact probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kproxy.simulate.passage import Passage

Flock: TypeAlias = list[tuple[Passage, float]]


def divide(flock: Flock, test: Callable[[Passage], bool]) -> tuple[Flock, Flock]:
    """Return those for whom the test holds, and the others."""
    chosen: Flock = []
    others: Flock = []
    for passage, share in flock:
        (chosen if test(passage) else others).append((passage, share))
    return chosen, others


def each(flock: Flock, change: Callable[[Passage], Passage]) -> Flock:
    """Return all of them, changed."""
    return [(change(passage), share) for passage, share in flock]


def anywhere(_: Passage) -> bool:
    """Whether a packet goes to any address at all: to one that does."""
    return True


def here(passage: Passage) -> bool:
    """Whether a packet goes to this node itself."""
    return passage.is_local(passage.destination)


def elsewhere(passage: Passage) -> bool:
    """Whether a packet goes to another machine, or to a pod."""
    return not here(passage)
