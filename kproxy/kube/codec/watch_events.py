"""What the API server tells of objects, in whatever form it was sent, as plain values."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.schema import ApiStatus

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
"""Marks the bookmark after the last initial event of a watch with `sendInitialEvents` (KEP-3157)."""
LONGEST_TEXT = 400
"""Characters of a server's message that are worth a log line."""


class Deleted(Struct, frozen=True):
    """A DELETED event."""

    namespace: str
    name: str
    resource_version: str


class Bookmark(Struct, frozen=True):
    """A BOOKMARK event; `ends_initial` is true for the one that ends the initial events."""

    resource_version: str
    ends_initial: bool


class UndecodableObject(Struct, frozen=True):
    """An object that could not be decoded. `name` is "" if not even that could be read."""

    namespace: str
    name: str
    resource_version: str
    text: str


class ErrorStatus(Struct, frozen=True):
    """An HTTP status other than 200, or an ERROR event. `retry_after` is in seconds, 0 if not given."""

    code: int
    reason: str
    message: str
    retry_after: float = 0.0

    def __str__(self) -> str:
        """Return the refusal on one line."""
        return f"{self.code} {self.reason}: {self.message}" if self.reason else f"{self.code}: {self.message}"


Event: TypeAlias = DecodedObject | Deleted | Bookmark | UndecodableObject | ErrorStatus


def one_line(text: str) -> str:
    """Return a text of unknown origin as one line of bearable length."""
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST_TEXT else flat[:LONGEST_TEXT] + "..."


def refusal_of(status: ApiStatus, code: int, retry_after: float) -> ErrorStatus:
    """Return what a Status says; `code` and `retry_after`, in seconds, come before its own unless they are 0."""
    if not retry_after and status.details:
        retry_after = max(0.0, status.details.retry_after_seconds)
    return ErrorStatus(
        code or status.code, one_line(status.reason), one_line(status.message) or "no message", retry_after
    )
