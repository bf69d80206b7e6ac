"""A stream of new connections to many Services, and a report of those that fail."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import cycle

from tests.lab.client import TIMEOUT, Answered, Failed, Outcome, Refused, TimedOut, complete_request, open_connection
from tests.lab.continuous_requests import ContinuousRequests
from tests.lab.topology import Host

CONNECTIONS_PER_SECOND = 200
"""Maximum number of new connections per second."""

MAX_CONNECTIONS = 10_000
"""Maximum number of connections of one stream, so that a stuck test does not flood the machine."""

FIRST_SOURCE_PORT = 20_000
"""The source port of a stream's first connection; each further connection uses the next port.

The kernel might pick the port of a connection that failed seconds ago. Connection tracking remembers the destination
of that connection for two minutes and would reuse it without consulting the rules.
"""

MAX_REPORTED = 10
_TOTAL_RETRANSMISSIONS = struct.Struct("=100xI")
"""`tcpi_total_retrans` of `struct tcp_info` (linux/tcp.h), after 8 bytes and 23 words of 4 bytes."""


@dataclass(frozen=True)
class Target:
    """One frontend of a TCP Service and the client that uses it. The Service's pods are named `<service>/...`."""

    service: str
    origin: Host
    address: str
    port: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.service} at {address}:{self.port} from {self.origin.name}"


@dataclass(frozen=True)
class Attempt:
    """One connection: its start (`time.monotonic`), duration and outcome."""

    target: Target
    began: float
    seconds: float
    outcome: Outcome


class ConnectionStream:
    """Connects to the targets in turn while in its `with` block. A connection may take `timeout` seconds."""

    def __init__(self, targets: Sequence[Target], *, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._targets = cycle(targets)
        self._round = len(targets)
        self._flow = ContinuousRequests(self._request)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._begun = 0
        self._next_slot = time.monotonic()
        self._attempts: list[Attempt] = []
        self._marks: list[tuple[float, str]] = [(self._next_slot, "the start")]

    def __enter__(self) -> ConnectionStream:
        self._flow.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._flow.__exit__(*exc)

    def mark(self, event: str) -> None:
        """Record an event; failures are reported relative to the last one."""
        with self._lock:
            self._marks.append((time.monotonic(), event))

    def take(self, rounds: int = 1) -> Counter[str]:
        """Wait until every target has been tried `rounds` more times; return the number of answers of each pod.

        Connections that were in flight at the time of the call are not counted.
        """
        self._flow.settle()
        return self._flow.take(rounds * self._round)

    def settle(self) -> None:
        """Return once every connection that was in flight at the time of the call has ended."""
        self._flow.settle()

    def failures(self) -> list[Attempt]:
        """Return the failed connections so far."""
        with self._lock:
            return [attempt for attempt in self._attempts if not isinstance(attempt.outcome, Answered)]

    def describe(self, failed: Sequence[Attempt]) -> str:
        """Return one line per failure: target, time and outcome; "" if there are none."""
        if not failed:
            return ""
        lines = [f"{len(failed)} of {len(self._attempts)} connections failed:"]
        lines += [self._line(attempt) for attempt in failed[:MAX_REPORTED]]
        if len(failed) > MAX_REPORTED:
            lines.append(f"... and {len(failed) - MAX_REPORTED} more")
        return "\n".join(lines)

    def failure_report(self) -> str:
        """Describe the failed connections so far; "" if there are none."""
        return self.describe(self.failures())

    def _line(self, attempt: Attempt) -> str:
        moment, event = max(mark for mark in self._marks if mark[0] <= attempt.began)
        when = f"{attempt.began - moment:.3f} s after {event}"
        return f"{attempt.target}, {when}: {attempt.outcome} within {attempt.seconds:.3f} s"

    def _request(self) -> Outcome:
        target, port = self._next_target()
        began = time.monotonic()
        outcome = _connect(target, port, self._timeout)
        attempt = Attempt(target, began, time.monotonic() - began, outcome)
        with self._lock:
            self._attempts.append(attempt)
        return outcome

    def _next_target(self) -> tuple[Target, int]:
        """Wait for the next slot, so that all workers together keep the rate; return a target and a new port."""
        with self._lock:
            target = next(self._targets)
            port = FIRST_SOURCE_PORT + self._begun
            self._begun += 1
            over = self._begun > MAX_CONNECTIONS
            now = time.monotonic()
            slot = max(self._next_slot, now)
            self._next_slot = slot + 1 / CONNECTIONS_PER_SECOND
        self._ended.wait(None if over else slot - now)
        return target, port


def _connect(target: Target, source_port: int, timeout: float) -> Outcome:
    """Make one connection. A retransmission and an answer from another Service's pod count as failures, too."""
    try:
        with open_connection(
            target.origin, target.address, target.port, source_port=source_port, timeout=timeout
        ) as connection:
            lost = _retransmissions(connection)
            answer = complete_request(connection)
    except ConnectionRefusedError:
        return Refused()
    except TimeoutError:
        return TimedOut()
    except (OSError, HTTPException, ValueError) as error:
        return Failed(str(error))
    if lost:
        return Failed(f"needed {lost} TCP retransmissions")
    if answer.pod.rpartition("/")[0] != target.service:
        return Failed(f"answered by {answer.pod}, which is not a pod of this Service")
    return answer


def _retransmissions(connection: socket.socket) -> int:
    """Return the number of TCP retransmissions of a new connection. One means that a packet was dropped 1 s ago."""
    size = _TOTAL_RETRANSMISSIONS.size
    count: int = _TOTAL_RETRANSMISSIONS.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size))[0]
    return count
