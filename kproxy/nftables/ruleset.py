"""Data types for the contents of a table: sets and maps, chains, rules and their statements. Pure.

`kproxy.nftables.nft_syntax` formats them in nft's syntax. `kproxy.nftables.encode` encodes them as netlink messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Literal, TypeAlias

from msgspec import Struct


class KeyField(Enum):
    """One field of the key of a set or map."""

    SOURCE = "saddr"
    DESTINATION = "daddr"
    PROTOCOL = "protocol"
    PORT = "dport"
    NUMGEN = "numgen"
    """A random number. `DnatMap` uses it to select an endpoint."""


class MapValue(Enum):
    """The type of a map's values. A set has no values (`NONE`)."""

    NONE = "none"
    VERDICT = "verdict"
    ENDPOINT = "endpoint"
    """An address and a port."""


class NftSet(Struct, frozen=True):
    """A set or map.

    `timeout` is in seconds; 0 means no timeout. If there is a timeout, rules add elements to the set (`flags
    dynamic,timeout`), and each element expires after that time. With `counters`, each element counts the packets that
    looked it up.
    """

    name: str
    key: tuple[KeyField, ...]
    value: MapValue = MapValue.NONE
    comment: str = ""
    timeout: int = 0
    counters: bool = False


class MatchSaddr(Struct, frozen=True, tag=True):
    """`ip saddr 10.0.0.0/8`: match packets from a network. With `negate`: `ip saddr != 10.0.0.0/8`."""

    network: str
    negate: bool = False


class MatchDaddr(Struct, frozen=True, tag=True):
    """`ip daddr 10.0.0.0/8`: match packets to a network. With `negate`: `ip daddr != 10.0.0.0/8`."""

    network: str
    negate: bool = False


class MatchIifname(Struct, frozen=True, tag=True):
    """`iifname "cni0"`: match packets from an input interface.

    With `prefix`, `name` is the start of an interface name: `iifname "cni0*"`. With `negate`: `iifname != "cni0"`.
    """

    name: str
    prefix: bool = False
    negate: bool = False


class Lookup(Struct, frozen=True, tag=True):
    """`ip saddr . ip daddr @set`: match if the set has an element whose key consists of these fields of the packet."""

    fields: tuple[KeyField, ...]
    set: str


class FibLocal(Struct, frozen=True, tag=True):
    """`fib daddr type local`: match if the packet's source or destination is an address of this node.

    With `negate`, match if it is not. The kernel looks up the address in its routing table `local`, so new addresses
    take effect at once.
    """

    field: Literal[KeyField.SOURCE, KeyField.DESTINATION]
    negate: bool = False


class MatchL4Proto(Struct, frozen=True, tag=True):
    """`meta l4proto tcp`: match packets of a transport protocol."""

    protocol: Literal["TCP", "UDP", "SCTP"]


class MatchSyn(Struct, frozen=True, tag=True):
    """`tcp flags syn / fin,syn,rst,ack`: match the packet that opens a TCP connection. With `negate`, all others."""

    negate: bool = False


class MatchSocket(Struct, frozen=True, tag=True):
    """`socket transparent 0`: match if this node has a socket for the packet, and its option IP_TRANSPARENT is not set.

    With `transparent`, the option must be set. Listening sockets count, and so do connections in state TIME_WAIT.
    """

    transparent: bool


class Count(Struct, frozen=True, tag=True):
    """`counter name "counter"`: count the packet. The counter is created with the rule."""

    counter: str


class CtStateNew(Struct, frozen=True, tag=True):
    """`ct state new`: match the first packet of a connection."""


class CtStatusDnat(Struct, frozen=True, tag=True):
    """`ct status dnat`: match if the connection's destination has been translated (DNAT)."""


class MatchMark(Struct, frozen=True, tag=True):
    """`meta mark & 0x4000 != 0`: match if any bit of `mark` is set in the packet mark."""

    mark: int


class Numgen(Struct, frozen=True, tag=True):
    """`numgen random mod N 0`: match with a probability of 1/N, where N is `modulus`."""

    modulus: int


class SetMark(Struct, frozen=True, tag=True):
    """`meta mark set meta mark | 0x4000`: set the bits of `mark` in the packet mark."""

    mark: int


class XorMark(Struct, frozen=True, tag=True):
    """`meta mark set meta mark ^ 0x4000`: flip the bits of `mark` in the packet mark."""

    mark: int


class Masquerade(Struct, frozen=True, tag=True):
    """`masquerade fully-random`: masquerade the connection with a randomly selected source port."""


class UpdateSet(Struct, frozen=True, tag=True):
    """`update @set { ip saddr }`: add the source address to a set with a timeout.

    If the set already has the address, restart the element's timeout.
    """

    set: str


class Dnat(Struct, frozen=True, tag=True):
    """`dnat to 10.244.0.1:8080`: translate the destination to this address and port."""

    address: str
    port: int


class DnatMap(Struct, frozen=True, tag=True):
    """`dnat ip to ip daddr . numgen random mod N map @map`.

    Translate the destination to an endpoint from the map. The key consists of `fields` and a random number below
    `modulus`. If the map has no element with this key, the rule does not match.
    """

    fields: tuple[KeyField, ...]
    modulus: int
    map: str


class VerdictMap(Struct, frozen=True, tag=True):
    """`ip daddr . th dport vmap @map`: apply the verdict that the map has for this key.

    If the map has no element with this key, the rule does not match.
    """

    fields: tuple[KeyField, ...]
    map: str


class Jump(Struct, frozen=True, tag=True):
    """`jump chain`: evaluate the rules of another chain, then continue with the next rule of this chain."""

    chain: str


class Goto(Struct, frozen=True, tag=True):
    """`goto chain`: continue with the rules of another chain, and do not return to this chain."""

    chain: str


class Drop(Struct, frozen=True, tag=True):
    """`drop`: drop the packet."""


class Return(Struct, frozen=True, tag=True):
    """`return`: leave this chain and continue in the chain that jumped to it. In a base chain, apply its policy."""


class Reject(Struct, frozen=True, tag=True):
    """`reject`: drop the packet and reply with an ICMP or ICMPv6 "port unreachable" error."""


Statement: TypeAlias = (
    MatchSaddr
    | MatchDaddr
    | MatchIifname
    | Lookup
    | FibLocal
    | MatchL4Proto
    | MatchSyn
    | MatchSocket
    | Count
    | CtStateNew
    | CtStatusDnat
    | MatchMark
    | Numgen
    | SetMark
    | XorMark
    | Masquerade
    | UpdateSet
    | Dnat
    | DnatMap
    | VerdictMap
    | Jump
    | Goto
    | Drop
    | Return
    | Reject
)


class NftRule(Struct, frozen=True):
    """A rule. The kernel evaluates its statements in order and stops at the first one that does not match."""

    statements: tuple[Statement, ...]
    comment: str = ""


class NftHook(Struct, frozen=True):
    """The hook of a base chain. At the same hook, chains with a smaller `priority` run earlier."""

    type: Literal["filter", "nat"]
    hook: Literal["prerouting", "input", "forward", "output", "postrouting"]
    priority: int


class NftChain(Struct, frozen=True):
    """A chain. With a `hook` it is a base chain, otherwise a regular chain.

    The target of a jump or goto must be a regular chain.
    """

    name: str
    rules: tuple[NftRule, ...]
    comment: str = ""
    hook: NftHook | None = None


def named_counters(chains: Iterable[NftChain]) -> tuple[str, ...]:
    """Return the names of the counters that the rules of these chains use, in order."""
    rules = (each for chain in chains for each in chain.rules)
    return tuple(dict.fromkeys(each.counter for rule in rules for each in rule.statements if isinstance(each, Count)))


def rule(*statements: Statement, comment: str = "") -> NftRule:
    """Return a rule that consists of these statements."""
    return NftRule(statements, comment)
