"""One proxied TCP connection: two sockets, and the bytes on their way from one to the other."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from fcntl import ioctl

from kproxy.serve.socket_poller import FAILED, READ, WRITE

BUFFER_SIZE = 64 * 1024
"""Maximum number of bytes that are passed on at a time."""
_SEND_BUFFER = 256 * 1024
"""The kernel's send buffer toward a client, in bytes. Loopback needs no more; by default, it can grow to megabytes."""
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_COUNT = 15, 15, 9
"""When to give up on a peer that has disappeared: seconds without data, seconds between probes, number of probes."""
_RESET = struct.pack("ii", 1, 0)  # struct linger: close() resets the connection at once
_SIOCOUTQNSD = 0x894B  # linux/sockios.h
_INT = struct.Struct("i")


class Stream:
    """One direction of a connection.

    Bytes that the receiver does not accept yet stay in the kernel's receive buffer of the source, so that TCP slows
    down the sender, and kproxy needs no memory for them: the stream is `blocked` until the sink is writable.

    A stream has `ended` if nothing more is passed on. It is `complete` if it ended because the sender ended it.
    """

    __slots__ = ("blocked", "complete", "ended", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.blocked = self.ended = self.complete = False

    def forward(self, buffer: memoryview) -> bool:
        """Pass on what has been received, or the end of the stream (half-close). Return False if the source failed."""
        try:
            size = self.source.recv_into(buffer, 0, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            self.ended = True
            return False
        try:
            if not size:
                self.ended = True
                self.sink.shutdown(socket.SHUT_WR)
                self.complete = True
                return True
            sent = _send(self.sink, buffer[:size])
        except OSError:
            self.ended = True
            return True
        if sent:
            self.source.recv_into(buffer, sent, socket.MSG_TRUNC)  # tcp(7): discard the bytes
        self.blocked = sent < size
        return True


class ProxiedConnection:
    """A client's connection and the connection to an endpoint. All sockets are non-blocking.

    `tried` are the endpoints to which a connection was attempted; the last one is the current one. `client_events` and
    `server_events` are the events that the owner of the connection waits for; None if it has not registered the socket.
    """

    __slots__ = ("client", "client_events", "server", "server_events", "to_client", "to_server", "tried")

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.client_events: int | None = None
        self.server_events: int | None = None
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
        """Return the events to wait for on the client's socket and on the endpoint's.

        While the connection to the endpoint is being opened, nothing is received from the client.
        """
        if self.to_server is None or self.to_client is None:
            return 0, WRITE if self.server is not None else 0
        up, down = self.to_server, self.to_client
        return _interest(up, down), _interest(down, up)

    def proceed(self, *, on_client: bool, events: int, buffer: memoryview) -> None:
        """Handle events on one of the sockets of an open connection.

        If a peer has reset the connection, what it has sent before is still passed on, except that an endpoint that
        does not read must notice at once that a client is gone.
        """
        assert self.to_server is not None
        assert self.to_client is not None
        outgoing, incoming = (self.to_client, self.to_server) if on_client else (self.to_server, self.to_client)
        if events & FAILED:
            outgoing.ended = True
            incoming.ended = incoming.ended or (on_client and incoming.blocked)
        if events & WRITE and outgoing.blocked and not outgoing.ended and not outgoing.forward(buffer):
            incoming.ended = True
        if events & READ and not incoming.blocked and not incoming.ended and not incoming.forward(buffer):
            outgoing.ended = True

    def close(self) -> None:
        """Close both sockets.

        A peer sees a reset if its stream is not complete, so that it does not take a part for the whole. It also sees
        a reset if the other peer failed, unless this would discard data of a complete stream.
        """
        failed = any(each is not None and each.ended and not each.complete for each in (self.to_server, self.to_client))
        for peer, stream in ((self.client, self.to_client), (self.server, self.to_server)):
            if peer is not None:
                with suppress(OSError):
                    if stream is None or not stream.complete or (failed and not _unsent(peer)):
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                peer.close()


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


def is_connected_to_itself(one: socket.socket) -> bool:
    """Return whether a socket is its own peer.

    The kernel connects a socket to itself if it picks the port of an endpoint on this node as the local port, and
    nothing listens there ("simultaneous open" in RFC 9293).
    """
    try:
        return bool(one.getsockname() == one.getpeername())
    except OSError:
        return False  # has been reset


def _set_options(one: socket.socket) -> None:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)


def _interest(incoming: Stream, outgoing: Stream) -> int:
    reads = not incoming.ended and not incoming.blocked
    return (READ if reads else 0) | (WRITE if outgoing.blocked and not outgoing.ended else 0)


def _send(sink: socket.socket, data: memoryview) -> int:
    try:
        return sink.send(data)
    except BlockingIOError:
        return 0


def _unsent(one: socket.socket) -> int:
    """Return the number of bytes in the send buffer that the kernel has not sent once, because the peer is slow."""
    return int(_INT.unpack(ioctl(one, _SIOCOUTQNSD, bytes(_INT.size)))[0])
