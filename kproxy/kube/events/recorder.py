"""The event recorder: posts Events to the API server, where `kubectl get events` shows them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import msgspec
from msgspec import Struct

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError
from kproxy.kube.client.response import ApiResponse, TransportError
from kproxy.kube.codec.json_codec import read_error
from kproxy.kube.events.correlator import (
    EventCorrelator,
    EventOccurrence,
    EventReport,
    EventType,
    ObjectReference,
    PostOutcome,
    event_object,
    event_path,
    post_outcome,
)
from kproxy.model.restarts import Restarts

QUEUE_LIMIT = 200
"""Maximum number of occurrences in the queue of the recorder's thread. Further occurrences are dropped."""
POST_TIMEOUT = 10.0
"""Seconds after which an attempt to post an event fails if the server sends no data."""
MAX_ERROR_BYTES = 1 << 16
"""Maximum number of bytes to read from a response."""
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
"""Seconds to wait before the second and each further attempt to post an event.

If the last attempt fails, the event is dropped.
"""
log = logging.getLogger(__name__)


class EventSink(Protocol):
    """Receives events."""

    def event(self, regarding: ObjectReference, event_type: EventType, reason: str, action: str, note: str) -> None:
        """Record an event about an object. This method is thread-safe. It does not block or raise.

        `reason` is the cause as a machine-readable word. `action` is what kproxy was doing. `note` is a sentence for
        users.
        """


class NullRecorder:
    """A recorder that drops all events, for a proxy without an API server."""

    def event(self, regarding: ObjectReference, event_type: EventType, reason: str, action: str, note: str) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self, timeout: float) -> None:
        """Do nothing."""


class EventRecorder:
    """Writes events to the API server in its own thread.

    `clock` returns the monotonic time in seconds, and `wall` returns nanoseconds since the epoch. An event is dropped
    if the server rejects it, or if the last attempt fails (see `RETRY_DELAYS`). When attempts fail, the recorder logs
    only the first failure, and then the next success.
    """

    def __init__(
        self, client: ApiClient, node_name: str, *, clock: Callable[[], float], wall: Callable[[], int]
    ) -> None:
        self._client, self._node_name = client, node_name
        self._clock, self._wall = clock, wall
        self._correlator = EventCorrelator()
        self._queue: queue.SimpleQueue[EventOccurrence | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def event(self, regarding: ObjectReference, event_type: EventType, reason: str, action: str, note: str) -> None:
        """See `EventSink`."""
        occurrence = EventOccurrence(regarding, event_type, reason, action, note, self._clock(), self._wall())
        if self._queue.qsize() < QUEUE_LIMIT:
            self._queue.put(occurrence)
        else:
            log.debug("event queue is full, dropping %s", _describe(occurrence))

    def start(self) -> None:
        """Start the thread. It first writes the events that were recorded before this call."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread. Events that have not been written yet are dropped.

        Waits at most `timeout` seconds. If the thread is connecting or waiting for a response, it may run longer.
        """
        self._stopping.set()
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        restarts = Restarts("events")
        while (occurrence := self._queue.get()) is not None and not self._stopping.is_set():
            try:
                report = self._correlator.admit(occurrence)
                if report is None:
                    log.debug("%s is counted, not written", _describe(occurrence))
                else:
                    self._write(report)
            except Exception as error:  # noqa: BLE001 - an unexpected error must not stop the thread
                delay, text = restarts.failed(error, self._clock())
                with suppress(MemoryError):
                    log.log(logging.ERROR if text else logging.DEBUG, "%s", text or error)
                self._stopping.wait(delay)

    def _write(self, report: EventReport) -> None:
        """Post an event. Retry until the server accepts or rejects it, attempts run out, or `stop` is called."""
        path = event_path(report.latest.regarding)
        body = msgspec.json.encode(event_object(report, self._node_name))
        for delay in (*RETRY_DELAYS, None):
            result = self._post(path, body)
            self._log_failure(report, result.failure)
            if result.outcome != "retry" or delay is None or self._stopping.wait(delay):
                return

    def _post(self, path: str, body: bytes) -> _PostResult:
        try:
            with self._client.post(path, body, POST_TIMEOUT) as response:
                result = _read_result(response)
            if result.outcome == "renew":
                self._client.renew(response)
                return msgspec.structs.replace(result, outcome="retry")
        except (TransportError, ClientError) as error:
            return _PostResult("retry", str(error))
        return result

    def _log_failure(self, report: EventReport, failure: str) -> None:
        """Log the first of several consecutive failures, and the first success after them.

        `failure` is "" for a success.
        """
        if failure and not self._failing:
            log.warning("cannot write %s: %s", _describe(report.latest), failure)
        elif self._failing and not failure:
            log.info("writing events again")
        self._failing = bool(failure)


class _PostResult(Struct, frozen=True):
    """The result of one attempt to post an event. `failure` is "" if the server accepted the event."""

    outcome: PostOutcome
    failure: str = ""


def _read_result(response: ApiResponse) -> _PostResult:
    body = response.read_start(MAX_ERROR_BYTES)
    outcome = post_outcome(response.status)
    if outcome == "accepted":
        return _PostResult(outcome)
    return _PostResult(outcome, str(read_error(response.status, response.headers, body)))


def _describe(occurrence: EventOccurrence) -> str:
    regarding = occurrence.regarding
    name = f"{regarding.namespace}/{regarding.name}".lstrip("/")
    return f"event {occurrence.reason} of {regarding.kind} {name}"
