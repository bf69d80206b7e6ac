"""Events as values: what is written, how often, and what an answer means. Writing them is in `tests/api`."""

from __future__ import annotations

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
    post_outcome,
    service_reference,
)
from kproxy.kube.events.recorder import EventSink, NullRecorder
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


def admitted(rules: EventCorrelator, *occurrences: EventOccurrence) -> list[tuple[str, int]]:
    reports = (rules.admit(each) for each in occurrences)
    return [(each.latest.note, each.count) for each in reports if each]


# What an event holds


def test_the_start_is_an_event_of_the_node_as_kube_proxy_writes_it() -> None:
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


def test_an_event_of_a_service_is_in_its_namespace() -> None:
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


def test_a_repeated_event_says_how_often_and_since_when() -> None:
    event = event_object(EventReport(occurrence(at=60.5), NOON, 3), "node-1")
    assert event["eventTime"] == "2026-01-01T12:00:00.000000Z"
    assert event["series"] == {"count": 3, "lastObservedTime": "2026-01-01T12:01:00.500000Z"}
    assert event["metadata"]["name"] == f"web.{NOON + 60_500_000_000:x}"
    assert event_problems(event) == []


def test_moments_have_six_digits_after_the_point() -> None:
    assert micro_time(0) == "1970-01-01T00:00:00.000000Z"
    assert micro_time(NOON + 1_999) == "2026-01-01T12:00:00.000001Z"


def test_a_long_note_is_cut_and_says_so() -> None:
    short = "ä" * 512
    assert event_object(report(occurrence(short)), "node-1")["note"] == short
    cut = event_object(report(occurrence(short + "!")), "node-1")["note"]
    assert cut == "ä" * 510 + "..."


def test_a_long_name_is_cut_where_a_name_may_end() -> None:
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
def test_the_api_server_accepts_every_event(name: str, note: str, wall: int) -> None:
    started = EventOccurrence(node_reference(name), "Normal", "Starting", "StartKubeProxy", note, 0.0, wall)
    event = event_object(report(started), name)
    assert event_problems(msgspec.json.decode(msgspec.json.encode(event))) == []


# Which are written


def test_the_same_event_is_written_once_in_a_while_and_then_counted() -> None:
    rules = EventCorrelator()
    assert admitted(rules, occurrence(at=0), occurrence(at=1), occurrence(at=DEDUPLICATION_WINDOW - 0.1)) == [
        ("port 30000 is in use", 1)
    ]
    again = rules.admit(occurrence(at=DEDUPLICATION_WINDOW))
    assert again == EventReport(occurrence(at=DEDUPLICATION_WINDOW), first_wall=NOON + 10**9, count=3)
    assert rules.admit(occurrence(at=2 * DEDUPLICATION_WINDOW - 0.1)) is None
    assert rules.admit(occurrence(at=3 * DEDUPLICATION_WINDOW)) == EventReport(
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
def test_what_differs_in_anything_but_the_moment_is_another_event(change: dict[str, object]) -> None:
    rules = EventCorrelator()
    assert rules.admit(occurrence())
    other = rules.admit(msgspec.structs.replace(occurrence(at=1), **change))
    assert other
    assert other.count == 1


def test_all_events_together_are_not_written_faster_than_allowed() -> None:
    rules = EventCorrelator()
    crowd = [occurrence(f"note {number}") for number in range(BURST + 10)]
    assert admitted(rules, *crowd) == [(each.note, 1) for each in crowd[:BURST]]
    late = [occurrence(f"late {number}", at=REFILL_SECONDS) for number in range(3)]
    assert admitted(rules, *late) == [("late 0", 1)]


def test_an_event_that_was_held_back_is_written_when_it_happens_again() -> None:
    rules = EventCorrelator()
    admitted(rules, *(occurrence(f"note {number}") for number in range(BURST)))
    assert admitted(rules, occurrence("held"), occurrence("held", at=1)) == []
    assert admitted(rules, occurrence("held", at=REFILL_SECONDS)) == [("held", 3)]


def test_what_is_remembered_is_bounded_and_the_longest_unseen_goes_first() -> None:
    rules = EventCorrelator()
    crowd = [occurrence(f"note {number}") for number in range(MAX_TRACKED_EVENTS)]
    assert len(admitted(rules, *crowd)) == BURST
    assert admitted(rules, occurrence("note 0", at=1), occurrence("one more", at=2)) == []
    assert admitted(rules, occurrence("note 0", at=REFILL_SECONDS)) == []  # remembered as written
    assert admitted(rules, occurrence("note 1", at=REFILL_SECONDS)) == [("note 1", 1)]  # forgotten


def test_the_bucket_refills_to_its_size_and_no_further() -> None:
    bucket = TokenBucket(2, 10.0)
    assert [bucket.take(0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(9.9), bucket.take(10.0), bucket.take(10.0)] == [False, True, False]
    assert [bucket.take(1000) for _ in range(3)] == [True, True, False]


def test_a_moment_in_the_past_gives_no_tokens() -> None:
    bucket = TokenBucket(1, 10.0)
    assert bucket.take(100)
    assert [bucket.take(50), bucket.take(105), bucket.take(110)] == [False, False, True]


# What an answer means


@pytest.mark.parametrize(
    ("status", "meaning"),
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
def test_what_a_status_means(status: int, meaning: str) -> None:
    assert post_outcome(status) == meaning


def test_without_an_api_server_events_go_nowhere() -> None:
    recorder: EventSink = NullRecorder()
    recorder.event(WEB, "Normal", "Starting", "StartKubeProxy", "")
