"""Ports of this machine: a free one, and what an HTTP server says on one."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPResponse

from tests.lab.waiting import HANG_GUARD


def free_port() -> int:
    """Return a TCP port on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def get(port: int, path: str = "/", host: str = "127.0.0.1", method: str = "GET") -> tuple[HTTPResponse, bytes]:
    """Send one request; return the answer and its body."""
    connection = HTTPConnection(host, port, timeout=HANG_GUARD)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()
