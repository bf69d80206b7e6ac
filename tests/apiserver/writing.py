"""The two encodings of a watch: JSON lines and protobuf frames."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Protocol

from tests.apiserver import protobuf
from tests.apiserver.resources import Resource
from tests.apiserver.selectors import Stored


class Writer(Protocol):
    content_type: str
    partial_event: bytes
    """The first bytes of an event, for a connection that breaks in the middle of it."""

    def event(self, change: str, body: dict[str, Any]) -> bytes:
        """Encode an event. `body` includes kind and apiVersion."""

    def stored(self, change: str, resource: Resource, item: Stored) -> bytes:
        """Encode an event with a stored object."""

    def injected(self, line: bytes) -> bytes:
        """Encode a line that a test injects. A line that is not JSON becomes garbage in this encoding."""


class JsonWriter:
    content_type = "application/json"
    partial_event = b'{"type":"MODIFIED","object":{"kind":"Serv'

    def event(self, change: str, body: dict[str, Any]) -> bytes:
        return json.dumps({"type": change, "object": body}, separators=(",", ":")).encode() + b"\n"

    def stored(self, change: str, resource: Resource, item: Stored) -> bytes:
        head = f'{{"type":"{change}","object":{{"kind":"{resource.kind}","apiVersion":"{resource.api_version}",'
        return head.encode() + item.raw[1:] + b"}\n"

    def injected(self, line: bytes) -> bytes:
        return line + b"\n"


class ProtobufWriter:
    content_type = f"{protobuf.MEDIA_TYPE};stream=watch"
    partial_event = b"\0\0\1\0\n\x08MODIFIED\x12\xf2\1k8s"

    def event(self, change: str, body: dict[str, Any]) -> bytes:
        return protobuf.frame(change, body)

    def stored(self, change: str, resource: Resource, item: Stored) -> bytes:
        return _frame_of_stored(change, resource, item.raw)

    def injected(self, line: bytes) -> bytes:
        try:
            return protobuf.frame_of_line(line)
        except (ValueError, LookupError, TypeError):
            return protobuf.framed(line)


@lru_cache(maxsize=1 << 17)
def _frame_of_stored(change: str, resource: Resource, raw: bytes) -> bytes:
    head = {"kind": resource.kind, "apiVersion": resource.api_version}
    return protobuf.frame(change, head | json.loads(raw))


def accepts_protobuf(accept: str) -> bool:
    """Return whether a server that supports both encodings answers with protobuf: the first supported one wins."""
    types = [clause.partition(";")[0].strip().lower() for clause in accept.split(",")]
    known = [name for name in types if name in {protobuf.MEDIA_TYPE, "application/json", "application/*", "*/*"}]
    return known[:1] == [protobuf.MEDIA_TYPE]
