"""One thread that serves HTTP on any number of ports, which may come and go."""

from __future__ import annotations

import errno
import logging
import os
import queue
import select
import socket
import threading
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from selectors import EVENT_READ, DefaultSelector
from typing import TypeAlias

from kproxy.serve.connection import Connection
from kproxy.serve.http import Handler

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
"""Beyond this many, a new client takes the place of the one whose patience would end first."""

SWEEP_SECONDS = 1.0
"""How often connections are looked through for those that take too long."""

_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

Action: TypeAlias = Callable[[], None]


class HttpServer:
    """Listening sockets, their clients, and the thread that serves them.

    Only `start`, `stop` and `call` may be used from other threads. `clock` gives seconds that never go back,
    `wall` seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self._selector = DefaultSelector()
        self._calls: queue.SimpleQueue[Action] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, EVENT_READ, self._run_calls)
        self._timers: list[tuple[float, int, Action]] = []
        self._order = count()
        self._clients: dict[Connection, socket.socket] = {}
        self._listeners: set[socket.socket] = set()
        self._sweeping = False
        self._stopping = False
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Close everything and return once that is done."""
        if self._thread.ident is None:
            self._close()
            return
        self.call(self._stop)
        self._thread.join()

    def call(self, action: Action) -> None:
        """Have something done in the server's thread, after what was asked for before. Returns at once.

        A server that has stopped does nothing any more.
        """
        with self._closing:
            if not self._closed:
                self._calls.put(action)
                os.eventfd_write(self._wake, 1)

    def now(self) -> float:
        """Return the time of the server's clock."""
        return self._clock()

    def call_later(self, seconds: float, action: Action) -> None:
        """Have something done in the server's thread after so many seconds."""
        heappush(self._timers, (self._clock() + seconds, next(self._order), action))

    def add(self, listener: socket.socket, handler: Handler) -> None:
        """Serve what comes in on a listening socket, which belongs to the server from now on."""
        self._listeners.add(listener)
        self._selector.register(listener, EVENT_READ, partial(self._accept, listener, handler))

    def remove(self, listener: socket.socket) -> None:
        """Close a listening socket and the connections of its clients."""
        for connection in [client for client, owner in self._clients.items() if owner is listener]:
            self._drop(connection)
        self._listeners.discard(listener)
        self._selector.unregister(listener)
        listener.close()

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._timeout()):
                _guard(key.data)
            now = self._clock()
            while self._timers and self._timers[0][0] <= now:
                _guard(heappop(self._timers)[2])
        self._close()

    def _timeout(self) -> float | None:
        return max(0.0, self._timers[0][0] - self._clock()) if self._timers else None

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        while not self._calls.empty():
            _guard(self._calls.get())

    def _stop(self) -> None:
        self._stopping = True

    def _close(self) -> None:
        for connection in list(self._clients):
            self._drop(connection)
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        with self._closing:
            self._closed = True
            os.close(self._wake)

    def _accept(self, listener: socket.socket, handler: Handler) -> None:
        if listener not in self._listeners:
            return  # closed by what came before it in the same round
        try:
            client, _ = listener.accept()
        except OSError as error:
            if error.errno in _FULL:
                self._make_room()
            return
        client.setblocking(False)
        if len(self._clients) >= MAX_CONNECTIONS:
            self._drop_one()
        if not self._sweeping:
            self._sweeping = True
            self.call_later(SWEEP_SECONDS, self._sweep)
        connection = Connection(client, handler, self._wall, self._clock())
        self._clients[connection] = listener
        self._selector.register(client, connection.events, partial(self._proceed, connection))

    def _make_room(self) -> None:
        if self._clients:
            self._drop_one()
        else:
            log.warning("no more files can be opened: health checks and metrics may go without an answer")
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.poll(1000 * SWEEP_SECONDS)

    def _drop_one(self) -> None:
        self._drop(min(self._clients, key=lambda connection: connection.deadline))

    def _drop(self, connection: Connection) -> None:
        del self._clients[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _proceed(self, connection: Connection) -> None:
        if connection not in self._clients:
            return
        before = connection.events
        connection.proceed(self._clock())
        if not connection.events:
            self._drop(connection)
        elif connection.events != before:
            self._selector.modify(connection.socket, connection.events, partial(self._proceed, connection))

    def _sweep(self) -> None:
        now = self._clock()
        for connection in [each for each in self._clients if each.deadline <= now]:
            self._drop(connection)
        self._sweeping = bool(self._clients)
        if self._sweeping:
            self.call_later(SWEEP_SECONDS, self._sweep)


def _guard(action: Action) -> None:
    try:
        action()
    except Exception as error:  # one client or port must not end the service of all others
        log.error("serving failed: unexpected %r", error)
        log.debug("where it failed", exc_info=error)
