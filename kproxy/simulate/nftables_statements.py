"""Parse the parts of a rule in the output of `nft list`: tokens, keys, values, verdicts and statements (see nft(8)).

All functions that parse raise `UnknownRuleError` for unsupported text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from operator import and_, or_, xor
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.packet import PacketState, UnknownRuleError, Verdict

NFT_FAMILIES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""nft's names for the IP families. nft uses them in tables, address expressions and dnat statements."""

_TOKEN = re.compile(r'\s*("[^"]*"|[{},;]|[^\s{},;"]+)')
_ENDPOINT = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+)|\[([0-9a-f:.]+)\]):(\d+)")
_IP_VERSIONS = {Family.IPV4: 4, Family.IPV6: 6}
_PROTOCOLS = ("tcp", "udp", "sctp")
_CONNECTION_STATES = {"new": "NEW", "established": "ESTABLISHED", "related": "RELATED", "invalid": "INVALID"}
_MARK_OPERATORS: dict[str, Callable[[int, int], int]] = {"|": or_, "^": xor, "&": and_}
_DEFAULT_REJECT = {Family.IPV4: "icmp-port-unreachable", Family.IPV6: "icmp6-port-unreachable"}

KeyType: TypeAlias = Literal["address", "protocol", "port", "number"]
"""The type of one part of a key. `number` is a random number (numgen). Other values are read from the packet."""


class TokenReader:
    """Reads a line token by token. Raises `UnknownRuleError` for an unexpected token.

    Each brace, comma, semicolon and quoted string is a token. White space separates other tokens.
    """

    def __init__(self, line: str) -> None:
        self._tokens: list[str] = []
        offset, line = 0, line.rstrip()
        while offset < len(line):
            found = _TOKEN.match(line, offset)
            if not found:
                raise UnknownRuleError("unterminated quoted string")
            self._tokens.append(found[1])
            offset = found.end()
        self._index = 0

    def __bool__(self) -> bool:
        """Return whether there are more tokens."""
        return self._index < len(self._tokens)

    @property
    def open_braces(self) -> int:
        """The number of opening braces in the line minus the number of closing braces."""
        return self._tokens.count("{") - self._tokens.count("}")

    def at(self, *tokens: str) -> bool:
        """Return whether the next tokens are exactly the given ones."""
        return tuple(self._tokens[self._index : self._index + len(tokens)]) == tokens

    def at_set_reference(self) -> bool:
        """Return whether the next token is a reference to a set or map, such as `@endpoints`."""
        return bool(self) and self._tokens[self._index].startswith("@")

    def at_name(self) -> bool:
        """Return whether the next token begins with a letter."""
        return bool(self) and self._tokens[self._index][0].isalpha()

    def accept(self, *tokens: str) -> bool:
        """Consume the next tokens if they are exactly the given ones. Return whether they were consumed."""
        found = self.at(*tokens)
        self._index += len(tokens) if found else 0
        return found

    def expect(self, *tokens: str) -> None:
        """Consume the next tokens, which must be exactly the given ones."""
        for token in tokens:
            found = self.next()
            if found != token:
                raise UnknownRuleError(f"unexpected {found}, expected {token}")

    def expect_end(self) -> None:
        """Check that there are no more tokens."""
        if self:
            raise UnknownRuleError(f"unexpected {self.next()}")

    def next(self) -> str:
        """Consume and return the next token."""
        if not self:
            after = f" after {self._tokens[-1]}" if self._tokens else ""
            raise UnknownRuleError(f"unexpected end of line{after}")
        self._index += 1
        return self._tokens[self._index - 1]

    def quoted(self) -> str:
        """Consume a quoted string and return it without the quotes."""
        found = self.next()
        if not found.startswith('"'):
            raise UnknownRuleError(f"unexpected {found}, expected a quoted string")
        return found[1:-1]

    def number(self) -> int:
        """Consume a decimal or hexadecimal number."""
        found = self.next()
        try:
            return int(found, 16 if found.startswith("0x") else 10)
        except ValueError:
            raise UnknownRuleError(f"unexpected {found}, expected a number") from None

    def comma_separated(self) -> list[str]:
        """Consume and return tokens that are separated by commas."""
        found = [self.next()]
        while self.accept(","):
            found.append(self.next())
        return found


# Keys.


class KeyPart(Struct, frozen=True):
    """One part of a key.

    `read` returns the packet's value for this part. It is not called for a part of type `number`, whose value is a
    random number from 0 to `modulus` - 1. `modulus` is 0 for parts of other types.
    """

    type: KeyType
    read: Callable[[PacketState], Hashable]
    is_source: bool = False
    modulus: int = 0


class KeyExpression(Struct, frozen=True):
    """A key: one part, or a concatenation of parts. At most one part is a random number."""

    parts: tuple[KeyPart, ...]

    @property
    def types(self) -> tuple[KeyType, ...]:
        """The types of the parts."""
        return tuple(part.type for part in self.parts)

    @property
    def modulus(self) -> int:
        """The modulus of the random number, or 0 if the key has no random number."""
        return sum(part.modulus for part in self.parts)

    @property
    def is_source(self) -> bool:
        """Whether the key consists only of the packet's source address."""
        return len(self.parts) == 1 and self.parts[0].is_source

    def evaluate(self, state: PacketState) -> tuple[Hashable, ...]:
        """Return the packet's value for each part, without the random number."""
        return tuple(part.read(state) for part in self.parts if part.type != "number")


def at_key(tokens: TokenReader, family: Family) -> bool:
    """Return whether the next token can begin a key."""
    return any(tokens.at(token) for token in (NFT_FAMILIES[family], "meta", "th", "numgen"))


def parse_key(tokens: TokenReader, family: Family) -> KeyExpression:
    """Parse a key such as `ip daddr . meta l4proto . th dport`."""
    parts = [_parse_part(tokens, NFT_FAMILIES[family])]
    while tokens.accept("."):
        parts.append(_parse_part(tokens, NFT_FAMILIES[family]))
    if sum(part.type == "number" for part in parts) > 1:
        raise UnknownRuleError("unsupported key with two numgen expressions")
    return KeyExpression(tuple(parts))


def _parse_part(tokens: TokenReader, ip: str) -> KeyPart:
    if tokens.accept(ip, "saddr"):
        return KeyPart("address", lambda state: state.source, is_source=True)
    if tokens.accept(ip, "daddr"):
        return KeyPart("address", lambda state: state.destination)
    if tokens.accept("meta", "l4proto"):
        return KeyPart("protocol", lambda state: state.packet.protocol)
    if tokens.accept("th", "dport"):
        return KeyPart("port", lambda state: state.port)
    if tokens.accept("numgen", "random", "mod"):
        modulus = tokens.number()
        if modulus < 1:
            raise UnknownRuleError(f"invalid modulus {modulus}")
        return KeyPart("number", lambda _: None, modulus=modulus)
    raise UnknownRuleError(f"unsupported expression or statement {tokens.next()}")


def parse_key_types(tokens: TokenReader, family: Family) -> tuple[KeyType, ...]:
    """Parse the type of a key, such as `ipv4_addr . inet_proto . inet_service`."""
    supported: dict[str, KeyType] = {
        f"ipv{_IP_VERSIONS[family]}_addr": "address",
        "inet_proto": "protocol",
        "inet_service": "port",
    }
    types: list[KeyType] = []
    while not types or tokens.accept("."):
        token = tokens.next()
        if token not in supported:
            raise UnknownRuleError(f"unsupported type {token}")
        types.append(supported[token])
    return tuple(types)


# Values.


def parse_value(tokens: TokenReader, key_type: KeyType, family: Family) -> Hashable:
    """Parse the value of one part of a key. Return an address or port as an integer, or a protocol in upper case."""
    if key_type == "address":
        return int(_parse_address(tokens.next(), family))
    if key_type == "protocol":
        found = tokens.next()
        if found not in _PROTOCOLS:
            raise UnknownRuleError(f"unsupported protocol {found}")
        return found.upper()
    port = tokens.number()
    if not 0 <= port <= 0xFFFF:
        raise UnknownRuleError(f"invalid port {port}")
    return port


def parse_address(tokens: TokenReader, family: Family) -> str:
    """Parse one address of the IP family. Return the address as text."""
    text = tokens.next()
    _parse_address(text, family)
    return text


def parse_address_range(tokens: TokenReader, family: Family) -> tuple[int, int]:
    """Parse an address, a network or a range. Return the first and the last address."""
    text = tokens.next()
    first, dash, last = text.partition("-")
    if dash:
        return int(_parse_address(first, family)), int(_parse_address(last, family))
    if "/" not in text:
        address = int(_parse_address(text, family))
        return address, address
    try:
        network = ip_network(text)
    except ValueError:
        raise UnknownRuleError(f"invalid network {text}") from None
    _check_version(text, network.version, family)
    return int(network.network_address), int(network.broadcast_address)


def _parse_address(text: str, family: Family) -> IPv4Address | IPv6Address:
    try:
        found = ip_address(text)
    except ValueError:
        raise UnknownRuleError(f"invalid address {text}") from None
    _check_version(text, found.version, family)
    return found


def _check_version(text: str, version: int, family: Family) -> None:
    if version != _IP_VERSIONS[family]:
        raise UnknownRuleError(f"{text} does not belong to family {family.value}")


# Verdicts.


def _unchanged(state: PacketState) -> PacketState:
    return state


class ListedVerdict(Struct, frozen=True):
    """A verdict of a rule or map element.

    `terminate` applies `change` to the packet, which then leaves the base chain. `chain` is the target of `goto` and
    `jump`.
    """

    action: Literal["terminate", "return", "continue", "goto", "jump"]
    chain: str = ""
    change: Callable[[PacketState], PacketState] = _unchanged


class DnatTarget(Struct, frozen=True):
    """The address and port to which a dnat statement translates destinations. `endpoint` is the text "ip:port"."""

    endpoint: str
    address: int
    port: int

    def verdict(self) -> ListedVerdict:
        """Return the verdict of a dnat statement with this target."""
        return ListedVerdict("terminate", change=lambda state: state.dnat(self.endpoint, self.address, self.port))


_DROP = ListedVerdict("terminate", change=lambda state: state.decide(Verdict.DROPPED))
_MASQUERADE = ListedVerdict("terminate", change=lambda state: replace(state, masqueraded=True))
_SIMPLE_VERDICTS = {
    "accept": ListedVerdict("terminate"),
    "drop": _DROP,
    "return": ListedVerdict("return"),
    "continue": ListedVerdict("continue"),
}


def parse_verdict(tokens: TokenReader) -> ListedVerdict | None:
    """Parse a verdict that both rules and map elements can contain, such as `accept` or `jump CHAIN`.

    Return None if the next token is not one of these verdicts.
    """
    if tokens.accept("goto"):
        return ListedVerdict("goto", tokens.next())
    if tokens.accept("jump"):
        return ListedVerdict("jump", tokens.next())
    return next((verdict for token, verdict in _SIMPLE_VERDICTS.items() if tokens.accept(token)), None)


def parse_dnat_target(tokens: TokenReader, family: Family) -> DnatTarget:
    """Parse an address with a port, such as `10.244.1.1:8080` or `[fd00::1]:8080`."""
    text = tokens.next()
    found = _ENDPOINT.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"invalid address and port {text}")
    return make_dnat_target(found[1] or found[2], int(found[3]), family)


def make_dnat_target(text: str, port: int, family: Family) -> DnatTarget:
    """Return the target for an address (as text) and a port. Raises `UnknownRuleError` if either is invalid."""
    address = _parse_address(text, family)
    if not 0 < port <= 0xFFFF:
        raise UnknownRuleError(f"invalid port {port}")
    return DnatTarget(f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}", int(address), port)


# Statements.


class PacketMatch(Struct, frozen=True):
    """A condition.

    `probability` returns the probability that a packet meets the condition. It is 0 or 1, unless the condition compares
    a random number.
    """

    probability: Callable[[PacketState], float]


class PacketChange(Struct, frozen=True):
    """A statement that changes the packet and continues with the next statement of the rule."""

    change: Callable[[PacketState], PacketState]


class VerdictChoice(Struct, frozen=True):
    """The last statement of a rule: its possible verdicts and their probabilities.

    If the probabilities sum to p < 1, then with probability 1 - p no verdict applies and the packet continues with the
    next rule. `chains` are the target chains of all `goto` and `jump` verdicts.
    """

    choose: Callable[[PacketState], list[tuple[ListedVerdict, float]]]
    chains: frozenset[str] = frozenset()


Statement: TypeAlias = PacketMatch | PacketChange | VerdictChoice


def unconditional(verdict: ListedVerdict) -> VerdictChoice:
    """Return the statement that always gives this verdict."""
    chains = frozenset({verdict.chain} if verdict.chain else ())
    return VerdictChoice(lambda _: [(verdict, 1.0)], chains)


def parse_simple_statement(tokens: TokenReader, family: Family) -> Statement | None:
    """Parse a statement that uses no key, set or map, and is not a `dnat` statement.

    Return None, without consuming a token, if the next statement is of another kind.
    """
    verdict = parse_verdict(tokens)
    if verdict:
        return unconditional(verdict)
    if tokens.accept("reject"):
        reply = _DEFAULT_REJECT[family]
        return unconditional(ListedVerdict("terminate", change=lambda state: state.decide(Verdict.REJECTED, reply)))
    parse = next((parser for start, parser in _STATEMENT_PARSERS.items() if tokens.accept(*start)), None)
    return parse(tokens) if parse else None


def _parse_masquerade(tokens: TokenReader) -> VerdictChoice:
    tokens.accept("fully-random")
    return unconditional(_MASQUERADE)


def _parse_ct_state(tokens: TokenReader) -> PacketMatch:
    names = tokens.comma_separated()
    unknown = set(names) - _CONNECTION_STATES.keys()
    if unknown:
        raise UnknownRuleError(f"unsupported connection state {', '.join(sorted(unknown))}")
    states = {_CONNECTION_STATES[name] for name in names}
    return PacketMatch(lambda state: state.packet.conntrack_state in states)


def _parse_ct_status(tokens: TokenReader) -> PacketMatch:
    tokens.expect("dnat")
    return PacketMatch(lambda state: bool(state.endpoint))


def _parse_fib(tokens: TokenReader) -> PacketMatch:
    of_source = tokens.accept("saddr")
    if not of_source:
        tokens.expect("daddr")
    tokens.expect("type")
    negated = tokens.accept("!=")
    tokens.expect("local")
    if of_source:
        return PacketMatch(lambda state: state.is_local(state.source) is not negated)
    return PacketMatch(lambda state: state.is_local(state.destination) is not negated)


def _parse_iifname(tokens: TokenReader) -> PacketMatch:
    """Parse a match on the name of the input interface. A trailing `*` in the rule makes the name a prefix.

    The name is "" for packets that the node itself sends, and "lo" once such a packet comes back in through `lo`.
    """
    negated = tokens.accept("!=")
    name = tokens.quoted()
    if name.endswith("*"):
        prefix = name.removesuffix("*")
        return PacketMatch(lambda state: state.interface.startswith(prefix) is not negated)
    return PacketMatch(lambda state: (state.interface == name) is not negated)


def _parse_tcp_flags(tokens: TokenReader) -> PacketMatch:
    """Parse a match on the packet that opens a TCP connection. All simulated packets in state NEW open one."""
    negated = tokens.accept("!=")
    tokens.expect("syn", "/", "fin", ",", "syn", ",", "rst", ",", "ack")
    return PacketMatch(
        lambda state: state.packet.protocol == "TCP" and (state.packet.conntrack_state == "NEW") is not negated
    )


def _parse_socket(tokens: TokenReader) -> PacketMatch:
    """Parse a match on the option IP_TRANSPARENT of a socket. A program without it is assumed to listen."""
    value = tokens.number()
    return PacketMatch(lambda _: value == 0)


def _parse_counter(tokens: TokenReader) -> PacketChange:
    tokens.quoted()
    return PacketChange(_unchanged)


def _parse_mark(tokens: TokenReader) -> PacketMatch | PacketChange:
    if tokens.accept("set", "meta", "mark"):
        operator = tokens.next()
        if operator not in _MARK_OPERATORS:
            raise UnknownRuleError(f"unsupported operator {operator}, expected one of {', '.join(_MARK_OPERATORS)}")
        combine, operand = _MARK_OPERATORS[operator], tokens.number()
        return PacketChange(lambda state: replace(state, mark=combine(state.mark, operand)))
    tokens.expect("&")
    mask = tokens.number()
    negated = tokens.accept("!=")
    if not negated:
        tokens.expect("==")
    value = tokens.number()
    return PacketMatch(lambda state: (state.mark & mask == value) is not negated)


_STATEMENT_PARSERS: dict[tuple[str, ...], Callable[[TokenReader], Statement]] = {
    ("masquerade",): _parse_masquerade,
    ("ct", "state"): _parse_ct_state,
    ("ct", "status"): _parse_ct_status,
    ("fib",): _parse_fib,
    ("iifname",): _parse_iifname,
    ("tcp", "flags"): _parse_tcp_flags,
    ("socket", "transparent"): _parse_socket,
    ("counter", "name"): _parse_counter,
    ("meta", "mark"): _parse_mark,
}
"""The first tokens of some statements, each with the function that parses the rest of the statement."""
