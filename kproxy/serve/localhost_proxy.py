"""A TCP proxy for NodePorts on 127.0.0.1 and ::1 in nftables mode (KEP-6032).

One thread serves all listeners and connections. The daemon imports this module only if `nodePortAddresses` names a
loopback range.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import queue
import random
import resource
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import TypeAlias

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.localhost_node_ports import DRAIN_SECONDS, LISTEN_ADDRESSES, EndpointChoice, LocalhostListener
from kproxy.model.log_throttle import LogThrottle
from kproxy.model.restarts import Restarts
from kproxy.model.types import Family
from kproxy.serve.proxied_connection import BUFFER_SIZE, ProxiedConnection, is_connected_to_itself, open_connection
from kproxy.serve.socket_poller import FAILED, READ, SocketPoller

MAX_CONNECTIONS = 8192
"""Maximum number of proxied connections. Further clients wait in the backlog of their listener until others finish.

A connection takes two file descriptors. The maximum is lower if it would leave fewer than `RESERVED_DESCRIPTORS` for
the rest of the daemon. A connection takes about 4 KiB of the daemon's memory, even if its receivers do not read.
"""
RESERVED_DESCRIPTORS = 256
BACKLOG = 4096
"""Maximum number of clients that wait for one listener. `net.core.somaxconn` may lower it."""
DIAL_SECONDS = 5.0
"""How long to wait until an endpoint accepts a connection, as in kube-proxy."""
LINGER_SECONDS = 0.05
"""How long a listener completes handshakes that clients have begun before the daemon stopped."""
FIRST_RETRY, LONGEST_RETRY = 1.0, 10.0
"""Seconds between the first and the second attempt to open a listener. Each further interval is twice as long."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
"""Seconds for which no connection is accepted if the kernel has no file descriptors or memory left."""
_ACCEPTS_PER_EVENT = 64
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# A classic BPF program (linux/filter.h) that sees a packet from its TCP header on. It drops the packet if SYN is set
# and ACK is not.
_DROP_SYN = struct.pack(
    "=HBBIHBBIHBBIHBBIHBBI",
    *(0x30, 0, 0, 13),  # load the byte with the flags
    *(0x54, 0, 0, 0x12),  # keep SYN and ACK
    *(0x15, 0, 1, 0x02),  # if only SYN is set, continue, otherwise skip one instruction
    *(0x06, 0, 0, 0),  # drop the packet
    *(0x06, 0, 0, 0xFFFFFFFF),  # keep all of it
)
PROCESS_NAME = b"\0kproxy-localhost-proxy"
"""The abstract address (unix(7)) of the process that serves NodePorts on the loopback addresses of this node."""
Action: TypeAlias = Callable[[], None]
log = logging.getLogger(__name__)


class Listener:
    """One NodePort on the loopback address of an IP family, and its connections."""

    def __init__(self, family: Family, wanted: LocalhostListener) -> None:
        self.family = family
        self.port = wanted.port
        self.choice = EndpointChoice(wanted, random.choice)
        self.socket: socket.socket | None = None
        self.connections: set[ProxiedConnection] = set()
        self.watched = False
        self.removed = False
        self.retry = FIRST_RETRY
        self.reminder = LogThrottle()

    def __str__(self) -> str:
        return socket_text(LISTEN_ADDRESSES[self.family], self.port)


_Socket: TypeAlias = tuple[Listener, ProxiedConnection, socket.socket]
"""One of the two sockets of a connection."""


class LocalhostProxy:
    """The listeners, their connections, and the thread that serves them. `clock` returns seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._poller: SocketPoller[Action | _Socket] = SocketPoller()
        self._calls: queue.SimpleQueue[Action] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller.register(self._wake, READ, self._run_calls)
        self._timers: list[tuple[float, int, Action]] = []
        self._order = count()
        self._lock = threading.Lock()
        self._listeners: dict[tuple[Family, int], Listener] = {}  # guarded by the lock
        self._bound: set[Listener] = set()  # those that have a socket
        self._failures: Counter[Family] = Counter()
        self._connections = 0
        self._dialing: dict[ProxiedConnection, tuple[float, Listener]] = {}
        self._timing = False
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._limit = MAX_CONNECTIONS
        self._accepting = True
        self._name: socket.socket | None = None
        self._pause = FIRST_PAUSE
        self._overload = LogThrottle()
        self._stopping = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="localhost-proxy", daemon=True)

    # Methods for any thread

    def start(self) -> None:
        """Start the thread."""
        self._limit = connection_limit(0)
        self._is_only_process()
        self._thread.start()

    def set_listener(self, family: Family, wanted: LocalhostListener) -> None:
        """Open a listener, or change the endpoints and the affinity of an open one.

        When the method returns, clients can connect, unless the port cannot be opened: then the proxy logs the reason
        and keeps trying. A change does not affect connections that an endpoint has accepted.
        """
        with self._lock:
            if self._stopping:
                return
            listener = self._listeners.get((family, wanted.port))
            if listener is not None:
                self._call(partial(self._update, listener, wanted))
                return
            listener = self._listeners[family, wanted.port] = Listener(family, wanted)
            self._open(listener)
            self._call(partial(self._watch, listener))

    def remove_listener(self, family: Family, port: int) -> None:
        """Close a listener and its connections."""
        with self._lock:
            listener = self._listeners.pop((family, port), None)
            if listener is not None:
                self._call(partial(self._remove, listener))

    def listening(self, family: Family) -> int:
        """Return the number of open listeners of an IP family, including those that are about to be closed."""
        return sum(each.family is family for each in tuple(self._bound))

    def failures(self, family: Family) -> int:
        """Return how often a listener of an IP family could not be opened."""
        return self._failures[family]

    def drain(self) -> None:
        """Close all listeners. Existing connections continue for at most `DRAIN_SECONDS`, then the thread ends.

        No client is refused: each handshake that has begun is completed. Rules of the kernel make later clients wait
        for the next process, if the kernel supports that (see `kproxy.model.localhost_node_ports`).
        """
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._call(self._drain)

    def stop(self, timeout: float) -> None:
        """Call `drain`, and wait at most `timeout` seconds for the thread to end."""
        self.drain()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _call(self, action: Action) -> None:
        if not self._stopped:
            self._calls.put(action)
            os.eventfd_write(self._wake, 1)

    # The thread

    def _run(self) -> None:
        restarts = Restarts(self._thread.name)
        while not self._stopped:
            try:
                self._serve()
            except Exception as error:  # no error may stop the proxy
                delay, text = restarts.failed(error, self._clock())
                with suppress(MemoryError):
                    log.log(logging.ERROR if text else logging.DEBUG, "%s", text or error)
                    log.debug("%s", self._thread.name, exc_info=error)
                poll = select.poll()
                poll.register(self._wake, select.POLLIN)
                poll.poll(1000 * delay)

    def _serve(self) -> None:
        timeout = max(0.0, self._timers[0][0] - self._clock()) if self._timers else None
        for item, events in self._poller.wait(timeout):
            self._dispatch(item, events)
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            self._guard(heappop(self._timers)[2])

    def _dispatch(self, item: Action | _Socket, events: int) -> None:
        if not isinstance(item, tuple):
            self._guard(item)
            return
        listener, connection, of = item
        try:
            self._proceed(listener, connection, of, events)
        except Exception as error:  # one connection must not affect the others
            log.error("NodePort %s: unexpected %r", listener, error)
            log.debug("NodePort %s: unexpected error", listener, exc_info=error)
            self._close(listener, connection)

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        while not self._calls.empty():
            self._guard(self._calls.get())

    def _guard(self, action: Action) -> None:
        try:
            action()
        except Exception as error:  # one listener must not affect the others
            log.error("%s: unexpected %r", self._thread.name, error)
            log.debug("%s: unexpected error", self._thread.name, exc_info=error)

    def _call_later(self, seconds: float, action: Action) -> None:
        heappush(self._timers, (self._clock() + seconds, next(self._order), action))

    # Listeners

    def _open(self, listener: Listener) -> None:
        try:
            try:
                listener.socket = listen(listener.family, listener.port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or self._is_only_process():
                    raise
                listener.socket = listen(listener.family, listener.port, share=True)
            self._bound.add(listener)
        except OSError as error:
            self._failures[listener.family] += 1
            if listener.reminder.is_due(self._clock()):
                log.error("NodePort: cannot listen on %s: %s, retrying", listener, error.strerror or error)

    def _is_only_process(self) -> bool:
        """Return False if another kproxy process serves NodePorts in this network namespace.

        Otherwise, a socket with SO_REUSEPORT belongs to another program. Sharing the port with it would give each of
        them a part of the connections.
        """
        if self._name is None:
            name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                name.bind(PROCESS_NAME)
            except OSError:
                name.close()
                return False
            self._name = name
        return True

    def _watch(self, listener: Listener) -> None:
        """Accept connections on a listener. If it is not open, try again later."""
        if listener.removed or self._stopping:
            return
        self._limit = connection_limit(len(self._listeners))
        if listener.socket is None:
            self._call_later(listener.retry, partial(self._retry, listener))
            listener.retry = min(2 * listener.retry, LONGEST_RETRY)
        elif self._accepting and not listener.watched:
            listener.watched = True
            self._poller.register(listener.socket, READ, partial(self._accept, listener))

    def _retry(self, listener: Listener) -> None:
        if not listener.removed and not self._stopping:
            self._open(listener)
            if listener.socket is not None:
                log.info("NodePort: listening on %s", listener)
            self._watch(listener)

    def _update(self, listener: Listener, wanted: LocalhostListener) -> None:
        """Use other endpoints. Do not wait for an answer of one that has left."""
        listener.choice.update(wanted)
        for connection, (_, of) in list(self._dialing.items()):
            if of is listener and connection.tried[-1] not in wanted.endpoints:
                self._redial(listener, connection, "no longer an endpoint")

    def _remove(self, listener: Listener) -> None:
        listener.removed = True
        self._close_listener(listener)
        self._limit = connection_limit(len(self._listeners))
        for connection in list(listener.connections):
            self._close(listener, connection)

    def _close_listener(self, listener: Listener) -> None:
        self._unwatch(listener)
        if listener.socket is not None:
            listener.socket.close()
            listener.socket = None
            self._bound.discard(listener)

    def _unwatch(self, listener: Listener) -> None:
        if listener.watched and listener.socket is not None:
            listener.watched = False
            self._poller.unregister(listener.socket)

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self._all_listeners():
                self._unwatch(listener)

    def _resume_accepting(self) -> None:
        if not self._accepting and not self._stopped and self._connections < self._limit:
            self._accepting = True
            for listener in self._all_listeners():
                if listener.socket is not None and not listener.watched:
                    listener.watched = True
                    self._poller.register(listener.socket, READ, partial(self._accept, listener))

    def _all_listeners(self) -> list[Listener]:
        with self._lock:
            return list(self._listeners.values())

    # Connections

    def _accept(self, listener: Listener, maximum: int = _ACCEPTS_PER_EVENT) -> None:
        for _ in range(maximum):
            if listener.socket is None or not self._accepting:
                return
            try:
                client, _ = listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause_accepting(error)
                continue  # otherwise, the client has closed the connection already
            self._pause = FIRST_PAUSE
            try:
                connection = ProxiedConnection(client)
            except OSError:
                client.close()
                continue
            listener.connections.add(connection)
            self._connections += 1
            self._dial(listener, connection)
            if self._connections >= self._limit:
                self._report_overload(f"{self._connections} connections, the maximum")
                self._stop_accepting()

    def _pause_accepting(self, error: OSError) -> None:
        self._report_overload(error.strerror or str(error))
        self._stop_accepting()
        self._call_later(self._pause, self._resume_accepting)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _report_overload(self, reason: str) -> None:
        if self._overload.is_due(self._clock()):
            log.warning("NodePorts on loopback addresses: %s: new connections wait", reason)

    def _dial(self, listener: Listener, connection: ProxiedConnection) -> None:
        """Connect to the next endpoint. If none is left, close the connection to the client."""
        try:
            self._dial_next(listener, connection)
        except Exception as error:  # as in `_dispatch`
            log.error("NodePort %s: cannot connect to an endpoint: unexpected %r", listener, error)
            log.debug("NodePort %s: unexpected error", listener, exc_info=error)
            self._close(listener, connection)

    def _dial_next(self, listener: Listener, connection: ProxiedConnection) -> None:
        while connection in listener.connections:
            endpoint = listener.choice.choose(connection.tried, self._clock())
            if not endpoint:
                self._close(listener, connection)
                return
            try:
                connection.server = open_connection(*split_socket_text(endpoint))
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause_accepting(error)
                    self._call_later(LONGEST_PAUSE, partial(self._dial, listener, connection))
                    return
                self._report_dial(listener, endpoint, error.strerror or str(error))
                connection.tried.append(endpoint)
                continue
            connection.tried.append(endpoint)
            self._register(listener, connection)
            self._dialing[connection] = (self._clock() + DIAL_SECONDS, listener)
            if not self._timing:
                self._timing = True
                self._call_later(DIAL_SECONDS, self._time_out)
            return

    def _time_out(self) -> None:
        """Give up on the attempts that take too long. The oldest one is the first."""
        while self._dialing:
            connection, (deadline, listener) = next(iter(self._dialing.items()))
            if (remaining := deadline - self._clock()) > 0:
                self._call_later(remaining, self._time_out)
                return
            self._redial(listener, connection, os.strerror(errno.ETIMEDOUT))
        self._timing = False

    def _redial(self, listener: Listener, connection: ProxiedConnection, reason: str) -> None:
        assert connection.server is not None
        self._dialing.pop(connection, None)
        self._report_dial(listener, connection.tried[-1], reason)
        self._poller.unregister(connection.server)
        connection.server.close()
        connection.server = connection.server_events = None
        self._dial(listener, connection)

    def _report_dial(self, listener: Listener, endpoint: str, reason: str) -> None:
        log.debug("NodePort %s: cannot connect to endpoint %s: %s", listener, endpoint, reason)

    def _proceed(self, listener: Listener, connection: ProxiedConnection, of: socket.socket, events: int) -> None:
        """Handle events on one of the two sockets of a connection."""
        if connection not in listener.connections or of not in {connection.client, connection.server}:
            return  # an earlier event of this round closed it
        if connection.to_server is None or connection.server is None:
            if of is connection.client:
                if events & FAILED:
                    self._close(listener, connection)
                return
            assert connection.server is not None
            failure = connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not failure and is_connected_to_itself(connection.server):
                failure = errno.ECONNREFUSED
            if failure:
                self._redial(listener, connection, os.strerror(failure))
                return
            self._dialing.pop(connection, None)
            connection.connected()
        else:
            connection.proceed(on_client=of is connection.client, events=events, buffer=self._buffer)
        if connection.is_done:
            self._close(listener, connection)
        else:
            self._register(listener, connection)

    def _register(self, listener: Listener, connection: ProxiedConnection) -> None:
        """Wait for the events that the connection needs next, and for failures."""
        client, server = connection.interests()
        if client != connection.client_events:
            self._watch_socket(connection.client, connection.client_events, client, listener, connection)
            connection.client_events = client
        if server != connection.server_events and connection.server is not None:
            self._watch_socket(connection.server, connection.server_events, server, listener, connection)
            connection.server_events = server

    def _watch_socket(
        self,
        one: socket.socket,
        before: int | None,
        after: int,
        listener: Listener,
        connection: ProxiedConnection,
    ) -> None:
        watch = self._poller.register if before is None else self._poller.modify
        watch(one, after, (listener, connection, one))

    def _close(self, listener: Listener, connection: ProxiedConnection) -> None:
        if connection not in listener.connections:
            return
        listener.connections.discard(connection)
        self._dialing.pop(connection, None)
        self._connections -= 1
        if connection.client_events is not None:
            self._poller.unregister(connection.client)
        if connection.server is not None and connection.server_events is not None:
            self._poller.unregister(connection.server)
        connection.close()
        if not self._accepting and self._connections <= self._limit * 9 // 10:
            self._resume_accepting()

    # The end

    def _drain(self) -> None:
        """Stop new handshakes, accept what has been established, then close the listeners."""
        for listener in self._all_listeners():
            if listener.socket is not None:
                drop_new_clients(listener.socket)
        self._resume_accepting()
        self._call_later(LINGER_SECONDS, self._close_listeners)
        self._call_later(DRAIN_SECONDS, self._end)

    def _close_listeners(self) -> None:
        for listener in self._all_listeners():
            self._accept(listener, BACKLOG)
            self._close_listener(listener)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self._connections:
            self._end()
        else:
            self._call_later(LINGER_SECONDS, self._end_if_idle)

    def _end(self) -> None:
        if self._stopped:
            return
        for listener in self._all_listeners():
            self._remove(listener)
        with self._lock:
            self._listeners.clear()
            self._stopped = True
            if self._name is not None:
                self._name.close()
            self._poller.close()
            os.close(self._wake)


def listen(family: Family, port: int, *, share: bool = False) -> socket.socket:
    """Listen on the loopback address of an IP family. Raises `OSError`.

    During an update, two processes may run for a moment. With `share`, the port may already belong to the other one.
    """
    listener = socket.socket(
        socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    )
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
        listener.bind((LISTEN_ADDRESSES[family], port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # for the next process
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def drop_new_clients(listener: socket.socket) -> None:
    """Let a listener ignore new clients. Handshakes that have begun are still completed."""
    program = array.array("B", _DROP_SYN)
    address, _ = program.buffer_info()
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_DROP_SYN) // 8, address))


def connection_limit(listeners: int) -> int:
    """Return the maximum number of connections besides a number of listeners.

    Raise the limit of open files if necessary and possible.
    """
    reserved = RESERVED_DESCRIPTORS + listeners
    needed = 2 * MAX_CONNECTIONS + reserved
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (soft - reserved) // 2))
