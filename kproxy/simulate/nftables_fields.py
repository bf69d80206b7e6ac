"""What nft can look at in a packet, alone or several as one key, and the values that it is compared with (nft(8))."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from ipaddress import ip_address, ip_network
from typing import Literal, TypeAlias

from msgspec import Struct

from kproxy.model.types import Family
from kproxy.simulate.nftables_words import Words
from kproxy.simulate.packet import UnknownRuleError
from kproxy.simulate.passage import Passage

Kind: TypeAlias = Literal["address", "protocol", "port", "number"]
"""What a part of a key is. A number is not of the packet, but drawn for each."""

PROTOCOLS = ("tcp", "udp", "sctp")
VERSIONS = {Family.IPV4: 4, Family.IPV6: 6}
TABLES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""What nft calls the families, as those of a table, an address or a translation."""


class Field(Struct, frozen=True):
    """One part of a key. A number is drawn below `modulus`; anything else is read from the packet."""

    kind: Kind
    read: Callable[[Passage], Hashable]
    is_source: bool = False
    modulus: int = 0


class Fields(Struct, frozen=True):
    """A key: one part, or several with dots between them, at most one of them a number."""

    parts: tuple[Field, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What its parts are, in their order."""
        return tuple(part.kind for part in self.parts)

    @property
    def modulus(self) -> int:
        """What its number is drawn below, 0 if it has none."""
        return sum(part.modulus for part in self.parts)

    @property
    def is_source(self) -> bool:
        """Whether it is the packet's source, alone."""
        return len(self.parts) == 1 and self.parts[0].is_source

    def key(self, passage: Passage) -> tuple[Hashable, ...]:
        """Return what the packet has in the parts that are not drawn."""
        return tuple(part.read(passage) for part in self.parts if part.kind != "number")


def read_fields(words: Words, family: Family) -> Fields:
    """Take a key, such as `ip daddr . meta l4proto . th dport`."""
    parts = [_read_field(words, TABLES[family])]
    while words.take("."):
        parts.append(_read_field(words, TABLES[family]))
    if sum(part.kind == "number" for part in parts) > 1:
        raise UnknownRuleError("two numbers in one key are not known")
    return Fields(tuple(parts))


def sees_field(words: Words, family: Family) -> bool:
    """Return whether the next word begins a key, without taking it."""
    return any(words.sees(word) for word in (TABLES[family], "meta", "th", "numgen"))


def _read_field(words: Words, ip: str) -> Field:
    if words.take(ip, "saddr"):
        return Field("address", lambda passage: passage.source, is_source=True)
    if words.take(ip, "daddr"):
        return Field("address", lambda passage: passage.destination)
    if words.take("meta", "l4proto"):
        return Field("protocol", lambda passage: passage.packet.protocol)
    if words.take("th", "dport"):
        return Field("port", lambda passage: passage.port)
    if words.take("numgen", "random", "mod"):
        modulus = words.number()
        if modulus < 1:
            raise UnknownRuleError(f"there is no number below {modulus}")
        return Field("number", lambda _: None, modulus=modulus)
    raise UnknownRuleError(f"{words.next()} is not known here")


def read_types(words: Words, family: Family) -> tuple[Kind, ...]:
    """Take the type of a key, such as `ipv4_addr . inet_proto . inet_service`."""
    known: dict[str, Kind] = {
        f"ipv{VERSIONS[family]}_addr": "address",
        "inet_proto": "protocol",
        "inet_service": "port",
    }
    kinds: list[Kind] = []
    while not kinds or words.take("."):
        word = words.next()
        if word not in known:
            raise UnknownRuleError(f"type {word} is not known here")
        kinds.append(known[word])
    return tuple(kinds)


def read_value(words: Words, kind: Kind, family: Family) -> Hashable:
    """Take one value of a kind: an address or port as a number, or a protocol in capitals."""
    if kind == "address":
        return int(ip_address(read_address(words, family)))
    if kind == "protocol":
        found = words.next()
        if found not in PROTOCOLS:
            raise UnknownRuleError(f"protocol {found} is not known")
        return found.upper()
    port = words.number()
    if not 0 <= port <= 0xFFFF:
        raise UnknownRuleError(f"{port} is not a port")
    return port


def read_address(words: Words, family: Family) -> str:
    """Take a single address of the family; return its text."""
    text = words.next()
    _address(text, family)
    return text


def read_range(words: Words, family: Family) -> tuple[int, int]:
    """Take an address, a network or a range; return its first and its last address."""
    text = words.next()
    first, dash, last = text.partition("-")
    if dash:
        return _address(first, family), _address(last, family)
    if "/" not in text:
        return _address(text, family), _address(text, family)
    try:
        network = ip_network(text)
    except ValueError:
        raise UnknownRuleError(f"{text} is not a network") from None
    _check(text, network.version, family)
    return int(network.network_address), int(network.broadcast_address)


def _address(text: str, family: Family) -> int:
    try:
        found = ip_address(text)
    except ValueError:
        raise UnknownRuleError(f"{text} is not an address") from None
    _check(text, found.version, family)
    return int(found)


def _check(text: str, version: int, family: Family) -> None:
    if version != VERSIONS[family]:
        raise UnknownRuleError(f"{text} is not of {family.value}")
