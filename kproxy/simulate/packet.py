"""The first packet of a connection, and what may become of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct

from kproxy.model import types
from kproxy.model.types import Family, family_of

ConntrackState: TypeAlias = Literal["NEW", "ESTABLISHED", "RELATED", "INVALID"]


class UnknownRuleError(ValueError):
    """A dump holds something whose meaning the simulator does not know; the text says where and what."""


class Packet(Struct, frozen=True, kw_only=True):
    """A packet at this node, before any rule has seen it.

    `interface` is where it came in, "" if the node itself sends it. `local_addresses` are the node's own, beside
    the loopback range, which always is. `remembered` are the endpoints ("ip:port") that session
    affinity, within its timeout, holds for the source.
    """

    protocol: types.Protocol
    source: str
    destination: str
    port: int
    interface: str = ""
    local_addresses: frozenset[str] = frozenset()
    state: ConntrackState = "NEW"
    remembered: frozenset[str] = frozenset()

    @property
    def family(self) -> Family:
        """The IP family of both addresses."""
        return family_of(self.destination)


class Verdict(Enum):
    """Where a packet's way through the rules ends."""

    ACCEPTED = "accepted"
    DROPPED = "dropped"
    REJECTED = "rejected"


class Fate(Struct, frozen=True):
    """One thing that may happen to a packet.

    `target` is the endpoint ("ip:port") that its destination was rewritten to, "" if it was left alone.
    `masqueraded` says that the endpoint sees this node's address instead of the source's, `remembered` that
    session affinity will send the source to the same endpoint again. `reply` is the ICMP message of
    a rejection. `counted` are the named counters that it went through, in order.
    """

    verdict: Verdict
    target: str = ""
    masqueraded: bool = False
    remembered: bool = False
    reply: str = ""
    counted: tuple[str, ...] = ()


class Outcome:
    """All that may happen to a packet, each with its probability; they sum to 1."""

    def __init__(self, shares: Iterable[tuple[Fate, float]]) -> None:
        merged: dict[Fate, float] = {}
        for fate, share in shares:
            merged[fate] = merged.get(fate, 0.0) + share
        total = math.fsum(merged.values())
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"the probabilities of all outcomes sum to {total}, not to 1")
        self.fates: Mapping[Fate, float] = merged

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and self.fates == other.fates

    def __hash__(self) -> int:
        return hash(frozenset(self.fates.items()))

    def __repr__(self) -> str:
        return f"Outcome({list(self.fates.items())})"

    @property
    def only(self) -> Fate:
        """The one fate of a packet that chance has no part in; `ValueError` if there are several."""
        (fate,) = self.fates
        return fate

    @property
    def targets(self) -> dict[str, float]:
        """The probability of each endpoint, for the packets that are sent to one."""
        found: dict[str, float] = {}
        for fate, share in self.fates.items():
            if fate.target and fate.verdict is Verdict.ACCEPTED:
                found[fate.target] = found.get(fate.target, 0.0) + share
        return found


class Simulator(Protocol):
    """The rules of one family, ready to be asked about packets."""

    def send(self, packet: Packet) -> Outcome:
        """Return what the rules do to a packet of this family."""
