"""The HTTP server over real sockets: valid and invalid requests, ports, timeouts, and misbehaving clients."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from time import monotonic, time, time_ns
from typing import Any

import pytest

from kproxy.model.types import Family, Node
from kproxy.serve.http import MAX_HEAD, HttpRequest, HttpResponse, RequestError, plain, pop_request
from kproxy.serve.server import HttpServer, ListenAddress, listen, parse_address
from kproxy.serve.status_server import ListenError, StatusServer
from tests.clock import Clock
from tests.lab.listen_attempts import ListenAttempts
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.ports import free_port, get

LOOPBACK = ListenAddress("127.0.0.1", 0)


def echo(request: HttpRequest) -> HttpResponse:
    return plain(200, f"{request.method} {request.path}")


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def server(clock: Clock) -> Iterator[HttpServer]:
    http_server = HttpServer(clock=clock, wall=lambda: 1795218460.8)
    http_server.start()
    yield http_server
    http_server.stop(HANG_GUARD)


def open_port(server: HttpServer, handler: Callable[[HttpRequest], HttpResponse] = echo) -> socket.socket:
    """Open a port on the server; return its listening socket."""
    listener = listen(LOOPBACK)
    server.call(lambda: server.add(listener, handler))
    return listener


def port_number(listener: socket.socket) -> int:
    number: int = listener.getsockname()[1]
    return number


def connect(listener: socket.socket) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_number(listener)), timeout=HANG_GUARD)


def exchange(listener: socket.socket, request: bytes) -> bytes:
    """Send bytes; return everything received until the server closes the connection."""
    with connect(listener) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


def wait_until_idle(server: HttpServer) -> None:
    """Wait until the server has made all calls so far and handled all timeouts that are due by its clock."""
    for _ in range(2):  # timeouts are handled after calls
        done = threading.Event()
        server.call(done.set)
        assert done.wait(HANG_GUARD)


REQUEST = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("text", "method", "path", "persistent"),
    [
        (REQUEST, "GET", "/a", True),
        (b"\r\n\n" + REQUEST, "GET", "/a", True),
        (b"GET /a HTTP/1.1\nHost: x\n\n", "GET", "/a", True),
        (b"GET http://x:1/a?b HTTP/1.1\r\nHost: x\r\n\r\n", "GET", "/a", True),
        (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", "GET", "/", True),
        (b"OPTIONS * HTTP/1.0\r\n\r\n", "OPTIONS", "*", False),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "GET", "/", True),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: foo\r\nConnection: Close\r\n\r\n", "GET", "/", False),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n", "POST", "/", False),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", "POST", "/", False),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "POST", "/", True),
    ],
)
def test_valid_requests(text: bytes, method: str, path: str, persistent: bool) -> None:
    buffer = bytearray(text + b"rest")
    request = pop_request(buffer)
    assert request is not None
    assert (request.method, request.path, request.persistent) == (method, path, persistent)
    assert buffer == b"rest"


@pytest.mark.parametrize("end", range(len(REQUEST)))
def test_incomplete_request_is_not_parsed_yet(end: int) -> None:
    assert pop_request(bytearray(REQUEST[:end])) is None


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET /\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nnonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\n\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost: " + b"x" * MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\nHost: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
    ],
)
def test_invalid_requests_are_rejected(server: HttpServer, text: bytes, status: int) -> None:
    with pytest.raises(RequestError) as error:
        pop_request(bytearray(text))
    assert error.value.status == status
    response = exchange(open_port(server), text)
    assert response.startswith(f"HTTP/1.1 {status} ".encode())
    assert response.endswith(f"Connection: close\r\n\r\n{error.value}\n".encode())


def test_response_bytes(server: HttpServer) -> None:
    assert exchange(open_port(server), b"GET /a HTTP/1.0\r\n\r\n") == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
        b"Date: Fri, 20 Nov 2026 23:47:40 GMT\r\nContent-Length: 6\r\nConnection: close\r\n\r\nGET /a"
    )


def test_head_omits_the_body(server: HttpServer) -> None:
    response, body = get(port_number(open_port(server)), "/abc", method="HEAD")
    assert (response.status, response.headers["Content-Length"], body) == (200, "9", b"")


def test_connection_is_kept_alive(server: HttpServer) -> None:
    connection = HTTPConnection("127.0.0.1", port_number(open_port(server)), timeout=HANG_GUARD)
    for path in ("/1", "/2", "/3"):
        connection.request("GET", path)
        if path == "/1":
            first = connection.sock
        assert connection.getresponse().read() == f"GET {path}".encode()
    assert connection.sock is first
    connection.close()


def test_pipelined_requests_are_answered_in_order(server: HttpServer) -> None:
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(50))
    response = exchange(open_port(server), requests)
    assert [part.rpartition(b"GET /")[2] for part in response.split(b"HTTP/1.1 200 OK")[1:]] == [
        b"%d" % number for number in range(50)
    ]


def test_request_that_arrives_byte_by_byte(server: HttpServer) -> None:
    with connect(open_port(server)) as client:
        for byte in b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n":
            client.sendall(bytes([byte]))
        assert client.recv(65536).endswith(b"GET /a")


def test_large_response_to_a_slow_client_does_not_block_other_clients(server: HttpServer) -> None:
    body = os.urandom(1 << 24)
    listener = open_port(server, lambda _: HttpResponse(200, (), body))
    quick = open_port(server)
    connection = HTTPConnection("127.0.0.1", port_number(listener), timeout=HANG_GUARD)
    connection.request("GET", "/")
    assert get(port_number(quick))[1] == b"GET /"  # other clients are served meanwhile
    assert connection.getresponse().read() == body
    connection.close()


def test_response_arrives_although_the_request_body_is_not_read(server: HttpServer) -> None:
    with connect(open_port(server)) as client:
        client.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        client.sendall(b"x" * 1000000)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    assert received.endswith(b"Connection: close\r\n\r\nPOST /a")


def test_failing_handler_returns_500(server: HttpServer) -> None:
    def fail(_: HttpRequest) -> HttpResponse:
        raise KeyError("bug")

    response, body = get(port_number(open_port(server, fail)))
    assert (response.status, body) == (500, b"internal error\n")
    assert get(port_number(open_port(server)))[0].status == 200


@pytest.mark.parametrize(
    ("sent", "timeout"),
    [(b"", 60), (b"GET / HTTP/1.1\r\n", 10), (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 60)],
)
def test_slow_clients_time_out(server: HttpServer, clock: Clock, sent: bytes, timeout: int) -> None:
    listener = open_port(server)
    with connect(listener) as client:
        client.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            assert client.recv(65536).endswith(b"GET /")
        get(port_number(listener))  # the server has seen the client now
        clock.advance(timeout - 0.5)
        wait_until_idle(server)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        clock.advance(1.5)
        wait_until_idle(server)
        assert client.recv(1) == b""


def test_clients_that_do_not_close_the_connection_time_out(server: HttpServer, clock: Clock) -> None:
    with connect(open_port(server)) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(65536).endswith(b"GET /")
        assert client.recv(1) == b""
        client.sendall(b"x")
        wait_until_idle(server)
        client.sendall(b"x")  # would fail if the server had closed the socket
        clock.advance(3)
        wait_until_idle(server)

        def is_closed() -> bool:
            try:
                client.sendall(b"x")
            except OSError:
                return True
            return False

        wait_until(is_closed, "the server closes the connection")


def test_sending_byte_by_byte_does_not_extend_the_timeout(server: HttpServer, clock: Clock) -> None:
    listener = open_port(server)
    with connect(listener) as client:
        for _ in range(9):
            client.sendall(b"G")
            get(port_number(listener))
            clock.advance(1)
            wait_until_idle(server)
        clock.advance(2)
        wait_until_idle(server)
        assert client.recv(1) == b""


def test_too_many_connections_close_the_longest_idle_ones(
    server: HttpServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.serve.server.MAX_CONNECTIONS", 3)
    listener = open_port(server)
    clients = []
    for _ in range(5):
        clients.append(connect(listener))
        clock.advance(0.1)
        wait_until_idle(server)
    assert [client.recv(1) for client in clients[:2]] == [b"", b""]
    for client in clients[2:]:
        client.sendall(REQUEST)
        assert client.recv(65536).endswith(b"GET /a")
    for client in clients:
        client.close()


def test_clients_use_at_most_half_of_the_descriptors(clock: Clock) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
    try:
        server = HttpServer(clock=clock, wall=time)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.start()
    listener = open_port(server)
    clients = [connect(listener) for _ in range(30)]
    for client in clients[:10]:
        assert client.recv(1) == b"", "replaced by a newer client"
    for client in clients[10:]:
        client.sendall(REQUEST)
        assert client.recv(65536).endswith(b"GET /a")
    for client in clients:
        client.close()
    server.stop(HANG_GUARD)


def exhaust_descriptors(files: list[int]) -> None:
    """Open files until the process runs out of descriptors."""
    while True:
        try:
            files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return


def test_newest_client_is_served_when_file_descriptors_run_out(server: HttpServer) -> None:
    listener = open_port(server)
    wait_until_idle(server)
    first, second = (socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (second.fileno() + 20, hard))
        exhaust_descriptors(descriptors)
        os.close(descriptors.pop())
        for client in (first, second):
            client.settimeout(HANG_GUARD)
            client.connect(("127.0.0.1", port_number(listener)))
        assert first.recv(1) == b""
        second.sendall(REQUEST)
        assert second.recv(65536).endswith(b"GET /a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in descriptors:
            os.close(descriptor)
        first.close()
        second.close()


def test_health_check_is_answered_when_other_threads_have_used_up_the_descriptors(server: HttpServer) -> None:
    listener = open_port(server)
    wait_until_idle(server)
    client = socket.socket()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    files: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit[0], 256), limit[1]))
    try:
        exhaust_descriptors(files)
        client.settimeout(HANG_GUARD)
        client.connect(listener.getsockname())
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    finally:
        for file in files:
            os.close(file)
        client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_server_continues_after_an_unexpected_error(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.01)
    listener = open_port(server)
    select, failures = server._selector.select, [OSError(12, "Cannot allocate memory"), MemoryError()]

    def failing(timeout: float | None = None) -> Any:
        if failures:
            raise failures.pop(0)
        return select(timeout)

    monkeypatch.setattr(server._selector, "select", failing)
    for _ in range(3):
        assert exchange(listener, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "http: unexpected OSError(12, 'Cannot allocate memory'); trying again",
        "http: unexpected MemoryError(); trying again",
    ]


def test_removing_a_port_closes_its_connections(server: HttpServer) -> None:
    listener, other = open_port(server), open_port(server)
    port = port_number(listener)
    connection = HTTPConnection("127.0.0.1", port, timeout=HANG_GUARD)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b"GET /"
    server.call(lambda: server.remove(listener))
    assert connection.sock is not None
    assert connection.sock.recv(1) == b""
    connection.close()
    wait_until_idle(server)  # the server closes the connections first, then the port
    with pytest.raises(ConnectionRefusedError):
        get(port)
    listen(ListenAddress("127.0.0.1", port)).close()  # the port is available again
    assert get(port_number(other))[0].status == 200


def test_hundreds_of_ports_use_one_thread(clock: Clock) -> None:
    before = threading.active_count()
    server = HttpServer(clock=clock, wall=time)
    server.start()
    listeners = [open_port(server) for _ in range(300)]
    clients = [connect(listener) for listener in listeners]
    for client in clients:
        client.sendall(REQUEST)
    assert all(client.recv(65536).endswith(b"GET /a") for client in clients)
    assert threading.active_count() == before + 1
    server.stop(HANG_GUARD)
    assert [client.recv(1) for client in clients] == [b""] * 300
    for client in clients:
        client.close()
    assert [listener.fileno() for listener in listeners] == [-1] * 300
    assert threading.active_count() == before


def test_call_after_stop_has_no_effect(clock: Clock) -> None:
    server = HttpServer(clock=clock, wall=time)
    server.start()
    server.stop(HANG_GUARD)
    server.call(lambda: pytest.fail("called after stop"))


def test_stop_before_start_closes_the_ports(clock: Clock) -> None:
    server = HttpServer(clock=clock, wall=time)
    listener = listen(LOOPBACK)
    port = port_number(listener)
    server.add(listener, echo)
    server.stop(HANG_GUARD)
    listen(ListenAddress("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        (ListenAddress("127.0.0.1", 0), {"127.0.0.1"}),
        (ListenAddress("::1", 0), {"::1"}),
        (ListenAddress("0.0.0.0", 0), {"127.0.0.1", "::1"}),
        (ListenAddress("::", 0), {"127.0.0.1", "::1"}),
        (ListenAddress("", 0), {"127.0.0.1", "::1"}),
        (ListenAddress("0.0.0.0", 0, one_family=True), {"127.0.0.1"}),
        (ListenAddress("::", 0, one_family=True), {"::1"}),
    ],
)
def test_addresses_listen_on_the_same_families_as_in_go(
    server: HttpServer, address: ListenAddress, hosts: set[str]
) -> None:
    listener = listen(address)
    port = port_number(listener)
    server.call(lambda: server.add(listener, echo))
    reached = set()
    for host in ("127.0.0.1", "::1"):
        try:
            assert get(port, host=host)[0].status == 200
        except ConnectionRefusedError:
            continue
        reached.add(host)
    assert reached == hosts


def test_parse_configured_addresses() -> None:
    assert parse_address("0.0.0.0:10256") == ListenAddress("0.0.0.0", 10256)
    assert parse_address("[::1]:10249") == ListenAddress("::1", 10249)


def status_server(**more: Any) -> StatusServer:
    return StatusServer(
        (Family.IPV4,),
        **{
            "mode": "iptables",
            "configuration": {"mode": "iptables", "iptables": {"syncPeriod": "30s"}},
            "healthz_address": "",
            "metrics_address": "",
            "hard_fail": False,
            "health_timeout": 60.0,
            "node": lambda: Node("node-1"),
            "counters": {},
            "on_port_failed": lambda *_: None,
            "clock": monotonic,
            "wall": time_ns,
            **more,
        },
    )


@pytest.fixture
def metrics_port() -> Iterator[int]:
    """The metrics port of a status server."""
    port = free_port()
    server = status_server(metrics_address=f"127.0.0.1:{port}")
    server.start()
    yield port
    server.stop(HANG_GUARD)


@pytest.mark.parametrize(
    ("path", "status", "kind", "body"),
    [
        ("/healthz", 200, "text/plain; charset=utf-8", b"ok"),
        ("/proxyMode", 200, "text/plain; charset=utf-8", b"iptables"),
        ("/nothing", 404, "text/plain; charset=utf-8", b"404 page not found\n"),
        ("/", 404, "text/plain; charset=utf-8", b"404 page not found\n"),
    ],
)
def test_other_pages_of_the_metrics_port(metrics_port: int, path: str, status: int, kind: str, body: bytes) -> None:
    response, received = get(metrics_port, path)
    assert (response.status, response.headers["Content-Type"], received) == (status, kind, body)
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_statusz_and_flagz_are_served() -> None:
    port = free_port()
    server = status_server(metrics_address=f"127.0.0.1:{port}", flags=lambda: {"v": "2"})
    server.start()
    body = get(port, "/statusz")[1].decode()
    assert "\nBinary version: 0.1.0\n" in body
    assert "\nUp: 0 hr 0" in body
    assert "\nPaths: /configz /flagz /healthz /metrics /proxyMode /statusz\n" in body
    assert get(port, "/flagz")[1].endswith(b"\n\nv=2\n")
    server.stop(HANG_GUARD)


def test_configz_is_served(metrics_port: int) -> None:
    response, body = get(metrics_port, "/configz")
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "kubeproxy.config.k8s.io": {"mode": "iptables", "iptables": {"syncPeriod": "30s"}},
    }


def test_empty_addresses_open_no_port() -> None:
    before = threading.active_count()
    server = status_server()
    server.start()
    assert threading.active_count() == before + 1
    server.stop(HANG_GUARD)


@pytest.mark.parametrize("name", ["healthz", "metrics"])
def test_port_in_use_is_fatal_with_hard_fail(name: str) -> None:
    with listen(LOOPBACK) as occupied:
        address = f"127.0.0.1:{port_number(occupied)}"
        server = status_server(hard_fail=True, **{f"{name}_address": address})
        message = f"{name}BindAddress {address}: cannot listen: Address already in use"
        with pytest.raises(ListenError, match=f"^{message}$"):
            server.start()
        server.stop(HANG_GUARD)


@pytest.mark.parametrize("name", ["healthz", "metrics"])
def test_port_in_use_is_logged_with_backoff_and_served_once_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    now = 0.0
    attempts = ListenAttempts(monkeypatch, "kproxy.serve.status_server")
    with listen(LOOPBACK) as occupied:
        port = port_number(occupied)
        warning = f"{name}BindAddress 127.0.0.1:{port}: cannot listen: Address already in use, retrying every 0 s"
        server = status_server(clock=lambda: monotonic() + now, **{f"{name}_address": f"127.0.0.1:{port}"})
        server.start()
        assert attempts.wait_for_many()
        assert caplog.messages == [warning]
        now += 60.0
        assert attempts.wait_for_many()
        assert caplog.messages == [warning] * 2
        now += 60.0
        assert attempts.wait_for_many()
        assert caplog.messages == [warning] * 2, "the second interval is longer"
    wait_until(lambda: len(caplog.messages) > 2, "a log line when the port is served")
    assert caplog.messages[2:] == [f"{name}BindAddress 127.0.0.1:{port}: listening now"]
    assert get(port, "/healthz")[0].status in {200, 503}
    server.stop(HANG_GUARD)


def test_available_port_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    server = status_server(metrics_address=f"127.0.0.1:{free_port()}")
    server.start()
    server.stop(HANG_GUARD)
    assert caplog.messages == []
