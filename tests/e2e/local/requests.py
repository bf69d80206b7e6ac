"""Requests from hosts of the emulated cluster: single ones, from one UDP port, continuous ones, and HTTP GETs."""

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
from tests.e2e.request_counter import RequestCounter
from tests.lab.client import complete_request
from tests.lab.servers import FAMILIES, SOCKET_TYPES
from tests.lab.topology import Host

TIMEOUT = 0.5
"""Seconds until a request counts as unanswered. Answers take a hundredth of it."""

LOAD_TIMEOUT = 5.0
"""The same for a load, where a busy machine must not look like a failure."""

LOAD_PAUSE = 0.002
ONE_PORT = 40000
IPV6_RECVERR = 25

REFUSALS = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPERM}
"""A TCP reset, an ICMP "port unreachable", or a rule in OUTPUT that rejects a local sender's packet."""


def send_request(origin: Host, address: str, port: int, protocol: str = "TCP", *, timeout: float = TIMEOUT) -> Outcome:
    """Send one request over a new connection, or from a new UDP port."""
    try:
        with origin.namespace.socket(_family(address), *SOCKET_TYPES[protocol]) as connection:
            _connect(connection, address, port, timeout)
            return _answer(connection, protocol)
    except (OSError, HTTPException, ValueError) as error:
        return failure(error)


def send_from_one_port(origin: Host, address: str, port: int, times: int) -> list[Outcome]:
    """Send UDP requests from one source port, the same in every call."""
    with origin.namespace.socket(_family(address), socket.SOCK_DGRAM) as connection:
        connection.bind(("", ONE_PORT))
        connection.settimeout(TIMEOUT)
        connection.connect((address, port))
        return [_request_again(connection) for _ in range(times)]


def failure(error: Exception) -> Failure:
    """Classify the error of a request."""
    if isinstance(error, TimeoutError):
        return Failure("no answer", str(error))
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return Failure("refused", str(error))
    return Failure("other", f"{type(error).__name__}: {error}")


def get(origin: Host, url: str) -> tuple[int, str]:
    """Return status and body of an HTTP or HTTPS GET made on a host. Certificates are not verified."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))

    def fetch() -> tuple[int, str]:
        try:
            with opener.open(url, timeout=LOAD_TIMEOUT) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return origin.namespace.call(fetch)


class LocalLoad(RequestCounter):
    """Sequential requests during a `with` block. Requests in flight at its end are counted too."""

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
            outcome = send_request(*self._target, timeout=LOAD_TIMEOUT)
            if isinstance(outcome, Answer):
                self.count_answer()
            else:
                self.add_failure(f"after {began:.3f} s: {outcome.kind}: {outcome.detail}")


def _connect(connection: socket.socket, address: str, port: int, timeout: float) -> None:
    """Connect, and report an ICMP error even if it arrives during the connect system call.

    Between namespaces, the error for an IPv6 address arrives that fast. TCP then only records it and retransmits the
    SYN after a second. With an error queue (IPV6_RECVERR, see ipv6(7)), the waiting connect reports it at once.
    """
    connection.settimeout(timeout)
    if connection.family == socket.AF_INET6 and connection.type == socket.SOCK_STREAM:
        connection.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    connection.connect((address, port))


def _family(address: str) -> int:
    return FAMILIES[6 if ":" in address else 4]


def _request_again(connection: socket.socket) -> Outcome:
    try:
        return _answer(connection, "UDP")
    except (OSError, ValueError) as error:
        return failure(error)


def _answer(connection: socket.socket, protocol: str) -> Answer:
    answered = complete_request(connection, protocol)
    return Answer(answered.pod, answered.source)
