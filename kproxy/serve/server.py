"""An HTTP server that serves any number of ports in one thread. Ports can be opened and closed while it runs."""

from __future__ import annotations

import errno
import logging
import os
import queue
import resource
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from heapq import heappop, heappush
from http import HTTPStatus
from itertools import count
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.log_throttle import LogThrottle
from kproxy.model.restarts import Restarts
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, RequestError, encode, plain, pop_request

BACKLOG = 128
UNSPECIFIED = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared with, not bound
MAX_CONNECTIONS = 512
"""The maximum number of connections. At this limit, a new connection replaces the one with the earliest deadline.

The limit is lower if connections would otherwise use more than half of the file descriptors of the process: clients
must not keep it from reading files and starting programs.
"""
SWEEP_SECONDS = 1.0
"""Seconds between two checks for connections whose deadline has passed."""
_CHUNK = 16 * 1024
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
Action: TypeAlias = Callable[[], None]
log = logging.getLogger(__name__)


class ListenAddress(Struct, frozen=True):
    """An address and a port to listen on.

    As in Go's `net.Listen("tcp", ...)`, an unspecified `host` ("", `0.0.0.0` or `::`) means all addresses of both IP
    families. If `one_family` is true, it means only the addresses of the IP family of `host`.
    """

    host: str
    port: int
    one_family: bool = False

    def __str__(self) -> str:
        return socket_text(self.host, self.port)


def parse_address(text: str) -> ListenAddress:
    """Parse `IP:port` or `[IP]:port`. Raises `ValueError` if the port is not a number."""
    return ListenAddress(*split_socket_text(text))


def listen(address: ListenAddress) -> socket.socket:
    """Open a non-blocking listening socket. Raises `OSError`."""
    family, host = _family(address)
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            both = host == "::" and not address.one_family
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind((host, address.port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _family(address: ListenAddress) -> tuple[socket.AddressFamily, str]:
    host = address.host
    if host in UNSPECIFIED and not address.one_family:
        if socket.has_dualstack_ipv6():
            return socket.AF_INET6, "::"
        return socket.AF_INET, "0.0.0.0"  # noqa: S104 - the configuration asks for every address
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), host


class ConnectionState(Enum):
    """The states of a connection."""

    IDLE = auto()
    """The server waits for a request."""
    RECEIVING = auto()
    """The server waits for the rest of a request."""
    SENDING = auto()
    """The server waits until the client has received more of the response."""
    QUEUED = auto()
    """At least part of the next request has already arrived (pipelining). The server processes it next."""
    DRAINING = auto()
    """The server has sent its last response and waits until the client closes the connection.

    If the server closed the connection first, a TCP reset could discard the response (RFC 9112, section 9.6).
    """
    CLOSED = auto()
    """The socket can be closed."""


TIMEOUTS = {
    ConnectionState.IDLE: 60.0,  # scrape intervals are rarely longer
    ConnectionState.RECEIVING: 10.0,
    ConnectionState.SENDING: 10.0,
    ConnectionState.QUEUED: 10.0,
    ConnectionState.DRAINING: 2.0,
    ConnectionState.CLOSED: 0.0,
}
"""The maximum number of seconds that a connection stays in each state."""


class Connection:
    """The non-blocking socket of a client, and the state of the connection.

    After `deadline`, the client has taken too long, and the server closes the connection. `deadline` and `now` are in
    seconds of a monotonic clock. `wall` returns seconds since the epoch.
    """

    def __init__(self, client: socket.socket, handler: Handler, wall: Callable[[], float], now: float) -> None:
        self.socket = client
        self._handler = handler
        self._wall = wall
        self._incoming = bytearray()
        self._outgoing = b""
        self._last = False
        self._set_state(ConnectionState.IDLE, now)

    @property
    def events(self) -> int:
        """The events to wait for, as an event mask of `selectors`. 0 means that the socket should be closed."""
        if self._state is ConnectionState.CLOSED:
            return 0
        return EVENT_WRITE if self._state in {ConnectionState.SENDING, ConnectionState.QUEUED} else EVENT_READ

    def proceed(self, now: float) -> None:
        """Receive or send without blocking, and process at most one request.

        This can change `events` and `deadline`.
        """
        try:
            if self._state is ConnectionState.SENDING:
                self._send(now)
            elif self._state is ConnectionState.QUEUED:
                self._next(now)
            else:
                self._receive(now)
        except BlockingIOError:
            pass
        except OSError:  # the client is gone
            self._set_state(ConnectionState.CLOSED, now)

    def _set_state(self, state: ConnectionState, now: float) -> None:
        self._state = state
        self.deadline = now + TIMEOUTS[state]

    def _receive(self, now: float) -> None:
        received = self.socket.recv(_CHUNK)
        if not received:
            self._set_state(ConnectionState.CLOSED, now)
        elif self._state is not ConnectionState.DRAINING:
            self._incoming += received
            self._next(now)

    def _next(self, now: float) -> None:
        try:
            request = pop_request(self._incoming)
        except RequestError as error:
            self._respond(plain(error.status, f"{error}\n"), now, head_only=False, last=True)
            return
        if request is not None:
            response = self._handle(request)
            self._respond(response, now, head_only=request.method == "HEAD", last=not request.persistent)
        elif self._state is not ConnectionState.RECEIVING:
            self._set_state(ConnectionState.RECEIVING, now)

    def _handle(self, request: HttpRequest) -> HttpResponse:
        try:
            return self._handler(request)
        except Exception as error:  # a bug in one page must not stop the server
            log.error("%s %s failed: unexpected %r", request.method, request.path, error)
            log.debug("%s %s failed", request.method, request.path, exc_info=error)
            return plain(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error\n")

    def _respond(self, response: HttpResponse, now: float, *, head_only: bool, last: bool) -> None:
        self._outgoing = encode(response, self._wall(), head_only=head_only, close=last)
        self._last = last
        self._set_state(ConnectionState.SENDING, now)
        self._send(now)

    def _send(self, now: float) -> None:
        self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        if self._outgoing:
            return
        if self._last:
            self.socket.shutdown(socket.SHUT_WR)
            self._set_state(ConnectionState.DRAINING, now)
        else:
            self._set_state(ConnectionState.QUEUED if self._incoming else ConnectionState.IDLE, now)


class HttpServer:
    """Listening sockets, their connections, and the thread that serves them.

    After the server has started, other threads may call only `stop` and `call`. `clock` returns seconds of a monotonic
    clock; `wall` returns seconds since the epoch. If an action or handler raises an exception, the server logs it and
    continues.
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
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_descriptors = limit if limit != resource.RLIM_INFINITY else 2 * MAX_CONNECTIONS
        self._overload = LogThrottle()
        self._reserve = -1
        self._open_reserve()
        self._sweeping = False
        self._stopping = False
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread and close all sockets. If a handler is running, wait at most `timeout` seconds for it."""
        if self._thread.ident is None:
            self._close()
            return
        self.call(self._stop)
        self._thread.join(timeout)

    def call(self, action: Action) -> None:
        """Schedule an action to run in the server's thread, and return immediately.

        Actions run in the order of the calls. After the server has stopped, actions are discarded.
        """
        with self._closing:
            if not self._closed:
                self._calls.put(action)
                os.eventfd_write(self._wake, 1)

    def now(self) -> float:
        """Return the time of the server's clock, in seconds."""
        return self._clock()

    def call_later(self, seconds: float, action: Action) -> None:
        """Schedule an action to run in the server's thread after `seconds`."""
        heappush(self._timers, (self._clock() + seconds, next(self._order), action))

    def add(self, listener: socket.socket, handler: Handler) -> None:
        """Accept connections on a listening socket and serve them. The server takes ownership of the socket."""
        self.add_chosen(listener, lambda _: handler)

    def add_chosen(self, listener: socket.socket, choose: Callable[[socket.socket], Handler]) -> None:
        """Like `add`, but call `choose` for each new connection to get its handler."""
        self._listeners.add(listener)
        self._selector.register(listener, EVENT_READ, partial(self._accept, listener, choose))

    def remove(self, listener: socket.socket) -> None:
        """Close a listening socket and its connections."""
        for connection in [client for client, owner in self._clients.items() if owner is listener]:
            self._drop(connection)
        self._listeners.discard(listener)
        self._selector.unregister(listener)
        listener.close()

    def _run(self) -> None:
        restarts = Restarts("http")
        while not self._stopping:
            try:
                self._serve()
            except Exception as error:  # no error may stop the server
                delay, text = restarts.failed(error, self._clock())
                with suppress(MemoryError):
                    log.log(logging.ERROR if text else logging.DEBUG, "%s", text or error)
                    log.debug("http", exc_info=error)
                _wait_readable(self._wake, delay)
        self._close()

    def _serve(self) -> None:
        """Serve all sockets that are ready, or wait for one, and run the actions that are due."""
        for key, _ in self._selector.select(self._timeout()):
            _guard(key.data)
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            _guard(heappop(self._timers)[2])

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
        self._close_reserve()
        self._selector.close()
        with self._closing:
            self._closed = True
            os.close(self._wake)

    def _accept(self, listener: socket.socket, choose: Callable[[socket.socket], Handler]) -> None:
        if listener not in self._listeners:
            return  # an earlier event of this round closed the listener
        try:
            client, _ = listener.accept()
        except OSError as error:
            if error.errno in _OUT_OF_RESOURCES:
                self._free_resources()
            return
        client.setblocking(False)
        if len(self._clients) >= min(MAX_CONNECTIONS, self._max_descriptors // 2):
            self._drop_earliest()
        if not self._sweeping:
            self._sweeping = True
            self.call_later(SWEEP_SECONDS, self._sweep)
        connection = Connection(client, choose(client), self._wall, self._clock())
        self._clients[connection] = listener
        self._selector.register(client, connection.events, partial(self._proceed, connection))

    def _open_reserve(self) -> None:
        """Hold a file descriptor that can be given up to answer a health check when descriptors run out."""
        if self._reserve < 0:
            with suppress(OSError):
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close_reserve(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def _free_resources(self) -> None:
        if self._clients:
            self._drop_earliest()
        elif self._reserve >= 0:
            self._close_reserve()
        else:
            if self._overload.is_due(self._clock()):
                log.warning("too many open files: health checks and metrics may get no response")
            _wait_readable(self._wake, SWEEP_SECONDS)

    def _drop_earliest(self) -> None:
        self._drop(min(self._clients, key=lambda connection: connection.deadline))

    def _drop(self, connection: Connection) -> None:
        del self._clients[connection]
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._open_reserve()

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


def _wait_readable(descriptor: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(1000 * seconds)


def _guard(action: Action) -> None:
    try:
        action()
    except Exception as error:  # one client or port must not affect the others
        log.error("HTTP server: unexpected %r", error)
        log.debug("HTTP server: unexpected error", exc_info=error)
