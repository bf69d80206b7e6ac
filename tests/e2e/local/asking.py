"""Requests from the cluster's machines: one by one, from one UDP port, without end, and HTTP GETs by URL."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from http.client import HTTPException
from typing import Self
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from tests.e2e.cluster import Answer, Failure, Outcome
from tests.e2e.tally import Tally
from tests.lab.client import complete_request
from tests.lab.servers import FAMILIES, SOCKET_TYPES
from tests.lab.topology import Host

PATIENCE = 0.5
"""Seconds until a request counts as unanswered; answers take a hundredth of it."""

LOAD_PATIENCE = 5.0
"""The same for a load, which is to tell failures from a machine that is busy."""

LOAD_PAUSE = 0.002
ONE_PORT = 40000
IPV6_RECVERR = 25

REFUSALS = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPERM}
"""A reset, an ICMP error for the port, or a rule that told the machine's own sender at once."""


def ask(origin: Host, address: str, port: int, protocol: str = "TCP", *, patience: float = PATIENCE) -> Outcome:
    """Send one request over a new connection, or from a new port."""
    try:
        with origin.namespace.socket(_family(address), *SOCKET_TYPES[protocol]) as connection:
            _connect(connection, address, port, patience)
            return _answer(connection, protocol)
    except (OSError, HTTPException, ValueError) as error:
        return failure(error)


def ask_from_one_port(origin: Host, address: str, port: int, times: int) -> list[Outcome]:
    """Send UDP requests from one socket, which has the same port in every call."""
    with origin.namespace.socket(_family(address), socket.SOCK_DGRAM) as connection:
        connection.bind(("", ONE_PORT))
        connection.settimeout(PATIENCE)
        connection.connect((address, port))
        return [_ask_again(connection) for _ in range(times)]


def failure(error: Exception) -> Failure:
    """Return what an error of a request means."""
    if isinstance(error, TimeoutError):
        return Failure("no answer", str(error))
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return Failure("refused", str(error))
    return Failure("other", f"{type(error).__name__}: {error}")


def get(origin: Host, url: str) -> tuple[int, str]:
    """Return status and body of an HTTP or HTTPS GET made on a machine; no certificate is checked."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))

    def fetch() -> tuple[int, str]:
        try:
            with opener.open(url, timeout=LOAD_PATIENCE) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return origin.namespace.call(fetch)


class Requests(Tally):
    """A load: requests one after the other while its `with` lasts. Those of its end are counted too."""

    def __init__(self, origin: Host, address: str, port: int) -> None:
        super().__init__()
        self._target = origin, address, port
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOAD_PAUSE):
            began = time.monotonic() - self._began
            outcome = ask(*self._target, patience=LOAD_PATIENCE)
            if isinstance(outcome, Answer):
                self.answered()
            else:
                self.failed(f"after {began:.3f} s: {outcome.kind}: {outcome.detail}")


def _connect(connection: socket.socket, address: str, port: int, patience: float) -> None:
    """Connect, and see an ICMP error that arrives before the system call is over.

    Without a network between, the error for an IPv6 address does. TCP only notes it then, and tries once more after a
    second. A queue of errors (ipv6(7), IPV6_RECVERR) wakes the wait for the connection, which finds the note.
    """
    connection.settimeout(patience)
    if connection.family == socket.AF_INET6 and connection.type == socket.SOCK_STREAM:
        connection.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    connection.connect((address, port))


def _family(address: str) -> int:
    return FAMILIES[6 if ":" in address else 4]


def _ask_again(connection: socket.socket) -> Outcome:
    try:
        return _answer(connection, "UDP")
    except (OSError, ValueError) as error:
        return failure(error)


def _answer(connection: socket.socket, protocol: str) -> Answer:
    answered = complete_request(connection, protocol)
    return Answer(answered.pod, answered.source)
