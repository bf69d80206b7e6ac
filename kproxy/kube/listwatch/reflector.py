"""The cluster's objects from the API server: one thread per kind around the list/watch state machine."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError
from kproxy.kube.client.response import ApiResponse, SilenceError, TransportError
from kproxy.kube.codec.streams import read_events
from kproxy.kube.listwatch.list_watch import (
    INACTIVITY,
    IgnoredFields,
    InvalidObject,
    ListWatch,
    ListWatchRequest,
    ListWatchStep,
)
from kproxy.model.delta import BASIC_KINDS, Delta, Invalid, Kind

REPEAT_PERIOD = 60.0
"""Seconds before the same complaint is logged again."""
LEFT_OUT_PERIOD = 3600.0
"""Seconds before it is logged again that parts of an object are of no use: nothing may change about that."""
log = logging.getLogger(__name__)


class ApiSource:
    """Follows objects of `kinds`, of the Nodes only one, and hands every change to `sink`.

    `sink` is called from several threads and must not block. Each kind begins with a `Replace`, as soon as
    the server has told of all of its objects; until then, and after errors, it tries again for ever. ServiceCIDRs
    that the server does not have or does not show begin with an empty `Replace`, and are asked for ever more rarely.
    `inactivity` is in seconds: a connection silent for longer is replaced.
    """

    def __init__(
        self,
        client: ApiClient,
        node_name: str,
        sink: Callable[[Delta], None],
        *,
        kinds: Iterable[Kind] = BASIC_KINDS,
        inactivity: float = INACTIVITY,
    ) -> None:
        def machine(kind: Kind) -> ListWatch:
            return ListWatch(kind, node_name, random.random, inactivity)

        self._followers = [_Reflector(client, kind, machine, sink) for kind in kinds]

    def start(self) -> None:
        """Start the threads."""
        for follower in self._followers:
            follower.start()

    def stop(self, timeout: float) -> None:
        """Stop the threads, even those that wait for data. `sink` is not called again.

        Waits at most `timeout` seconds: a thread that connects, or waits for the beginning of an answer, takes longer.
        """
        for follower in self._followers:
            follower.stop()
        deadline = time.monotonic() + timeout
        for follower in self._followers:
            follower.join(max(0.0, deadline - time.monotonic()))


class LogDeduplicator:
    """Decides which complaints of one thread are worth a log line; times are seconds of one clock."""

    def __init__(self, period: float = REPEAT_PERIOD) -> None:
        self._period = period
        self._logged: dict[str, float] = {}
        self._open = ""

    def is_news(self, text: str, now: float) -> bool:
        """Tell whether `text` was not said within `period` seconds, and remember it as said if so."""
        if now - self._logged.get(text, float("-inf")) < self._period:
            return False
        self._logged = {old: at for old, at in self._logged.items() if now - at < self._period}
        self._logged[text] = now
        return True

    def is_trouble_news(self, trouble: str, now: float, *, lasting: bool = False) -> bool:
        """Like `is_news` for the present trouble, "" for none: the end of one that was said is news too.

        `lasting` trouble may well be for ever: it is said once, not again and again.
        """
        if trouble:
            news = trouble != self._open if lasting else self.is_news(trouble, now)
            self._open = trouble if news else self._open
            return news
        ended, self._open = bool(self._open), ""
        return ended


class _Reflector:
    """The thread of one kind."""

    def __init__(
        self,
        client: ApiClient,
        kind: Kind,
        machine: Callable[[Kind], ListWatch],
        sink: Callable[[Delta], None],
    ) -> None:
        self._client, self._kind, self._new_machine, self._sink = client, kind, machine, sink
        self._machine = machine(kind)
        self._complaints = LogDeduplicator()
        self._left_out = LogDeduplicator(LEFT_OUT_PERIOD)
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # between stop() and: using the sink, holding a response
        self._response: ApiResponse | None = None
        self._seen: ApiResponse | None = None
        self._opened: float | None = None  # when the present watch began
        self._thread = threading.Thread(target=self._run, name=f"api-{self._machine.resource}", daemon=True)

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
        while not self._stopping.is_set():
            try:
                delay = self._one_request()
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the updates of a kind
                delay = self._start_over(error)
            self._stopping.wait(delay)

    def _start_over(self, error: Exception) -> float:
        log.error("%s: unexpected %s: %s; starting over", self._machine.resource, type(error).__name__, error)
        self._machine = self._new_machine(self._kind)
        return self._machine.failed("starting over").again_after or 0.0

    def _one_request(self) -> float:
        """Send the machine's next request, feed it what comes, and return the seconds until the next."""
        machine = self._machine
        request = machine.next_request()
        self._opened = None
        try:
            with self._client.get(
                request.path, request.params, machine.inactivity, request.accept, absences=machine.absences
            ) as response:
                try:
                    step = self._take(request, response) if self._hold(response) else ListWatchStep(again_after=0.0)
                finally:
                    self._response = None
        except SilenceError:
            step = self._machine.silent()
        except (TransportError, ClientError) as error:
            step = self._machine.failed(str(error), self._lasted())
        if not self._stopping.is_set():
            self._follow(step)
            if step.renew:
                self._renew()
        return step.again_after or 0.0

    def _hold(self, response: ApiResponse) -> bool:
        """Let `stop` close the response from now on; false if it came first."""
        with self._lock:
            self._response = self._seen = response
            return not self._stopping.is_set()

    def _take(self, request: ListWatchRequest, response: ApiResponse) -> ListWatchStep:
        """Read an answer; return the step that ended it, not yet followed."""
        if response.status != 200:
            return self._machine.refused(response.status, response.headers, response.read())
        if not request.watch:
            return self._machine.page(response.read())
        self._opened = time.monotonic()
        self._machine.opened()
        self._follow(ListWatchStep())
        for event in read_events(self._kind, response):
            step = self._machine.event(event)
            if step.again_after is not None:
                return step
            self._follow(step)
        return self._machine.closed(self._lasted())

    def _lasted(self) -> float:
        """Return for how many seconds the present watch has been open, 0 if it never was."""
        return time.monotonic() - self._opened if self._opened is not None else 0.0

    def _follow(self, step: ListWatchStep) -> None:
        """Log what changed, and hand on the messages of a step."""
        now = time.monotonic()
        self._log_trouble(step, now)
        for message in step.messages:
            if isinstance(message, InvalidObject):
                self._log_problem(message, now)
                if message.name:
                    self._hand_on(Invalid(message.kind, message.namespace, message.name))
            elif isinstance(message, IgnoredFields):
                self._log_left_out(message, now)
            else:
                self._hand_on(message)

    def _hand_on(self, delta: Delta) -> None:
        with self._lock:
            if not self._stopping.is_set():
                self._sink(delta)

    def _log_trouble(self, step: ListWatchStep, now: float) -> None:
        trouble = self._machine.trouble
        if not self._complaints.is_trouble_news(trouble, now, lasting=self._machine.absent):
            return
        if trouble:
            log.warning("%s; next try in %.1f s", trouble, step.again_after or 0.0)
        else:
            log.info("following %s again", self._machine.resource)

    def _log_problem(self, problem: InvalidObject, now: float) -> None:
        name = f"{problem.namespace}/{problem.name}".lstrip("/") or "an object without a readable name"
        text = f"{problem.kind.__name__} {name} cannot be read, its last good state stays: {problem.text}"
        if self._complaints.is_news(text, now):
            log.warning("%s", text)

    def _log_left_out(self, found: IgnoredFields, now: float) -> None:
        name = f"{found.kind.__name__} {found.namespace}/{found.name}"
        text = f"{name}: left out what cannot be used: {found.text}"
        if self._left_out.is_news(text, now):
            log.warning("%s", text)

    def _renew(self) -> None:
        try:
            self._client.renew(self._seen)
        except ClientError as error:
            if self._complaints.is_news(str(error), time.monotonic()):
                log.warning("cannot renew the credentials: %s", error)
