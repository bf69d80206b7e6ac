"""The thread that owns all state: takes in deltas, and brings each family's kernel rules after them."""

from __future__ import annotations

import logging
import math
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.delta import Delta, Upsert
from kproxy.model.logging import V2
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import (
    AfterSyncStep,
    ChangeListener,
    QueueListener,
    SyncError,
    SyncListener,
    SyncReport,
    SyncResult,
)
from kproxy.model.types import Family
from kproxy.sync.family import FamilySync
from kproxy.sync.schedule import Schedule
from kproxy.sync.summary import Summary, seconds_text, synced_text

log = logging.getLogger(__name__)
_P = ParamSpec("_P")

MESSAGES_PER_SYNC = 10_000
"""How many messages are taken in before a sync that is due goes first."""


class Stop(Struct, frozen=True):
    """Ends the reconciler; the rules stay."""


class Resync(Struct, frozen=True):
    """Something outside of the objects changed that rules may depend on: work out the context again."""


Batch: TypeAlias = tuple[Delta, ...]
"""Deltas that belong together: no sync happens between them."""
Message: TypeAlias = Delta | Batch | Stop | Resync


class Reconciler:
    """Programs every family whenever its schedule says so.

    The families are independent: one that the kernel refuses does not hold up the other. Nothing is programmed before
    all kinds of objects have been listed.
    """

    def __init__(
        self,
        store: Store,
        families: Mapping[Family, FamilySync],
        *,
        make_schedule: Callable[[], Schedule],
        clock: Callable[[], float],
        is_ready: Callable[[Store], bool] = lambda store: store.complete,
        on_queue: Sequence[QueueListener] = (),
        on_change: Sequence[ChangeListener] = (),
        on_sync: Sequence[SyncListener] = (),
        after_sync: Sequence[AfterSyncStep] = (),
        check_interval: float | None = None,
        full_check_interval: float | None = None,
        look: Callable[[Store, float], float | None] = lambda *_: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_ready` says whether enough is known to program anything; once it is, it stays so.

        Every `check_interval` seconds, a look tells whether somebody else has removed rules of ours; every
        `full_check_interval`, which should be a multiple of it, everything is compared.

        `look` is called with the state and the clock's time after each batch of messages, and whenever the seconds are
        over that it returned last; None means that only messages matter. It is also called before anything is ready.
        """
        self._look = look
        self._check_interval = check_interval
        self._full_check_interval = full_check_interval
        self._next_check = clock() + check_interval if check_interval else None
        self._next_full_check = clock() + full_check_interval if full_check_interval else math.inf
        self._store = store
        self._is_ready = is_ready
        self._ready = False
        self._on_queue = on_queue
        self._on_change = on_change
        self._on_sync = on_sync
        self._after_sync = after_sync
        self._families = {family: (sync, make_schedule()) for family, sync in families.items()}
        self._summaries = {family: Summary(family) for family in families}
        self._synced: set[Family] = set()
        self._failing_since: dict[Family, float] = {}
        self._clock = clock
        self._stopping = stopping

    def run(self, messages: queue.SimpleQueue[Message]) -> None:
        """Work until a `Stop` arrives."""
        pause: float | None = None
        while True:
            waits = [wait for wait in (self.wait(), pause) if wait is not None]
            try:
                message = messages.get(timeout=min(waits, default=None))
            except queue.Empty:
                message = None
            # What has already arrived belongs to the same sync, but a flood must not keep it from happening.
            taken = 0
            while message is not None:
                if isinstance(message, Stop):
                    return
                self._take_safely(message)
                taken += 1
                message = None if taken >= MESSAGES_PER_SYNC or messages.empty() else messages.get()
            pause = self._look_safely()
            self.sync_due()

    def _look_safely(self) -> float | None:
        try:
            return self._look(self._store, self._clock())
        except Exception as error:  # who watches must not stop the work
            log.error("looking at the state failed: unexpected %r", error)
            log.debug("where it failed", exc_info=error)
            return None

    def _take_safely(self, message: Delta | Batch | Resync) -> None:
        try:
            self.take(message)
        except Exception as error:  # a bug in here must not end the node's proxy
            log.error("a change could not be taken in: unexpected %r", error)
            log.debug("where it failed", exc_info=error)

    def take(self, message: Delta | Batch | Resync) -> None:
        """Apply one message to the desired state and note what it leaves to do."""
        if isinstance(message, tuple):
            for delta in message:
                self.take(delta)
            return
        if isinstance(message, Resync):
            changed = StoreChange(node=True)
        else:
            changed = self._store.apply(message)
            if changed:
                kind = type(message.object) if isinstance(message, Upsert) else message.kind
                _call_each(self._on_change, kind, changed)
            if not self._ready and self._is_ready(self._store):
                self._ready = True
                changed = replace(changed, node=True)
        if not changed:
            return
        for family, (sync, schedule) in self._families.items():
            sync.add_changes(changed)
            schedule.request()
            _call_each(self._on_queue, family, self._clock())

    def wait(self) -> float | None:
        """Return in how many seconds `sync_due` has something to do, None if only a message can tell."""
        if not self._ready:
            return None
        waits = [self.sync_wait(), *(summary.wait(self._clock()) for summary in self._summaries.values())]
        if self._next_check is not None:
            waits.append(max(0.0, self._next_check - self._clock()))
        return min((wait for wait in waits if wait is not None), default=None)

    def sync_wait(self) -> float | None:
        """Return in how many seconds the next sync is due, None if nothing is pending."""
        waits = [schedule.wait(self._clock()) for _, schedule in self._families.values()]
        return min((wait for wait in waits if wait is not None), default=None)

    def sync_due(self) -> bool:
        """Sync every family that is due now. Return whether all that were due succeeded."""
        if not self._ready:
            return True
        self._check()
        due = [family for family in self._families if self._due(family)]
        reports = [self._sync(family) for family in due]
        for summary in self._summaries.values():
            if text := summary.take(self._clock()):
                log.info("%s", text)
        for report in reports:
            _call_each(self._after_sync, report)
        return all(report.result is not None for report in reports)

    def _check(self) -> None:
        if self._next_check is None or self._check_interval is None or self._clock() < self._next_check:
            return
        full = self._clock() >= self._next_full_check
        if full:
            self._next_full_check += self._full_check_interval or math.inf
        for family, (sync, schedule) in self._families.items():
            if full:
                sync.forget()
                schedule.request()
            elif not sync.verify():
                log.warning("%s: somebody else has removed rules of ours: putting them back", family.value)
                self._synced.discard(family)  # that they are back is worth a line
                schedule.request()
        self._next_check = self._clock() + self._check_interval

    def _due(self, family: Family) -> bool:
        wait = self._families[family][1].wait(self._clock())
        return wait is not None and wait <= 0

    def _sync(self, family: Family) -> SyncReport:
        started = self._clock()
        schedule = self._families[family][1]
        schedule.started(started)
        try:
            result = self._families[family][0].sync(self._store)
        except Exception as error:  # a bug in here must not end the node's proxy: it is told and retried
            schedule.failed(self._clock())
            self._failing_since.setdefault(family, started)
            pause = schedule.wait(self._clock()) or 0.0
            reason = str(error) if isinstance(error, SyncError) else f"unexpected {error!r}"
            if self._stopping():
                log.info("%s: sync canceled: kproxy is stopping", family.value)
            else:
                log.error("%s: sync failed, trying again in %.1f s: %s", family.value, pause, reason)
            log.debug("%s: where it failed", family.value, exc_info=error)
            report = SyncReport(family, started, self._clock(), None, reason)
        else:
            schedule.succeeded()
            report = SyncReport(family, started, self._clock(), result)
            self._log_sync(report, result)
        _call_each(self._on_sync, report)
        return report

    def _log_sync(self, report: SyncReport, result: SyncResult) -> None:
        """Log a sync: at once if it is the first, ends a failure or puts rules back, else in the next summary."""
        family, seconds = report.family, report.finished - report.started
        text = synced_text(family, result.services, seconds, result.counts, complete=result.complete)
        failing_since = self._failing_since.pop(family, None)
        if failing_since is not None:
            text += f", after failures for {seconds_text(report.finished - failing_since)}"
        if failing_since is not None or family not in self._synced:
            self._synced.add(family)
            log.info("%s", text)
            return
        self._summaries[family].add(report.finished, result.services, seconds, result.counts, complete=result.complete)
        log.log(V2, "%s", text)


def _call_each(callbacks: Iterable[Callable[_P, None]], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """Call each of some callbacks. One that raises is logged and does not keep the others from being called."""
    for callback in callbacks:
        try:
            callback(*args, **kwargs)
        except Exception as error:
            name = getattr(callback, "__qualname__", repr(callback))
            log.error("%s failed: unexpected %r", name, error)
            log.debug("where it failed", exc_info=error)
