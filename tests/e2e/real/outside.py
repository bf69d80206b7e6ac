"""This machine as a client, where it is neither a node nor a pod."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPException

from tests.e2e.cluster import Answer, Failure, Node, Outcome
from tests.e2e.real.objects import family_of
from tests.e2e.real.scripts import PATIENCE, host_of

KUBELET_PORT = 10250
SOCKETS = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}


def ask(address: str, port: int, protocol: str) -> Outcome:
    """Send one request from this machine."""
    try:
        return _by_datagram(address, port) if protocol == "UDP" else _by_http(address, port)
    except ConnectionRefusedError as error:
        return Failure("refused", str(error))
    except TimeoutError as error:
        return Failure("no answer", str(error))
    except (OSError, HTTPException) as error:
        return Failure("other", str(error))


def why_not(nodes: list[Node], everyone: set[str]) -> str:
    """Return why this machine is no client outside for these nodes, "" if it is one.

    `everyone` has the addresses of all nodes, those without pods too: a node's requests go through its own proxy.
    """
    for node in nodes:
        for address in node.addresses.values():
            if reason := _why_not_at(address, everyone):
                return f"node {node.name}: {reason}"
    return ""


def _why_not_at(address: str, everyone: set[str]) -> str:
    try:
        with socket.create_connection((address, KUBELET_PORT), PATIENCE) as connection:
            own = connection.getsockname()[0]
    except OSError as error:
        return f"its kubelet at {address} port {KUBELET_PORT} is not reached from this machine: {error}"
    return f"this machine is a node itself, {own}" if own in everyone else ""


def _by_http(address: str, port: int) -> Answer:
    connection = HTTPConnection(address, port, timeout=PATIENCE)
    try:
        connection.connect()
        asked = connection.sock
        words = []
        for path in ("/hostname", "/clientip"):
            connection.request("GET", path)
            words.append(connection.getresponse().read().decode())
            if connection.sock is not asked:
                raise HTTPException("the server ended the connection after its first answer")
    finally:
        connection.close()
    return Answer(words[0], host_of(words[1]))


def _by_datagram(address: str, port: int) -> Answer:
    words = []
    with socket.socket(SOCKETS[family_of(address)], socket.SOCK_DGRAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect((address, port))
        for word in (b"hostname", b"clientip"):
            connection.send(word)
            words.append(connection.recv(2048).decode())
    return Answer(words[0], host_of(words[1]))
