"""Splitting the body of a watch response into events: JSON lines and protobuf frames."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.kube.client.response import TransportError
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.streams import FramingError, read_events, split_frames, split_lines
from kproxy.kube.codec.watch_events import Deleted, Event
from kproxy.model.types import Service
from tests.apiserver import protobuf
from tests.apiserver.objects import service

ADDED = json.dumps({"type": "ADDED", "object": service("web", "10.96.7.1")}).encode()
DELETED = json.dumps({"type": "DELETED", "object": service("web", "10.96.7.1")}).encode()
LINES = ADDED + b"\n\n \r\n" + DELETED + b"\n"
FRAMES = protobuf.frame_of_line(ADDED) + protobuf.frame_of_line(DELETED)


@dataclass
class Body:
    """A watch response: its media type and the chunks of its body, which may end with an error."""

    media_type: str
    body: Iterable[bytes]

    def chunks(self) -> Iterable[bytes]:
        return self.body


def read(media_type: str, *chunks: bytes) -> list[Event]:
    return list(read_events(Service, Body(media_type, chunks)))


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 50), st.binary(max_size=3))
def test_frames_split_at_any_position(frames: list[bytes], size: int, rest: bytes) -> None:
    data = b"".join(protobuf.framed(frame) for frame in frames) + rest
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(split_frames(chunks)) == frames


@given(st.lists(st.binary(max_size=300).filter(lambda line: b"\n" not in line), max_size=6), st.integers(1, 50))
def test_lines_split_at_any_position(lines: list[bytes], size: int) -> None:
    data = b"".join(line + b"\n" for line in lines) + b"cut off"
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(split_lines(chunks)) == lines


def test_event_is_delivered_as_soon_as_it_is_complete() -> None:
    def chunks() -> Iterator[bytes]:
        yield FRAMES[:-1]
        raise TransportError("reset by peer")

    received = read_events(Service, Body(protobuf.MEDIA_TYPE, chunks()))
    assert isinstance(next(received), DecodedObject)
    with pytest.raises(TransportError):
        next(received)


@pytest.mark.parametrize("media_type", ["application/json", "", "text/plain"])
def test_lines_are_read_as_json(media_type: str) -> None:
    first, second = read(media_type, LINES)
    assert isinstance(first, DecodedObject)
    assert second == Deleted("demo", "web", "")


def test_frames_are_read_as_protobuf() -> None:
    assert read(protobuf.MEDIA_TYPE, FRAMES) == read("application/json", LINES)


@pytest.mark.parametrize("media_type", ["application/json", protobuf.MEDIA_TYPE])
@pytest.mark.parametrize("last", [b"\x7f" * 6000, b"\x7f" * 6000 + b"\n" + LINES])
def test_event_that_is_too_long_ends_the_stream(media_type: str, last: bytes) -> None:
    valid = LINES if media_type == "application/json" else FRAMES
    received = read_events(Service, Body(media_type, [valid, last]), limit=5000)
    assert isinstance(next(received), DecodedObject)
    assert isinstance(next(received), Deleted)
    with pytest.raises(FramingError, match="exceeds the maximum of 5000 bytes"):
        next(received)


def test_endless_line_is_not_buffered_forever() -> None:
    chunks_read = 0

    def endless() -> Iterator[bytes]:
        nonlocal chunks_read
        while True:
            chunks_read += 1
            yield b"x" * 1000

    with pytest.raises(FramingError):
        list(split_lines(endless(), limit=5000))
    assert chunks_read == 6
