"""What a table holds: sets and maps, chains, and the rules in them, as values.

Both ways into the kernel start from these: `text` writes them as nft does, `netlink` as the kernel reads them.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

from msgspec import Struct


class KeyField(Enum):
    """A part of a packet (or of chance) that a set is keyed by."""

    SOURCE = "saddr"
    DESTINATION = "daddr"
    PROTOCOL = "protocol"
    PORT = "dport"
    NUMBER = "numgen"
    """A number drawn at random: see `DnatMap`."""


class MapValue(Enum):
    """What a map has for each key. A set has nothing."""

    NOTHING = "nothing"
    VERDICT = "verdict"
    ENDPOINT = "endpoint"
    """An address and a port."""


class NftSet(Struct, frozen=True):
    """A set or map. With a `timeout` in seconds, packets add to it and what they add is forgotten after that."""

    name: str
    key: tuple[KeyField, ...]
    value: MapValue = MapValue.NOTHING
    comment: str = ""
    timeout: int = 0


class MatchSaddr(Struct, frozen=True, tag=True):
    """The source address is in a network (`10.0.0.0/8`), or not."""

    network: str
    inside: bool = True


class MatchDaddr(Struct, frozen=True, tag=True):
    """The destination address is in a network, or not."""

    network: str
    inside: bool = True


class MatchIifname(Struct, frozen=True, tag=True):
    """The packet comes in by the interface of this name, or (with `prefix`) of a name that begins so; or not."""

    name: str
    prefix: bool = False
    inside: bool = True


class Lookup(Struct, frozen=True, tag=True):
    """These fields of the packet are a key of the set."""

    fields: tuple[KeyField, ...]
    set: str


class FibLocal(Struct, frozen=True, tag=True):
    """The address is one of this node's own."""

    field: Literal[KeyField.SOURCE, KeyField.DESTINATION]


class MatchL4Proto(Struct, frozen=True, tag=True):
    """The packet is of this transport protocol."""

    protocol: Literal["TCP", "UDP", "SCTP"]


class CtStateNew(Struct, frozen=True, tag=True):
    """The packet is the first of its connection."""


class CtStatusDnat(Struct, frozen=True, tag=True):
    """The packet's connection had its destination changed."""


class MatchMark(Struct, frozen=True, tag=True):
    """The packet carries the mark."""

    mark: int


class Numgen(Struct, frozen=True, tag=True):
    """One packet in `of` of them."""

    of: int


class SetMark(Struct, frozen=True, tag=True):
    """Set the mark's bit."""

    mark: int


class XorMark(Struct, frozen=True, tag=True):
    """Flip the mark's bit."""

    mark: int


class Masquerade(Struct, frozen=True, tag=True):
    """Give the packet's connection this node's address for its source, and a port chosen fully at random."""


class UpdateSet(Struct, frozen=True, tag=True):
    """Put the source address into a set whose elements expire; its time begins anew."""

    set: str


class Dnat(Struct, frozen=True, tag=True):
    """Change the destination of the packet's connection."""

    address: str
    port: int


class DnatMap(Struct, frozen=True, tag=True):
    """Change the destination to what a map has for the fields and a number drawn below `of`; if nothing, go on."""

    fields: tuple[KeyField, ...]
    of: int
    map: str


class VerdictMap(Struct, frozen=True, tag=True):
    """Do what a map of verdicts has for the fields; if nothing, go on."""

    fields: tuple[KeyField, ...]
    map: str


class Go(Struct, frozen=True, tag=True):
    """Go to a chain: for good (`goto`), or until its end (`jump`)."""

    chain: str
    back: bool = False


class Drop(Struct, frozen=True, tag=True):
    """Drop the packet silently."""


class Return(Struct, frozen=True, tag=True):
    """Leave the chain."""


class Reject(Struct, frozen=True, tag=True):
    """Drop the packet and say so: port unreachable."""


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
    | Go
    | Drop
    | Return
    | Reject
)


class NftRule(Struct, frozen=True):
    """Statements that are carried out one after the other until one does not hold."""

    statements: tuple[Statement, ...]
    comment: str = ""


class NftHook(Struct, frozen=True):
    """Where in the kernel a base chain is called, and when: the lower the priority, the earlier."""

    type: Literal["filter", "nat"]
    hook: Literal["prerouting", "input", "forward", "output", "postrouting"]
    priority: int


class NftChain(Struct, frozen=True):
    """A chain: one that packets reach from the kernel (`hook`), or from another chain."""

    name: str
    rules: tuple[NftRule, ...]
    comment: str = ""
    hook: NftHook | None = None


def rule(*statements: Statement, comment: str = "") -> NftRule:
    """Return a rule of these statements."""
    return NftRule(statements, comment)
