"""This machine as a client outside the cluster, if it is neither a node nor a pod."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPException

from tests.e2e.cluster import Answer, Failure, Node, Outcome
from tests.e2e.real.objects import family_of
from tests.e2e.real.scripts import TIMEOUT, host_of

KUBELET_PORT = 10250
SOCKETS = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}


def send_request(address: str, port: int, protocol: str) -> Outcome:
    """Send one request from this machine."""
    try:
        return _by_datagram(address, port) if protocol == "UDP" else _by_http(address, port)
    except ConnectionRefusedError as error:
        return Failure("refused", str(error))
    except TimeoutError as error:
        return Failure("no answer", str(error))
    except (OSError, HTTPException) as error:
        return Failure("other", str(error))


def unusable_reason(nodes: list[Node], node_addresses: set[str]) -> str:
    """Return why this machine cannot be the outside client for these nodes, "" if it can.

    `node_addresses` are the addresses of all nodes, unschedulable ones included: requests from a node pass its own
    proxy.
    """
    for node in nodes:
        for address in node.addresses.values():
            if reason := _unusable_reason_at(address, node_addresses):
                return f"node {node.name}: {reason}"
    return ""


def _unusable_reason_at(address: str, node_addresses: set[str]) -> str:
    try:
        with socket.create_connection((address, KUBELET_PORT), TIMEOUT) as connection:
            own = connection.getsockname()[0]
    except OSError as error:
        return f"its kubelet at {address} port {KUBELET_PORT} is unreachable from this machine: {error}"
    return f"this machine is itself a node, {own}" if own in node_addresses else ""


def _by_http(address: str, port: int) -> Answer:
    connection = HTTPConnection(address, port, timeout=TIMEOUT)
    try:
        connection.connect()
        socket_used = connection.sock
        words = []
        for path in ("/hostname", "/clientip"):
            connection.request("GET", path)
            words.append(connection.getresponse().read().decode())
            if connection.sock is not socket_used:
                raise HTTPException("the server closed the connection after its first answer")
    finally:
        connection.close()
    return Answer(words[0], host_of(words[1]))


def _by_datagram(address: str, port: int) -> Answer:
    words = []
    with socket.socket(SOCKETS[family_of(address)], socket.SOCK_DGRAM) as connection:
        connection.settimeout(TIMEOUT)
        connection.connect((address, port))
        for request in (b"hostname", b"clientip"):
            connection.send(request)
            words.append(connection.recv(2048).decode())
    return Answer(words[0], host_of(words[1]))
