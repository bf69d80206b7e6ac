"""What passes between the list/watch state machine and what sends its requests."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from kproxy.kube.streams import JSON
from kproxy.model.delta import Delta, Kind


class Request(Struct, frozen=True):
    """A GET: path, query parameters, whether the answer is a watch or a page (one body), and its media types."""

    path: str
    params: dict[str, str]
    watch: bool
    accept: str = JSON


class Problem(Struct, frozen=True):
    """An object that cannot be used. Its earlier state, if any, stays; `name` is "" where it is unknown."""

    kind: Kind
    namespace: str
    name: str
    text: str


class LeftOut(Struct, frozen=True):
    """Parts of an object that are of no use and left out; `text` says which and why."""

    kind: Kind
    namespace: str
    name: str
    text: str


Message: TypeAlias = Delta | Problem | LeftOut


class Step(Struct, frozen=True):
    """What follows from an answer.

    `again_after` is None while the present connection goes on; otherwise it is to be closed, and the next
    request sent after that many seconds. `renew` asks for new credentials before that.
    """

    messages: tuple[Message, ...] = ()
    again_after: float | None = None
    renew: bool = False
