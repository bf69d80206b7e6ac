"""One request from a host of the lab, and its outcome."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TypeAlias

from tests.lab.links import version_of
from tests.lab.servers import FAMILIES, SOCKET_TYPES
from tests.lab.topology import Host

_IP_RECVERR = 11  # linux/in.h
_IPV6_RECVERR = 25  # linux/in6.h

_SCTP_RTOINFO = 0  # linux/sctp.h
_SCTP_RTO = struct.pack("=iIII", 0, 200, 1_000, 100)
"""`struct sctp_rtoinfo`: the association, and the initial, highest and lowest time in ms until a retransmission."""

TIMEOUT = 5.0
"""Seconds until a request counts as unanswered. Only dropped packets take that long."""


@dataclass(frozen=True)
class Answered:
    """A pod answered; it saw `source` as the client address."""

    pod: str
    source: str


@dataclass(frozen=True)
class Refused:
    """Rejected at once, by a TCP reset or an ICMP "port unreachable"."""


@dataclass(frozen=True)
class TimedOut:
    """No answer."""


@dataclass(frozen=True)
class Failed:
    """Any other failure, with the error message of the kernel or of the protocol."""

    reason: str


Outcome: TypeAlias = Answered | Refused | TimedOut | Failed


def send_request(
    origin: Host,
    address: str,
    port: int,
    protocol: str = "TCP",
    *,
    source: str = "",
    source_port: int = 0,
    timeout: float = TIMEOUT,
) -> Outcome:
    """Send one request over a new connection. `source` selects one of the origin's addresses."""
    try:
        with open_connection(
            origin, address, port, protocol, source=source, source_port=source_port, timeout=timeout
        ) as connection:
            return complete_request(connection, protocol)
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
    timeout: float = TIMEOUT,
) -> socket.socket:
    """Return a connected socket for `complete_request`. Over UDP, nothing has been sent yet.

    Without `source` and `source_port`, the kernel picks one of the origin's addresses and ports.
    """
    kind, number = SOCKET_TYPES[protocol]
    connection = origin.namespace.socket(FAMILIES[version_of(address)], kind, number)
    try:
        connection.settimeout(timeout)
        if connection.family is socket.AF_INET6 and protocol == "TCP":
            # Otherwise a rejection that arrives while the SYN is being sent is seen only at the next SYN, 1 s later.
            connection.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
        if protocol == "SCTP":
            _prepare_sctp(connection)
            # An unbound socket would offer all addresses of the host, which NAT does not translate.
            source = source or origin.address(version_of(address))
        if source or source_port:
            connection.bind((source, source_port))
        connection.connect((address, port))
    except OSError:
        connection.close()
        raise
    return connection


def complete_request(connection: socket.socket, protocol: str = "TCP") -> Answered:
    """Send the request over an open connection and return the answer. Raises the errors of the socket."""
    text = _by_datagram(connection) if protocol == "UDP" else _by_http(connection)
    pod, source = text.split()
    return Answered(pod, source)


def _prepare_sctp(connection: socket.socket) -> None:
    """Report ICMP errors at once, or at the first retransmission if one arrives while the INIT is being sent."""
    if connection.family is socket.AF_INET6:
        connection.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    else:
        connection.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    connection.setsockopt(socket.IPPROTO_SCTP, _SCTP_RTOINFO, _SCTP_RTO)


def _by_datagram(connection: socket.socket) -> str:
    connection.send(b"who are you?\n")
    return connection.recv(1500).decode()


def _by_http(connection: socket.socket) -> str:
    http = HTTPConnection("service.test")
    http.sock = connection
    http.request("GET", "/", headers={"Connection": "close"})
    return http.getresponse().read().decode()
