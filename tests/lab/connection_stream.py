"""A stream of new connections to many Services, and what to say about those that fail."""

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

from tests.lab.client import Answered, Failed, Outcome, Refused, TimedOut, finish, open_connection
from tests.lab.continuous_requests import Flow
from tests.lab.topology import Host

RATE = 200
"""Connections begun per second, at most."""

LIMIT = 10_000
"""Connections of one stream; after that it waits for its end, and so does not flood a machine that is stuck."""

FIRST_PORT = 20_000
"""The port that a stream's first connection comes from; each further one comes from the next.

The kernel may pick the port of a connection that failed seconds ago. Connection tracking then still remembers where
that one was sent, for two minutes, and asks no rule where the new one should go.
"""

SHOWN = 10
_TOTAL_RETRANSMISSIONS = struct.Struct("=100xI")
"""`tcpi_total_retrans` of `struct tcp_info` (linux/tcp.h), behind 8 bytes and 23 words of 4."""


@dataclass(frozen=True)
class Target:
    """One way to reach a Service over TCP. Its pods are called `<service>/...`."""

    service: str
    origin: Host
    address: str
    port: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.service} at {address}:{self.port} from {self.origin.name}"


@dataclass(frozen=True)
class Attempt:
    """One connection: when it began (by `time.monotonic`), how long it took, and how it ended."""

    target: Target
    began: float
    seconds: float
    outcome: Outcome


class Stream:
    """Connects to the targets in turn, all the time, until it is left (use it in a `with`)."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = cycle(targets)
        self._round = len(targets)
        self._flow = Flow(self._request)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._begun = 0
        self._next_turn = time.monotonic()
        self._attempts: list[Attempt] = []
        self._marks: list[tuple[float, str]] = [(self._next_turn, "the start")]

    def __enter__(self) -> Stream:
        self._flow.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._flow.__exit__(*exc)

    def mark(self, event: str) -> None:
        """Note that something happens now: failures are told relative to it."""
        with self._lock:
            self._marks.append((time.monotonic(), event))

    def take(self, rounds: int = 1) -> Counter[str]:
        """Wait until every target has been tried `rounds` times more; return how many answers each pod gave.

        What was under way before this began is not counted.
        """
        self._flow.settle()
        return self._flow.take(rounds * self._round)

    def settle(self) -> None:
        """Return once every connection has ended that was under way when this was called."""
        self._flow.settle()

    def failures(self) -> list[Attempt]:
        """Return the connections so far that failed."""
        with self._lock:
            return [attempt for attempt in self._attempts if not isinstance(attempt.outcome, Answered)]

    def told(self, failed: Sequence[Attempt]) -> str:
        """Say what failed, when, and to which Service; "" if nothing did."""
        if not failed:
            return ""
        lines = [f"{len(failed)} of {len(self._attempts)} connections failed:"]
        lines += [self._tell(attempt) for attempt in failed[:SHOWN]]
        if len(failed) > SHOWN:
            lines.append(f"... and {len(failed) - SHOWN} more")
        return "\n".join(lines)

    def complaints(self) -> str:
        """Say what failed, when, and to which Service; "" if nothing did."""
        return self.told(self.failures())

    def _tell(self, attempt: Attempt) -> str:
        moment, event = max(mark for mark in self._marks if mark[0] <= attempt.began)
        when = f"{attempt.began - moment:.3f} s after {event}"
        return f"{attempt.target}, {when}: {attempt.outcome} within {attempt.seconds:.3f} s"

    def _request(self) -> Outcome:
        target, port = self._turn()
        began = time.monotonic()
        outcome = _connect(target, port)
        attempt = Attempt(target, began, time.monotonic() - began, outcome)
        with self._lock:
            self._attempts.append(attempt)
        return outcome

    def _turn(self) -> tuple[Target, int]:
        """Wait for one's turn, so that all workers together keep to the rate; return the target and a new port."""
        with self._lock:
            target = next(self._targets)
            port = FIRST_PORT + self._begun
            self._begun += 1
            over = self._begun > LIMIT
            now = time.monotonic()
            turn = max(self._next_turn, now)
            self._next_turn = turn + 1 / RATE
        self._ended.wait(None if over else turn - now)
        return target, port


def _connect(target: Target, source_port: int) -> Outcome:
    """Make one connection, and hold against it what a retry of TCP or another Service's pod would hide."""
    try:
        with open_connection(target.origin, target.address, target.port, source_port=source_port) as connection:
            lost = _retransmissions(connection)
            answer = finish(connection)
    except ConnectionRefusedError:
        return Refused()
    except TimeoutError:
        return TimedOut()
    except (OSError, HTTPException, ValueError) as error:
        return Failed(str(error))
    if lost:
        return Failed(f"TCP had to send its first packet {lost + 1} times")
    if answer.pod.rpartition("/")[0] != target.service:
        return Failed(f"answered by {answer.pod}")
    return answer


def _retransmissions(connection: socket.socket) -> int:
    """Return how often a new connection had to repeat itself: a second after a packet that was dropped."""
    size = _TOTAL_RETRANSMISSIONS.size
    count: int = _TOTAL_RETRANSMISSIONS.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size))[0]
    return count
