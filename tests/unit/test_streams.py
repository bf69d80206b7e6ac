"""From the bytes of a watch to events: where each ends, and which reader gets it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.kube.client.response import TransportError
from kproxy.kube.codec import streams as framing
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.streams import FramingError, read_events, split_frames, split_lines
from kproxy.kube.codec.watch_events import Deleted, Event, UndecodableObject
from kproxy.model.types import Service
from tests.apiserver import protobuf
from tests.apiserver.objects import service

ADDED = json.dumps({"type": "ADDED", "object": service("web", "10.96.7.1")}).encode()
DELETED = json.dumps({"type": "DELETED", "object": service("web", "10.96.7.1")}).encode()
LINES = ADDED + b"\n\n \r\n" + DELETED + b"\n"
FRAMES = protobuf.frame_of_line(ADDED) + protobuf.frame_of_line(DELETED)


@dataclass
class Body:
    """A watch with this type whose body comes in these pieces, maybe with an error after them."""

    media_type: str
    pieces: Iterable[bytes]

    def chunks(self) -> Iterable[bytes]:
        return self.pieces


def read(media_type: str, *pieces: bytes) -> list[Event]:
    return list(read_events(Service, Body(media_type, pieces)))


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 50), st.binary(max_size=3))
def test_frames_wherever_the_pieces_end(frames: list[bytes], size: int, rest: bytes) -> None:
    data = b"".join(protobuf.framed(frame) for frame in frames) + rest
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(split_frames(pieces)) == frames


@given(st.lists(st.binary(max_size=300).filter(lambda line: b"\n" not in line), max_size=6), st.integers(1, 50))
def test_lines_wherever_the_pieces_end(lines: list[bytes], size: int) -> None:
    data = b"".join(line + b"\n" for line in lines) + b"cut off"
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(split_lines(pieces)) == lines


def test_an_event_is_there_as_soon_as_it_is_complete() -> None:
    def pieces() -> Iterator[bytes]:
        yield FRAMES[:-1]
        raise TransportError("reset by peer")

    events = read_events(Service, Body(protobuf.MEDIA_TYPE, pieces()))
    assert isinstance(next(events), DecodedObject)
    with pytest.raises(TransportError):
        next(events)


@pytest.mark.parametrize("media_type", ["application/json", "", "text/plain"])
def test_lines_are_read_as_json(media_type: str) -> None:
    first, second = read(media_type, LINES)
    assert isinstance(first, DecodedObject)
    assert second == Deleted("demo", "web", "")


def test_frames_are_read_as_protobuf() -> None:
    assert read(protobuf.MEDIA_TYPE, FRAMES) == read("application/json", LINES)


@pytest.mark.parametrize("media_type", ["application/json", protobuf.MEDIA_TYPE])
def test_what_is_longer_than_any_event_ends_them(monkeypatch: pytest.MonkeyPatch, media_type: str) -> None:
    monkeypatch.setattr(framing, "MAX_EVENT_BYTES", 5000)
    good = LINES if media_type == "application/json" else FRAMES
    *before, last = read(media_type, good, b"\x7f" * 6000, good)
    assert len(before) == 2
    assert isinstance(last, UndecodableObject)
    assert "exceeds the maximum of 5000 bytes" in last.text
    assert not last.name


def test_a_line_without_end_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_EVENT_BYTES", 5000)
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 1000

    with pytest.raises(FramingError):
        list(split_lines(endless()))
    assert taken == 6
