"""Kubernetes Events: API objects, deduplication, rate limit and HTTP outcomes. `tests/api` tests the posting."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.kube.events.correlator import (
    BURST,
    DEDUPLICATION_WINDOW,
    MAX_TRACKED_EVENTS,
    REFILL_SECONDS,
    EventCorrelator,
    EventOccurrence,
    EventReport,
    ObjectReference,
    TokenBucket,
    event_object,
    event_path,
    micro_time,
    node_reference,
    object_reference,
    post_outcome,
    service_reference,
)
from kproxy.kube.events.recorder import EventSink, NullRecorder
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Service
from tests.apiserver.events import event_problems

NOON = 1_767_268_800 * 10**9
"""2026-01-01T12:00:00Z in nanoseconds."""

WEB = service_reference("demo/web")


def occurrence(
    note: str = "port 30000 is in use", *, at: float = 0.0, regarding: ObjectReference = WEB
) -> EventOccurrence:
    wall = NOON + int(at * 10**9)
    return EventOccurrence(regarding, "Warning", "FailedToStartServiceHealthcheck", "Listen", note, at, wall)


def report(latest: EventOccurrence) -> EventReport:
    return EventReport(latest, latest.wall, 1)


def admitted(correlator: EventCorrelator, *occurrences: EventOccurrence) -> list[tuple[str, int]]:
    """Return the note and count of each event that is written for these occurrences."""
    reports = (correlator.admit(occurrence) for occurrence in occurrences)
    return [(report.latest.note, report.count) for report in reports if report]


# API objects


def test_start_event_of_the_node_is_that_of_kube_proxy() -> None:
    started = EventOccurrence(
        node_reference("node-1"), "Normal", "Starting", "StartKubeProxy", "", 5.0, NOON + 123_456_789
    )
    assert event_path(started.regarding) == "/apis/events.k8s.io/v1/namespaces/default/events"
    assert event_object(report(started), "node-1") == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"node-1.{NOON + 123_456_789:x}", "namespace": "default"},
        "eventTime": "2026-01-01T12:00:00.123456Z",
        "reportingController": "kube-proxy",
        "reportingInstance": "kube-proxy-node-1",
        "action": "StartKubeProxy",
        "reason": "Starting",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"},
        "type": "Normal",
        "note": "",
    }


def test_events_of_a_service_are_in_its_namespace() -> None:
    event = event_object(report(occurrence()), "node-1")
    assert event_path(WEB) == "/apis/events.k8s.io/v1/namespaces/demo/events"
    assert event["metadata"]["namespace"] == "demo"
    assert event["regarding"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "namespace": "demo",
        "name": "web",
        "uid": "demo/web",
    }


def test_events_of_other_kinds_refer_to_their_api_group() -> None:
    def regarding(kind: Kind, namespace: str, name: str) -> Any:
        occurrence = EventOccurrence(
            object_reference(kind, namespace, name, "node-1"), "Warning", "R", "A", "", 0.0, NOON
        )
        return event_object(EventReport(occurrence, NOON, 1), "node-1")["regarding"]

    assert regarding(EndpointSlice, "demo", "web-1") == {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "namespace": "demo",
        "name": "web-1",
        "uid": "demo/web-1",
    }
    assert regarding(Service, "demo", "web")["apiVersion"] == "v1"
    for namespace, name in (("demo", "a\nb"), ("a/b", "web"), ("demo", "a" * 10_000)):
        assert regarding(Service, namespace, name)["kind"] == "Node"


def test_repeated_event_has_a_series_and_the_time_of_the_first_occurrence() -> None:
    event = event_object(EventReport(occurrence(at=60.5), NOON, 3), "node-1")
    assert event["eventTime"] == "2026-01-01T12:00:00.000000Z"
    assert event["series"] == {"count": 3, "lastObservedTime": "2026-01-01T12:01:00.500000Z"}
    assert event["metadata"]["name"] == f"web.{NOON + 60_500_000_000:x}"
    assert event_problems(event) == []


def test_times_have_microseconds() -> None:
    assert micro_time(0) == "1970-01-01T00:00:00.000000Z"
    assert micro_time(NOON + 1_999) == "2026-01-01T12:00:00.000001Z"


def test_long_note_is_truncated_with_an_ellipsis() -> None:
    short = "ä" * 512
    assert event_object(report(occurrence(short)), "node-1")["note"] == short
    cut = event_object(report(occurrence(short + "!")), "node-1")["note"]
    assert cut == "ä" * 510 + "..."


def test_long_name_is_truncated_to_a_valid_name() -> None:
    regarding = node_reference("a" * 235 + "-" + "b" * 10)
    event = event_object(report(occurrence(regarding=regarding)), "node-1")
    assert event["metadata"]["name"] == f"{'a' * 235}.{NOON:x}"
    assert event["regarding"]["name"] == regarding.name


@given(
    name=st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?", fullmatch=True).filter(
        lambda name: not any(pair in name for pair in ("..", "-.", ".-"))
    ),
    note=st.text(st.characters(), max_size=2000),
    wall=st.integers(0, 2**63 - 1),
)
def test_api_server_accepts_every_event(name: str, note: str, wall: int) -> None:
    started = EventOccurrence(node_reference(name), "Normal", "Starting", "StartKubeProxy", note, 0.0, wall)
    event = event_object(report(started), name)
    assert event_problems(msgspec.json.decode(msgspec.json.encode(event))) == []


# Deduplication and rate limit


def test_repeated_events_are_counted_and_written_once_per_window() -> None:
    correlator = EventCorrelator()
    assert admitted(correlator, occurrence(at=0), occurrence(at=1), occurrence(at=DEDUPLICATION_WINDOW - 0.1)) == [
        ("port 30000 is in use", 1)
    ]
    again = correlator.admit(occurrence(at=DEDUPLICATION_WINDOW))
    assert again == EventReport(occurrence(at=DEDUPLICATION_WINDOW), first_wall=NOON + 10**9, count=3)
    assert correlator.admit(occurrence(at=2 * DEDUPLICATION_WINDOW - 0.1)) is None
    assert correlator.admit(occurrence(at=3 * DEDUPLICATION_WINDOW)) == EventReport(
        occurrence(at=3 * DEDUPLICATION_WINDOW), first_wall=occurrence(at=2 * DEDUPLICATION_WINDOW - 0.1).wall, count=2
    )


@pytest.mark.parametrize(
    "change",
    [
        {"regarding": service_reference("demo/db")},
        {"event_type": "Normal"},
        {"reason": "Other"},
        {"action": "Other"},
        {"note": "permission denied"},
    ],
)
def test_events_that_differ_in_more_than_time_are_not_deduplicated(change: dict[str, object]) -> None:
    correlator = EventCorrelator()
    assert correlator.admit(occurrence())
    report = correlator.admit(msgspec.structs.replace(occurrence(at=1), **change))
    assert report
    assert report.count == 1


def test_all_events_share_one_rate_limit() -> None:
    correlator = EventCorrelator()
    burst = [occurrence(f"note {number}") for number in range(BURST + 10)]
    assert admitted(correlator, *burst) == [(event.note, 1) for event in burst[:BURST]]
    late = [occurrence(f"late {number}", at=REFILL_SECONDS) for number in range(3)]
    assert admitted(correlator, *late) == [("late 0", 1)]


def test_rate_limited_event_is_written_with_its_next_occurrence() -> None:
    correlator = EventCorrelator()
    admitted(correlator, *(occurrence(f"note {number}") for number in range(BURST)))
    assert admitted(correlator, occurrence("limited"), occurrence("limited", at=1)) == []
    assert admitted(correlator, occurrence("limited", at=REFILL_SECONDS)) == [("limited", 3)]


def test_least_recent_event_is_evicted_beyond_the_maximum() -> None:
    correlator = EventCorrelator()
    events = [occurrence(f"note {number}") for number in range(MAX_TRACKED_EVENTS)]
    assert len(admitted(correlator, *events)) == BURST
    assert admitted(correlator, occurrence("note 0", at=1), occurrence("one more", at=2)) == []
    assert admitted(correlator, occurrence("note 0", at=REFILL_SECONDS)) == []  # still tracked as written
    assert admitted(correlator, occurrence("note 1", at=REFILL_SECONDS)) == [("note 1", 1)]  # evicted before


def test_token_bucket_refills_up_to_its_burst() -> None:
    bucket = TokenBucket(2, 10.0)
    assert [bucket.take(0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(9.9), bucket.take(10.0), bucket.take(10.0)] == [False, True, False]
    assert [bucket.take(1000) for _ in range(3)] == [True, True, False]


def test_time_going_backwards_adds_no_tokens() -> None:
    bucket = TokenBucket(1, 10.0)
    assert bucket.take(100)
    assert [bucket.take(50), bucket.take(105), bucket.take(110)] == [False, False, True]


# HTTP outcomes


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "accepted"),
        (201, "accepted"),
        (409, "accepted"),
        (401, "renew"),
        (429, "retry"),
        (500, "retry"),
        (503, "retry"),
        (400, "rejected"),
        (403, "rejected"),
        (404, "rejected"),
        (422, "rejected"),
    ],
)
def test_outcomes_of_http_statuses(status: int, outcome: str) -> None:
    assert post_outcome(status) == outcome


def test_events_are_discarded_without_an_api_server() -> None:
    recorder: EventSink = NullRecorder()
    recorder.event(WEB, "Normal", "Starting", "StartKubeProxy", "")
