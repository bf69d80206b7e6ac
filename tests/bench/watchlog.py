"""What an API server wrote to its watches, and when."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

from msgspec import Struct

_EVENT = re.compile(rb'[0-9a-f]+\r\n(\{"type":"|.{4}\n[\5\7\x08])(ADDED|MODIFIED|DELETED)', re.DOTALL)
"""A chunk (RFC 9112, 7.1) that holds an event which tells news: bookmarks come at their own times.

As JSON, or as a frame of protobuf behind its length in 4 bytes, whose first field is the type.
"""


class Written(Struct, frozen=True):
    """Events of all watches: their number and bytes, how many were protobuf, when the first and the last were written.

    The moments are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share; 0 if there was none.
    """

    events: int = 0
    bytes: int = 0
    protobuf: int = 0
    first: int = 0
    last: int = 0


class WatchLog:
    """Counts what is written, by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found = Written()

    def note(self, data: bytes) -> None:
        """Take in what is about to be written to a connection."""
        now = time.monotonic_ns()
        event = _EVENT.match(data)
        if event is None:
            return
        protobuf = not event[1].startswith(b"{")
        with self._lock:
            found = self._found
            size = found.bytes + len(data)
            self._found = Written(found.events + 1, size, found.protobuf + protobuf, found.first or now, now)

    def take(self) -> Written:
        """Return what was written since the last call."""
        with self._lock:
            found, self._found = self._found, Written()
        return found


class LoggedSocket(socket.socket):
    """A connection that tells a log what it is about to send."""

    def __init__(self, of: socket.socket, log: WatchLog) -> None:
        """Take the place of a connection, which is of no use any more."""
        super().__init__(fileno=of.detach())
        self._log = log

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send everything."""
        self._log.note(data)
        super().sendall(data, flags)
