"""The packet that is traced: what rules can see of it and change, and which of that is unknown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.types import Family, Protocol

Truth: TypeAlias = bool | None
"""Whether a condition holds; None means that it cannot be known."""
ALL_BITS = 0xFFFFFFFF
PROTOCOL_NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}


class Bits(Struct, frozen=True):
    """A mark, of which only the bits in `known` are known."""

    value: int = 0
    known: int = ALL_BITS

    def change(self, clear: int, flip: int) -> Bits:
        """Return the mark after clearing the bits of one mask and flipping those of another."""
        known = self.known | clear
        return Bits(((self.value & ~clear) ^ flip) & known, known)

    def masked_equals(self, mask: int, value: int) -> Truth:
        """Return whether the bits in `mask` equal `value`."""
        if (self.value ^ value) & mask & self.known or value & ~mask:
            return False
        return True if mask & ALL_BITS & ~self.known == 0 else None


class Interface(Struct, frozen=True):
    """An interface of the packet: its name ("" for none, None if unknown), and what has been assumed about it.

    A pattern is a name, or a prefix followed by `*`.
    """

    name: str | None = None
    included: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()

    def matches(self, pattern: str) -> Truth:
        """Return whether the interface has a name that fits a pattern."""
        if self.name is not None:
            return _fits(self.name, pattern)
        if pattern == "*":
            return True
        if any(_covers(each, pattern) for each in self.excluded):
            return False
        if any(_covers(pattern, each) for each in self.included):
            return True
        return None if all(_related(each, pattern) for each in self.included) else False

    def assume(self, pattern: str, *, fits: bool) -> Interface:
        """Return the interface under the assumption that it does or does not fit a pattern."""
        if self.name is not None:
            return self
        if not fits:
            return replace(self, excluded=self.excluded | {pattern})
        return replace(self, included=(*self.included, pattern)) if pattern.endswith("*") else Interface(pattern)


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _covers(pattern: str, other: str) -> bool:
    """Return whether every name that fits `other` also fits `pattern`."""
    return pattern == other or (pattern.endswith("*") and other.rstrip("*").startswith(pattern[:-1]))


def _related(one: str, other: str) -> bool:
    return _covers(one, other) or _covers(other, one)


NO_INTERFACE = Interface("")

ConnectionState: TypeAlias = Literal["new", "established", "untracked", "invalid"]


class Flow(Struct, frozen=True, kw_only=True):
    """A packet between two rules.

    `source_port` is None if unknown; `port` is then negative in replies. `state` is "invalid" before connection
    tracking has seen the packet, as in the kernel; `entry` is the state that connection tracking will give it.
    `original` is the destination before DNAT, and `dnat` the one after it ("ip:port"), or "" without DNAT. `snat` is
    the new source ("masquerade" if it is the address of the output interface). A packet that is `redirected` has an
    unknown address of the node as its destination. `restored` is the destination with its port that conntrack gives to
    a packet of a known connection, such as a reply. `local` has the addresses that are assumed to be local, or not.
    """

    family: Family
    protocol: Protocol
    source: int
    destination: int
    port: int
    source_port: int | None = None
    iif: Interface = Interface()
    oif: Interface = NO_INTERFACE
    mark: Bits = Bits()
    connection_mark: Bits = Bits()
    state: ConnectionState = "invalid"
    entry: ConnectionState = "new"
    reply: bool = False
    original: tuple[int, int] = (0, 0)
    dnat: str = ""
    snat: str = ""
    destination_settled: bool = False
    source_settled: bool = False
    redirected: bool = False
    restored: tuple[int, int] | None = None
    affinity: bool = False
    local: frozenset[tuple[int, bool]] = frozenset()

    @property
    def protocol_number(self) -> int:
        """The number of the protocol in the IP header."""
        return PROTOCOL_NUMBERS[self.protocol]

    def translated(self, address: int, port: int) -> Flow:
        """Return the packet after DNAT."""
        return replace(
            self,
            destination=address,
            port=port,
            dnat=socket_text(self.family, address, port),
            destination_settled=True,
        )


class TraceFacts(Struct, frozen=True, kw_only=True):
    """What is known about the node besides its rules.

    `local_addresses` are addresses of the node, all of them if `complete`. `foreign_addresses` are known not to be the
    node's. `recent` has the addresses in each list of `-m recent`, or is None if unknown; if
    entries may have expired, only a missing one is certain. `interface_to` returns the
    interface through which packets to an address leave, or None if unknown.
    """

    local_addresses: frozenset[int] = frozenset()
    complete: bool = False
    foreign_addresses: frozenset[int] = frozenset()
    recent: Mapping[str, frozenset[int]] | None = None
    recent_may_have_expired: bool = False
    interface_to: Callable[[int], str | None] = lambda _: None

    def is_local(self, flow: Flow, address: int) -> Truth:
        """Return whether an address, the packet's source or destination, is the node's own."""
        if flow.redirected and address == flow.destination:
            return True
        if flow.family is Family.IPV4 and address >> 24 == 127:
            return True
        if flow.family is Family.IPV6 and address == 1:
            return True
        if address in self.local_addresses:
            return True
        if self.complete or address in self.foreign_addresses:
            return False
        return next((value for known, value in flow.local if known == address), None)


def address_text(family: Family, address: int) -> str:
    """Return an address as text."""
    return str(IPv4Address(address) if family is Family.IPV4 else IPv6Address(address))


def socket_text(family: Family, address: int, port: int) -> str:
    """Return an address and port as text: `ip:port`, or `[ip]:port` for IPv6."""
    text = address_text(family, address)
    return f"[{text}]:{port}" if family is Family.IPV6 else f"{text}:{port}"


def number_of(address: str) -> int:
    """Return an address as a number. Raises `ValueError` if it is not an address."""
    return int(ip_address(address))
