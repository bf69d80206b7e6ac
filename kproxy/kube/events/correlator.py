"""Kubernetes Events (`events.k8s.io/v1`): deduplication, rate limit, API objects and HTTP outcomes. Pure.

Callers pass the time: `at` is the monotonic time in seconds, and `wall` is in nanoseconds since the epoch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from kproxy.kube.codec.conversion import is_subdomain
from kproxy.model.delta import Kind
from kproxy.model.printable_text import printable
from kproxy.model.types import ServiceKey

API_VERSIONS = {"EndpointSlice": "discovery.k8s.io/v1", "ServiceCIDR": "networking.k8s.io/v1"}
"""The `apiVersion` of each kind that events are about, except for kinds of the core group (`v1`)."""
EventType: TypeAlias = Literal["Normal", "Warning"]
PostOutcome: TypeAlias = Literal["accepted", "retry", "renew", "rejected"]
CONTROLLER = "kube-proxy"
"""The `reportingController` of all events. It is kube-proxy's name, so that existing alerts and filters match."""
DEDUPLICATION_WINDOW = 360.0
"""Seconds for which a repeated event is counted instead of written.

client-go ends a series of events after the same time.
"""
BURST = 25
"""Maximum number of events that the rate limit allows at once."""
REFILL_SECONDS = 5.0
"""Seconds after which the rate limit allows one more event."""
MAX_TRACKED_EVENTS = 500
"""Maximum number of distinct events tracked for deduplication."""
MAX_NOTE_BYTES = 1024
MAX_INSTANCE_BYTES = 128
MAX_NAME_BYTES = 253
"""The API server's limits for `note`, `reportingInstance` and `metadata.name`, which is a DNS subdomain."""


class ObjectReference(Struct, frozen=True):
    """The object that an event is about. `namespace` is "" for a cluster-scoped object."""

    kind: str
    name: str
    namespace: str
    uid: str


class EventOccurrence(Struct, frozen=True):
    """One occurrence of an event. `at` is the monotonic time in seconds; `wall` is in nanoseconds since the epoch."""

    regarding: ObjectReference
    event_type: EventType
    reason: str
    action: str
    note: str
    at: float
    wall: int

    @property
    def identity(self) -> tuple[ObjectReference, str, str, str, str]:
        """The key for deduplication: everything except the times."""
        return self.regarding, self.event_type, self.reason, self.action, self.note


class EventReport(Struct, frozen=True):
    """An event to write, which reports `count` occurrences.

    `first_wall` is the time of the first occurrence in nanoseconds since the epoch.
    """

    latest: EventOccurrence
    first_wall: int
    count: int


def node_reference(name: str) -> ObjectReference:
    """Return the reference to a Node. Its `uid` is the name, as in events of kube-proxy and the kubelet."""
    return ObjectReference("Node", name, "", name)


def service_reference(key: ServiceKey) -> ObjectReference:
    """Return the reference to a Service. Its `uid` is `namespace/name`, as in events of kube-proxy."""
    namespace, _, name = key.partition("/")
    return ObjectReference("Service", name, namespace, key)


def object_reference(kind: Kind, namespace: str, name: str, node: str) -> ObjectReference:
    """Return the reference to an object, or to this Node if the name or namespace of the object is not valid.

    The API server would reject an event whose name or namespace is not valid.
    """
    if not is_subdomain(name) or (namespace and not is_subdomain(namespace)):
        return node_reference(node)
    return ObjectReference(kind.__name__, name, namespace, f"{namespace}/{name}".lstrip("/"))


class TokenBucket:
    """A rate limiter. It provides `burst` tokens at first, and one more every `refill_seconds`, up to `burst`."""

    def __init__(self, burst: int, refill_seconds: float) -> None:
        self._burst = burst
        self._refill_seconds = refill_seconds
        self._tokens = float(burst)
        self._refilled_at = float("-inf")

    def take(self, now: float) -> bool:
        """Take a token if one is available, and return whether one was. `now` is the monotonic time in seconds."""
        self._tokens = min(self._burst, self._tokens + (now - self._refilled_at) / self._refill_seconds)
        self._refilled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class _EventSeries(Struct):
    """The occurrences of one event since it was last written."""

    written_at: float = float("-inf")
    first_wall: int = 0
    count: int = 0


class EventCorrelator:
    """Decides which occurrences of events are written, and counts the others.

    While an event is tracked (see `MAX_TRACKED_EVENTS`), it is written at most once in `DEDUPLICATION_WINDOW`, and the
    count of its next report includes the occurrences that were not written. In addition, a token bucket limits the rate
    of all events together.
    """

    def __init__(self) -> None:
        self._bucket = TokenBucket(BURST, REFILL_SECONDS)
        self._series: dict[tuple[ObjectReference, str, str, str, str], _EventSeries] = {}

    def admit(self, occurrence: EventOccurrence) -> EventReport | None:
        """Return the report to write for an occurrence, or None if the occurrence is only counted."""
        series = self._series.pop(occurrence.identity, None) or _EventSeries()
        self._series[occurrence.identity] = series
        if len(self._series) > MAX_TRACKED_EVENTS:
            del self._series[next(iter(self._series))]  # the event whose latest occurrence is the oldest
        series.count += 1
        if series.count == 1:
            series.first_wall = occurrence.wall
        if occurrence.at - series.written_at < DEDUPLICATION_WINDOW or not self._bucket.take(occurrence.at):
            return None
        report = EventReport(occurrence, series.first_wall, series.count)
        series.written_at, series.count = occurrence.at, 0
        return report


def event_path(regarding: ObjectReference) -> str:
    """Return the API path to which events about an object are posted."""
    return f"/apis/events.k8s.io/v1/namespaces/{_namespace(regarding)}/events"


def event_object(report: EventReport, node_name: str) -> dict[str, Any]:
    """Return the Event object for a report, with the fields that client-go's `tools/events` sets.

    The object's name contains the time of the latest occurrence, which makes the name unique. Text that exceeds the API
    server's limits is truncated.
    """
    latest = report.latest
    kind = latest.regarding.kind
    regarding = {"apiVersion": API_VERSIONS.get(kind, "v1"), "kind": kind, "name": latest.regarding.name}
    if latest.regarding.namespace:
        regarding["namespace"] = latest.regarding.namespace
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": _name(latest), "namespace": _namespace(latest.regarding)},
        "eventTime": micro_time(report.first_wall),
        "reportingController": CONTROLLER,
        "reportingInstance": _truncate(f"{CONTROLLER}-{node_name}", MAX_INSTANCE_BYTES),
        "action": latest.action,
        "reason": latest.reason,
        "regarding": regarding | {"uid": latest.regarding.uid},
        "type": latest.event_type,
        "note": _note(printable(latest.note, MAX_NOTE_BYTES)),
    }
    if report.count > 1:
        event["series"] = {"count": report.count, "lastObservedTime": micro_time(latest.wall)}
    return event


def micro_time(wall: int) -> str:
    """Format nanoseconds since the epoch as the API type MicroTime: RFC 3339 in UTC with microseconds."""
    seconds, nanoseconds = divmod(wall, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds // 1000:06}Z"


def post_outcome(status: int) -> PostOutcome:
    """Return the outcome of posting an event, based on the HTTP status.

    After `retry`, post the event again. After `renew`, renew the credentials and then post the event again. After
    `accepted` and `rejected`, do nothing. A conflict (409) counts as `accepted`, because it means that an earlier
    attempt succeeded, but its response was lost.
    """
    if status in range(200, 300) or status == 409:
        return "accepted"
    if status == 401:
        return "renew"
    return "retry" if status == 429 or status >= 500 else "rejected"


def _namespace(regarding: ObjectReference) -> str:
    return regarding.namespace or "default"


def _name(occurrence: EventOccurrence) -> str:
    suffix = f".{occurrence.wall:x}"
    return _truncate(occurrence.regarding.name, MAX_NAME_BYTES - len(suffix)).rstrip("-.") + suffix


def _note(text: str) -> str:
    truncated = _truncate(text, MAX_NOTE_BYTES)
    return truncated if len(truncated) == len(text) else _truncate(text, MAX_NOTE_BYTES - 3) + "..."


def _truncate(text: str, limit: int) -> str:
    """Return the longest prefix of `text` that takes at most `limit` bytes of UTF-8."""
    return text.encode(errors="replace")[:limit].decode(errors="ignore")
