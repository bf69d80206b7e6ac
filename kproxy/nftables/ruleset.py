"""The contents of a table as values: sets and maps, chains, rules and their statements. Pure.

`kproxy.nftables.nft_syntax` formats them as nft does, `kproxy.nftables.encode` as netlink messages for the kernel.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

from msgspec import Struct


class KeyField(Enum):
    """One field of a set's key, by its name in nft."""

    SOURCE = "saddr"
    DESTINATION = "daddr"
    PROTOCOL = "protocol"
    PORT = "dport"
    NUMGEN = "numgen"
    """A random number, by which `DnatMap` selects an endpoint."""


class MapValue(Enum):
    """The type of a map's values. A set has none."""

    NONE = "none"
    VERDICT = "verdict"
    ENDPOINT = "endpoint"
    """An address and a port."""


class NftSet(Struct, frozen=True):
    """A set or map.

    With a `timeout` in seconds, rules add elements to it (`flags dynamic,timeout`) and each element expires after that
    time.
    """

    name: str
    key: tuple[KeyField, ...]
    value: MapValue = MapValue.NONE
    comment: str = ""
    timeout: int = 0


class MatchSaddr(Struct, frozen=True, tag=True):
    """`ip saddr 10.0.0.0/8`, or with `negate` `ip saddr != 10.0.0.0/8`."""

    network: str
    negate: bool = False


class MatchDaddr(Struct, frozen=True, tag=True):
    """`ip daddr 10.0.0.0/8`, or with `negate` `ip daddr != 10.0.0.0/8`."""

    network: str
    negate: bool = False


class MatchIifname(Struct, frozen=True, tag=True):
    """`iifname "cni0"`, with `prefix` `iifname "cni0*"`; with `negate` `iifname != "cni0"`."""

    name: str
    prefix: bool = False
    negate: bool = False


class Lookup(Struct, frozen=True, tag=True):
    """`ip saddr . ip daddr @set`: match if the set has an element with this key."""

    fields: tuple[KeyField, ...]
    set: str


class FibLocal(Struct, frozen=True, tag=True):
    """`fib daddr type local`: match if the address is one of this node's own."""

    field: Literal[KeyField.SOURCE, KeyField.DESTINATION]


class MatchL4Proto(Struct, frozen=True, tag=True):
    """`meta l4proto tcp`."""

    protocol: Literal["TCP", "UDP", "SCTP"]


class CtStateNew(Struct, frozen=True, tag=True):
    """`ct state new`: match the first packet of a connection."""


class CtStatusDnat(Struct, frozen=True, tag=True):
    """`ct status dnat`: match if the connection's destination was translated."""


class MatchMark(Struct, frozen=True, tag=True):
    """`meta mark & 0x4000 != 0`: match if any bit of `mark` is set in the packet mark."""

    mark: int


class Numgen(Struct, frozen=True, tag=True):
    """`numgen random mod N 0`: match one packet in `modulus`."""

    modulus: int


class SetMark(Struct, frozen=True, tag=True):
    """`meta mark set meta mark | 0x4000`: set the bits of `mark` in the packet mark."""

    mark: int


class XorMark(Struct, frozen=True, tag=True):
    """`meta mark set meta mark ^ 0x4000`: flip the bits of `mark` in the packet mark."""

    mark: int


class Masquerade(Struct, frozen=True, tag=True):
    """`masquerade fully-random`."""


class UpdateSet(Struct, frozen=True, tag=True):
    """`update @set { ip saddr }`: add the source address to a set with a timeout, or restart the element's timeout."""

    set: str


class Dnat(Struct, frozen=True, tag=True):
    """`dnat to 10.244.0.1:8080`."""

    address: str
    port: int


class DnatMap(Struct, frozen=True, tag=True):
    """`dnat ip to ip daddr . numgen random mod N map @map`.

    Translate the destination to the endpoint that the map has for the fields and a random number below `modulus`. If
    the map has none, the rule does not match.
    """

    fields: tuple[KeyField, ...]
    modulus: int
    map: str


class VerdictMap(Struct, frozen=True, tag=True):
    """`ip daddr . th dport vmap @map`: apply the map's verdict; without one, the rule does not match."""

    fields: tuple[KeyField, ...]
    map: str


class Jump(Struct, frozen=True, tag=True):
    """`jump chain`: evaluate the chain, then return to the next rule."""

    chain: str


class Goto(Struct, frozen=True, tag=True):
    """`goto chain`: continue in the chain; do not return to this one."""

    chain: str


class Drop(Struct, frozen=True, tag=True):
    """`drop`."""


class Return(Struct, frozen=True, tag=True):
    """`return`: return to the chain that jumped to this one; from a base chain, apply its policy."""


class Reject(Struct, frozen=True, tag=True):
    """`reject`: drop the packet and answer with ICMP port unreachable."""


Statement: TypeAlias = (
    MatchSaddr
    | MatchDaddr
    | MatchIifname
    | Lookup
    | FibLocal
    | MatchL4Proto
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
    """A rule: the kernel evaluates its statements in order, up to the first that does not match."""

    statements: tuple[Statement, ...]
    comment: str = ""


class NftHook(Struct, frozen=True):
    """The hook of a base chain. Chains with a smaller priority number run earlier."""

    type: Literal["filter", "nat"]
    hook: Literal["prerouting", "input", "forward", "output", "postrouting"]
    priority: int


class NftChain(Struct, frozen=True):
    """A base chain if it has a `hook`, else a regular chain, the target of rules and verdict maps."""

    name: str
    rules: tuple[NftRule, ...]
    comment: str = ""
    hook: NftHook | None = None


def rule(*statements: Statement, comment: str = "") -> NftRule:
    """Return a rule of these statements."""
    return NftRule(statements, comment)
