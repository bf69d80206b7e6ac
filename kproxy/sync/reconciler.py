"""The reconciler: the thread that owns all state, applies deltas to it and keeps the kernel rules in sync."""

from __future__ import annotations

import logging
import math
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.delta import Delta, Upsert
from kproxy.model.log_throttle import V2
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
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.log_summary import Summary, seconds_text, synced_text
from kproxy.sync.schedule import Schedule

log = logging.getLogger(__name__)
_P = ParamSpec("_P")

MESSAGES_PER_SYNC = 10_000
"""Maximum number of messages to apply before running a sync that is due."""


class Stop(Struct, frozen=True):
    """Stops the reconciler. Existing rules stay active."""


class Resync(Struct, frozen=True):
    """Requests a sync because something other than an API object changed the context, such as an interface address."""


Batch: TypeAlias = tuple[Delta, ...]
"""Deltas that are applied together, without a sync in between."""
Message: TypeAlias = Delta | Batch | Stop | Resync


class Reconciler:
    """Applies messages to the desired state, and syncs each family when its schedule says that a sync is due.

    If one family fails, the other is still synced. Nothing is programmed until `is_ready` has returned True, by default
    once all kinds of objects have been listed.
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
        monitor: Callable[[Store, float], float | None] = lambda *_: None,
        programs_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_ready` returns whether enough is known to sync. It is not called again once it has returned True.

        `clock` returns seconds of a monotonic clock.

        The listeners `on_queue`, `on_change` and `on_sync` must not block. `QueueListener`, `ChangeListener` and
        `SyncListener` document when they are called. The `after_sync` steps may block. They run in order, after every
        family that was due has been synced and all listeners have been called. Health and metrics therefore do not wait
        for the steps, but the next sync does.

        Every `check_interval` seconds, a quick drift check looks for rules that another process removed. Every
        `full_check_interval` seconds, which should be a multiple of `check_interval`, all rules are read from the
        kernel and compared with the desired state.

        `monitor` is called with the store and the current time whenever the reconciler wakes up, even before the first
        sync. It returns the number of seconds after which it must be called again even if no message arrives, or None.

        Once `programs_stopped` returns True, kproxy is stopping and has killed the programs that a sync was waiting
        for. A sync that fails after that is logged as canceled.
        """
        self._monitor = monitor
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
        self._programs_stopped = programs_stopped

    def run(self, messages: queue.SimpleQueue[Message]) -> None:
        """Apply messages and sync until a `Stop` arrives."""
        monitor_wait: float | None = None
        while True:
            waits = [wait for wait in (self.wait(), monitor_wait) if wait is not None]
            try:
                message = messages.get(timeout=min(waits, default=None))
            except queue.Empty:
                message = None
            # Before a sync, apply all messages that have already arrived. Their number is limited, so that a flood of
            # messages cannot delay the sync forever.
            applied = 0
            while message is not None:
                if isinstance(message, Stop):
                    return
                self._try_to_apply(message)
                applied += 1
                message = None if applied >= MESSAGES_PER_SYNC or messages.empty() else messages.get()
            monitor_wait = self._run_monitor()
            self.sync_due()

    def _run_monitor(self) -> float | None:
        try:
            return self._monitor(self._store, self._clock())
        except Exception as error:  # a bug in the monitor must not stop the reconciler
            log.error("monitor failed: unexpected %r", error)
            log.debug("monitor failed", exc_info=error)
            return None

    def _try_to_apply(self, message: Delta | Batch | Resync) -> None:
        try:
            self.apply(message)
        except Exception as error:  # a bug must not stop the reconciler
            log.error("cannot apply a change: unexpected %r", error)
            log.debug("cannot apply a change", exc_info=error)

    def apply(self, message: Delta | Batch | Resync) -> None:
        """Apply one message to the desired state. If it changed anything, request a sync of all families.

        Also request a sync when `is_ready` returns True for the first time.
        """
        if isinstance(message, tuple):
            for delta in message:
                self.apply(delta)
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
        """Return the seconds until `sync_due` must be called, or None if no call is needed before the next message."""
        if not self._ready:
            return None
        waits = [self.sync_wait(), *(summary.wait(self._clock()) for summary in self._summaries.values())]
        if self._next_check is not None:
            waits.append(max(0.0, self._next_check - self._clock()))
        return min((wait for wait in waits if wait is not None), default=None)

    def sync_wait(self) -> float | None:
        """Return the seconds until the next sync is due, or None if no sync is pending."""
        waits = [schedule.wait(self._clock()) for _, schedule in self._families.values()]
        return min((wait for wait in waits if wait is not None), default=None)

    def sync_due(self) -> bool:
        """Sync every family that is due, then run the steps after a sync. Return whether all syncs succeeded."""
        if not self._ready:
            return True
        self._check_drift()
        due = [family for family in self._families if self._is_due(family)]
        reports = [self._sync(family) for family in due]
        for summary in self._summaries.values():
            if text := summary.flush(self._clock()):
                log.info("%s", text)
        for report in reports:  # not between the syncs, because health must not wait for a step
            _call_each(self._after_sync, report)
        return all(report.result is not None for report in reports)

    def _check_drift(self) -> None:
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
                log.warning("%s: another process removed kproxy's rules; restoring them", family.value)
                self._synced.discard(family)  # so that the sync that restores them is logged
                schedule.request()
        self._next_check = self._clock() + self._check_interval

    def _is_due(self, family: Family) -> bool:
        wait = self._families[family][1].wait(self._clock())
        return wait is not None and wait <= 0

    def _sync(self, family: Family) -> SyncReport:
        started = self._clock()
        schedule = self._families[family][1]
        schedule.started(started)
        try:
            result = self._families[family][0].sync(self._store)
        except Exception as error:  # a bug must not stop the reconciler: log it and retry
            schedule.failed(self._clock())
            self._failing_since.setdefault(family, started)
            delay = schedule.wait(self._clock()) or 0.0
            reason = str(error) if isinstance(error, SyncError) else f"unexpected {error!r}"
            if self._programs_stopped():
                log.info("%s: sync canceled, because kproxy is stopping: %s", family.value, reason)
            else:
                log.error("%s: sync failed, retrying in %.1f s: %s", family.value, delay, reason)
            log.debug("%s: sync failed", family.value, exc_info=error)
            report = SyncReport(family, started, self._clock(), None, reason)
        else:
            schedule.succeeded()
            report = SyncReport(family, started, self._clock(), result)
            self._log_sync(report, result)
        _call_each(self._on_sync, report)
        return report

    def _log_sync(self, report: SyncReport, result: SyncResult) -> None:
        """Log a successful sync.

        The first sync, a sync after failures, and a sync that restores removed rules are logged at once. All other
        syncs are logged at level V2, and added to the summary.
        """
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
    """Call each callback. If one raises an exception, log it and continue."""
    for callback in callbacks:
        try:
            callback(*args, **kwargs)
        except Exception as error:
            name = getattr(callback, "__qualname__", repr(callback))
            log.error("%s failed: unexpected %r", name, error)
            log.debug("%s failed", name, exc_info=error)
