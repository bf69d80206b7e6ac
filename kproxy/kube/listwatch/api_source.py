"""Receive objects from the API server. For each kind, one thread drives a list/watch state machine."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from msgspec import Struct

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError
from kproxy.kube.client.response import ApiResponse, BodyTooLargeError, IdleTimeoutError, TransportError
from kproxy.kube.codec.streams import MAX_EVENT_BYTES, FramingError, read_events
from kproxy.kube.codec.watch_events import ErrorStatus, UndecodableObject, one_line
from kproxy.kube.listwatch.protocol import (
    INACTIVITY,
    MAX_PAGE_BYTES,
    NOTHING,
    IgnoredFields,
    InvalidObject,
    ListWatch,
    ListWatchRequest,
    ListWatchStep,
)
from kproxy.model.delta import BASIC_KINDS, Delta, Invalid, Kind
from kproxy.model.restarts import Restarts

REPEAT_PERIOD = 60.0
"""Seconds for which the same message is not logged again."""
IGNORED_FIELDS_PERIOD = 3600.0
"""Like `REPEAT_PERIOD`, for messages about ignored fields. It is longer, because some objects are never corrected."""
ERROR_REASONS = ("connection", "credentials", "decoding", "size", "status", "timeout", "unexpected")
"""Why receiving objects failed.

The connection or the credentials failed; an object or a list could not be decoded or was too large; the server returned
an error or was silent for too long; or there was an unexpected error.
"""
MAX_ERROR_BYTES = 1 << 16
"""Maximum number of bytes to read from a response whose status is not 200. The rest is never read."""
STALE_SECONDS = 180.0
"""Seconds without data after which the objects of a kind may be outdated.

The API server sends a bookmark about every 60 s, and a silent connection is replaced after `INACTIVITY` seconds.
"""
log = logging.getLogger(__name__)


class ApiSource:
    """Lists and watches objects of `kinds` and passes every change to `sink`. The only Node it reads is `node_name`.

    Several threads call `sink`, which must not block. Apart from `Invalid` deltas for invalid objects in the first
    list, the first delta for each kind is a `Replace` with the complete list. Failed requests are retried forever. If
    the server does not serve ServiceCIDRs or does not allow reading them, their first delta is an empty `Replace`, and
    the time between requests for them grows to between 3 and 5 minutes. A connection that receives no data for
    `inactivity` seconds is replaced.

    A page of a list of more than `max_page_bytes` bytes or an event of more than `max_event_bytes` bytes is not read:
    the objects are listed again, in pages. `on_error` is called with the kind and one of the `ERROR_REASONS` for each
    failure. It must neither block nor raise.

    `on_invalid` is called with the kind, namespace and name of an object, and with a log line that names the field, if
    the object or a part of it cannot be used. Like the log line, the call is not repeated for some time. `on_invalid`
    runs in the threads of this class and must neither block nor raise.
    """

    def __init__(
        self,
        client: ApiClient,
        node_name: str,
        sink: Callable[[Delta], None],
        *,
        kinds: Iterable[Kind] = BASIC_KINDS,
        inactivity: float = INACTIVITY,
        on_invalid: Callable[[Kind, str, str, str], None] | None = None,
        max_page_bytes: int = MAX_PAGE_BYTES,
        max_event_bytes: int = MAX_EVENT_BYTES,
        on_error: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        def machine(kind: Kind) -> ListWatch:
            return ListWatch(kind, node_name, random.random, inactivity)

        limits = _Limits(max_page_bytes, max_event_bytes)
        self._reflectors = [
            _Reflector(client, kind, machine, sink, limits=limits, on_error=on_error, on_invalid=on_invalid)
            for kind in kinds
        ]

    def start(self) -> None:
        """Start the threads."""
        for reflector in self._reflectors:
            reflector.start()

    def ages(self) -> dict[str, float]:
        """Return the seconds since the API server last sent an object, a list or a bookmark, for each kind.

        Until then, they count from the creation of this source. Optional kinds that the server does not provide are
        omitted.
        """
        now = time.monotonic()
        return {each.name: now - each.last_contact for each in self._reflectors if not each.unavailable}

    def status(self) -> dict[str, object]:
        """Return `apiStaleSeconds`, the age of the oldest objects, if it exceeds `STALE_SECONDS`."""
        age = max(self.ages().values(), default=0.0)
        return {"apiStaleSeconds": int(age)} if age > STALE_SECONDS else {}

    def stop(self, timeout: float) -> None:
        """Stop the threads, even if they are waiting for data. `sink` is not called after this method returns.

        Waits at most `timeout` seconds. A thread that is connecting or waiting for a response may run longer.
        """
        for reflector in self._reflectors:
            reflector.stop()
        deadline = time.monotonic() + timeout
        for reflector in self._reflectors:
            reflector.join(max(0.0, deadline - time.monotonic()))


class LogDeduplicator:
    """Suppresses messages that were already logged within the last `period` seconds.

    The methods take the monotonic time in seconds as `now`. Not thread-safe: each thread needs its own instance.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._logged: dict[str, float] = {}
        self._open_error = ""

    def should_log(self, text: str, now: float) -> bool:
        """Return whether to log `text`. If the result is true, `text` counts as logged at `now`."""
        if now - self._logged.get(text, float("-inf")) < self._period:
            return False
        self._logged = {old: at for old, at in self._logged.items() if now - at < self._period}
        self._logged[text] = now
        return True

    @property
    def error_is_open(self) -> bool:
        """Whether an error was logged, but not the recovery from it."""
        return bool(self._open_error)

    def should_log_error(self, error: str, now: float, *, lasting: bool = False) -> bool:
        """Return whether to log the current error. If `error` is "", return whether to log the recovery.

        A recovery is logged only if an error was logged before it. A `lasting` error, which may never end, is logged
        once and not repeated.
        """
        if error:
            new = error != self._open_error if lasting else self.should_log(error, now)
            self._open_error = error if new else self._open_error
            return new
        recovered, self._open_error = bool(self._open_error), ""
        return recovered


class _Limits(Struct, frozen=True):
    """Maximum sizes in bytes: of a page of a list, and of an event of a watch."""

    page: int
    event: int


class _Reflector:
    """A thread that lists and watches one kind of object."""

    def __init__(
        self,
        client: ApiClient,
        kind: Kind,
        machine: Callable[[Kind], ListWatch],
        sink: Callable[[Delta], None],
        *,
        limits: _Limits,
        on_error: Callable[[str, str], None],
        on_invalid: Callable[[Kind, str, str, str], None] | None,
    ) -> None:
        self._on_invalid = on_invalid
        self._client, self._kind, self._new_machine, self._sink = client, kind, machine, sink
        self._limits, self._on_error = limits, on_error
        self.name = kind.__name__
        self.last_contact = time.monotonic()
        self._machine = machine(kind)
        self._restarts = Restarts(f"watch of {self._machine.resource}")
        self._messages = LogDeduplicator(REPEAT_PERIOD)
        self._ignored_fields = LogDeduplicator(IGNORED_FIELDS_PERIOD)
        self._stopping = threading.Event()
        # Once stop() has set _stopping under this lock, the sink is not called and no further response is read.
        self._lock = threading.Lock()
        self._response: ApiResponse | None = None
        self._last_response: ApiResponse | None = None
        self._watch_start: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"api-{self._machine.resource}", daemon=True)

    @property
    def unavailable(self) -> bool:
        return self._machine.unavailable

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
            if self._response is not None:
                self._response.close()

    def join(self, timeout: float) -> None:
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        failed = False
        while not self._stopping.is_set():
            try:
                if failed:  # list again with a new state machine, because the state of the old one is unknown
                    self._machine, failed = self._new_machine(self._kind), False
                delay = self._send_request()
            except Exception as error:  # noqa: BLE001 - no error may stop the updates for a kind
                failed = True
                delay, text = self._restarts.failed(error, time.monotonic())
                with suppress(MemoryError):
                    self._log_unexpected(error, text)
            self._stopping.wait(delay)

    def _log_unexpected(self, error: Exception, text: str) -> None:
        if text:
            log.error("%s", text)
            log.debug("watch of %s", self._machine.resource, exc_info=error)
        self._on_error(self.name, "unexpected")

    def _send_request(self) -> float:
        """Send the next request and process the response. Return the seconds to wait before the following request."""
        machine = self._machine
        request = machine.next_request()
        self._watch_start = None
        try:
            with self._client.get(
                request.path,
                request.params,
                machine.inactivity,
                request.accept,
                optional_statuses=machine.optional_statuses,
            ) as response:
                try:
                    registered = self._register(response)
                    step = self._process(request, response) if registered else ListWatchStep(reconnect_after=0.0)
                finally:
                    self._response = None
        except IdleTimeoutError:
            self._on_error(self.name, "timeout")
            step = self._machine.handle_inactivity()
        except (BodyTooLargeError, FramingError) as error:
            self._on_error(self.name, "size")
            step = self._machine.handle_oversize(str(error))
        except (TransportError, ClientError) as error:
            self._on_error(self.name, "connection" if isinstance(error, TransportError) else "credentials")
            step = self._machine.handle_failure(str(error), self._watch_duration())
        if not self._stopping.is_set():
            self._carry_out(step)
            if step.renew_credentials:
                self._renew_credentials()
        return step.reconnect_after or 0.0

    def _register(self, response: ApiResponse) -> bool:
        """Record the response, so that `stop` can close it. Return False if `stop` has already been called."""
        with self._lock:
            self._response = self._last_response = response
            return not self._stopping.is_set()

    def _process(self, request: ListWatchRequest, response: ApiResponse) -> ListWatchStep:
        """Process a response until it ends or must be closed. Return the last step, which the caller must carry out."""
        if response.status != 200:
            if response.status not in self._machine.optional_statuses:
                self._on_error(self.name, "status")
            body = response.read_start(MAX_ERROR_BYTES)
            return self._machine.handle_status(response.status, response.headers, body)
        if not request.watch:
            return self._process_page(response.read(self._limits.page))
        self._watch_start = time.monotonic()
        self._machine.handle_open()
        self._carry_out(NOTHING)
        for event in read_events(self._kind, response, self._limits.event):
            if isinstance(event, ErrorStatus | UndecodableObject):
                self._on_error(self.name, "status" if isinstance(event, ErrorStatus) else "decoding")
            else:
                self.last_contact = time.monotonic()
            step = self._machine.handle_event(event)
            if step is NOTHING and not (self._machine.error or self._messages.error_is_open):
                continue
            if step.reconnect_after is not None:
                return step
            self._carry_out(step)
        return self._machine.handle_close(self._watch_duration())

    def _process_page(self, body: bytes) -> ListWatchStep:
        step = self._machine.handle_page(body)
        if step.reconnect_after:  # the page could not be used
            self._on_error(self.name, "decoding")
        else:
            self.last_contact = time.monotonic()
        return step

    def _watch_duration(self) -> float:
        """Return the seconds since the current watch started, or 0 if the request has not started a watch."""
        return time.monotonic() - self._watch_start if self._watch_start is not None else 0.0

    def _carry_out(self, step: ListWatchStep) -> None:
        """Log errors and recovery, and deliver the messages of a step."""
        now = time.monotonic()
        self._log_error(step, now)
        for message in step.messages:
            if isinstance(message, InvalidObject):
                self._log_invalid(message, now)
                if message.name:
                    self._deliver(Invalid(message.kind, message.namespace, message.name))
            elif isinstance(message, IgnoredFields):
                self._log_ignored_fields(message, now)
            else:
                self._deliver(message)

    def _deliver(self, delta: Delta) -> None:
        with self._lock:
            if not self._stopping.is_set():
                self._sink(delta)

    def _log_error(self, step: ListWatchStep, now: float) -> None:
        error = self._machine.error
        if not self._messages.should_log_error(error, now, lasting=self._machine.unavailable):
            return
        if error:
            log.warning("%s; retrying in %.1f s", error, step.reconnect_after or 0.0)
        else:
            log.info("watching %s again", self._machine.resource)

    def _log_invalid(self, invalid: InvalidObject, now: float) -> None:
        kind = invalid.kind.__name__
        if invalid.name:
            name = one_line(f"{invalid.namespace}/{invalid.name}".lstrip("/"))
            text = f"{kind} {name} is invalid: {invalid.text}; keeping its last valid state"
        else:
            text = f"cannot decode a {kind}: {invalid.text}; will relist {self._machine.resource}"
        if self._messages.should_log(text, now):
            log.warning("%s", text)
            if invalid.name:
                self._report_invalid(invalid, text)

    def _log_ignored_fields(self, ignored: IgnoredFields, now: float) -> None:
        name = f"{ignored.kind.__name__} {ignored.namespace}/{ignored.name}"
        text = f"{name}: ignoring unusable addresses and ports: {ignored.text}"
        if self._ignored_fields.should_log(text, now):
            log.warning("%s", text)
            self._report_invalid(ignored, text)

    def _report_invalid(self, object_: InvalidObject | IgnoredFields, text: str) -> None:
        if self._on_invalid is not None:
            self._on_invalid(object_.kind, object_.namespace, object_.name, text)

    def _renew_credentials(self) -> None:
        try:
            self._client.renew(self._last_response)
        except ClientError as error:
            if self._messages.should_log(str(error), time.monotonic()):
                log.warning("cannot renew the credentials: %s", error)
