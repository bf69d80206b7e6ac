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
from enum import Enum, auto
from functools import partial
from heapq import heappop, heappush
from http import HTTPStatus
from itertools import count
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, RequestError, encode, plain, take_request

BACKLOG = 128
ANY = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - told apart here, not bound


class ListenAddress(Struct, frozen=True):
    """Where to listen.

    An unspecified host means every address of both families, as it does in Go's `net.Listen("tcp", ...)`; with
    `one_family` it means those of its own.
    """

    host: str
    port: int
    one_family: bool = False

    def __str__(self) -> str:
        return socket_text(self.host, self.port)


def parse_address(text: str) -> ListenAddress:
    """Return the address that `IP:port` or `[IP]:port` says."""
    return ListenAddress(*split_socket_text(text))


def listen(address: ListenAddress) -> socket.socket:
    """Return a listening socket that does not block. Raises `OSError`, which says why, if there cannot be one."""
    family, host = _family(address)
    found = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            both = host == "::" and not address.one_family
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        found.bind((host, address.port))
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


def _family(address: ListenAddress) -> tuple[socket.AddressFamily, str]:
    host = address.host
    if host in ANY and not address.one_family:
        return (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")  # noqa: S104
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), host


log = logging.getLogger(__name__)
_CHUNK = 16 * 1024


class ConnectionState(Enum):
    """What a connection waits for."""

    IDLE = auto()
    """A request."""
    RECEIVING = auto()
    """The rest of a request."""
    SENDING = auto()
    """The client, to take the answer."""
    QUEUED = auto()
    """Its turn: a request came together with the one before."""
    DRAINING = auto()
    """The client to hang up: closing first might reset the connection and take the last answer from it."""
    OVER = auto()
    """Nothing: the socket can be closed."""


PATIENCE = {
    ConnectionState.IDLE: 60.0,  # scrapers come back within a minute
    ConnectionState.RECEIVING: 10.0,
    ConnectionState.SENDING: 10.0,
    ConnectionState.QUEUED: 10.0,
    ConnectionState.DRAINING: 2.0,
    ConnectionState.OVER: 0.0,
}
"""How many seconds a connection may be in each state."""


class Connection:
    """A client's socket, which does not block, and how far the conversation is.

    `deadline`, by the clock whose `now` is passed in, is when patience with the client ends.
    """

    def __init__(self, client: socket.socket, handler: Handler, wall: Callable[[], float], now: float) -> None:
        self.socket = client
        self._handler = handler
        self._wall = wall
        self._incoming = bytearray()
        self._outgoing = b""
        self._last = False
        self._become(ConnectionState.IDLE, now)

    @property
    def events(self) -> int:
        """What to wait for, as `selectors` names it; 0 once the connection is over and its socket to be closed."""
        if self._state is ConnectionState.OVER:
            return 0
        return EVENT_WRITE if self._state in {ConnectionState.SENDING, ConnectionState.QUEUED} else EVENT_READ

    def proceed(self, now: float) -> None:
        """Go on as far as possible without waiting."""
        try:
            if self._state is ConnectionState.SENDING:
                self._send(now)
            elif self._state is ConnectionState.QUEUED:
                self._next(now)
            else:
                self._receive(now)
        except BlockingIOError:
            pass
        except OSError:  # the client is gone: nobody to tell
            self._become(ConnectionState.OVER, now)

    def _become(self, state: ConnectionState, now: float) -> None:
        self._state = state
        self.deadline = now + PATIENCE[state]

    def _receive(self, now: float) -> None:
        received = self.socket.recv(_CHUNK)
        if not received:
            self._become(ConnectionState.OVER, now)
        elif self._state is not ConnectionState.DRAINING:
            self._incoming += received
            self._next(now)

    def _next(self, now: float) -> None:
        try:
            request = take_request(self._incoming)
        except RequestError as error:
            self._answer(plain(error.status, f"{error}\n"), now, head_only=False, last=True)
            return
        if request is not None:
            response = self._handle(request)
            self._answer(response, now, head_only=request.method == "HEAD", last=not request.persistent)
        elif self._state is not ConnectionState.RECEIVING:
            self._become(ConnectionState.RECEIVING, now)

    def _handle(self, request: HttpRequest) -> HttpResponse:
        try:
            return self._handler(request)
        except Exception as error:  # a bug in one page must not end the others
            log.error("%s %s failed: unexpected %r", request.method, request.path, error)
            log.debug("where it failed", exc_info=error)
            return plain(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error\n")

    def _answer(self, response: HttpResponse, now: float, *, head_only: bool, last: bool) -> None:
        self._outgoing = encode(response, self._wall(), head_only=head_only, close=last)
        self._last = last
        self._become(ConnectionState.SENDING, now)
        self._send(now)

    def _send(self, now: float) -> None:
        self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        if self._outgoing:
            return
        if self._last:
            self.socket.shutdown(socket.SHUT_WR)
            self._become(ConnectionState.DRAINING, now)
        else:
            self._become(ConnectionState.QUEUED if self._incoming else ConnectionState.IDLE, now)


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

    def stop(self, timeout: float) -> None:
        """Stop the thread and close all sockets; wait at most `timeout` seconds for a handler that is running."""
        if self._thread.ident is None:
            self._close()
            return
        self.call(self._stop)
        self._thread.join(timeout)

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
