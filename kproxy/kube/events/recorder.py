"""Writing events: what operators see with `kubectl get events` without looking at any node's log."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
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
    Verdict,
    event_object,
    event_path,
    verdict,
)

MOST_WAITING = 200
"""How many occurrences wait at most for the thread; what comes on top while the API server is away is left out."""
POST_TIMEOUT = 10.0
"""Seconds without any byte of an answer after which a try counts as failed."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
"""Seconds before each further try to write an event; after the last one it is given up."""
STOP_TIMEOUT = 0.5
"""Seconds that `EventRecorder.stop` waits for its thread: only one that waits for an answer takes longer."""
log = logging.getLogger(__name__)


class EventSink(Protocol):
    """Takes note of what operators should see."""

    def event(self, regarding: ObjectReference, event_type: EventType, reason: str, action: str, note: str) -> None:
        """Note that something happened to an object. For any thread; neither waits nor raises.

        `reason` is why, in one word for machines; `action` what was being done; `note` a sentence for people.
        """


class NullRecorder:
    """Forgets everything: for a proxy without an API server."""

    def event(self, regarding: ObjectReference, event_type: EventType, reason: str, action: str, note: str) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class EventRecorder:
    """Writes events through the API, in a thread of its own.

    `clock` gives seconds that never go back, `wall` nanoseconds since the epoch. An event that cannot be written
    after some tries is given up. Trouble is logged once, until an event is written again.
    """

    def __init__(
        self, client: ApiClient, node_name: str, *, clock: Callable[[], float], wall: Callable[[], int]
    ) -> None:
        self._client, self._node_name = client, node_name
        self._clock, self._wall = clock, wall
        self._rules = EventCorrelator()
        self._queue: queue.SimpleQueue[EventOccurrence | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._in_trouble = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def event(self, regarding: ObjectReference, event_type: EventType, reason: str, action: str, note: str) -> None:
        """See `EventSink`."""
        occurrence = EventOccurrence(regarding, event_type, reason, action, note, self._clock(), self._wall())
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put(occurrence)
        else:
            log.debug("too many events wait to be written; %s is left out", _describe(occurrence))

    def start(self) -> None:
        """Start the thread; what was noted before is written too. It is a daemon: a process may end without `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; events that are not written yet never will be."""
        self._stopping.set()
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while (occurrence := self._queue.get()) is not None and not self._stopping.is_set():
            report = self._rules.admit(occurrence)
            if report is None:
                log.debug("%s is counted, not written", _describe(occurrence))
                continue
            try:
                self._write(report)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the writing of events
                self._log_trouble(report, f"unexpected {type(error).__name__}: {error}")

    def _write(self, report: EventReport) -> None:
        """Try until the event is written, refused or given up, or `stop` is called."""
        path = event_path(report.latest.regarding)
        body = msgspec.json.encode(event_object(report, self._node_name))
        for pause in (*PAUSES, None):
            answer = self._post(path, body)
            self._log_trouble(report, answer.trouble)
            if answer.verdict != "again" or pause is None or self._stopping.wait(pause):
                return

    def _post(self, path: str, body: bytes) -> _PostResult:
        try:
            with self._client.post(path, body, POST_TIMEOUT) as response:
                answer = _read(response)
            if answer.verdict == "renew":
                self._client.renew(response)
                return msgspec.structs.replace(answer, verdict="again")
        except (TransportError, ClientError) as error:
            return _PostResult("again", str(error))
        return answer

    def _log_trouble(self, report: EventReport, trouble: str) -> None:
        """Log where trouble begins and where it ends."""
        if trouble and not self._in_trouble:
            log.warning("%s cannot be written: %s", _describe(report.latest), trouble)
        elif self._in_trouble and not trouble:
            log.info("events are written again")
        self._in_trouble = bool(trouble)


class _PostResult(Struct, frozen=True):
    """What came of one try; `trouble` is "" if the event is written."""

    verdict: Verdict
    trouble: str = ""


def _read(response: ApiResponse) -> _PostResult:
    body = response.read()
    found = verdict(response.status)
    if found == "written":
        return _PostResult(found)
    return _PostResult(found, str(read_error(response.status, response.headers, body)))


def _describe(occurrence: EventOccurrence) -> str:
    regarding = occurrence.regarding
    name = f"{regarding.namespace}/{regarding.name}".lstrip("/")
    return f"event {occurrence.reason} of {regarding.kind} {name}"
