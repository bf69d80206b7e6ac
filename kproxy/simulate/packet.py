"""The first packet of a connection, and what may become of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model import types
from kproxy.model.addresses import family_of
from kproxy.model.types import Family

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


class FateDistribution:
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
        return isinstance(other, FateDistribution) and self.fates == other.fates

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

    def send(self, packet: Packet) -> FateDistribution:
        """Return what the rules do to a packet of this family."""


_LOOPBACK = {Family.IPV4: ip_network("127.0.0.0/8"), Family.IPV6: ip_network("::1/128")}


class PacketState(Struct, frozen=True):
    """What rules can look at and change. Addresses are numbers; `local` are the node's own.

    `interface` is the one that the packet came in by, "" before it has come in by any. `verdict` stays None for as
    long as the packet is on its way.
    """

    packet: Packet
    local: frozenset[int]
    source: int
    destination: int
    port: int
    interface: str
    mark: int = 0
    target: str = ""
    masqueraded: bool = False
    remembered: bool = False
    counted: tuple[str, ...] = ()
    verdict: Verdict | None = None
    reply: str = ""

    @classmethod
    def begin(cls, packet: Packet) -> PacketState:
        """Return a packet before its first rule; `ValueError` for what is no address, or of another family."""
        source, destination = ip_address(packet.source), ip_address(packet.destination)
        if source.version != destination.version:
            raise ValueError(f"{packet.source} cannot send to {packet.destination}: not of one family")
        local = frozenset(int(ip_address(address)) for address in packet.local_addresses)
        return cls(packet, local, int(source), int(destination), packet.port, packet.interface)

    def is_local(self, address: int) -> bool:
        """Whether an address of the packet's family is one of this node's."""
        loopback = _LOOPBACK[self.packet.family]
        return address in self.local or address & int(loopback.netmask) == int(loopback.network_address)

    def translate(self, target: str, address: int, port: int) -> PacketState:
        """Return the packet on its way to another destination, `target` its text."""
        return replace(self, target=target, destination=address, port=port)

    def end(self, verdict: Verdict, reply: str = "") -> PacketState:
        """Return the packet as one that goes no further."""
        return replace(self, verdict=verdict, reply=reply)

    def fate(self) -> Fate:
        """Return what has become of the packet; one that nothing stopped has arrived."""
        verdict = self.verdict or Verdict.ACCEPTED
        return Fate(verdict, self.target, self.masqueraded, self.remembered, self.reply, self.counted)


Flock: TypeAlias = list[tuple[PacketState, float]]


def follow(
    packet: Packet, family: Family, come_in: Callable[[Flock], Flock], go_out: Callable[[Flock], Flock]
) -> FateDistribution:
    """Return what may become of a packet that comes in by an interface, or goes out because it is the node's own.

    Raises `ValueError` if it is not of the family.
    """
    if packet.family is not family:
        raise ValueError(f"a packet to {packet.destination} does not meet rules of {family.value}")
    flock = [(PacketState.begin(packet), 1.0)]
    flock = come_in(flock) if packet.interface else go_out(flock)
    return FateDistribution((passage.fate(), share) for passage, share in flock)


def divide(flock: Flock, test: Callable[[PacketState], bool]) -> tuple[Flock, Flock]:
    """Return those for whom the test holds, and the others."""
    chosen: Flock = []
    others: Flock = []
    for passage, share in flock:
        (chosen if test(passage) else others).append((passage, share))
    return chosen, others


def each(flock: Flock, change: Callable[[PacketState], PacketState]) -> Flock:
    """Return all of them, changed."""
    return [(change(passage), share) for passage, share in flock]


def anywhere(_: PacketState) -> bool:
    """Whether a packet goes to any address at all: to one that does."""
    return True


def here(passage: PacketState) -> bool:
    """Whether a packet goes to this node itself."""
    return passage.is_local(passage.destination)


def elsewhere(passage: PacketState) -> bool:
    """Whether a packet goes to another machine, or to a pod."""
    return not here(passage)
