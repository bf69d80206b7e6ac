"""The values of nftables expressions for a packet, and whether they match constants, sets and maps. Pure.

Expressions have the form of libnftables-json(5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from ipaddress import ip_address
from typing import Any, TypeAlias

from msgspec import Struct

from kproxy.diagnose.trace.flow import ALL_BITS, Bits, Flow, Interface, TraceFacts, Truth
from kproxy.model.types import Family

Json: TypeAlias = Any


class Special(Enum):
    """Values that are no values: unknown, or missing from the packet, so that a rule with them does not match."""

    UNKNOWN = "unknown"
    ABSENT = "absent"


class Drawn(Struct, frozen=True):
    """A random number from `offset` to `offset + modulus - 1`."""

    modulus: int
    offset: int = 0


Value: TypeAlias = Any
"""An int (address, port, protocol), a str, a `Bits`, an `Interface`, a `Drawn`, a `Special`, or a tuple of values."""
Sets: TypeAlias = Mapping[str, Json]
"""The sets and maps of a table by name, in the form of libnftables-json(5)."""

_PROTOCOLS = {
    "icmp": 1, "igmp": 2, "ipencap": 4, "tcp": 6, "udp": 17, "dccp": 33, "ipv6": 41, "gre": 47, "esp": 50, "ah": 51,
    "icmpv6": 58, "ipv6-icmp": 58, "comp": 108, "vrrp": 112, "sctp": 132, "udplite": 136,
}  # fmt: skip
_PORTS = {
    "ssh": 22, "domain": 53, "http": 80, "https": 443, "bootps": 67, "bootpc": 68, "ntp": 123, "dhcpv6-client": 546,
    "dhcpv6-server": 547, "mdns": 5353, "smtp": 25, "telnet": 23, "ftp": 21, "snmp": 161, "syslog": 514, "nfs": 2049,
    "sunrpc": 111, "kubernetes": 6443,
}  # fmt: skip
_INERT_PROPERTIES = {"val", "comment", "timeout", "expires", "counter"}
"""The properties of an element that do not restrict when it matches. Others are statements, such as a limit."""
_TRANSPORT = {"tcp": 6, "udp": 17, "sctp": 132}
_OTHER_TRANSPORT = {"dccp", "udplite", "icmp", "icmpv6", "ah", "esp", "comp", "gre", "igmp", "arp", "vxlan", "geneve"}


def evaluate(expression: Json, flow: Flow, facts: TraceFacts) -> Value:
    """Return the value of an expression."""
    if not isinstance(expression, dict):
        return Special.UNKNOWN
    ((kind, content),) = list(expression.items())[:1]
    if kind in ("&", "|", "^"):
        return _binary(kind, content, flow, facts)
    if kind == "fib":
        return _fib(content, flow, facts)
    if kind == "concat":
        parts = tuple(evaluate(part, flow, facts) for part in content)
        return Special.ABSENT if Special.ABSENT in parts else parts
    read = _READERS.get(kind)
    return read(content, flow) if read else Special.UNKNOWN


def _payload(content: Json, flow: Flow) -> Value:
    if "base" in content:
        field = _RAW_FIELDS.get((content["base"], content["offset"], content["len"]))
        return _ports(field, flow) if field else Special.UNKNOWN
    protocol, field = content["protocol"], content["field"]
    if protocol in ("ip", "ip6"):
        return _network_header(protocol, field, flow)
    if protocol == "th" or _TRANSPORT.get(protocol) == flow.protocol_number:
        return _tcp_flags(flow) if (protocol, field) == ("tcp", "flags") else _ports(field, flow)
    return Special.ABSENT if protocol in _TRANSPORT or protocol in _OTHER_TRANSPORT else Special.UNKNOWN


_RAW_FIELDS = {("th", 16, 16): "dport", ("th", 0, 16): "sport"}


def _network_header(protocol: str, field: str, flow: Flow) -> Value:
    if (protocol == "ip6") is not (flow.family is Family.IPV6):
        return Special.ABSENT
    known = {
        "saddr": flow.source,
        "daddr": Special.UNKNOWN if flow.redirected else flow.destination,
        "protocol": flow.protocol_number,
        "nexthdr": flow.protocol_number,
        "version": 6 if flow.family is Family.IPV6 else 4,
    }
    return known.get(field, Special.UNKNOWN)


def _ports(field: str, flow: Flow) -> Value:
    if field == "dport":
        return Special.UNKNOWN if flow.port < 0 else flow.port
    if field == "sport" and flow.source_port is not None:
        return flow.source_port
    return Special.UNKNOWN


_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ecn": 64, "cwr": 128}


def _tcp_flags(flow: Flow) -> Value:
    if flow.entry == "established":
        return _FLAGS["syn"] | _FLAGS["ack"] if flow.reply else Special.UNKNOWN
    return _FLAGS["syn"]


def _meta(content: Json, flow: Flow) -> Value:
    key = content["key"]
    if key == "pkttype":
        return Special.UNKNOWN if flow.iif.name == "" else "host"
    six = flow.family is Family.IPV6
    known = {
        "mark": flow.mark,
        "iifname": flow.iif,
        "iif": flow.iif,
        "oifname": flow.oif,
        "oif": flow.oif,
        "l4proto": flow.protocol_number,
        "nfproto": "ipv6" if six else "ipv4",
        "protocol": "ip6" if six else "ip",
    }
    return known.get(key, Special.UNKNOWN)


def _connection(content: Json, flow: Flow) -> Value:
    key, direction = content["key"], content.get("dir", "")
    if key == "state":
        return flow.state
    if flow.state in ("untracked", "invalid"):
        return Special.ABSENT
    known: dict[str, Value] = {
        "status": _status(flow),
        "mark": flow.connection_mark,
        "direction": "reply" if flow.reply else "original",
        "l3proto": "ipv6" if flow.family is Family.IPV6 else "ipv4",
        "protocol": flow.protocol_number,
    }
    if direction == "original":
        original = {"daddr": flow.original[0], "proto-dst": flow.original[1]}
        return original.get(key.split()[-1], Special.UNKNOWN)
    return known.get(key, Special.UNKNOWN)


_READERS: dict[str, Callable[[Json, Flow], Value]] = {
    "payload": _payload,
    "meta": _meta,
    "ct": _connection,
    "numgen": lambda content, _: Drawn(content["mod"], content.get("offset", 0) or 0),
}


def _status(flow: Flow) -> frozenset[str]:
    found = {"dnat"} if flow.dnat else set()
    found |= {"snat"} if flow.snat else set()
    found |= {"seen-reply", "confirmed"} if flow.state == "established" else set()
    return frozenset(found)


def _fib(content: Json, flow: Flow, facts: TraceFacts) -> Value:
    flags, result = content["flags"], content["result"]
    if isinstance(flags, str):
        flags = [flags]
    if result != "type":
        return Special.UNKNOWN
    address = flow.source if "saddr" in flags else flow.destination
    local = facts.is_local(flow, address)
    if "iif" in flags or "oif" in flags:
        return "not-local" if local is False else Special.UNKNOWN
    return Special.UNKNOWN if local is None else "local" if local else _other_type(flow, facts, address)


def _other_type(flow: Flow, facts: TraceFacts, address: int) -> str:
    size = 16 if flow.family is Family.IPV6 else 4
    if ip_address(address.to_bytes(size, "big")).is_multicast:
        return "multicast"
    broadcast = flow.family is Family.IPV4 and (address == ALL_BITS or (address & 1 and flow.protocol == "UDP"))
    return "not-local" if broadcast and address not in facts.foreign_addresses else "unicast"


def _binary(operator: str, content: Json, flow: Flow, facts: TraceFacts) -> Value:
    left, right = content[0], content[1]
    value = evaluate(left, flow, facts)
    constant = flag_number(right)
    if constant is None:
        other = evaluate(right, flow, facts)
        if isinstance(value, Bits) and isinstance(other, Bits):
            known = value.known & other.known
            combined = {"&": value.value & other.value, "|": value.value | other.value, "^": value.value ^ other.value}
            return Bits(combined[operator] & known, known)
        return Special.UNKNOWN if isinstance(other, Bits) else other if other is Special.ABSENT else Special.UNKNOWN
    if isinstance(value, Bits):
        return changed(value, operator, constant)
    if isinstance(value, int) and not isinstance(value, bool):
        return {"&": value & constant, "|": value | constant, "^": value ^ constant}[operator]
    return value if isinstance(value, Special) else Special.UNKNOWN


def changed(mark: Bits, operator: str, constant: int) -> Bits:
    """Return a mark after one of the operators `&`, `|` and `^`."""
    clear, flip = {
        "&": (~constant & ALL_BITS, 0),
        "|": (constant, constant),
        "^": (0, constant),
    }[operator]
    return mark.change(clear, flip)


def flag_number(constant: Json) -> int | None:
    """Return a constant, or a combination of TCP flags, as a number. None if it is neither."""
    if isinstance(constant, int) and not isinstance(constant, bool):
        return constant
    if isinstance(constant, str):
        return _FLAGS[constant] if constant in _FLAGS else _integer(constant)
    parts = constant if isinstance(constant, list) else constant.get("|") if isinstance(constant, dict) else None
    if not parts:
        return None
    total = 0
    for number in map(flag_number, parts):
        if number is None:
            return None
        total |= number
    return total


def _integer(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


# Comparisons.


def compare(value: Value, operator: str, right: Json, sets: Sets) -> Truth:
    """Return whether a comparison holds. An absent value never matches, not even with `!=`."""
    if value is Special.ABSENT:
        return False
    if operator in ("<", ">", "<=", ">="):
        return _ordered(value, operator, right)
    found = contains(right, value, sets, exact=operator == "==")
    if operator == "!=":
        return None if found is None else not found
    return found


def _ordered(value: Value, operator: str, right: Json) -> Truth:
    constant = _number(right, value)
    if isinstance(value, Bits) and value.known == ALL_BITS:
        value = value.value
    if constant is None or not isinstance(value, int):
        return None
    return {"<": value < constant, ">": value > constant, "<=": value <= constant, ">=": value >= constant}[operator]


def contains(right: Json, value: Value, sets: Sets, *, exact: bool = False) -> Truth:
    """Return whether a value equals a constant, or is in a range, prefix, list or set."""
    elements = _members(right, sets)
    if elements is not None:
        return _any(contains(each, value, sets) for each in elements)
    if isinstance(right, dict) and "elem" in right:
        found = contains(right["elem"]["val"], value, sets)
        return None if found and right["elem"].keys() - _INERT_PROPERTIES else found
    if isinstance(right, dict) and "concat" in right:
        return _concatenation(right["concat"], value, sets)
    if isinstance(value, tuple) or value is Special.UNKNOWN or (isinstance(right, str) and right.startswith("@")):
        return True if right == "*" else None
    return value is not Special.ABSENT and _constant(right, value, exact=exact)


def _members(right: Json, sets: Sets) -> list[Json] | None:
    """Return the elements of a set or list. None if it is neither, or if its elements are not known."""
    if isinstance(right, str) and right.startswith("@"):
        named = sets.get(right[1:])
        return None if named is None or "unparsed" in named else named.get("elem", [])
    if isinstance(right, dict) and "set" in right:
        return right["set"] if isinstance(right["set"], list) else [right["set"]]
    return right if isinstance(right, list) else None


def _any(truths: Iterator[Truth]) -> Truth:
    unknown = False
    for truth in truths:
        if truth:
            return True
        unknown = unknown or truth is None
    return None if unknown else False


def _concatenation(parts: list[Json], value: Value, sets: Sets) -> Truth:
    if not isinstance(value, tuple) or len(value) != len(parts):
        return None
    truths = [contains(part, each, sets) for part, each in zip(parts, value, strict=True)]
    return False if False in truths else None if None in truths else True


def _constant(right: Json, value: Value, *, exact: bool) -> Truth:  # noqa: PLR0911
    if right == "*":
        return True
    if isinstance(value, Interface):
        return value.matches(str(right)) if isinstance(right, str) else None
    if isinstance(value, frozenset):
        return str(right) in value
    if isinstance(value, str):
        if value == "not-local":
            return False if right == "local" else None
        return _same_word(value, str(right))
    if isinstance(value, Bits):
        number = _number(right, value)
        if number is None:
            return _mark_range(right, value)
        return value.masked_equals(ALL_BITS, number & ALL_BITS)
    if isinstance(right, dict):
        return _in_range(right, value)
    number = _number(right, value)
    if number is not None and not exact and isinstance(right, str) and right in _FLAGS:
        return bool(value & number)
    return None if number is None else value == number


_SYNONYMS = {"ip": {"ip", "ipv4", "0x0800"}, "ip6": {"ip6", "ipv6"}, "ipv4": {"ip", "ipv4"}, "ipv6": {"ip6", "ipv6"}}
_SYNONYMS["host"] = {"host", "unicast"}


def _same_word(value: str, right: str) -> bool:
    return right in _SYNONYMS.get(value, {value})


def _mark_range(right: Json, value: Bits) -> Truth:
    if value.known != ALL_BITS or not isinstance(right, dict):
        return None
    return _in_range(right, value.value)


def _in_range(right: Json, value: int) -> Truth:
    if "range" in right:
        low, high = (_number(each, value) for each in right["range"])
        return None if low is None or high is None else low <= value <= high
    if "prefix" in right:
        address = ip_address(right["prefix"]["addr"])
        host_bits = address.max_prefixlen - int(right["prefix"]["len"])
        return value >> host_bits == int(address) >> host_bits
    number = flag_number(right)
    return None if number is None else value == number


def _number(right: Json, _: Value) -> int | None:
    if not isinstance(right, str):
        return int(right) if isinstance(right, bool) else flag_number(right)
    for names in (_PROTOCOLS, _PORTS, _FLAGS):
        if right in names:
            return names[right]
    try:
        return int(ip_address(right))
    except ValueError:
        return _integer(right)


# Maps.


class Found(Struct, frozen=True):
    """A possible result of a lookup: the element's data (None if there is no element), and its probability.

    The probability is None if it is not known whether this is the result.
    """

    data: Json
    probability: float | None = 1.0
    comment: str = ""
    key: Json = None


def look_up(value: Value, data: Json, sets: Sets) -> list[Found]:
    """Return the possible results of looking up a value in a map."""
    if value is Special.ABSENT:
        return [Found(None)]
    elements = _elements(data, sets)
    if elements is None:
        return [Found(None, None), Found({"unknown": None}, None)]
    drawn = next((part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Drawn)), None)
    certain: list[Found] = []
    possible: list[Found] = []
    fallback: Found | None = None
    for key, result in elements:
        wrapped = key["elem"] if isinstance(key, dict) and "elem" in key else {"val": key}
        pattern, comment = wrapped["val"], wrapped.get("comment", "")
        if pattern == "*":
            fallback = Found(result, comment=comment)
            continue
        share = 1.0 if drawn is None else _share(pattern, value, drawn)
        truth = _matches_key(pattern, value, sets)
        if truth and share:
            certain.append(Found(result, share, comment, pattern))
        elif truth is None and share:
            possible.append(Found(result, None, comment, pattern))
    if possible:
        other = Found(fallback.data if fallback else None, None)
        return [*(Found(each.data, None, each.comment) for each in certain), *possible, *([] if certain else [other])]
    if drawn is None:
        return certain[:1] or [fallback or Found(None)]
    rest = 1.0 - sum(each.probability or 0.0 for each in certain)
    if rest > 1e-9:
        certain.append(Found(fallback.data if fallback else None, rest))
    return certain


def _elements(data: Json, sets: Sets) -> list[tuple[Json, Json]] | None:
    if isinstance(data, str):
        named = sets.get(data.removeprefix("@"))
        if named is None or "unparsed" in named:
            return None
        entries = named.get("elem", [])
    else:
        entries = data["set"] if isinstance(data, dict) and "set" in data else data
    return [(entry[0], entry[1]) for entry in entries]


def _matches_key(pattern: Json, value: Value, sets: Sets) -> Truth:
    """Return whether a key matches, leaving random numbers aside."""
    if isinstance(value, Drawn):
        return True
    if not isinstance(value, tuple):
        return contains(pattern, value, sets)
    if not isinstance(pattern, dict) or "concat" not in pattern or len(pattern["concat"]) != len(value):
        return None
    truths = [
        contains(part, each, sets)
        for part, each in zip(pattern["concat"], value, strict=True)
        if not isinstance(each, Drawn)
    ]
    return False if False in truths else None if None in truths else True


def _share(pattern: Json, value: Value, drawn: Drawn) -> float:
    """Return the probability that the random number of a lookup matches that of a key."""
    if isinstance(value, tuple):
        if not isinstance(pattern, dict) or "concat" not in pattern:
            return 0.0
        pattern = pattern["concat"][value.index(drawn)]
    low, high = pattern["range"] if isinstance(pattern, dict) and "range" in pattern else (pattern, pattern)
    first, last = max(int(low), drawn.offset), min(int(high), drawn.offset + drawn.modulus - 1)
    return max(0, last - first + 1) / drawn.modulus
