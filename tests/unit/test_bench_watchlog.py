"""The benchmark's log of watch events written by its API server."""

from __future__ import annotations

import socket
import time

import pytest

from tests.bench.watchlog import LoggedSocket, WatchLog, WatchTraffic

ADDED = b'1c\r\n{"type":"ADDED","object":{}}\n\r\n'
FRAME = b"7\r\n\0\0\0\x0a\n\5ADDED\x12\1x\r\n"
BOOKMARK = ADDED.replace(b"ADDED", b"BOOKMARK")


def test_events_are_counted_with_first_and_last_time() -> None:
    log = WatchLog()
    before = time.monotonic_ns()
    log.record(ADDED)
    between = time.monotonic_ns()
    log.record(ADDED.replace(b"ADDED", b"DELETED"))
    drained = log.drain()
    assert (drained.events, drained.bytes) == (2, 2 * len(ADDED) + 2)
    assert before <= drained.first <= between <= drained.last <= time.monotonic_ns()


def test_protobuf_and_json_events_are_distinguished() -> None:
    log = WatchLog()
    for data in (ADDED, FRAME, FRAME.replace(b"\5ADDED", b"\7DELETED"), FRAME.replace(b"\5ADDED", b"\x08MODIFIED")):
        log.record(data)
    drained = log.drain()
    assert (drained.events, drained.protobuf) == (4, 3)


@pytest.mark.parametrize(
    "data",
    [
        BOOKMARK,
        FRAME.replace(b"\5ADDED", b"\x08BOOKMARK"),
        b"HTTP/1.1 200 OK\r\n\r\n",
        b'{"kind":"ServiceList","type":"ADDED"}',
        b"0\r\n\r\n",
    ],
)
def test_bookmarks_and_other_data_are_not_counted(data: bytes) -> None:
    log = WatchLog()
    log.record(data)
    assert log.drain() == WatchTraffic()


def test_take_resets_the_log() -> None:
    log = WatchLog()
    log.record(ADDED)
    log.drain()
    assert log.drain() == WatchTraffic()


def test_logged_socket_sends_data() -> None:
    log = WatchLog()
    near, far = socket.socketpair()
    with far, LoggedSocket(near, log) as logged:
        logged.sendall(ADDED)
        assert far.recv(1000) == ADDED
    assert log.drain().events == 1
