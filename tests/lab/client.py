"""One request from a machine of the lab, and how it ended."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TypeAlias

from tests.lab.links import version_of
from tests.lab.servers import FAMILIES, SOCKET_TYPES
from tests.lab.topology import Host

_IPV6_RECVERR = 25  # linux/in6.h

PATIENCE = 5.0
"""Seconds until a request counts as unanswered. Only packets that something dropped take that long."""


@dataclass(frozen=True)
class Answered:
    """A pod answered, and saw the request come from `source`."""

    pod: str
    source: str


@dataclass(frozen=True)
class Refused:
    """The way was closed at once: a TCP reset or an ICMP "port unreachable"."""


@dataclass(frozen=True)
class TimedOut:
    """Nothing came back."""


@dataclass(frozen=True)
class Failed:
    """Anything else, with the kernel's or the protocol's word for it."""

    reason: str


Outcome: TypeAlias = Answered | Refused | TimedOut | Failed


def ask(
    origin: Host,
    address: str,
    port: int,
    protocol: str = "TCP",
    *,
    source: str = "",
    source_port: int = 0,
    patience: float = PATIENCE,
) -> Outcome:
    """Send one request over a new connection. `source` picks one of the origin's addresses, if it has many."""
    try:
        with open_connection(
            origin, address, port, protocol, source=source, source_port=source_port, patience=patience
        ) as connection:
            return finish(connection, protocol)
    except ConnectionRefusedError:
        return Refused()
    except TimeoutError:
        return TimedOut()
    except (OSError, HTTPException) as error:
        return Failed(str(error))


def open_connection(
    origin: Host,
    address: str,
    port: int,
    protocol: str = "TCP",
    *,
    source: str = "",
    source_port: int = 0,
    patience: float = PATIENCE,
) -> socket.socket:
    """Return a connected socket for `finish`; for UDP nothing has been sent by then.

    Without `source` and `source_port` the kernel picks one of the origin's addresses and ports.
    """
    kind, number = SOCKET_TYPES[protocol]
    connection = origin.namespace.socket(FAMILIES[version_of(address)], kind, number)
    try:
        connection.settimeout(patience)
        if connection.family is socket.AF_INET6 and protocol == "TCP":
            # Else a refusal that comes while the first packet is being sent counts for the second, a second later.
            connection.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
        if source or source_port:
            connection.bind((source, source_port))
        connection.connect((address, port))
    except OSError:
        connection.close()
        raise
    return connection


def finish(connection: socket.socket, protocol: str = "TCP") -> Answered:
    """Send the request over an open connection and return the answer; errors are those of the socket."""
    text = _by_datagram(connection) if protocol == "UDP" else _by_http(connection)
    pod, source = text.split()
    return Answered(pod, source)


def _by_datagram(connection: socket.socket) -> str:
    connection.send(b"who are you?\n")
    return connection.recv(1500).decode()


def _by_http(connection: socket.socket) -> str:
    http = HTTPConnection("service.test")
    http.sock = connection
    http.request("GET", "/", headers={"Connection": "close"})
    return http.getresponse().read().decode()
