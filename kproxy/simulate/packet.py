"""A simulated packet, its state between rules, its possible outcomes, and the base class of the simulators."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from ipaddress import ip_address, ip_network
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model import types
from kproxy.model.addresses import family_of
from kproxy.model.types import Family

_LOOPBACK = {Family.IPV4: ip_network("127.0.0.0/8"), Family.IPV6: ip_network("::1/128")}

ConntrackState: TypeAlias = Literal["NEW", "ESTABLISHED", "RELATED", "INVALID"]


class UnknownRuleError(ValueError):
    """A dump contains something that the simulator does not support. The message names it and its line or chain."""


class Packet(Struct, frozen=True, kw_only=True):
    """A packet on this node, before the kernel applies the first rule.

    `port` is the destination port. `interface` is the input interface, or "" if the node itself sends the packet.
    `local_addresses` are the node's own addresses; loopback addresses are local even if they are not listed.

    `affinity_endpoints` are the endpoints ("ip:port") to which session affinity binds the packet's source address: the
    kernel has recorded the affinity, and it has not timed out.
    """

    protocol: types.Protocol
    source: str
    destination: str
    port: int
    interface: str = ""
    local_addresses: frozenset[str] = frozenset()
    conntrack_state: ConntrackState = "NEW"
    affinity_endpoints: frozenset[str] = frozenset()

    @property
    def family(self) -> Family:
        """The IP family of the destination, which must also be that of the source."""
        return family_of(self.destination)


class Verdict(Enum):
    """The final verdict on a packet."""

    ACCEPTED = "accepted"
    DROPPED = "dropped"
    REJECTED = "rejected"


class PacketOutcome(Struct, frozen=True):
    """One possible outcome for a packet.

    `endpoint` is the destination after DNAT ("ip:port"), or "" if no rule applied DNAT. If `masqueraded` is true, the
    receiver sees the node's address as the source. If `affinity_recorded` is true, a rule recorded session affinity for
    the source. `reject_with` is the type of the ICMP message that rejects the packet, or "". `counters` are the names
    of the nfacct counters of the rules that matched, in the order of the matches.
    """

    verdict: Verdict
    endpoint: str = ""
    masqueraded: bool = False
    affinity_recorded: bool = False
    reject_with: str = ""
    counters: tuple[str, ...] = ()


class OutcomeDistribution:
    """All possible outcomes for a packet and their probabilities, which sum to 1."""

    def __init__(self, outcomes: Iterable[tuple[PacketOutcome, float]]) -> None:
        """Add up the probabilities of equal outcomes. Raises `ValueError` if the probabilities do not sum to 1."""
        merged: dict[PacketOutcome, float] = {}
        for outcome, probability in outcomes:
            merged[outcome] = merged.get(outcome, 0.0) + probability
        total = math.fsum(merged.values())
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(f"probabilities of all outcomes sum to {total}, not to 1")
        self.probabilities: Mapping[PacketOutcome, float] = merged

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OutcomeDistribution) and self.probabilities == other.probabilities

    def __hash__(self) -> int:
        return hash(frozenset(self.probabilities.items()))

    def __repr__(self) -> str:
        return f"OutcomeDistribution({list(self.probabilities.items())})"

    @property
    def only(self) -> PacketOutcome:
        """The only possible outcome. Raises `ValueError` if there are several."""
        (outcome,) = self.probabilities
        return outcome

    @property
    def endpoints(self) -> dict[str, float]:
        """For each endpoint ("ip:port"), the probability that the packet is accepted and sent to this endpoint."""
        found: dict[str, float] = {}
        for outcome, probability in self.probabilities.items():
            if outcome.endpoint and outcome.verdict is Verdict.ACCEPTED:
                found[outcome.endpoint] = found.get(outcome.endpoint, 0.0) + probability
        return found


class PacketState(Struct, frozen=True):
    """The properties of a packet that rules can match or change. Addresses are integers.

    `port` is the destination port. DNAT changes `destination` and `port`. `interface` is the input interface, or "" if
    the node itself sends the packet and it has not returned through the interface `lo`. `verdict` is None unless a
    rule or the policy of a chain drops or rejects the packet: an accepted packet continues with the next chain, where
    it can still be dropped.
    """

    packet: Packet
    local_addresses: frozenset[int]
    source: int
    destination: int
    port: int
    interface: str
    mark: int = 0
    endpoint: str = ""
    masqueraded: bool = False
    affinity_recorded: bool = False
    counters: tuple[str, ...] = ()
    verdict: Verdict | None = None
    reject_with: str = ""

    @classmethod
    def initial(cls, packet: Packet) -> PacketState:
        """Return the state of a packet before the first rule.

        Raises `ValueError` if an address is invalid, or if source and destination belong to different IP families.
        """
        source, destination = ip_address(packet.source), ip_address(packet.destination)
        if source.version != destination.version:
            raise ValueError(f"source {packet.source} and destination {packet.destination} differ in their IP family")
        local = frozenset(int(ip_address(address)) for address in packet.local_addresses)
        return cls(packet, local, int(source), int(destination), packet.port, packet.interface)

    def is_local(self, address: int) -> bool:
        """Return whether an address is local to this node. The address must belong to the packet's IP family."""
        loopback = _LOOPBACK[self.packet.family]
        return address in self.local_addresses or address & int(loopback.netmask) == int(loopback.network_address)

    def dnat(self, endpoint: str, address: int, port: int) -> PacketState:
        """Return the state after DNAT. `endpoint` is the text "ip:port" for `address` and `port`."""
        return replace(self, endpoint=endpoint, destination=address, port=port)

    def decide(self, verdict: Verdict, reject_with: str = "") -> PacketState:
        """Return the state with a final verdict."""
        return replace(self, verdict=verdict, reject_with=reject_with)

    def outcome(self) -> PacketOutcome:
        """Return the outcome after the last hook. A packet without a verdict is accepted."""
        return PacketOutcome(
            self.verdict or Verdict.ACCEPTED,
            self.endpoint,
            self.masqueraded,
            self.affinity_recorded,
            self.reject_with,
            self.counters,
        )


Branches: TypeAlias = list[tuple[PacketState, float]]
"""The possible states of a packet, each with its probability.

A branch is one state with its probability. A rule that matches at random splits a branch in two.
"""


class Simulator(ABC):
    """Simulates the rules of one IP family. Subclasses implement the hooks and chains of iptables or nftables."""

    def __init__(self, family: Family) -> None:
        """Create a simulator for the packets of `family`."""
        self._family = family

    def send(self, packet: Packet) -> OutcomeDistribution:
        """Return the possible outcomes for a packet.

        The packet traverses the hooks in netfilter's order. In particular, DNAT happens before the routing decision,
        which determines whether the packet is for this node. Only the first packet of a connection traverses NAT rules.

        Raises `ValueError` if the packet belongs to the other IP family, or if its addresses are invalid.
        """
        if packet.family is not self._family:
            raise ValueError(f"packet to {packet.destination} is not an {self._family.value} packet")
        branches = [(PacketState.initial(packet), 1.0)]
        branches = self._receive(branches) if packet.interface else self._transmit(branches)
        return OutcomeDistribution((state.outcome(), probability) for state, probability in branches)

    @abstractmethod
    def _receive(self, branches: Branches) -> Branches:
        """Run the hooks that a packet traverses if it arrives at an interface."""

    @abstractmethod
    def _transmit(self, branches: Branches) -> Branches:
        """Run the hooks that a packet traverses if the node itself sends it.

        If the destination is one of the node's own addresses, the node then receives the packet on `lo`.
        """


def partition(branches: Branches, condition: Callable[[PacketState], bool]) -> tuple[Branches, Branches]:
    """Return two lists: the branches whose state meets a condition, and all other branches."""
    chosen: Branches = []
    others: Branches = []
    for state, probability in branches:
        (chosen if condition(state) else others).append((state, probability))
    return chosen, others


def update(branches: Branches, change: Callable[[PacketState], PacketState]) -> Branches:
    """Apply a change to the state of every branch."""
    return [(change(state), probability) for state, probability in branches]


def to_anywhere(_: PacketState) -> bool:
    """Return True: the condition for hooks that all packets traverse."""
    return True


def to_node(state: PacketState) -> bool:
    """Return whether the destination is this node itself."""
    return state.is_local(state.destination)


def to_elsewhere(state: PacketState) -> bool:
    """Return whether the destination is not this node itself, but a pod or another machine."""
    return not to_node(state)
