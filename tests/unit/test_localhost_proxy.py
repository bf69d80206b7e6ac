"""The TCP proxy for NodePorts on loopback addresses, with real sockets."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeAlias

import pytest

from kproxy.model.localhost_node_ports import LocalhostListener
from kproxy.model.types import Family
from kproxy.serve import localhost_proxy
from kproxy.serve.localhost_proxy import RESERVED_DESCRIPTORS, LocalhostProxy, drop_new_clients
from kproxy.serve.socket_poller import SocketPoller
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.ports import free_port

V4 = Family.IPV4
ANSWER_SIZE = 200_000
"""Number of bytes that fit into the buffers between an endpoint and a client, but not into those of the client."""
PROBLEM = "NodePorts on loopback addresses: {}: new connections wait"


class Endpoint:
    """A server on a loopback address. It answers each connection with `name` and the data up to its end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.text = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno != errno.EMFILE:
                    return
                time.sleep(0.01)
                continue
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.sendall(self._name.encode())
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        """Refuse connections from now on."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def endpoint() -> Iterator[Callable[[str], Endpoint]]:
    created: list[Endpoint] = []

    def make(name: str) -> Endpoint:
        created.append(Endpoint(name))
        return created[-1]

    yield make
    for each in created:
        with suppress(OSError):
            each.close()


@pytest.fixture
def proxy() -> Iterator[LocalhostProxy]:
    found = LocalhostProxy(time.monotonic)
    found.start()
    yield found
    found.stop(HANG_GUARD)


@pytest.fixture
def port() -> int:
    return free_port()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), HANG_GUARD)


def name_of_answer(port: int) -> str:
    with connect(port) as client:
        return client.recv(1, socket.MSG_WAITALL).decode()


def received_until_end(client: socket.socket) -> bytes:
    found = bytearray()
    while data := client.recv(1 << 20):
        found += data
    return bytes(found)


def test_end_of_a_stream_is_passed_on(proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint]) -> None:
    proxy.set_listener(V4, LocalhostListener(port, (endpoint("a").text,)))
    data = os.urandom(8 << 20)
    with connect(port) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert received_until_end(client) == b"a" + data
        sender.join()


def test_endpoints_change_while_connections_continue(
    proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint]
) -> None:
    one, other = endpoint("a"), endpoint("b")
    proxy.set_listener(V4, LocalhostListener(port, (one.text, other.text)))
    assert {name_of_answer(port) for _ in range(50)} == {"a", "b"}
    proxy.set_listener(V4, LocalhostListener(port, (one.text,)))
    with connect(port) as client:
        assert client.recv(1, socket.MSG_WAITALL) == b"a"
        proxy.set_listener(V4, LocalhostListener(port, (other.text,)))
        assert {name_of_answer(port) for _ in range(10)} == {"b"}
        client.sendall(b"still there")
        assert client.recv(11, socket.MSG_WAITALL) == b"still there"
        assert proxy.listening(V4) == 1
        proxy.remove_listener(V4, port)
        with pytest.raises(ConnectionResetError):  # an end would look as if the endpoint had sent everything
            client.recv(1)
    assert proxy.listening(V4) == 0
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_affinity(proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint]) -> None:
    endpoints = tuple(endpoint(name).text for name in "abcdef")
    proxy.set_listener(V4, LocalhostListener(port, endpoints, 60))
    assert len({name_of_answer(port) for _ in range(30)}) == 1


def test_another_endpoint_is_tried(proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint]) -> None:
    dead, alive = endpoint("a"), endpoint("b")
    dead.close()
    proxy.set_listener(V4, LocalhostListener(port, (dead.text, alive.text)))
    assert {name_of_answer(port) for _ in range(30)} == {"b"}


def test_client_is_reset_if_no_endpoint_answers(
    proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint]
) -> None:
    dead = endpoint("a")
    dead.close()
    proxy.set_listener(V4, LocalhostListener(port, (dead.text,)))
    with pytest.raises(ConnectionResetError), connect(port) as client:  # the reset may arrive at once
        client.recv(1)


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """An endpoint that does not answer: its backlog is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(3)]
        for each in fillers:
            each.setblocking(False)
            each.connect_ex(address)
        yield f"127.0.0.1:{address[1]}"
        for each in fillers:
            each.close()


def test_silent_endpoint_is_given_up(
    proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhost_proxy, "DIAL_SECONDS", 0.2)
    with silent_endpoint() as silent:
        proxy.set_listener(V4, LocalhostListener(port, (silent, endpoint("b").text)))
        assert {name_of_answer(port) for _ in range(6)} == {"b"}
        proxy.set_listener(V4, LocalhostListener(port, (silent,)))
        clients = [connect(port) for _ in range(3)]
        for each in clients:
            with each, pytest.raises(ConnectionResetError):
                each.recv(1)


def test_reset_is_passed_on(proxy: LocalhostProxy, port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.set_listener(V4, LocalhostListener(port, (f"127.0.0.1:{listener.getsockname()[1]}",)))
        with connect(port) as client:
            server, _ = listener.accept()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            server.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        client = connect(port)
        server, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with server, pytest.raises(ConnectionResetError):
            server.recv(1)


@pytest.fixture
def ends(proxy: LocalhostProxy, port: int) -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """A function that returns a new connection: the client's socket and the endpoint's."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        proxy.set_listener(V4, LocalhostListener(port, (f"127.0.0.1:{listener.getsockname()[1]}",)))

        def make() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(connect(port))
            server = stack.enter_context(listener.accept()[0])
            server.settimeout(HANG_GUARD)
            return client, server

        yield make


def reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def wait_until_reset(one: socket.socket) -> None:
    wait_until(lambda: one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0, "the connection is reset")


def fill(one: socket.socket) -> None:
    """Send until nothing more has been accepted for a while."""
    one.settimeout(0.2)
    with suppress(TimeoutError):
        while True:
            one.sendall(bytes(1 << 18))


Ends: TypeAlias = Callable[[], tuple[socket.socket, socket.socket]]
BOTH_ENDS = pytest.mark.parametrize("by_client", [True, False], ids=["client", "endpoint"])


@BOTH_ENDS
def test_reset_after_the_end_of_a_stream_is_passed_on(ends: Ends, *, by_client: bool) -> None:
    one, other = ends() if by_client else ends()[::-1]
    one.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b""
    reset(one)
    wait_until_reset(other)


def test_endpoint_that_does_not_read_sees_the_reset_of_a_client(ends: Ends) -> None:
    client, server = ends()
    fill(client)
    reset(client)
    wait_until_reset(server)


@BOTH_ENDS
def test_data_before_a_reset_arrives(ends: Ends, *, by_client: bool) -> None:
    """As from a server that answers before it has received everything, and then closes the connection."""
    for _ in range(10):
        one, other = ends() if by_client else ends()[::-1]
        fill(other)
        one.sendall(b"too large")
        one.close()
        assert other.recv(9, socket.MSG_WAITALL) == b"too large"
        wait_until_reset(other)


def test_complete_answer_survives_a_reset(ends: Ends, proxy: LocalhostProxy, port: int) -> None:
    """The endpoint has ended its stream, and refuses further data, before the client has received all of it."""
    client, server = ends()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server.sendall(bytes(ANSWER_SIZE))
    server.close()
    (connection,) = proxy._listeners[V4, port].connections
    wait_until(lambda: connection.to_client and connection.to_client.complete, "kproxy has passed on the answer")
    client.sendall(b"more")
    wait_until(lambda: not proxy._connections, "kproxy notices the reset")
    received = 0
    with suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            received += len(data)
    assert received == ANSWER_SIZE


def test_slow_receivers_take_no_memory(ends: Ends) -> None:
    def stall(count: int) -> list[tuple[socket.socket, socket.socket]]:
        found = [ends() for _ in range(count)]
        for _, server in found:
            server.settimeout(0)
            with suppress(BlockingIOError):
                while True:
                    server.send(bytes(1 << 20))
        return found

    stalled = stall(2)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        stalled += stall(20)
        for _, server in stalled:
            fill(server)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20 * (16 << 10)


def test_endpoint_that_leaves_is_not_waited_for(
    proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhost_proxy, "DIAL_SECONDS", 10 * HANG_GUARD)
    with silent_endpoint() as silent:
        proxy.set_listener(V4, LocalhostListener(port, (silent,)))
        with connect(port) as waiting:
            wait_until(lambda: proxy._dialing, "kproxy connects to the endpoint")
            proxy.set_listener(V4, LocalhostListener(port, (endpoint("b").text,)))
            assert waiting.recv(1, socket.MSG_WAITALL) == b"b"


def test_client_that_gives_up_is_forgotten(proxy: LocalhostProxy, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localhost_proxy, "DIAL_SECONDS", 10 * HANG_GUARD)
    with silent_endpoint() as silent:
        proxy.set_listener(V4, LocalhostListener(port, (silent,)))
        client = connect(port)
        wait_until(lambda: proxy._dialing, "kproxy connects to the endpoint")
        reset(client)
        wait_until(lambda: not proxy._connections, "kproxy closes the connection")


def test_connection_that_cannot_be_watched_is_closed(
    proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beyond `fs.epoll.max_user_watches`, which is a setting of the whole machine."""
    proxy.set_listener(V4, LocalhostListener(port, (endpoint("a").text,)))
    assert name_of_answer(port) == "a"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(SocketPoller, "register", fail)
        for _ in range(3):
            with pytest.raises(ConnectionResetError), connect(port) as client:
                client.recv(1)
    assert name_of_answer(port) == "a"
    wait_until(lambda: not proxy._connections, "no connection is left")


def test_listeners_count_as_descriptors() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000));"
        "from kproxy.serve.localhost_proxy import *; print(connection_limit(0), connection_limit(1000))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str((3000 - RESERVED_DESCRIPTORS - each) // 2) for each in (0, 1000)]


def test_port_that_is_in_use_is_opened_later(
    proxy: LocalhostProxy,
    port: int,
    endpoint: Callable[[str], Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(localhost_proxy, "LONGEST_RETRY", 0.01)
    other = free_port()
    text = endpoint("a").text
    with socket.create_server(("127.0.0.1", port)):
        for each in (port, other):
            proxy.set_listener(V4, LocalhostListener(each, (text,)))
        assert name_of_answer(other) == "a"
        wait_until(lambda: proxy.failures(V4) >= 3, "kproxy tries several times")
        assert (proxy.listening(V4), proxy.listening(Family.IPV6)) == (1, 0)
    wait_until(lambda: proxy.listening(V4) == 2, "kproxy listens")
    assert name_of_answer(port) == "a"
    errors = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert errors == [f"NodePort: cannot listen on 127.0.0.1:{port}: Address already in use, retrying"]


def test_accepting_pauses_when_descriptors_run_out(
    proxy: LocalhostProxy, port: int, endpoint: Callable[[str], Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    proxy.set_listener(V4, LocalhostListener(port, (endpoint("a").text,)))
    assert name_of_answer(port) == "a"
    clients = [socket.socket() for _ in range(20)]
    (thread,) = (each for each in threading.enumerate() if each.name == "localhost-proxy")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        for each in clients:
            each.settimeout(HANG_GUARD)
            each.connect(("127.0.0.1", port))
        wait_until(lambda: PROBLEM.format("Too many open files") in caplog.messages, "kproxy logs the problem")
        before, began = cpu_seconds(thread), time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1, "a second has passed")
        assert cpu_seconds(thread) < before + 0.1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {each.recv(1, socket.MSG_WAITALL) for each in clients} == {b"a"}
    for each in clients:
        each.close()
    assert len([each for each in caplog.messages if "new connections wait" in each]) == 1


def cpu_seconds(thread: threading.Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def test_further_clients_wait_at_the_limit(
    port: int,
    endpoint: Callable[[str], Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(localhost_proxy, "MAX_CONNECTIONS", 10)
    server = endpoint("a")
    proxy = LocalhostProxy(time.monotonic)
    proxy.start()
    proxy.set_listener(V4, LocalhostListener(port, (server.text,)))
    clients = [connect(port) for _ in range(25)]
    assert {each.recv(1, socket.MSG_WAITALL) for each in clients[:10]} == {b"a"}
    assert server.connections == 10
    assert PROBLEM.format("10 connections, the maximum") in caplog.messages
    for each in clients[:10]:
        each.close()
    assert {each.recv(1, socket.MSG_WAITALL) for each in clients[10:20]} == {b"a"}
    for each in clients[10:20]:
        each.close()
    assert {each.recv(1, socket.MSG_WAITALL) for each in clients[20:]} == {b"a"}
    for each in clients[20:]:
        each.close()
    proxy.stop(HANG_GUARD)


def test_stopped_proxy_serves_the_clients_that_it_has(
    port: int, endpoint: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhost_proxy, "DRAIN_SECONDS", HANG_GUARD)
    proxy = LocalhostProxy(time.monotonic)
    proxy.start()
    proxy.set_listener(V4, LocalhostListener(port, (endpoint("a").text,)))
    clients = [connect(port) for _ in range(200)]
    proxy.drain()
    proxy.set_listener(V4, LocalhostListener(free_port(), ("127.0.0.1:1",)))  # ignored
    for each in clients:
        each.sendall(b"b")
        each.shutdown(socket.SHUT_WR)
    assert {received_until_end(each) for each in clients} == {b"ab"}
    proxy.stop(HANG_GUARD)
    assert proxy.listening(V4) == 0
    for each in clients:
        each.close()
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_idle_connections_end_with_the_drain(
    port: int, endpoint: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhost_proxy, "DRAIN_SECONDS", 0.1)
    proxy = LocalhostProxy(time.monotonic)
    proxy.start()
    proxy.set_listener(V4, LocalhostListener(port, (endpoint("a").text,)))
    with connect(port) as client:
        assert client.recv(1, socket.MSG_WAITALL) == b"a"
        proxy.stop(HANG_GUARD)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_listener_that_drops_new_clients_completes_handshakes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as late:
        early = socket.create_connection(listener.getsockname(), HANG_GUARD)
        drop_new_clients(listener)
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.connect(listener.getsockname())
        accepted, _ = listener.accept()
        early.sendall(b"x")
        assert accepted.recv(1) == b"x"
        early.close()
        accepted.close()


def test_listener_counts_until_its_socket_is_closed(port: int) -> None:
    proxy = LocalhostProxy(time.monotonic)
    proxy.set_listener(V4, LocalhostListener(port, ("127.0.0.1:9",)))
    proxy.remove_listener(V4, port)
    assert proxy.listening(V4) == 1, "the thread, which closes it, has not been started"
    connect(port).close()
    proxy.start()
    wait_until(lambda: proxy.listening(V4) == 0, "the thread has closed the listener")
    with pytest.raises(ConnectionRefusedError):
        connect(port)
    proxy.drain()
