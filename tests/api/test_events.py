"""Writing Events over real HTTP."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.codec.streams import split_lines
from kproxy.kube.events import recorder as events
from kproxy.kube.events.correlator import (
    BURST,
    REFILL_SECONDS,
    EventOccurrence,
    EventReport,
    event_object,
    event_path,
    node_reference,
    service_reference,
)
from kproxy.kube.events.recorder import QUEUE_LIMIT, EventRecorder
from tests.api.conftest import Cluster
from tests.apiserver import ApiServer, Relay, SeenRequest
from tests.apiserver.objects import service
from tests.apiserver.resources import EVENTS
from tests.clock import Clock
from tests.lab.waiting import HANG_GUARD

NOON = 1_767_268_800 * 10**9
PATH = "/apis/events.k8s.io/v1/events"
NODE = node_reference("node-1")
WEB = service_reference("demo/web")


Record = Callable[..., EventRecorder]


@pytest.fixture
def clock() -> Clock:
    return Clock(wall=NOON)


@pytest.fixture
def record(tmp_path: Path, clock: Clock) -> Iterator[Record]:
    """Start an `EventRecorder` for a cluster, optionally through the port of a relay."""
    started: list[EventRecorder] = []

    def start(cluster: Cluster, *, port: int | None = None) -> EventRecorder:
        client = ApiClient.from_config(str(cluster.kubeconfig(tmp_path / "kubeconfig", port=port)))
        recorder = EventRecorder(client, "node-1", clock=clock, wall=clock.wall)
        started.append(recorder)
        recorder.start()
        return recorder

    yield start
    for recorder in started:
        recorder.stop(0.5)
    for thread in threading.enumerate():
        if thread.name == "events":
            thread.join(HANG_GUARD)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without pauses."""
    monkeypatch.setattr(events, "RETRY_DELAYS", (0.0, 0.0))


def is_post(request: SeenRequest) -> bool:
    return request.method == "POST"


def notes(requests: list[SeenRequest]) -> list[str]:
    return [json.loads(request.body)["note"] for request in requests]


def emit(recorder: EventRecorder, note: str) -> None:
    recorder.event(WEB, "Warning", "FailedToStartServiceHealthcheck", "Listen", note)


def stored(server: ApiServer) -> list[str]:
    """Return the notes of the Events that the server accepted."""
    return [server.store.get(EVENTS, key)["note"] for key in server.store.keys(EVENTS)]


def settle(recorder: EventRecorder, server: ApiServer) -> list[str]:
    """Wait until the recorder has sent all earlier events; return the notes of all requests so far."""
    emit(recorder, "settled")
    server.requests.wait_for(lambda request: is_post(request) and b"settled" in request.body)
    return notes(server.requests.wait_for(is_post))[:-1]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == events.__name__]


def first_log_record(caplog: pytest.LogCaptureFixture) -> threading.Event:
    """Return an event that is set by the next log record."""
    logged_any = threading.Event()

    def on_record(_: logging.LogRecord) -> bool:
        logged_any.set()
        return True

    caplog.handler.addFilter(on_record)
    return logged_any


def is_running() -> bool:
    return any(thread.name == "events" for thread in threading.enumerate())


def first_events(cluster: Cluster, tmp_path: Path, note: str, count: int) -> list[dict[str, Any]]:
    """Return the first `count` Events with this note."""
    client = ApiClient.from_config(str(cluster.kubeconfig(tmp_path / "watcher")))
    events = []
    with client.get(PATH, {"watch": "1"}, HANG_GUARD) as response:
        for line in split_lines(response.chunks()):
            event = json.loads(line)["object"]
            if event.get("note") == note:
                events.append(event)
            if len(events) == count:
                return events
    raise AssertionError(f"the watch ended after {events}")


def test_events_of_nodes_and_services_are_written(cluster: Cluster, record: Record, tmp_path: Path) -> None:
    cluster.create(service("web", "10.96.7.1"))  # creates the namespace on a real server
    recorder = record(cluster)
    note = f"unique note {uuid4()}"
    recorder.event(NODE, "Normal", "Starting", "StartKubeProxy", note)
    emit(recorder, note)
    by_kind = {event["regarding"]["kind"]: event for event in first_events(cluster, tmp_path, note, 2)}
    assert by_kind["Node"]["metadata"]["namespace"] == "default"
    assert by_kind["Node"]["reason"] == "Starting"
    assert by_kind["Service"]["metadata"]["namespace"] == "demo"
    assert by_kind["Service"]["type"] == "Warning"
    assert {event["reportingInstance"] for event in by_kind.values()} == {"kube-proxy-node-1"}


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Odd"},
        {"reason": ""},
        {"eventTime": None},
        {"note": "n" * 1025},
        {"reportingInstance": "i" * 129},
        {"series": {"count": 1, "lastObservedTime": "2026-01-01T12:00:00.000000Z"}},
        {"metadata": {"name": "Not_A_Name", "namespace": "default"}},
    ],
)
def test_servers_reject_invalid_events(cluster: Cluster, tmp_path: Path, change: dict[str, Any]) -> None:
    latest = EventOccurrence(NODE, "Normal", "Starting", "StartKubeProxy", "", 0.0, time.time_ns())
    event = event_object(EventReport(latest, latest.wall, 1), "node-1")
    client = ApiClient.from_config(str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    answers = []
    for body in (event | change, event):
        with client.post(event_path(NODE), json.dumps(body).encode(), HANG_GUARD) as response:
            answers.append((response.status, response.read()))
    assert [status for status, _ in answers] == [422, 201]
    assert json.loads(answers[0][1])["reason"] == "Invalid"


def test_servers_reject_events_in_another_namespace(cluster: Cluster, tmp_path: Path) -> None:
    latest = EventOccurrence(NODE, "Normal", "Starting", "StartKubeProxy", "", 0.0, time.time_ns())
    event = event_object(EventReport(latest, latest.wall, 1), "node-1")
    client = ApiClient.from_config(str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    with client.post(
        event_path(NODE).replace("default", "kube-system"), json.dumps(event).encode(), HANG_GUARD
    ) as response:
        assert response.status == 400


def test_event_without_note_is_accepted(server: ApiServer, record: Record) -> None:
    recorder = record(server)
    recorder.event(NODE, "Normal", "Starting", "StartKubeProxy", "")
    settle(recorder, server)
    assert stored(server)[0] == ""


def test_repeated_event_is_sent_once(server: ApiServer, record: Record) -> None:
    recorder = record(server)
    for note in ("same", "same", "same", "other"):
        emit(recorder, note)
    assert settle(recorder, server) == ["same", "other"]


def test_event_rate_is_limited(server: ApiServer, record: Record, clock: Clock) -> None:
    recorder = record(server)
    for number in range(BURST + 10):
        emit(recorder, f"note {number}")
    clock.now = REFILL_SECONDS
    emit(recorder, "later")
    requests = server.requests.wait_for(is_post, BURST + 1)
    assert notes(requests) == [f"note {number}" for number in range(BURST)] + ["later"]


def test_events_before_the_start_are_written(server: ApiServer, tmp_path: Path, clock: Clock, record: Record) -> None:
    client = ApiClient.from_config(str(server.kubeconfig(tmp_path / "kubeconfig")))
    recorder = EventRecorder(client, "node-1", clock=clock, wall=clock.wall)
    emit(recorder, "early")
    recorder.start()
    assert notes(server.requests.wait_for(is_post)) == ["early"]
    recorder.stop(HANG_GUARD)


def test_emitting_never_blocks_while_the_server_is_stalled(server: ApiServer, record: Record) -> None:
    with Relay(server.address) as relay:
        recorder = record(server, port=relay.port)
        relay.stall(new=True)

        def flood() -> None:
            for number in range(2 * QUEUE_LIMIT):
                emit(recorder, f"note {number}")

        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        thread.join(HANG_GUARD)
        assert not thread.is_alive()
        relay.resume()
        requests = server.requests.wait_for(is_post, BURST)
        assert notes(requests)[:BURST] == [f"note {number}" for number in range(BURST)]


def test_queue_is_bounded_while_the_server_is_stalled(server: ApiServer, record: Record, clock: Clock) -> None:
    with Relay(server.address) as relay:
        recorder = record(server, port=relay.port)
        relay.stall(new=True)
        for number in range(QUEUE_LIMIT + 10):
            clock.now += REFILL_SECONDS
            emit(recorder, f"note {number}")
        relay.resume()
        settled = notes(server.requests.wait_for(is_post, QUEUE_LIMIT))
        assert settled[:QUEUE_LIMIT] == [f"note {number}" for number in range(QUEUE_LIMIT)]
        last = settle(recorder, server)[-1]
        assert last in {f"note {QUEUE_LIMIT - 1}", f"note {QUEUE_LIMIT}"}  # one more if one was being sent


def test_rejected_event_is_not_retried_and_logged_once(
    server: ApiServer, record: Record, caplog: pytest.LogCaptureFixture, no_pauses: None
) -> None:
    caplog.set_level(logging.INFO)
    server.fail_requests(403, times=2)
    recorder = record(server)
    for note in ("one", "two", "three", "four"):
        emit(recorder, note)
    assert settle(recorder, server) == ["one", "two", "three", "four"]
    first, last = logged(caplog)
    assert first.startswith("cannot write event FailedToStartServiceHealthcheck of Service demo/web: 403 Forbidden: ")
    assert last == "writing events again"


def test_events_are_retried_on_an_overloaded_server(server: ApiServer, record: Record, no_pauses: None) -> None:
    server.fail_requests(503)
    server.fail_requests(429)
    recorder = record(server)
    emit(recorder, "patient")
    assert settle(recorder, server) == ["patient"] * 3
    assert "patient" in stored(server)


def test_event_is_dropped_after_the_last_retry(
    server: ApiServer, record: Record, caplog: pytest.LogCaptureFixture, no_pauses: None
) -> None:
    server.fail_requests(503, times=3)
    recorder = record(server)
    emit(recorder, "lost")
    assert settle(recorder, server) == ["lost"] * 3
    assert "lost" not in stored(server)
    assert len([line for line in logged(caplog) if line.startswith("cannot write event ") and ": 503" in line]) == 1


def test_events_are_retried_on_an_unreachable_server(
    server: ApiServer, record: Record, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RETRY_DELAYS", (0.01,) * 1000)
    failed = first_log_record(caplog)
    with Relay(server.address) as relay:
        relay.refuse()
        recorder = record(server, port=relay.port)
        emit(recorder, "patient")
        assert failed.wait(HANG_GUARD)
        relay.allow()
        assert notes(server.requests.wait_for(is_post)) == ["patient"]


def test_conflict_means_that_an_earlier_attempt_succeeded(
    server: ApiServer, record: Record, caplog: pytest.LogCaptureFixture, no_pauses: None
) -> None:
    server.fail_requests(409)
    recorder = record(server)
    emit(recorder, "duplicate")
    assert settle(recorder, server) == ["duplicate"]
    assert logged(caplog) == []


def test_credentials_are_reloaded(server: ApiServer, record: Record, tmp_path: Path, no_pauses: None) -> None:
    recorder = record(server)
    server.tokens = {"rotated"}
    server.kubeconfig(tmp_path / "kubeconfig")
    emit(recorder, "with a new token")
    assert settle(recorder, server) == ["with a new token"] * 2
    assert "with a new token" in stored(server)


def test_unexpected_error_does_not_stop_the_recorder(
    server: ApiServer, record: Record, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = record(server)
    clock.wall_time = 10**40  # beyond the range of datetime
    emit(recorder, "impossible")
    clock.wall_time = NOON
    assert settle(recorder, server) == []
    assert "unexpected" in logged(caplog)[0]


def test_stop_does_not_wait_for_retries(
    server: ApiServer, record: Record, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "RETRY_DELAYS", (3600.0,))
    failed = first_log_record(caplog)
    server.fail_requests(503, times=2)
    recorder = record(server)
    emit(recorder, "never")
    assert failed.wait(HANG_GUARD)
    recorder.stop(HANG_GUARD)
    assert not is_running()
    assert len(server.requests.wait_for(is_post)) == 1


def test_stop_drops_queued_events(server: ApiServer, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RETRY_DELAYS", (3600.0,))
    server.fail_requests(503)
    recorder = record(server)
    for number in range(2 * QUEUE_LIMIT):
        emit(recorder, f"note {number}")
    server.requests.wait_for(is_post)
    recorder.stop(HANG_GUARD)
    assert not is_running()
    assert stored(server) == []


def test_stop_returns_while_the_server_is_stalled(server: ApiServer, record: Record) -> None:
    with Relay(server.address) as relay:
        recorder = record(server, port=relay.port)
        relay.stall(new=True)
        emit(recorder, "never answered")
        stopper = threading.Thread(target=recorder.stop, args=(0.5,), daemon=True)
        stopper.start()
        stopper.join(HANG_GUARD)
        assert not stopper.is_alive()
