"""Watch events and API server errors as plain values, independent of their encoding. Pure."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.object_error import ObjectError, must_be
from kproxy.kube.codec.schema import ApiStatus
from kproxy.model.printable_text import printable

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
"""Annotation of the bookmark that ends the initial events of a watch with `sendInitialEvents` (KEP-3157)."""
MAX_TEXT_LENGTH = 400
"""Maximum number of characters of a server's message that a log line quotes."""


class Deleted(Struct, frozen=True):
    """A DELETED event."""

    namespace: str
    name: str
    resource_version: str


class Bookmark(Struct, frozen=True):
    """A BOOKMARK event. `initial_events_end` is true for the bookmark that ends the initial events."""

    resource_version: str
    initial_events_end: bool


class Unchanged(Struct, frozen=True):
    """A MODIFIED event of an object in which nothing that kproxy uses differs from the object's previous event."""

    resource_version: str


class UndecodableObject(Struct, frozen=True):
    """An object that is invalid or cannot be decoded. `text` says why.

    `name` is "" if the object's name cannot be decoded either.
    """

    namespace: str
    name: str
    resource_version: str
    text: str


class ErrorStatus(Struct, frozen=True):
    """An HTTP response with a status other than 200, or an ERROR event.

    `retry_after` is the delay that the server asked for, in seconds. It is never negative or NaN, but may be infinite;
    it is 0 if the server did not send a usable delay.
    """

    code: int
    reason: str
    message: str
    retry_after: float = 0.0

    def __str__(self) -> str:
        """Return the error as one line."""
        return f"{self.code} {self.reason}: {self.message}" if self.reason else f"{self.code}: {self.message}"


Event: TypeAlias = DecodedObject | Unchanged | Deleted | Bookmark | UndecodableObject | ErrorStatus


def one_line(text: str) -> str:
    """Return text of unknown origin as one printable line, cut to `MAX_TEXT_LENGTH` characters."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= MAX_TEXT_LENGTH else flat[:MAX_TEXT_LENGTH] + "..."


def deleted_event(event_type: str, namespace: str, name: str, resource_version: str) -> Deleted:
    """Return a `Deleted` event. Raises `ObjectError` if `event_type` is not DELETED or the name is empty."""
    if event_type != "DELETED":
        raise must_be("one of ADDED, MODIFIED, DELETED, BOOKMARK, ERROR", event_type, "type")
    if not name:
        raise ObjectError("is missing", ("object", "metadata", "name"))
    return Deleted(namespace, name, resource_version)


def error_from_status(status: ApiStatus, code: int = 0, retry_after: float = 0.0) -> ErrorStatus:
    """Return the error that a Status describes.

    `code` and `retry_after` (in seconds) take precedence over the values in the Status, unless they are 0.
    """
    if not retry_after and status.details:
        retry_after = status.details.retry_after_seconds
    retry_after = retry_after if retry_after > 0 else 0.0  # also for NaN, which JSON does not have
    return ErrorStatus(
        code or status.code, one_line(status.reason), one_line(status.message) or "no message", retry_after
    )
