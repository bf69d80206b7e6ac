"""What a way to the API server is: where the server is, connections to it, and how it knows us."""

from __future__ import annotations

import socket
from typing import Any, Protocol
from urllib.parse import urlsplit

KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""Socket options by which a peer that vanished is found within a minute."""

CONNECTIONS = 4
"""How many idle connections are kept."""

IN_CLUSTER = "in-cluster service account"


class ClientError(Exception):
    """The configuration or the credentials cannot be used; the message is one line: which file, what, why."""


class Access(Protocol):
    """A way to the API server."""

    @property
    def server(self) -> str:
        """The server's URL."""

    @property
    def rotates(self) -> bool:
        """Whether it is from files that others replace in time, so that it has to be loaded anew now and then."""

    @property
    def pool(self) -> Any:
        """The connections, a `urllib3.PoolManager`."""

    def authentication(self) -> dict[str, str]:
        """Return the headers by which the server knows us. Raises `ClientError` if they cannot be had."""


def check_server(server: str, source: str | None) -> None:
    """Raise `ClientError`, naming the file it is from if there is one, unless `server` is a URL to talk HTTP to."""
    where = f"{source}: server" if source else "server"
    try:
        parts = urlsplit(server)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ClientError(f"{where} {server!r} is no URL like https://10.0.0.1:6443")
