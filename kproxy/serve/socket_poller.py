"""Wait for events on sockets with epoll, and for failures of sockets for which no event is requested.

The selectors of the standard library cannot do the latter: without it, a connection that is reset while nothing can be
passed on would never end.
"""

from __future__ import annotations

import select
import socket
from typing import Generic, TypeVar

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
FAILED = select.EPOLLERR
"""The peer has reset the connection or has disappeared. This event need not be requested."""
T = TypeVar("T")


class SocketPoller(Generic[T]):
    """Sockets, or other file descriptors, each with the requested events and an item that identifies it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[T, int]] = {}

    def register(self, one: socket.socket | int, events: int, item: T) -> None:
        """Add a socket. `events` is a combination of `READ` and `WRITE`, or 0. Raises `OSError`."""
        number = one if isinstance(one, int) else one.fileno()
        self._epoll.register(number, _mask(events))
        self._watched[number] = item, events

    def modify(self, one: socket.socket, events: int, item: T) -> None:
        """Replace the requested events and the item of a socket. Raises `OSError`."""
        self._epoll.modify(one.fileno(), _mask(events))
        self._watched[one.fileno()] = item, events

    def unregister(self, one: socket.socket) -> None:
        """Remove a socket, before it is closed."""
        del self._watched[one.fileno()]
        self._epoll.unregister(one.fileno())

    def wait(self, timeout: float | None) -> list[tuple[T, int]]:
        """Return the items of the sockets with events, and the events. `timeout` is in seconds; None means forever."""
        found = []
        for number, mask in self._epoll.poll(timeout):
            if (watched := self._watched.get(number)) is None:
                continue
            item, requested = watched
            # EPOLLHUP and EPOLLERR end the wait for any event: receiving or sending shows what has happened.
            events = (READ if mask & ~WRITE else 0) | (WRITE if mask & ~READ else 0)
            if events := (events & requested) | (mask & FAILED):
                found.append((item, events))
        return found

    def close(self) -> None:
        """Close the epoll instance."""
        self._epoll.close()


def _mask(events: int) -> int:
    # Without requested events, EPOLLHUP would be reported again and again if both directions have been shut down.
    return events or select.EPOLLET
