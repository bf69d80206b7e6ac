"""What nft can look at in a packet, alone or several as one key, and the values that it is compared with (nft(8))."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from ipaddress import ip_address, ip_network
from operator import and_, or_, xor
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.packet import PacketState, UnknownRuleError, Verdict

_WORD = re.compile(r'\s*("[^"]*"|[{},;]|[^\s{},;"]+)')


class WordReader:
    """A line's words, each to be taken once. Raises `UnknownRuleError` for any that is not the one expected.

    Braces, commas and semicolons are words of their own, and so is what stands in quotes.
    """

    def __init__(self, line: str) -> None:
        self._words: list[str] = []
        place, line = 0, line.rstrip()
        while place < len(line):
            found = _WORD.match(line, place)
            if not found:
                raise UnknownRuleError("a quote without its end")
            self._words.append(found[1])
            place = found.end()
        self._place = 0

    def __bool__(self) -> bool:
        """Whether there are words left."""
        return self._place < len(self._words)

    @property
    def open_braces(self) -> int:
        """How many braces the line opens beyond those that it closes."""
        return self._words.count("{") - self._words.count("}")

    def sees(self, *words: str) -> bool:
        """Return whether these are the next words, without taking them."""
        return tuple(self._words[self._place : self._place + len(words)]) == words

    def sees_set(self) -> bool:
        """Return whether the next word is the name of a set or map after its `@`, without taking it."""
        return bool(self) and self._words[self._place].startswith("@")

    def sees_name(self) -> bool:
        """Return whether the next word begins with a letter, without taking it."""
        return bool(self) and self._words[self._place][0].isalpha()

    def take(self, *words: str) -> bool:
        """Take these words if they are the next; return whether they were."""
        found = self.sees(*words)
        self._place += len(words) if found else 0
        return found

    def next(self) -> str:
        """Take the next word, whatever it is."""
        if not self:
            raise UnknownRuleError(f"nothing after {self._words[-1] if self._words else 'the start of the line'}")
        self._place += 1
        return self._words[self._place - 1]

    def expect(self, *words: str) -> None:
        """Take exactly these words."""
        for word in words:
            found = self.next()
            if found != word:
                raise UnknownRuleError(f"{found} is not known here, only {word}")

    def text(self) -> str:
        """Take what stands in quotes; return it without them."""
        found = self.next()
        if not found.startswith('"'):
            raise UnknownRuleError(f"{found} does not stand in quotes")
        return found[1:-1]

    def number(self) -> int:
        """Take a number, decimal or hexadecimal."""
        found = self.next()
        try:
            return int(found, 16 if found.startswith("0x") else 10)
        except ValueError:
            raise UnknownRuleError(f"{found} is not a number") from None

    def with_commas(self) -> list[str]:
        """Take words with commas between them."""
        found = [self.next()]
        while self.take(","):
            found.append(self.next())
        return found

    def end(self) -> None:
        """Check that no word is left."""
        if self:
            raise UnknownRuleError(f"{self.next()} is not known here")


Kind: TypeAlias = Literal["address", "protocol", "port", "number"]
"""What a part of a key is. A number is not of the packet, but drawn for each."""
PROTOCOLS = ("tcp", "udp", "sctp")
VERSIONS = {Family.IPV4: 4, Family.IPV6: 6}
TABLES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""What nft calls the families, as those of a table, an address or a translation."""


class PacketField(Struct, frozen=True):
    """One part of a key. A number is drawn below `modulus`; anything else is read from the packet."""

    kind: Kind
    read: Callable[[PacketState], Hashable]
    is_source: bool = False
    modulus: int = 0


class PacketFields(Struct, frozen=True):
    """A key: one part, or several with dots between them, at most one of them a number."""

    parts: tuple[PacketField, ...]

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

    def key(self, passage: PacketState) -> tuple[Hashable, ...]:
        """Return what the packet has in the parts that are not drawn."""
        return tuple(part.read(passage) for part in self.parts if part.kind != "number")


def read_fields(words: WordReader, family: Family) -> PacketFields:
    """Take a key, such as `ip daddr . meta l4proto . th dport`."""
    parts = [_read_field(words, TABLES[family])]
    while words.take("."):
        parts.append(_read_field(words, TABLES[family]))
    if sum(part.kind == "number" for part in parts) > 1:
        raise UnknownRuleError("two numbers in one key are not known")
    return PacketFields(tuple(parts))


def sees_field(words: WordReader, family: Family) -> bool:
    """Return whether the next word begins a key, without taking it."""
    return any(words.sees(word) for word in (TABLES[family], "meta", "th", "numgen"))


def _read_field(words: WordReader, ip: str) -> PacketField:
    if words.take(ip, "saddr"):
        return PacketField("address", lambda passage: passage.source, is_source=True)
    if words.take(ip, "daddr"):
        return PacketField("address", lambda passage: passage.destination)
    if words.take("meta", "l4proto"):
        return PacketField("protocol", lambda passage: passage.packet.protocol)
    if words.take("th", "dport"):
        return PacketField("port", lambda passage: passage.port)
    if words.take("numgen", "random", "mod"):
        modulus = words.number()
        if modulus < 1:
            raise UnknownRuleError(f"there is no number below {modulus}")
        return PacketField("number", lambda _: None, modulus=modulus)
    raise UnknownRuleError(f"{words.next()} is not known here")


def read_types(words: WordReader, family: Family) -> tuple[Kind, ...]:
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


def read_value(words: WordReader, kind: Kind, family: Family) -> Hashable:
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


def read_address(words: WordReader, family: Family) -> str:
    """Take a single address of the family; return its text."""
    text = words.next()
    _address(text, family)
    return text


def read_range(words: WordReader, family: Family) -> tuple[int, int]:
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


_REPLIES = {Family.IPV4: "icmp-port-unreachable", Family.IPV6: "icmp6-port-unreachable"}
_SOCKET = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+)|\[([0-9a-f:.]+)\]):(\d+)")


def _unchanged(passage: PacketState) -> PacketState:
    return passage


class ListedVerdict(Struct, frozen=True):
    """Where a packet goes from a rule: to a `chain`, out of this one, to the next rule, or out of the base chain.

    In the last case (`end`), `change` is what has been done to it.
    """

    way: Literal["end", "return", "continue", "goto", "jump"]
    chain: str = ""
    change: Callable[[PacketState], PacketState] = _unchanged


ACCEPT = ListedVerdict("end")
DROP = ListedVerdict("end", change=lambda passage: passage.end(Verdict.DROPPED))
MASQUERADE = ListedVerdict("end", change=lambda passage: replace(passage, masqueraded=True))
_PLAIN = {"accept": ACCEPT, "drop": DROP, "return": ListedVerdict("return"), "continue": ListedVerdict("continue")}


class DnatTarget(Struct, frozen=True):
    """An address and a port, and their text."""

    socket: str
    address: int
    port: int

    def decision(self) -> ListedVerdict:
        """Return the decision to send a packet there."""
        return ListedVerdict("end", change=lambda passage: passage.translate(self.socket, self.address, self.port))


def reject(family: Family) -> ListedVerdict:
    """Return the decision of `reject` without a type: port unreachable, as the family says it."""
    return ListedVerdict("end", change=lambda passage: passage.end(Verdict.REJECTED, _REPLIES[family]))


def read_verdict(words: WordReader) -> ListedVerdict | None:
    """Take a verdict that may also stand in a map; None if the next word is none."""
    for word in ("goto", "jump"):
        if words.take(word):
            return ListedVerdict("goto" if word == "goto" else "jump", words.next())
    return next((decision for word, decision in _PLAIN.items() if words.take(word)), None)


def read_destination(words: WordReader, family: Family) -> DnatTarget:
    """Take an address with a port, such as `10.244.1.1:8080` or `[fd00::1]:8080`."""
    text = words.next()
    found = _SOCKET.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"{text} is not an address with a port")
    return endpoint(found[1] or found[2], int(found[3]), family)


def endpoint(text: str, port: int, family: Family) -> DnatTarget:
    """Return an endpoint by the text of its address."""
    try:
        address = ip_address(text)
    except ValueError:
        raise UnknownRuleError(f"{text} is not an address") from None
    if address.version != VERSIONS[family]:
        raise UnknownRuleError(f"{text} is not of {family.value}")
    if not 0 < port <= 0xFFFF:
        raise UnknownRuleError(f"{port} is not a port of an endpoint")
    return DnatTarget(f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}", int(address), port)


_STATES = {"new": "NEW", "established": "ESTABLISHED", "related": "RELATED", "invalid": "INVALID"}
_BITS: dict[str, Callable[[int, int], int]] = {"|": or_, "^": xor, "&": and_}


class PacketMatch(Struct, frozen=True):
    """A condition: for what part of packets like this one it holds. That is all or none, but for drawn numbers."""

    share: Callable[[PacketState], float]


class PacketChange(Struct, frozen=True):
    """A statement that changes a packet and lets it go on within the rule."""

    change: Callable[[PacketState], PacketState]


class VerdictChoice(Struct, frozen=True):
    """The end of a rule: what may be decided, with the chance of each. For the rest, the rule does not match.

    `chains` are all that it may send packets to.
    """

    choose: Callable[[PacketState], list[tuple[ListedVerdict, float]]]
    chains: frozenset[str] = frozenset()


Statement: TypeAlias = PacketMatch | PacketChange | VerdictChoice


def always(decision: ListedVerdict) -> VerdictChoice:
    """Return the choice that leaves none."""
    chains = frozenset({decision.chain} if decision.chain else ())
    return VerdictChoice(lambda _: [(decision, 1.0)], chains)


def read_plain(words: WordReader, family: Family) -> Statement | None:
    """Take one statement; None if the next begins with a key, or refers to a set or map."""
    decision = read_verdict(words)
    if decision:
        return always(decision)
    if words.take("reject"):
        return always(reject(family))
    found = next((reader for start, reader in _READERS.items() if words.take(*start)), None)
    return found(words) if found else None


def _read_masquerade(words: WordReader) -> VerdictChoice:
    words.take("fully-random")
    return always(MASQUERADE)


def _read_status(words: WordReader) -> PacketMatch:
    words.expect("dnat")
    return PacketMatch(lambda passage: bool(passage.target))


def _read_states(words: WordReader) -> PacketMatch:
    names = words.with_commas()
    unknown = set(names) - _STATES.keys()
    if unknown:
        raise UnknownRuleError(f"connection state {', '.join(sorted(unknown))} is not known")
    states = {_STATES[name] for name in names}
    return PacketMatch(lambda passage: passage.packet.state in states)


def _read_fib(words: WordReader) -> PacketMatch:
    of_source = words.take("saddr")
    if not of_source:
        words.expect("daddr")
    words.expect("type", "local")
    if of_source:
        return PacketMatch(lambda passage: passage.is_local(passage.source))
    return PacketMatch(lambda passage: passage.is_local(passage.destination))


def _read_interface(words: WordReader) -> PacketMatch:
    """Match the name, or with a `*` at its end what it begins with. A packet that came in by none has the name ""."""
    negated = words.take("!=")
    name = words.text()
    if name.endswith("*"):
        prefix = name.removesuffix("*")
        return PacketMatch(lambda passage: passage.interface.startswith(prefix) is not negated)
    return PacketMatch(lambda passage: (passage.interface == name) is not negated)


def _read_mark(words: WordReader) -> PacketMatch | PacketChange:
    if words.take("set", "meta", "mark"):
        operator = words.next()
        if operator not in _BITS:
            raise UnknownRuleError(f"{operator} is not known here, only {', '.join(_BITS)}")
        combine, operand = _BITS[operator], words.number()
        return PacketChange(lambda passage: replace(passage, mark=combine(passage.mark, operand)))
    words.expect("&")
    mask = words.number()
    negated = words.take("!=")
    if not negated:
        words.expect("==")
    wanted = words.number()
    return PacketMatch(lambda passage: (passage.mark & mask == wanted) is not negated)


_READERS: dict[tuple[str, ...], Callable[[WordReader], Statement]] = {
    ("masquerade",): _read_masquerade,
    ("ct", "state"): _read_states,
    ("ct", "status"): _read_status,
    ("fib",): _read_fib,
    ("iifname",): _read_interface,
    ("meta", "mark"): _read_mark,
}
"""By how a statement begins, who takes the rest of it."""
