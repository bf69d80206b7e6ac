"""Counts and timestamps of the watch events that an API server sends."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

from msgspec import Struct

_EVENT = re.compile(rb'[0-9a-f]+\r\n(\{"type":"|.{4}\n[\5\7\x08])(ADDED|MODIFIED|DELETED)', re.DOTALL)
"""An HTTP chunk (RFC 9112, 7.1) that contains a watch event. Bookmarks do not match: the server sends them on a timer.

The event is either JSON or a protobuf frame: 4 bytes of length, then a message whose first field is the type.
"""


class WatchTraffic(Struct, frozen=True):
    """Events sent to all watches: number, bytes, how many were protobuf, and the times of the first and last one.

    Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share; 0 if there was no event.
    """

    events: int = 0
    bytes: int = 0
    protobuf: int = 0
    first: int = 0
    last: int = 0


class WatchLog:
    """A thread-safe counter of sent watch events."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traffic = WatchTraffic()

    def record(self, data: bytes) -> None:
        """Count data that is about to be written to a connection, if it is a watch event."""
        now = time.monotonic_ns()
        event = _EVENT.match(data)
        if event is None:
            return
        protobuf = not event[1].startswith(b"{")
        with self._lock:
            old = self._traffic
            size = old.bytes + len(data)
            self._traffic = WatchTraffic(old.events + 1, size, old.protobuf + protobuf, old.first or now, now)

    def drain(self) -> WatchTraffic:
        """Return the traffic since the last call, and start again from zero."""
        with self._lock:
            traffic, self._traffic = self._traffic, WatchTraffic()
        return traffic


class LoggedSocket(socket.socket):
    """A connection that records in a log what it sends."""

    def __init__(self, connection: socket.socket, log: WatchLog) -> None:
        """Take over the file descriptor of `connection`, which must not be used afterwards."""
        super().__init__(fileno=connection.detach())
        self._log = log

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Record the data, then send all of it."""
        self._log.record(data)
        super().sendall(data, flags)
