"""Read entries of connection tracking, as /proc/net/nf_conntrack and `conntrack -L` print them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from msgspec import Struct

from kproxy.model.types import Protocol

_FIELD = re.compile(r"\b(src|dst|sport|dport)=(\S+)")
_STATE = re.compile(r"\b(ESTABLISHED|SYN_SENT2?|SYN_RECV|FIN_WAIT|CLOSE_WAIT|LAST_ACK|TIME_WAIT|CLOSE|COOKIE_\w+)\b")


class ConnectionEntry(Struct, frozen=True):
    """One connection: the tuple of the client's packets, and that of the replies. Addresses are in canonical form."""

    source: str
    source_port: int
    destination: str
    port: int
    reply_source: str
    reply_source_port: int
    reply_destination: str
    state: str = ""
    replied: bool = True


def read_connections(
    lines: Iterable[str], protocol: Protocol, source: str, to: str, port: int
) -> list[ConnectionEntry]:
    """Return the connections of one client to one destination."""
    return [
        entry
        for entry in _entries(lines, protocol.lower())
        if (entry.source, entry.destination, entry.port) == (source, to, port)
    ]


def _entries(lines: Iterable[str], protocol: str) -> Iterator[ConnectionEntry]:
    for line in lines:
        fields = _FIELD.findall(line)
        if protocol not in line.split()[:3] or len(fields) != 8:
            continue
        original, reply = dict(fields[:4]), dict(fields[4:])
        state = _STATE.search(line)
        yield ConnectionEntry(
            source=str(ip_address(original["src"])),
            source_port=int(original["sport"]),
            destination=str(ip_address(original["dst"])),
            port=int(original["dport"]),
            reply_source=str(ip_address(reply["src"])),
            reply_source_port=int(reply["sport"]),
            reply_destination=str(ip_address(reply["dst"])),
            state=state[1] if state else "",
            replied="[UNREPLIED]" not in line,
        )
