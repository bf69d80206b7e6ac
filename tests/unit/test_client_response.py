"""HTTP responses and streams of the API server, intact and broken, over real sockets."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import threading
from pathlib import Path

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.response import ApiResponse, BodyTooLargeError, IdleTimeoutError, TransportError
from kproxy.kube.codec.streams import split_lines
from tests.apiserver import ApiServer
from tests.apiserver.objects import endpoint_slice, service
from tests.lab.waiting import HANG_GUARD
from tests.unit.client_fixtures import (
    SERVICES,
    ScriptedServer,
    certificates,
    get,
    kubeconfig,
    server,
    server_context,
)

__all__ = ["certificates", "server"]


@pytest.fixture
def client(tmp_path: Path, server: ApiServer) -> ApiClient:
    return ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"token": "secret"}))


def test_large_lists_are_compressed_and_watches_are_not(server: ApiServer, client: ApiClient) -> None:
    server.create(endpoint_slice("big", "web", [f"10.{i // 250}.0.{i % 250}" for i in range(5000)]))
    path = "/apis/discovery.k8s.io/v1/endpointslices"
    with client.get(path, {}, HANG_GUARD) as response:
        assert response.headers["content-encoding"] == "gzip"
        assert len(json.loads(response.read())["items"][0]["endpoints"]) == 5000
    with client.get(path, {"watch": "1"}, HANG_GUARD) as watch:
        line = next(split_lines(watch.chunks()))
        assert len(json.loads(line)["object"]["endpoints"]) == 5000
    encodings = [request.headers["Accept-Encoding"] for request in server.requests.all()]
    assert encodings == ["gzip", "identity"]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\n"
"""Headers of a response whose body ends when the server closes the connection."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_lines(pieces: list[bytes], *, close: bool = True, timeout: float = HANG_GUARD) -> tuple[list[bytes], str]:
    """Return the lines that a client reads from these pieces, and the name of the exception that ends reading, if any.

    `close` is whether the server closes the connection after the last piece.
    """
    lines: list[bytes] = []
    with ScriptedServer(pieces, close=close) as server:
        client = ApiClient.from_config(None, server.url)
        try:
            with client.get("/", {"watch": "1"}, timeout) as response:
                lines.extend(split_lines(response.chunks()))
        except TransportError as error:
            return lines, type(error).__name__
    return lines, ""


TEXT = '{"name":"größe"}\n{"name":"名前"}\n\n{"name":"' + "x" * 3_000_000 + '"}\n{"cut":'
LINES = TEXT.encode().split(b"\n")[:-1]


@pytest.mark.parametrize("size", [7, 1000, 65536, 10_000_000])
def test_lines_are_independent_of_chunk_boundaries(size: int) -> None:
    data = TEXT.encode()
    if size == 7:
        data = data[:60] + data[-20:]
    pieces = [chunk(data[start : start + size]) for start in range(0, len(data), size)]
    expected = data.split(b"\n")[:-1]
    assert read_lines([CHUNKED, *pieces, chunk(b"")]) == (expected, "")


def test_lines_of_a_response_without_chunked_encoding() -> None:
    assert read_lines([UNTIL_CLOSE, TEXT.encode()]) == (LINES, "")


def test_line_is_available_as_soon_as_it_is_complete() -> None:
    for headers, encode in ((CHUNKED, chunk), (UNTIL_CLOSE, bytes)):
        lines, error = read_lines([headers, encode(b"one\ntwo\nthr")], close=False, timeout=0.3)
        assert (lines, error) == ([b"one", b"two"], "IdleTimeoutError")


@pytest.mark.parametrize(
    "pieces",
    [
        [CHUNKED, chunk(b"one\n"), b"ff\r\nabc"],
        [CHUNKED, chunk(b"one\n")],
        [CHUNKED, chunk(b"one\n"), b"no number\r\n"],
    ],
)
def test_broken_stream_is_an_error(pieces: list[bytes]) -> None:
    assert read_lines(pieces) == ([b"one"], "TransportError")


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"no HTTP at all\r\n\r\n",
        b"",
    ],
)
def test_broken_responses_are_errors_of_one_line(response: bytes) -> None:
    with ScriptedServer([response]) as server, pytest.raises(TransportError) as caught:
        get(ApiClient.from_config(None, server.url))
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_idle_timeout_before_the_headers() -> None:
    with ScriptedServer([], close=False) as server:
        client = ApiClient.from_config(None, server.url)
        with pytest.raises(IdleTimeoutError):
            client.get("/", {}, 0.2)


def test_repeated_connection_errors_have_the_same_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = ApiClient.from_config(None, f"http://127.0.0.1:{port}")
    messages = set()
    for _ in range(2):
        with pytest.raises(TransportError) as caught:
            get(client)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "Connection refused" in messages.pop()


def test_redirects_are_not_followed() -> None:
    response = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with ScriptedServer([response]) as server:
        assert get(ApiClient.from_config(None, server.url))[0] == 302


def gzip_response(body: bytes, *, chunked: bool) -> bytes:
    headers = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"
    if chunked:
        return headers + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(body) + chunk(b"")
    return headers + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("chunked", [False, True])
def test_compressed_body_of_several_members(chunked: bool) -> None:
    first, second = TEXT.encode(), b"x" * 1_000_000
    body = gzip.compress(first) + gzip.compress(second)
    with ScriptedServer([gzip_response(body, chunked=chunked)]) as server:
        assert get(ApiClient.from_config(None, server.url)) == (200, first + second)


def test_body_that_expands_too_much_is_not_decompressed_completely() -> None:
    bomb = gzip.compress(b"a" * (64 << 20))
    with ScriptedServer([gzip_response(bomb, chunked=False)]) as server:
        client = ApiClient.from_config(None, server.url)
        with client.get("/", {}, HANG_GUARD) as response:
            assert max(map(len, itertools.islice(response.chunks(), 20))) <= 1 << 16
    with ScriptedServer([gzip_response(bomb, chunked=False)]) as server:
        client = ApiClient.from_config(None, server.url)
        with client.get("/", {}, HANG_GUARD) as response, pytest.raises(BodyTooLargeError, match="of 1000000 bytes"):
            response.read(1_000_000)


@pytest.mark.parametrize("headers", [CHUNKED, UNTIL_CLOSE])
def test_body_that_is_too_large_is_an_error_before_it_ends(headers: bytes) -> None:
    body = b"x" * 300_000
    pieces = [headers, chunk(body) if headers is CHUNKED else body]
    with ScriptedServer(pieces, close=False) as server:
        client = ApiClient.from_config(None, server.url)
        with client.get("/", {}, HANG_GUARD) as response:
            assert response.read_start(1000) == b"x" * 1000
    with ScriptedServer(pieces, close=False) as server:
        client = ApiClient.from_config(None, server.url)
        with client.get("/", {}, HANG_GUARD) as response, pytest.raises(BodyTooLargeError):
            response.read(200_000)


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(5000)) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        CHUNKED + b"1" * 1_000_000 + b"\r\n",
        CHUNKED + b"1;" + b"x" * 1_000_000 + b"\r\nx\r\n",
        CHUNKED + b"0\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
        gzip_response(gzip.compress(b"{}")[:-4], chunked=False),
    ],
    ids=["headers", "header", "chunk size", "chunk extension", "trailer", "encoding", "gzip cut off"],
)
def test_oversized_or_unsupported_parts_of_a_response_are_errors(response: bytes) -> None:
    with ScriptedServer([response]) as server, pytest.raises(TransportError) as caught:
        get(ApiClient.from_config(None, server.url))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("tls", [False, True])
def test_close_from_another_thread_ends_a_read(certificates: Path, tmp_path: Path, tls: bool) -> None:
    with ApiServer(tls=server_context(certificates) if tls else None) as server:
        server.create(service("web", "10.96.7.1"))
        cluster = {"insecure-skip-tls-verify": True}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {}, cluster))
        response = client.get(SERVICES, {"watch": "1"}, HANG_GUARD)
        outcomes = close_during_read(response)
        assert len(outcomes) == 1


def close_during_read(response: ApiResponse) -> list[TransportError | None]:
    """Close a watch while another thread reads it. Return how the read ended: None, or with an error."""
    outcomes: list[TransportError | None] = []
    lines = split_lines(response.chunks())
    next(lines)

    def read() -> None:
        try:
            outcomes.extend(None for _ in lines)
            outcomes.append(None)
        except TransportError as error:
            outcomes.append(error)
        finally:
            response.release()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    response.close()
    reader.join(HANG_GUARD)
    assert not reader.is_alive()
    response.close()
    return outcomes


def test_idle_connections_have_tcp_keepalive(client: ApiClient) -> None:
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    with client.get(SERVICES, {"watch": "1"}, HANG_GUARD) as response:
        sock = response._raw.connection.sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [30, 10, 3]


@pytest.mark.parametrize(("excess", "reused"), [(b"", True), (b"unexpected", False)])
def test_connection_is_used_again_after_a_complete_chunked_body(excess: bytes, reused: bool) -> None:
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while len(connections) < 2 - reused:
                connections.append(listener.accept()[0])
                for _ in range(1 + reused):
                    connections[-1].recv(1 << 16)
                    connections[-1].sendall(CHUNKED + chunk(b"one\n") + chunk(b"two\n") + chunk(b"") + excess)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        client = ApiClient.from_config(None, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for _ in range(2):
            with client.get("/", {"watch": "1"}, HANG_GUARD) as response:
                assert list(split_lines(response.chunks())) == [b"one", b"two"]
        server.join(HANG_GUARD)
        assert not server.is_alive()
        assert len(connections) == 2 - reused
    for each in connections:
        each.close()
