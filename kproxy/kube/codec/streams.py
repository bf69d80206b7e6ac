"""Split the body of a watch into events and decode them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kproxy.kube.codec import protobuf
from kproxy.kube.codec.json_codec import read_line
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
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        frame_end = 0
        while len(buffer) >= frame_end + _LENGTH_BYTES:
            start = frame_end + _LENGTH_BYTES
            size = int.from_bytes(buffer[frame_end:start], "big")
            if size > limit:
                raise FramingError(f"an event of {size} bytes exceeds the maximum of {limit} bytes")
            if len(buffer) < start + size:
                break
            frame_end = start + size
            yield bytes(buffer[start:frame_end])
        del buffer[:frame_end]


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
        yield from (read_line(kind, line) for line in split_lines(stream.chunks(), limit) if line.strip())
