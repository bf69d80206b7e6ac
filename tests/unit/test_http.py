"""The HTTP server, over real sockets: requests good and bad, ports that come and go, clients that misbehave."""

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
from kproxy.serve.http import MAX_HEAD, HttpRequest, HttpResponse, RequestError, plain, take_request
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
    found = HttpServer(clock=clock, wall=lambda: 1795218460.8)
    found.start()
    yield found
    found.stop()


def opened(server: HttpServer, handler: Callable[[HttpRequest], HttpResponse] = echo) -> socket.socket:
    """A port that the server listens on."""
    listener = listen(LOOPBACK)
    server.call(lambda: server.add(listener, handler))
    return listener


def port_of(listener: socket.socket) -> int:
    number: int = listener.getsockname()[1]
    return number


def connected(listener: socket.socket) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(listener)), timeout=HANG_GUARD)


def exchange(listener: socket.socket, sent: bytes) -> bytes:
    """What comes back until the server hangs up."""
    with connected(listener) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


def settled(server: HttpServer) -> None:
    """Return once the server has done all it was asked for so far, and all that is due by its clock."""
    for _ in range(2):  # what is due comes after what was asked for
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
def test_requests_are_understood(text: bytes, method: str, path: str, persistent: bool) -> None:
    buffer = bytearray(text + b"rest")
    request = take_request(buffer)
    assert request is not None
    assert (request.method, request.path, request.persistent) == (method, path, persistent)
    assert buffer == b"rest"


@pytest.mark.parametrize("end", range(len(REQUEST)))
def test_a_part_of_a_request_is_none_yet(end: int) -> None:
    assert take_request(bytearray(REQUEST[:end])) is None


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
def test_what_is_no_request_is_refused(server: HttpServer, text: bytes, status: int) -> None:
    with pytest.raises(RequestError) as refusal:
        take_request(bytearray(text))
    assert refusal.value.status == status
    answer = exchange(opened(server), text)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.endswith(f"Connection: close\r\n\r\n{refusal.value}\n".encode())


def test_an_answer_on_the_wire(server: HttpServer) -> None:
    assert exchange(opened(server), b"GET /a HTTP/1.0\r\n\r\n") == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
        b"Date: Fri, 20 Nov 2026 23:47:40 GMT\r\nContent-Length: 6\r\nConnection: close\r\n\r\nGET /a"
    )


def test_head_is_get_without_the_body(server: HttpServer) -> None:
    response, body = get(port_of(opened(server)), "/abc", method="HEAD")
    assert (response.status, response.headers["Content-Length"], body) == (200, "9", b"")


def test_a_connection_serves_many_requests(server: HttpServer) -> None:
    connection = HTTPConnection("127.0.0.1", port_of(opened(server)), timeout=HANG_GUARD)
    for path in ("/1", "/2", "/3"):
        connection.request("GET", path)
        if path == "/1":
            first = connection.sock
        assert connection.getresponse().read() == f"GET {path}".encode()
    assert connection.sock is first
    connection.close()


def test_requests_that_come_at_once_are_answered_in_order(server: HttpServer) -> None:
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(50))
    answer = exchange(opened(server), requests)
    assert [part.rpartition(b"GET /")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]] == [
        b"%d" % number for number in range(50)
    ]


def test_a_request_in_pieces(server: HttpServer) -> None:
    with connected(opened(server)) as client:
        for byte in b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n":
            client.sendall(bytes([byte]))
        assert client.recv(65536).endswith(b"GET /a")


def test_a_large_answer_to_a_slow_reader(server: HttpServer) -> None:
    body = os.urandom(1 << 24)
    listener = opened(server, lambda _: HttpResponse(200, (), body))
    quick = opened(server)
    connection = HTTPConnection("127.0.0.1", port_of(listener), timeout=HANG_GUARD)
    connection.request("GET", "/")
    assert get(port_of(quick))[1] == b"GET /"  # others are served meanwhile
    assert connection.getresponse().read() == body
    connection.close()


def test_a_body_is_not_read_and_the_answer_arrives_nevertheless(server: HttpServer) -> None:
    with connected(opened(server)) as client:
        client.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        client.sendall(b"x" * 1000000)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
    assert received.endswith(b"Connection: close\r\n\r\nPOST /a")


def test_a_handler_that_fails_harms_only_its_answer(server: HttpServer) -> None:
    def fail(_: HttpRequest) -> HttpResponse:
        raise KeyError("bug")

    response, body = get(port_of(opened(server, fail)))
    assert (response.status, body) == (500, b"internal error\n")
    assert get(port_of(opened(server)))[0].status == 200


@pytest.mark.parametrize(
    ("sent", "patience"),
    [(b"", 60), (b"GET / HTTP/1.1\r\n", 10), (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 60)],
)
def test_clients_that_take_too_long_are_dropped(server: HttpServer, clock: Clock, sent: bytes, patience: int) -> None:
    listener = opened(server)
    with connected(listener) as client:
        client.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            assert client.recv(65536).endswith(b"GET /")
        get(port_of(listener))  # so the client was looked at
        clock.advance(patience - 0.5)
        settled(server)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        clock.advance(1.5)
        settled(server)
        assert client.recv(1) == b""


def test_clients_that_do_not_hang_up_are_dropped(server: HttpServer, clock: Clock) -> None:
    with connected(opened(server)) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(65536).endswith(b"GET /")
        assert client.recv(1) == b""
        client.sendall(b"x")
        settled(server)
        client.sendall(b"x")  # would fail if the server had closed its side
        clock.advance(3)
        settled(server)

        def is_refused() -> bool:
            try:
                client.sendall(b"x")
            except OSError:
                return True
            return False

        wait_until(is_refused, "the server closes the connection")


def test_dribbling_does_not_buy_time(server: HttpServer, clock: Clock) -> None:
    listener = opened(server)
    with connected(listener) as client:
        for _ in range(9):
            client.sendall(b"G")
            get(port_of(listener))
            clock.advance(1)
            settled(server)
        clock.advance(2)
        settled(server)
        assert client.recv(1) == b""


def test_too_many_clients_push_out_those_that_wait_longest(
    server: HttpServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.serve.server.MAX_CONNECTIONS", 3)
    listener = opened(server)
    clients = []
    for _ in range(5):
        clients.append(connected(listener))
        clock.advance(0.1)
        settled(server)
    assert [client.recv(1) for client in clients[:2]] == [b"", b""]
    for client in clients[2:]:
        client.sendall(REQUEST)
        assert client.recv(65536).endswith(b"GET /a")
    for client in clients:
        client.close()


def fill(files: list[int]) -> None:
    """Open files until no more can be."""
    while True:
        try:
            files.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return


def test_without_free_files_the_newest_client_is_served(server: HttpServer) -> None:
    listener = opened(server)
    settled(server)
    first, second = (socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filling: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (second.fileno() + 20, hard))
        fill(filling)
        os.close(filling.pop())
        for client in (first, second):
            client.settimeout(HANG_GUARD)
            client.connect(("127.0.0.1", port_of(listener)))
        assert first.recv(1) == b""
        second.sendall(REQUEST)
        assert second.recv(65536).endswith(b"GET /a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filling:
            os.close(descriptor)
        first.close()
        second.close()


def test_a_removed_port_takes_its_clients_with_it(server: HttpServer) -> None:
    listener, other = opened(server), opened(server)
    port = port_of(listener)
    connection = HTTPConnection("127.0.0.1", port, timeout=HANG_GUARD)
    connection.request("GET", "/")
    assert connection.getresponse().read() == b"GET /"
    server.call(lambda: server.remove(listener))
    assert connection.sock is not None
    assert connection.sock.recv(1) == b""
    connection.close()
    settled(server)  # clients go first, then the port
    with pytest.raises(ConnectionRefusedError):
        get(port)
    listen(ListenAddress("127.0.0.1", port)).close()  # free again
    assert get(port_of(other))[0].status == 200


def test_hundreds_of_ports_take_one_thread(clock: Clock) -> None:
    before = threading.active_count()
    server = HttpServer(clock=clock, wall=time)
    server.start()
    listeners = [opened(server) for _ in range(300)]
    clients = [connected(listener) for listener in listeners]
    for client in clients:
        client.sendall(REQUEST)
    assert all(client.recv(65536).endswith(b"GET /a") for client in clients)
    assert threading.active_count() == before + 1
    server.stop()
    assert [client.recv(1) for client in clients] == [b""] * 300
    for client in clients:
        client.close()
    assert [listener.fileno() for listener in listeners] == [-1] * 300
    assert threading.active_count() == before


def test_a_stopped_server_can_still_be_called(clock: Clock) -> None:
    server = HttpServer(clock=clock, wall=time)
    server.start()
    server.stop()
    server.call(lambda: pytest.fail("done after the end"))


def test_a_server_that_never_started_lets_go_of_its_ports(clock: Clock) -> None:
    server = HttpServer(clock=clock, wall=time)
    listener = listen(LOOPBACK)
    port = port_of(listener)
    server.add(listener, echo)
    server.stop()
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
def test_addresses_mean_what_they_mean_to_go(server: HttpServer, address: ListenAddress, hosts: set[str]) -> None:
    listener = listen(address)
    port = port_of(listener)
    server.call(lambda: server.add(listener, echo))
    reached = set()
    for host in ("127.0.0.1", "::1"):
        try:
            assert get(port, host=host)[0].status == 200
        except ConnectionRefusedError:
            continue
        reached.add(host)
    assert reached == hosts


def test_addresses_as_the_configuration_writes_them() -> None:
    assert parse_address("0.0.0.0:10256") == ListenAddress("0.0.0.0", 10256)
    assert parse_address("[::1]:10249") == ListenAddress("::1", 10249)


def serving(**more: Any) -> StatusServer:
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
            "port_failed": lambda *_: None,
            "clock": monotonic,
            "wall": time_ns,
            **more,
        },
    )


@pytest.fixture
def pages() -> Iterator[int]:
    """The port of the metrics pages."""
    port = free_port()
    found = serving(metrics_address=f"127.0.0.1:{port}")
    found.start()
    yield port
    found.stop()


@pytest.mark.parametrize(
    ("path", "status", "kind", "body"),
    [
        ("/healthz", 200, "text/plain; charset=utf-8", b"ok"),
        ("/proxyMode", 200, "text/plain; charset=utf-8", b"iptables"),
        ("/nothing", 404, "text/plain; charset=utf-8", b"404 page not found\n"),
        ("/", 404, "text/plain; charset=utf-8", b"404 page not found\n"),
    ],
)
def test_the_pages_beside_the_metrics(pages: int, path: str, status: int, kind: str, body: bytes) -> None:
    response, found = get(pages, path)
    assert (response.status, response.headers["Content-Type"], found) == (status, kind, body)
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_status_and_flags_can_be_read() -> None:
    port = free_port()
    found = serving(metrics_address=f"127.0.0.1:{port}", flags=lambda: {"v": "2"})
    found.start()
    body = get(port, "/statusz")[1].decode()
    assert "\nBinary version: 0.1.0\n" in body
    assert "\nUp: 0 hr 0" in body
    assert "\nPaths: /configz /flagz /healthz /metrics /proxyMode /statusz\n" in body
    assert get(port, "/flagz")[1].endswith(b"\n\nv=2\n")
    found.stop()


def test_the_configuration_can_be_read(pages: int) -> None:
    response, body = get(pages, "/configz")
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "kubeproxy.config.k8s.io": {"mode": "iptables", "iptables": {"syncPeriod": "30s"}},
    }


def test_no_address_means_no_port() -> None:
    before = threading.active_count()
    found = serving()
    found.start()
    assert threading.active_count() == before + 1
    found.stop()


@pytest.mark.parametrize("name", ["healthz", "metrics"])
def test_a_port_that_must_be_there(name: str) -> None:
    with listen(LOOPBACK) as taken:
        address = f"127.0.0.1:{port_of(taken)}"
        found = serving(hard_fail=True, **{f"{name}_address": address})
        message = f"{name}BindAddress {address}: cannot listen: Address already in use"
        with pytest.raises(ListenError, match=f"^{message}$"):
            found.start()
        found.stop()


@pytest.mark.parametrize("name", ["healthz", "metrics"])
def test_a_port_that_is_taken_is_said_ever_more_rarely_and_served_once_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    now = 0.0
    attempts = ListenAttempts(monkeypatch, "kproxy.serve.status_server")
    with listen(LOOPBACK) as taken:
        port = port_of(taken)
        said = f"{name}BindAddress 127.0.0.1:{port}: cannot listen: Address already in use, trying again every 0 s"
        found = serving(clock=lambda: monotonic() + now, **{f"{name}_address": f"127.0.0.1:{port}"})
        found.start()
        assert attempts.wait_for_many()
        assert caplog.messages == [said]
        now += 60.0
        assert attempts.wait_for_many()
        assert caplog.messages == [said] * 2
        now += 60.0
        assert attempts.wait_for_many()
        assert caplog.messages == [said] * 2, "the second pause is longer"
    wait_until(lambda: len(caplog.messages) > 2, "a line that says that the port is served")
    assert caplog.messages[2:] == [f"{name}BindAddress 127.0.0.1:{port}: listening now"]
    assert get(port, "/healthz")[0].status in {200, 503}
    found.stop()


def test_a_port_that_can_be_had_at_once_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    found = serving(metrics_address=f"127.0.0.1:{free_port()}")
    found.start()
    found.stop()
    assert caplog.messages == []
