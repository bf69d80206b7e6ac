"""Where one event of a stream ends and the next begins. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kproxy.kube.codec import protobuf
from kproxy.kube.codec.json_codec import read_line
from kproxy.kube.codec.watch_events import Event, UndecodableObject
from kproxy.model.delta import Kind

LONGEST_EVENT = 64 << 20
"""Bytes of one event. etcd takes objects of 1.5 MB unless told otherwise; JSON is no more than a few times that."""
_LENGTH = 4


class FramingError(ValueError):
    """An event that is longer than any can be: probably none at all. What follows it cannot be read either."""


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield each complete line without its end, as soon as it is there; what follows the last is dropped.

    Raises `FramingError`.
    """
    tail: list[bytes] = []  # joined once per line: a line of megabytes comes in thousands of pieces
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        tail.append(first)
        size += len(first)
        if size > LONGEST_EVENT:
            raise FramingError(f"Expected lines of at most {LONGEST_EVENT} bytes")
        if not others:
            continue
        yield b"".join(tail)
        yield from others[:-1]
        tail, size = [others[-1]], len(others[-1])


def split_frames(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what follows each length of 4 bytes, most significant first, as soon as it is complete.

    What follows the last complete frame is dropped. Raises `FramingError`.
    """
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        start = 0
        while len(waiting) >= start + _LENGTH:
            begin = start + _LENGTH
            size = int.from_bytes(waiting[start:begin], "big")
            if size > LONGEST_EVENT:
                raise FramingError(f"Expected frames of at most {LONGEST_EVENT} bytes, got one of {size}")
            if len(waiting) < begin + size:
                break
            start = begin + size
            yield bytes(waiting[begin:start])
        del waiting[:start]


JSON = "application/json"
"""What to accept of a list, and of everything from a server whose protobuf is of no use."""
WATCH = f"{protobuf.MEDIA_TYPE};stream=watch,{JSON}"
"""What to accept of a watch, best first: the API server takes the first it can do."""


class WatchStream(Protocol):
    """The response to a watch request."""

    @property
    def media_type(self) -> str:
        """Return the media type of the body in lower case and without parameters, or "" if it is unknown."""

    def chunks(self) -> Iterable[bytes]:
        """Return the body in pieces of any size, as they arrive."""


def read_events(kind: Kind, stream: WatchStream) -> Iterator[Event]:
    """Yield the events of a watch of `kind` as they arrive, until the watch ends.

    An event that cannot be decoded becomes an `UndecodableObject`. It is the last event if the start of the next one
    cannot be found. Raises only what `stream.chunks` raises.
    """
    try:
        if stream.media_type == protobuf.MEDIA_TYPE:
            yield from map(protobuf.FrameReader(kind).read, split_frames(stream.chunks()))
        else:
            yield from (read_line(kind, line) for line in split_lines(stream.chunks()) if line.strip())
    except FramingError as error:
        yield UndecodableObject("", "", "", str(error))
