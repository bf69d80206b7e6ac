"""Local TCP ports: find a free one, and send HTTP requests to one."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPResponse

from tests.lab.waiting import HANG_GUARD


def free_port() -> int:
    """Return an unused TCP port on 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(port: int, path: str = "/", host: str = "127.0.0.1", method: str = "GET") -> tuple[HTTPResponse, bytes]:
    """Send one request; return the response and its body."""
    connection = HTTPConnection(host, port, timeout=HANG_GUARD)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()
