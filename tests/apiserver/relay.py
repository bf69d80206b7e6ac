"""A TCP relay between client and server, for network faults."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


def _listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=64)


class Relay:
    """Forwards connections to `target`. `cut` breaks them, `stall` delays their bytes, `refuse` accepts no new ones.

    `port` never changes. `listen` creates the listening socket for a port (0: any), for example in another network
    namespace.
    """

    def __init__(self, target: tuple[str, int], *, listen: Callable[[int], socket.socket] = _listen) -> None:
        self._target, self._listen = target, listen
        self._next_flowing = _flowing()
        self._stalled: list[threading.Event] = []
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.bytes_to_clients = 0
        """Bytes received from the target and not delayed."""
        self.allow()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.resume()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        with self._lock:
            return len(self._sockets) // 2

    def allow(self) -> None:
        """Accept connections (again)."""
        listener = self._listen(self.port)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections and break the open ones."""
        listener, self._listener = self._listener, None
        if listener:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            listener.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def stall(self, *, new: bool = False) -> None:
        """Stop forwarding on the open connections, in both directions; with `new`, also on later connections."""
        self._next_flowing.clear()
        self._stalled.append(self._next_flowing)
        if not new:
            self._next_flowing = _flowing()

    def resume(self) -> None:
        """Forward again, including the delayed bytes."""
        for each in self._stalled:
            each.set()
        self._stalled.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for source, sink, count in ((near, far, _ignore), (far, near, self._count)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                arguments = (source, sink, self._next_flowing, count)
                threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_to_clients += size

    def _pump(
        self, source: socket.socket, sink: socket.socket, flowing: threading.Event, count: Callable[[int], None]
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                flowing.wait()
                count(len(data))
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._sockets -= {source, sink}


def _ignore(_: int) -> None:
    pass


def _flowing() -> threading.Event:
    event = threading.Event()
    event.set()
    return event
