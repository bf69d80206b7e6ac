"""Listening sockets, with Go's understanding of addresses, so that one configuration means the same to both."""

from __future__ import annotations

import socket

from msgspec import Struct

from kproxy.model.endpoints import socket_text, split_socket_text

BACKLOG = 128
ANY = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - told apart here, not bound


class Address(Struct, frozen=True):
    """Where to listen.

    An unspecified host means every address of both families, as it does in Go's `net.Listen("tcp", ...)`; with
    `one_family` it means those of its own.
    """

    host: str
    port: int
    one_family: bool = False

    def __str__(self) -> str:
        return socket_text(self.host, self.port)


def parse_address(text: str) -> Address:
    """Return the address that `IP:port` or `[IP]:port` says."""
    return Address(*split_socket_text(text))


def listen(address: Address) -> socket.socket:
    """Return a listening socket that does not block. Raises `OSError`, which says why, if there cannot be one."""
    family, host = _family(address)
    found = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            both = host == "::" and not address.one_family
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        found.bind((host, address.port))
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


def _family(address: Address) -> tuple[socket.AddressFamily, str]:
    host = address.host
    if host in ANY and not address.one_family:
        return (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")  # noqa: S104
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), host
