"""From the bytes of a watch to its events, in whichever form the server chose to send them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from kproxy.kube import protobuf
from kproxy.kube.answers import read_line
from kproxy.kube.changes import Event, Unreadable
from kproxy.kube.framing import FramingError
from kproxy.model.delta import Kind

JSON = "application/json"
"""What to accept of a list, and of everything from a server whose protobuf is of no use."""

WATCH = f"{protobuf.MEDIA_TYPE};stream=watch,{JSON}"
"""What to accept of a watch, best first: the API server takes the first it can do."""


class Stream(Protocol):
    """An open watch: its type, and its body in either of two ways to cut it up."""

    @property
    def media_type(self) -> str:
        """Return the type of the body in lower case, without parameters, "" if it is unknown."""

    def lines(self) -> Iterator[bytes]:
        """Yield the body's lines."""

    def frames(self) -> Iterator[bytes]:
        """Yield the body's frames."""


def read_events(kind: Kind, stream: Stream) -> Iterator[Event]:
    """Yield the events of a watch of `kind` as they come, until it ends.

    What cannot be read is an `Unreadable`, the last event if nothing after it can be found. Raises only what
    reading the stream does.
    """
    try:
        if stream.media_type == protobuf.MEDIA_TYPE:
            yield from map(protobuf.FrameReader(kind).read, stream.frames())
        else:
            yield from (read_line(kind, line) for line in stream.lines() if line.strip())
    except FramingError as error:
        yield Unreadable("", "", "", str(error))
