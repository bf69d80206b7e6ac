"""Split the body of a watch into events and decode them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kproxy.kube.codec import protobuf
from kproxy.kube.codec.json_codec import LineReader
from kproxy.kube.codec.watch_events import Event
from kproxy.model.delta import Kind

ACCEPT_JSON = "application/json"
"""Accept header of lists.

A watch uses it too after the server has returned status 406, or after an event in which not even the object's name
could be decoded.
"""
ACCEPT_WATCH = f"{protobuf.MEDIA_TYPE};stream=watch,application/json"
"""Accept header of a watch, in order of preference: the API server uses the first media type that it supports."""
MAX_EVENT_BYTES = 16 << 20
"""Default maximum size of one event, in bytes.

By default, etcd accepts objects of up to 1.5 MB; their JSON is at most a few times larger.
"""
_LENGTH_BYTES = 4
"""Size of the length prefix that precedes each frame, in bytes."""


class FramingError(ValueError):
    """An event is larger than the maximum, probably because the stream is corrupt.

    The rest of the stream cannot be decoded.
    """


def split_lines(chunks: Iterable[bytes], limit: int = MAX_EVENT_BYTES) -> Iterator[bytes]:
    """Yield each line without its line feed as soon as it is complete. An incomplete last line is dropped.

    Raises `FramingError` for a line of more than `limit` bytes.
    """
    tail = bytearray()
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        if max(len(tail) + len(first), *map(len, others), 0) > limit:
            raise FramingError(f"an event exceeds the maximum of {limit} bytes")
        tail += first
        if not others:
            continue
        yield bytes(tail)
        yield from others[:-1]
        tail = bytearray(others[-1])


def split_frames(chunks: Iterable[bytes], limit: int = MAX_EVENT_BYTES) -> Iterator[bytes]:
    """Yield each frame, without its length prefix (4 bytes, big-endian), as soon as it is complete.

    An incomplete last frame is dropped. Raises `FramingError` for a frame of more than `limit` bytes.
    """
    tail: list[bytes] = []  # what was received of an incomplete frame
    received, needed = 0, _LENGTH_BYTES
    for chunk in chunks:
        received += len(chunk)
        if received < needed:
            tail.append(chunk)
            continue
        buffer = b"".join((*tail, chunk)) if tail else chunk
        position = 0
        while True:
            start = position + _LENGTH_BYTES
            if start > received:
                needed = _LENGTH_BYTES
                break
            size = int.from_bytes(buffer[position:start], "big")
            if size > limit:
                raise FramingError(f"an event of {size} bytes exceeds the maximum of {limit} bytes")
            if start + size > received:
                needed = _LENGTH_BYTES + size
                break
            position = start + size
            yield buffer[start:position]
        received -= position
        tail = [buffer[position:]] if received else []


class WatchStream(Protocol):
    """The response to a watch request."""

    @property
    def media_type(self) -> str:
        """Return the media type of the body in lower case and without parameters, or "" if it is unknown."""

    def chunks(self) -> Iterable[bytes]:
        """Return the body in pieces of any size, as they arrive.

        Iteration raises `IdleTimeoutError` and `TransportError`, like `ApiResponse.chunks`.
        """


def read_events(kind: Kind, stream: WatchStream, limit: int = MAX_EVENT_BYTES) -> Iterator[Event]:
    """Yield the events of a watch of `kind` as they arrive, until the watch ends.

    An event that cannot be decoded becomes an `UndecodableObject`. Raises `FramingError` for an event of more than
    `limit` bytes, and what `stream.chunks` raises.
    """
    if stream.media_type == protobuf.MEDIA_TYPE:
        yield from map(protobuf.FrameReader(kind).read, split_frames(stream.chunks(), limit))
    else:
        yield from map(LineReader(kind).read, filter(bytes.strip, split_lines(stream.chunks(), limit)))
