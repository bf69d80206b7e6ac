"""Packets that are one packet with different luck, each with its probability.

Wherever a rule hits by chance, the flock divides in proportion. So following it to the end gives every way that a
packet may go, with its exact probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kproxy.model.types import Family
from kproxy.simulate.packet import Outcome, Packet
from kproxy.simulate.passage import Passage

Flock: TypeAlias = list[tuple[Passage, float]]


def follow(
    packet: Packet, family: Family, come_in: Callable[[Flock], Flock], go_out: Callable[[Flock], Flock]
) -> Outcome:
    """Return what may become of a packet that comes in by an interface, or goes out because it is the node's own.

    Raises `ValueError` if it is not of the family.
    """
    if packet.family is not family:
        raise ValueError(f"a packet to {packet.destination} does not meet rules of {family.value}")
    flock = [(Passage.begin(packet), 1.0)]
    flock = come_in(flock) if packet.interface else go_out(flock)
    return Outcome((passage.fate(), share) for passage, share in flock)


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
