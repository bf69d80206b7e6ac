"""A new connection every 10 ms, and the time until connections succeed again."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from itertools import cycle
from typing import Self

from tests.lab.topology import Host

INTERVAL = 0.01
TIMEOUT = 0.9
"""Seconds after which an unanswered connection counts as failed. The first retransmission comes after 1 s."""

_ports = cycle(range(10_000, 60_000))
"""Each connection of this process has a source port of its own, so that none is assigned to an earlier connection."""

_RESET = struct.pack("ii", 1, 0)  # struct linger: close with a reset


class Probes:
    """Connects to one address all the time, from a thread, in a `with` block."""

    def __init__(self, origin: Host, address: str, port: int = 80) -> None:
        self._namespace, self._target = origin.namespace, (address, port)
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)
        self._lock = threading.Lock()
        self._ended: deque[tuple[float, bool]] = deque(maxlen=100_000)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def outage(self, since: float) -> float:
        """Return the seconds from `since` (`time.monotonic`) to the start of the last failed connection, or 0.0."""
        with self._lock:
            failed = [began for began, succeeded in self._ended if began >= since and not succeeded]
        return max(failed) - since if failed else 0.0

    def succeeded_after(self, moment: float) -> int:
        """Return how many connections that began after `moment` succeeded after the last failure."""
        with self._lock:
            ended = sorted(each for each in self._ended if each[0] > moment)
        count = 0
        for _, succeeded in reversed(ended):
            if not succeeded:
                return count
            count += 1
        return count

    def _run(self) -> None:
        waiting: dict[int, tuple[float, socket.socket]] = {}
        polling = select.poll()
        turn = time.monotonic()
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= turn:
                turn = max(turn + INTERVAL, now)
                self._begin(now, waiting, polling)
            for number, _ in polling.poll(max(0.0, turn - time.monotonic()) * 1000):
                began, connection = waiting.pop(number)
                polling.unregister(number)
                self._end(began, connection, succeeded=connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0)
            for number in [number for number, (began, _) in waiting.items() if began < now - TIMEOUT]:
                began, connection = waiting.pop(number)
                polling.unregister(number)
                self._end(began, connection, succeeded=False)
        for _, connection in waiting.values():
            connection.close()

    def _begin(self, now: float, waiting: dict[int, tuple[float, socket.socket]], polling: select.poll) -> None:
        connection = self._namespace.socket(self._family, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            connection.bind(("", next(_ports)))
            connection.connect(self._target)
        except BlockingIOError:
            pass
        except OSError:
            self._end(now, connection, succeeded=False)
            return
        waiting[connection.fileno()] = now, connection
        polling.register(connection, select.POLLOUT)

    def _end(self, began: float, connection: socket.socket, *, succeeded: bool) -> None:
        connection.close()
        with self._lock:
            self._ended.append((began, succeeded))
