"""What each match option of iptables asks of a packet (iptables(8), iptables-extensions(8))."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_network
from typing import TypeAlias

from kproxy.simulate.packet import UnknownRuleError
from kproxy.simulate.passage import Passage

Match: TypeAlias = Callable[[Passage], bool]

_STATES = frozenset({"NEW", "ESTABLISHED", "RELATED", "INVALID", "DNAT"})
_MARK = re.compile(r"(0x[0-9a-f]+)(?:/(0x[0-9a-f]+))?")
_ALL_BITS = 0xFFFFFFFF


def negate(match: Match) -> Match:
    """Return the match that `!` before an option makes of it."""
    return lambda passage: not match(passage)


def masked(text: str) -> tuple[int, int]:
    """Return value and mask of a mark such as `0x4000/0x4000`; without a mask, all bits count."""
    found = _MARK.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"{text} is not a mark")
    return int(found[1], 16), int(found[2], 16) if found[2] else _ALL_BITS


def _within(text: str) -> tuple[int, int]:
    try:
        network = ip_network(text)
    except ValueError:
        raise UnknownRuleError(f"{text} is not a network") from None
    return int(network.network_address), int(network.netmask)


def _source(text: str) -> Match:
    network, mask = _within(text)
    return lambda passage: passage.source & mask == network


def _destination(text: str) -> Match:
    network, mask = _within(text)
    return lambda passage: passage.destination & mask == network


def _interface(text: str) -> Match:
    """Match the name, or with a `+` at its end what it begins with. A packet that came in by none has the name ""."""
    if text.endswith("+"):
        prefix = text.removesuffix("+")
        return lambda passage: passage.interface.startswith(prefix)
    return lambda passage: passage.interface == text


def _protocol(text: str) -> Match:
    if text not in ("tcp", "udp", "sctp"):
        raise UnknownRuleError(f"protocol {text} is not known")
    wanted = text.upper()
    return lambda passage: passage.packet.protocol == wanted


def _port(text: str) -> Match:
    """Match one port, or a range such as `30000:30015`."""
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or text.endswith(":"):
        raise UnknownRuleError(f"{text} is not a port or a range of ports")
    low, high = int(first), int(last or first)
    return lambda passage: low <= passage.port <= high


def _local_source(text: str) -> Match:
    _only_local(text)
    return lambda passage: passage.is_local(passage.source)


def _local_destination(text: str) -> Match:
    _only_local(text)
    return lambda passage: passage.is_local(passage.destination)


def _only_local(text: str) -> None:
    if text != "LOCAL":
        raise UnknownRuleError(f"address type {text} is not known")


def _mark(text: str) -> Match:
    value, mask = masked(text)
    return lambda passage: passage.mark & mask == value


def _state(text: str) -> Match:
    states = frozenset(text.split(","))
    if not states <= _STATES:
        raise UnknownRuleError(f"connection state {text} is not known")
    translated = "DNAT" in states
    return lambda passage: passage.packet.state in states or (translated and bool(passage.target))


MATCHES: dict[str, Callable[[str], Match]] = {
    "-s": _source,
    "-d": _destination,
    "-i": _interface,
    "-p": _protocol,
    "--dport": _port,
    "--src-type": _local_source,
    "--dst-type": _local_destination,
    "--mark": _mark,
    "--ctstate": _state,
}
"""By option, the maker of the match from the option's argument; raises `UnknownRuleError`."""
