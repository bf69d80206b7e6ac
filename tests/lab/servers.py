"""Real servers in the lab's pods: one thread for any number of sockets.

TCP and SCTP servers speak HTTP/1.1; UDP servers answer one line with one line. Every answer is
`<name of the pod> <client address as the pod sees it>`.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from tests.lab.links import version_of
from tests.lab.topology import Host
from tests.lab.waiting import HANG_GUARD, wait_until

BACKLOG = 512
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
SOCKET_TYPES = {
    "TCP": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "UDP": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "SCTP": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}

_T = TypeVar("_T")


@dataclass
class _Listener:
    """The server of one socket, a stream or a datagram server, and its unanswered requests."""

    server: asyncio.Server | None = None
    datagrams: asyncio.DatagramTransport | None = None
    open: set[asyncio.Task[None]] = field(default_factory=set)


class Servers:
    """All servers of a lab. Close it before the lab, or use it in a `with` block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab-servers", daemon=True)
        self._listeners: dict[str, list[_Listener]] = {}
        self._thread.start()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def serve(self, pod: Host, port: int, protocol: str = "TCP") -> None:
        """Listen on a port of all addresses of a pod."""
        for address in pod.addresses:
            kind, number = SOCKET_TYPES[protocol]
            listening = pod.namespace.socket(FAMILIES[version_of(address)], kind, number)
            listening.setblocking(False)
            # Otherwise, a connection whose last packets are lost keeps other programs from using the port.
            if kind == socket.SOCK_STREAM:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(listening, address, port)
            listener = self._await(self._start(pod.name, listening, protocol))
            self._listeners.setdefault(pod.name, []).append(listener)

    def stop(self, pod: Host) -> None:
        """Stop all servers of a pod once every accepted request is answered."""
        for listener in self._listeners.pop(pod.name, []):
            self._await(_finish(listener))

    def close(self) -> None:
        """Stop all servers at once; requests in flight are aborted."""
        for listeners in self._listeners.values():
            for listener in listeners:
                self._await(_abort(listener))
        self._listeners.clear()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(HANG_GUARD)

    async def _start(self, name: str, listening: socket.socket, protocol: str) -> _Listener:
        listener = _Listener()
        if protocol == "UDP":
            listener.datagrams, _ = await self._loop.create_datagram_endpoint(lambda: _Datagrams(name), sock=listening)
            return listener

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            listener.open.add(task)
            task.add_done_callback(listener.open.discard)
            await _answer_http(name, reader, writer)

        listener.server = await asyncio.start_server(answer, sock=listening, backlog=BACKLOG)
        return listener


def _bind(listening: socket.socket, address: str, port: int) -> None:
    """Bind a socket. A busy kernel may need a moment until an address that was just added can be used."""

    def is_bound() -> bool:
        try:
            listening.bind((address, port))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return False
        return True

    wait_until(is_bound, f"address {address} can be used")


async def _finish(listener: _Listener) -> None:
    """Close the listener, then wait for the requests in flight."""
    if listener.datagrams is not None:
        listener.datagrams.close()
    if listener.server is not None:
        listener.server.close()
        await asyncio.gather(*listener.open)


async def _abort(listener: _Listener) -> None:
    for task in listener.open:
        task.cancel()
    await asyncio.gather(*listener.open, return_exceptions=True)
    await _finish(listener)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self._name = name
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # the actual class is not a subclass

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        assert self._transport is not None
        self._transport.sendto(f"{self._name} {addr[0]}\n".encode(), addr)


async def _answer_http(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.readuntil(b"\r\n\r\n")
        body = f"{name} {writer.get_extra_info('peername')[0]}\n".encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client closed the connection
    finally:
        writer.close()
