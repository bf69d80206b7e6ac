"""Events (`events.k8s.io/v1`) as values: what they hold, which are worth writing, what the API server's answer means.

Pure: moments are passed in. `at` is in seconds of a clock that never goes back, `wall` in nanoseconds since the epoch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from kproxy.model.types import ServiceKey

EventType: TypeAlias = Literal["Normal", "Warning"]
Verdict: TypeAlias = Literal["written", "again", "renew", "refused"]
CONTROLLER = "kube-proxy"
"""`reportingController`, by which existing alerts and filters know the events of a service proxy."""
WINDOW = 360.0
"""Seconds within which the same event is counted, not written again (as long as client-go waits for a series)."""
BURST = 25
"""How many events may be written at once."""
REFILL_SECONDS = 5.0
"""After how many seconds one more may be written."""
MOST_REMEMBERED = 500
"""Of how many different events it is remembered when they were last written."""
LONGEST_NOTE = 1024
LONGEST_INSTANCE = 128
LONGEST_NAME = 253
"""The API server's limits, in bytes (validation of `events.k8s.io/v1`; object names are DNS subdomains)."""


class ObjectReference(Struct, frozen=True):
    """The object that an event is about; `namespace` is "" for one that has none."""

    kind: str
    name: str
    namespace: str
    uid: str


class EventOccurrence(Struct, frozen=True):
    """Something that happened at one moment."""

    regarding: ObjectReference
    event_type: EventType
    reason: str
    action: str
    note: str
    at: float
    wall: int

    @property
    def identity(self) -> tuple[ObjectReference, str, str, str, str]:
        """What two occurrences of the same event have in common: everything but the moment."""
        return self.regarding, self.event_type, self.reason, self.action, self.note


class EventReport(Struct, frozen=True):
    """An event to write: the latest occurrence, when the first was that it stands for, and how many these are."""

    latest: EventOccurrence
    first_wall: int
    count: int


def node_reference(name: str) -> ObjectReference:
    """Return the reference to a Node. As kube-proxy's and the kubelet's it has the name as `uid`."""
    return ObjectReference("Node", name, "", name)


def service_reference(key: ServiceKey) -> ObjectReference:
    """Return the reference to a Service. As kube-proxy's it has `namespace/name` as `uid`."""
    namespace, _, name = key.partition("/")
    return ObjectReference("Service", name, namespace, key)


class TokenBucket:
    """Lets `burst` through at once, and after that one in `refill_seconds`."""

    def __init__(self, burst: int, refill_seconds: float) -> None:
        self._burst = burst
        self._refill_seconds = refill_seconds
        self._tokens = float(burst)
        self._filled_at = float("-inf")

    def take(self, now: float) -> bool:
        """Tell whether one more may pass at `now`, and if so count it."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) / self._refill_seconds)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class _EventSeries(Struct):
    written_at: float = float("-inf")
    first_wall: int = 0
    waiting: int = 0


class EventCorrelator:
    """Decides which occurrences are written, and counts the others.

    The same event is written once in `WINDOW`, and all events together not faster than the token bucket allows. What
    was held back is counted by the next event of the same identity that is written.
    """

    def __init__(self) -> None:
        self._bucket = TokenBucket(BURST, REFILL_SECONDS)
        self._known: dict[tuple[ObjectReference, str, str, str, str], _EventSeries] = {}

    def admit(self, occurrence: EventOccurrence) -> EventReport | None:
        """Return the event to write now for an occurrence, None if it is only counted."""
        memory = self._known.pop(occurrence.identity, None) or _EventSeries()
        self._known[occurrence.identity] = memory
        if len(self._known) > MOST_REMEMBERED:
            del self._known[next(iter(self._known))]  # the one that has not occurred for longest
        memory.waiting += 1
        if memory.waiting == 1:
            memory.first_wall = occurrence.wall
        if occurrence.at - memory.written_at < WINDOW or not self._bucket.take(occurrence.at):
            return None
        report = EventReport(occurrence, memory.first_wall, memory.waiting)
        memory.written_at, memory.waiting = occurrence.at, 0
        return report


def event_path(regarding: ObjectReference) -> str:
    """Return the path of the API that events about an object are posted to."""
    return f"/apis/events.k8s.io/v1/namespaces/{_namespace(regarding)}/events"


def event_object(report: EventReport, node_name: str) -> dict[str, Any]:
    """Return the Event of a report, in the form that client-go's `tools/events` gives it.

    Its name ends in the moment, so that no two are the same. What is too long for the API server is cut.
    """
    latest = report.latest
    regarding = {"apiVersion": "v1", "kind": latest.regarding.kind, "name": latest.regarding.name}
    if latest.regarding.namespace:
        regarding["namespace"] = latest.regarding.namespace
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": _name(latest), "namespace": _namespace(latest.regarding)},
        "eventTime": micro_time(report.first_wall),
        "reportingController": CONTROLLER,
        "reportingInstance": _cut(f"{CONTROLLER}-{node_name}", LONGEST_INSTANCE),
        "action": latest.action,
        "reason": latest.reason,
        "regarding": regarding | {"uid": latest.regarding.uid},
        "type": latest.event_type,
        "note": _note(latest.note),
    }
    if report.count > 1:
        event["series"] = {"count": report.count, "lastObservedTime": micro_time(latest.wall)}
    return event


def micro_time(wall: int) -> str:
    """Return a moment as the API's type MicroTime: RFC 3339 with six digits after the point, in UTC."""
    seconds, nanoseconds = divmod(wall, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1000:06}Z"


def verdict(status: int) -> Verdict:
    """Return what an answer's HTTP status means for the event that was sent.

    `again` is worth another try, `renew` one with fresh credentials, `refused` none. A conflict says that an earlier
    try had arrived although its answer had not.
    """
    if status in range(200, 300) or status == 409:
        return "written"
    if status == 401:
        return "renew"
    return "again" if status == 429 or status >= 500 else "refused"


def _namespace(regarding: ObjectReference) -> str:
    return regarding.namespace or "default"


def _name(occurrence: EventOccurrence) -> str:
    end = f".{occurrence.wall:x}"
    return _cut(occurrence.regarding.name, LONGEST_NAME - len(end)).rstrip("-.") + end


def _note(text: str) -> str:
    cut = _cut(text, LONGEST_NOTE)
    return cut if len(cut) == len(text) else _cut(text, LONGEST_NOTE - 3) + "..."


def _cut(text: str, limit: int) -> str:
    """Return as much of the start of a text as has room in so many bytes of UTF-8."""
    return text.encode(errors="replace")[:limit].decode(errors="ignore")
