"""One proxied TCP connection: two sockets, and the bytes on their way from one to the other."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE

BUFFER_SIZE = 64 * 1024
"""Maximum number of bytes that one direction of a connection holds while the receiver is slow.

As long as a direction holds any bytes, nothing more is received for it, so that TCP slows down the sender.
"""
_SEND_BUFFER = 256 * 1024
"""The kernel's send buffer toward a client, in bytes. Loopback needs no more; by default, it can grow to megabytes."""
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_COUNT = 15, 15, 9
"""When to give up on a peer that has disappeared: seconds without data, seconds between probes, number of probes."""
_RESET = struct.pack("ii", 1, 0)  # struct linger: close() resets the connection at once


class Stream:
    """One direction of a connection. Raises `OSError` if a socket fails."""

    __slots__ = ("ended", "sink", "source", "waiting")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.waiting: memoryview | None = None
        self.ended = False

    def receive(self, buffer: memoryview) -> None:
        """Receive once, and send on as much as possible. Pass on the end of the stream (half-close)."""
        try:
            size = self.source.recv_into(buffer)
        except BlockingIOError:
            return
        if not size:
            self.ended = True
            self.sink.shutdown(socket.SHUT_WR)
            return
        sent = _send(self.sink, buffer[:size])
        if sent < size:
            self.waiting = memoryview(bytes(buffer[sent:size]))

    def flush(self) -> None:
        """Send what is waiting."""
        if self.waiting is not None:
            sent = _send(self.sink, self.waiting)
            self.waiting = self.waiting[sent:] if sent < len(self.waiting) else None


class ProxiedConnection:
    """A client's connection and the connection to an endpoint. All sockets are non-blocking.

    `tried` are the endpoints to which a connection was attempted; the last one is the current one. `client_events` and
    `server_events` are the events that the owner of the connection waits for.
    """

    __slots__ = ("client", "client_events", "server", "server_events", "to_client", "to_server", "tried")

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.client_events = self.server_events = 0
        self.tried: list[str] = []
        self.to_server: Stream | None = None
        self.to_client: Stream | None = None
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        _set_options(client)

    def connected(self) -> None:
        """Start to pass on data: the connection to the endpoint is open."""
        assert self.server is not None
        self.to_server = Stream(self.client, self.server)
        self.to_client = Stream(self.server, self.client)

    @property
    def is_done(self) -> bool:
        """Whether both directions have ended."""
        return bool(self.to_server and self.to_client and self.to_server.ended and self.to_client.ended)

    def interests(self) -> tuple[int, int]:
        """Return the events to wait for on the client's socket and on the endpoint's, as event masks of `selectors`.

        While the connection to the endpoint is being opened, nothing is received from the client.
        """
        if self.to_server is None or self.to_client is None:
            return 0, EVENT_WRITE if self.server is not None else 0
        up, down = self.to_server, self.to_client
        return _interest(up, down), _interest(down, up)

    def proceed(self, stream_from: Stream, stream_to: Stream, events: int, buffer: memoryview) -> None:
        """Handle events on a socket: the source of one stream and the sink of the other. Raises `OSError`."""
        if events & EVENT_WRITE:
            stream_to.flush()
        if events & EVENT_READ and not stream_from.ended and stream_from.waiting is None:
            stream_from.receive(buffer)

    def close(self, *, reset: bool) -> None:
        """Close both sockets. With `reset`, the peers see that the connection failed."""
        for each in (self.client, self.server):
            if each is not None:
                with suppress(OSError):
                    if reset:
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    each.close()


def open_connection(address: str, port: int) -> socket.socket:
    """Begin to connect to an endpoint. The socket is writable when the attempt has ended. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _set_options(server)
        server.connect((address, port))
    except BlockingIOError:
        pass
    except OSError:
        server.close()
        raise
    return server


def _set_options(one: socket.socket) -> None:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)


def _interest(from_socket: Stream, to_socket: Stream) -> int:
    reads = not from_socket.ended and from_socket.waiting is None
    return (EVENT_READ if reads else 0) | (EVENT_WRITE if to_socket.waiting is not None else 0)


def _send(sink: socket.socket, data: memoryview) -> int:
    try:
        return sink.send(data)
    except BlockingIOError:
        return 0
