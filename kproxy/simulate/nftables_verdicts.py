"""What a rule that hits decides about a packet."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.nftables_fields import VERSIONS
from kproxy.simulate.nftables_words import Words
from kproxy.simulate.packet import UnknownRuleError, Verdict
from kproxy.simulate.passage import Passage

_REPLIES = {Family.IPV4: "icmp-port-unreachable", Family.IPV6: "icmp6-port-unreachable"}
_SOCKET = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+)|\[([0-9a-f:.]+)\]):(\d+)")


def _unchanged(passage: Passage) -> Passage:
    return passage


class Decision(Struct, frozen=True):
    """Where a packet goes from a rule: to a `chain`, out of this one, to the next rule, or out of the base chain.

    In the last case (`end`), `change` is what has been done to it.
    """

    way: Literal["end", "return", "continue", "goto", "jump"]
    chain: str = ""
    change: Callable[[Passage], Passage] = _unchanged


ACCEPT = Decision("end")
DROP = Decision("end", change=lambda passage: passage.end(Verdict.DROPPED))
MASQUERADE = Decision("end", change=lambda passage: replace(passage, masqueraded=True))
_PLAIN = {"accept": ACCEPT, "drop": DROP, "return": Decision("return"), "continue": Decision("continue")}


class Endpoint(Struct, frozen=True):
    """An address and a port, and their text."""

    socket: str
    address: int
    port: int

    def decision(self) -> Decision:
        """Return the decision to send a packet there."""
        return Decision("end", change=lambda passage: passage.translate(self.socket, self.address, self.port))


def reject(family: Family) -> Decision:
    """Return the decision of `reject` without a type: port unreachable, as the family says it."""
    return Decision("end", change=lambda passage: passage.end(Verdict.REJECTED, _REPLIES[family]))


def read_verdict(words: Words) -> Decision | None:
    """Take a verdict that may also stand in a map; None if the next word is none."""
    for word in ("goto", "jump"):
        if words.take(word):
            return Decision("goto" if word == "goto" else "jump", words.next())
    return next((decision for word, decision in _PLAIN.items() if words.take(word)), None)


def read_destination(words: Words, family: Family) -> Endpoint:
    """Take an address with a port, such as `10.244.1.1:8080` or `[fd00::1]:8080`."""
    text = words.next()
    found = _SOCKET.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"{text} is not an address with a port")
    return endpoint(found[1] or found[2], int(found[3]), family)


def endpoint(text: str, port: int, family: Family) -> Endpoint:
    """Return an endpoint by the text of its address."""
    try:
        address = ip_address(text)
    except ValueError:
        raise UnknownRuleError(f"{text} is not an address") from None
    if address.version != VERSIONS[family]:
        raise UnknownRuleError(f"{text} is not of {family.value}")
    if not 0 < port <= 0xFFFF:
        raise UnknownRuleError(f"{port} is not a port of an endpoint")
    return Endpoint(f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}", int(address), port)
