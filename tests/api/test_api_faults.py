"""Faults of the API server that must neither stop the updates nor use up memory."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.listwatch.api_source import STALE_SECONDS, ApiSource
from kproxy.model.types import Service
from tests.api.conftest import Received, StartSource
from tests.apiserver import ApiServer
from tests.apiserver.objects import node, service
from tests.lab.waiting import HANG_GUARD, wait_until

HEADERS = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\n\r\n"


@contextmanager
def endless_server(head: bytes, piece: bytes) -> Iterator[int]:
    """Run a server that answers every request with `head` and then `piece`, forever. Yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_connections: list[socket.socket] = []

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.recv(1 << 16)
            connection.sendall(head)
            while True:
                connection.sendall(piece)

    def accept() -> None:
        with suppress(OSError):
            while True:
                open_connections.append(listener.accept()[0])
                threading.Thread(target=answer, args=(open_connections[-1],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        for each in (listener, *open_connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


CLIENT = """
import queue, resource, sys, threading
from kproxy.kube.client.client import ApiClient
from kproxy.kube.listwatch.api_source import ApiSource

errors = queue.SimpleQueue()
source = ApiSource(ApiClient.from_config(None, sys.argv[1]), "node-1", print,
    max_page_bytes=8 << 20, max_event_bytes=4 << 20, on_error=lambda kind, reason: errors.put((kind, reason)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.start()
for _ in range(9):
    print(*errors.get(timeout=60))
source.stop(1)
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize(
    ("head", "piece", "reason"),
    [
        (HEADERS % (500, b"text/html"), b"a" * (1 << 20), "status"),
        (HEADERS % (200, b"application/json"), b"a" * (1 << 20), "size"),
        (HEADERS % (200, b"application/vnd.kubernetes.protobuf;stream=watch"), b"\x00\xff\xff\xff" * 65536, "size"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"y" * 1000 + b"\r\n", "connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1" * 65536, "connection"),
        (HEADERS % (200, b"application/json"), b'{"type":"WHAT"}\n' * 65536, "decoding"),
    ],
    ids=["error body", "line", "frame", "headers", "chunk size", "events"],
)
def test_endless_response_does_not_use_up_memory(head: bytes, piece: bytes, reason: str) -> None:
    with endless_server(head, piece) as port:
        command = [sys.executable, "-c", CLIENT, f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * HANG_GUARD, check=False)
    *errors, grown = done.stdout.splitlines()
    assert {line.split()[1] for line in errors} == {reason}, done.stderr
    assert int(grown.split()[-1]) < 60, "MiB, for the four watches of a source"


def large(name: str, size: int) -> dict[str, Any]:
    body = service(name, "10.96.7.2")
    body["metadata"]["annotations"] = {"large": "x" * size}
    return body


@pytest.mark.parametrize("protobuf", ["supported", "ignored"])
def test_large_event_makes_the_source_list_in_pages(
    server: ApiServer,
    start_source: StartSource,
    received: Received,
    caplog: pytest.LogCaptureFixture,
    protobuf: Literal["supported", "ignored"],
) -> None:
    server.faults.protobuf = protobuf
    server.create(service("web", "10.96.7.1"))
    errors: list[tuple[str, str]] = []
    start_source(server, max_event_bytes=20_000, on_error=lambda *error: errors.append(error))
    received.until_listed()
    server.create(large("large", 30_000))
    received.until(lambda _: received.names(Service) == {"web", "large"})
    assert ("Service", "size") in errors
    assert "must relist services in pages: an event" in caplog.text
    assert "exceeds the maximum of 20000 bytes" in caplog.text
    server.create(service("next", "10.96.7.3"))
    received.until(lambda _: received.names(Service) == {"web", "large", "next"})


def test_large_list_is_read_in_smaller_pages(
    server: ApiServer, start_source: StartSource, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    server.set_watch_list("forbidden")
    for number in range(8):
        server.create(large(f"large-{number}", 10_000))
    errors: list[tuple[str, str]] = []
    start_source(server, max_page_bytes=50_000, on_error=lambda *error: errors.append(error))
    received.until(lambda _: len(received.names(Service)) == 8)
    assert [reason for kind, reason in errors if kind == "Service"] == ["status", "size", "size", "size"]
    limits = [request.query.get("limit") for request in server.requests.all() if request.path == "/api/v1/services"]
    assert [limit for limit, _ in itertools.groupby(limits)][:5] == [None, "500", "100", "20", "4"]
    assert "cannot list services: the response exceeds the maximum of 50000 bytes; listing 4 objects" in caplog.text


def test_unexpected_errors_are_logged_once_and_do_not_stop_the_source(
    server: ApiServer, received: Received, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.01)
    server.create(service("web", "10.96.7.1"))
    client = ApiClient.from_config(None, server.url)
    failures = [OverflowError("too big"), OverflowError("too big"), MemoryError()]
    get = client.get

    def failing(*args: object, **options: object) -> object:
        if failures:
            raise failures.pop(0)
        return get(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "get", failing)
    server.tokens = set()
    source = ApiSource(client, "node-1", received.put, kinds=[Service])
    source.start()
    received.until(lambda _: received.names(Service) == {"web"})
    source.stop(1.0)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "watch of services: unexpected OverflowError('too big'); trying again",
        "watch of services: unexpected MemoryError(); trying again",
    ]


def test_age_of_the_objects(server: ApiServer, start_source: StartSource, received: Received) -> None:
    server.bookmark_interval = 0.05
    server.create(node("node-1"))
    source = start_source(server)
    received.until_listed()
    assert set(source.ages()) == {"Service", "EndpointSlice", "Node"}
    for reflector in source._reflectors:
        reflector.last_contact -= 2 * STALE_SECONDS
    wait_until(lambda: max(source.ages().values()) < 10.0, "bookmarks of all kinds")
    assert source.status() == {}
    source.stop(HANG_GUARD)
    for reflector in source._reflectors:
        reflector.last_contact -= 2 * STALE_SECONDS
    assert source.status() == {"apiStaleSeconds": int(2 * STALE_SECONDS)}


def test_data_without_a_complete_event_does_not_count_as_contact(received: Received) -> None:
    with endless_server(HEADERS % (200, b"application/json"), b" ") as port:
        errors: list[str] = []
        client = ApiClient.from_config(None, f"http://127.0.0.1:{port}")
        source = ApiSource(
            client,
            "node-1",
            received.put,
            kinds=[Service],
            max_event_bytes=1 << 16,
            on_error=lambda _, reason: errors.append(reason),
        )
        created = source._reflectors[0].last_contact
        source.start()
        wait_until(lambda: errors, "an error")
        source.stop(HANG_GUARD)
        assert source._reflectors[0].last_contact == created
