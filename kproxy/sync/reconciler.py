"""The reconciler: the thread that owns all state, applies deltas to it and keeps the kernel rules in sync."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.delta import Delta, Upsert
from kproxy.model.drift import Part, RepairResult, RulesChanged, Touched
from kproxy.model.log_throttle import V2
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import (
    AfterSyncStep,
    ChangeListener,
    QueueListener,
    RepairListener,
    RepairReport,
    SyncError,
    SyncListener,
    SyncReport,
    SyncResult,
)
from kproxy.model.types import Family
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.log_summary import Summary, seconds_text, synced_text
from kproxy.sync.repair_schedule import RepairSchedule
from kproxy.sync.schedule import Schedule

log = logging.getLogger(__name__)
_P = ParamSpec("_P")

STEP_SECONDS = 1.0
"""Seconds between two steps of a comparison of all rules."""
MESSAGES_PER_SYNC = 10_000
"""Maximum number of messages to apply before running a sync that is due."""
OUT_OF_MEMORY_SECONDS = 0.5
"""Pause after something failed because there was not enough memory."""
OUT_OF_MEMORY_RETRIES = 120
"""How often in a row the reconciler tries again after it has run out of memory. After that, its thread ends."""


class Stop(Struct, frozen=True):
    """Stops the reconciler. Existing rules stay active."""


class Resync(Struct, frozen=True):
    """Requests a sync because something other than an API object changed the context, such as an interface address."""


class Attempted(Struct, frozen=True):
    """The outcome of an attempt to sync a family: a result or an error. The times are those of a `SyncReport`."""

    family: Family
    started: float
    finished: float
    outcome: SyncResult | Exception


class Repaired(Struct, frozen=True):
    """The outcome of checking touched `parts` of a family's rules. `by` are the processes that touched them."""

    family: Family
    outcome: RepairResult | Exception
    parts: frozenset[Part] = frozenset()
    by: frozenset[str] = frozenset()


class Compared(Struct, frozen=True):
    """The outcome of one step of a comparison of all rules of a family. None means that the comparison is complete."""

    family: Family
    outcome: RepairResult | Exception | None


class Idle(Struct, frozen=True):
    """A job of a family is done."""

    family: Family


Outcome: TypeAlias = Attempted | Repaired | Compared | Idle
"""What a job tells the reconciler."""
Batch: TypeAlias = tuple[Delta, ...]
"""Deltas that are applied together, without a sync in between."""
Message: TypeAlias = Delta | Batch | Stop | Resync | RulesChanged | Outcome
Deliver: TypeAlias = Callable[[Outcome], None]
Job: TypeAlias = Callable[[Deliver], None]
"""Work that may block for a long time. It passes its outcomes to `Deliver` and raises no `Exception`."""


class FamilyState:
    """What the reconciler knows about one family."""

    def __init__(self, family: Family, sync: FamilySync, schedule: Schedule) -> None:
        self.sync = sync
        self.schedule = schedule
        self.summary = Summary(family)
        self.log_next_sync = True
        """Whether the next successful sync is logged at once instead of in the next summary."""
        self.failing_since: float | None = None
        self.compare_all = False
        """Whether the next sync must read all rules from the kernel."""
        self.repairs = RepairSchedule()
        self.next_step: float | None = None
        """When the next step of the current comparison is due. None means that no comparison is running."""
        self.syncing = False
        """Whether a sync is running or waiting."""
        self.checking = False
        """Whether a repair or a step of a comparison is running or waiting."""
        self.jobs = 0
        """The number of jobs that are running or waiting."""
        self.reports: list[SyncReport] = []
        """The attempts whose `after_sync` steps have not been started."""


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
        on_repair: Sequence[RepairListener] = (),
        after_sync: Sequence[AfterSyncStep] = (),
        check_interval: float | None = None,
        full_check_interval: float | None = None,
        monitor: Callable[[Store, float], float | None] = lambda *_: None,
        programs_stopped: Callable[[], bool] = lambda: False,
        execute: Callable[[Family, Job], None] | None = None,
    ) -> None:
        """`is_ready` returns whether enough is known to sync. It is not called again once it has returned True.

        `clock` returns seconds of a monotonic clock.

        The listeners `on_queue`, `on_change`, `on_sync` and `on_repair` run in the reconciler's thread and must not
        block. Their types document when they are called. The `after_sync` steps may
        block. They run in order, as a job of the family, after the listeners have been called and before any other
        check or sync of the family. Health and metrics therefore do not wait for the steps, but the next sync of the
        family does: the steps see exactly the rules that their sync has programmed.

        Every `check_interval` seconds, a comparison of all rules with the desired state begins. It proceeds in steps,
        one every `STEP_SECONDS`. Every `full_check_interval` seconds, which should be a multiple of `check_interval`,
        a full sync reads all rules from the kernel instead.

        `monitor` is called with the store and the current time whenever the reconciler wakes up, even before the first
        sync. It returns the number of seconds after which it must be called again even if no message arrives, or None.

        Once `programs_stopped` returns True, kproxy is stopping and has killed the programs that a sync was waiting
        for. A sync that fails after that is logged as canceled.

        `execute` runs a job of a family in another thread, after all earlier jobs of this family. The job's outcomes
        must be put on the queue that `run` reads, and the store needs a lock. By default, a job runs at once in the
        reconciler's thread.
        """
        self._monitor = monitor
        self._check_interval = check_interval
        self._full_check_interval = full_check_interval
        self._next_check = clock() + check_interval if check_interval else None
        self._next_full_check = clock() + full_check_interval if full_check_interval else math.inf
        self._store = store
        self._is_ready = is_ready
        self._ready = False
        self._monitor_wait: float | None = None
        self._ran_out_of_memory = False
        self._on_queue = on_queue
        self._on_change = on_change
        self._on_sync = on_sync
        self._on_repair = on_repair
        self._after_sync = after_sync
        self._families = {family: FamilyState(family, sync, make_schedule()) for family, sync in families.items()}
        self._clock = clock
        self._programs_stopped = programs_stopped
        self._execute = execute or (lambda _, job: job(self._receive))

    def run(self, messages: queue.SimpleQueue[Message]) -> None:
        """Apply messages and sync until a `Stop` arrives and the jobs that have begun are done."""
        failures = 0
        message: Message | None = None
        while True:
            try:
                self._recover()
                waits = [wait for wait in (self.wait(), self._monitor_wait) if wait is not None]
                if message is None:
                    with suppress(queue.Empty):
                        message = messages.get(timeout=min(waits, default=None))
                # Before a sync, apply all messages that have already arrived. Their number is limited, so that a flood
                # of messages cannot delay the sync forever.
                applied = 0
                while message is not None:
                    if isinstance(message, Stop):
                        self._finish_jobs(messages)
                        return
                    self._try_to_apply(message)
                    applied += 1
                    message = None
                    if applied < MESSAGES_PER_SYNC and not messages.empty():
                        message = messages.get()
                self._monitor_wait = self._run_monitor()
                self.sync_due()
                failures = 0
            except MemoryError:
                # Nothing may be lost: the message is applied again, and all rules are compared with the whole store.
                self._ran_out_of_memory = True
                failures += 1
                if failures > OUT_OF_MEMORY_RETRIES:
                    raise
                time.sleep(OUT_OF_MEMORY_SECONDS)

    def _recover(self) -> None:
        """After the reconciler has run out of memory, request full syncs: some changes may not be pending."""
        if self._ran_out_of_memory:
            for state in self._families.values():
                state.compare_all = True
                state.schedule.request()
            self._ran_out_of_memory = False

    def _finish_jobs(self, messages: queue.SimpleQueue[Message]) -> None:
        """Wait until no job is left. Ignore all messages except outcomes."""
        while any(state.jobs for state in self._families.values()):
            message = messages.get()
            if isinstance(message, Outcome):
                self._try_to_apply(message)

    def _run_monitor(self) -> float | None:
        try:
            return self._monitor(self._store, self._clock())
        except Exception as error:  # a bug in the monitor must not stop the reconciler
            log.error("monitor failed: unexpected %r", error)
            log.debug("monitor failed", exc_info=error)
            return None

    def _try_to_apply(self, message: Delta | Batch | Resync | RulesChanged | Outcome) -> None:
        try:
            if isinstance(message, Outcome):
                self._receive(message)
            elif isinstance(message, RulesChanged):
                self.touch(message)
            else:
                self.apply(message)
        except MemoryError:
            raise
        except Exception as error:  # a bug must not stop the reconciler
            log.error("cannot apply a change: unexpected %r", error)
            log.debug("cannot apply a change", exc_info=error)

    def apply(self, message: Delta | Batch | Resync) -> None:
        """Apply one message to the desired state. If it changed anything, request a sync of the families it affects.

        Also request a sync when `is_ready` returns True for the first time.
        """
        if isinstance(message, tuple):
            with self._store.lock:
                for delta in message:
                    self.apply(delta)
            return
        with self._store.lock:
            changed = self._apply_to_store(message)
            affected = [family for family in self._families if changed and changed.affects(family)]
            for family in affected:
                self._families[family].sync.add_changes(changed)
        for family in affected:
            self._families[family].schedule.request()
            _call_each(self._on_queue, family, self._clock())

    def _apply_to_store(self, message: Delta | Resync) -> StoreChange:
        if isinstance(message, Resync):
            return StoreChange(node=True)
        changed = self._store.apply(message)
        if changed:
            kind = type(message.object) if isinstance(message, Upsert) else message.kind
            _call_each(self._on_change, kind, changed)
        if not self._ready and self._is_ready(self._store):
            self._ready = True
            changed = replace(changed, node=True, families=None)
        return changed

    def touch(self, changed: RulesChanged) -> None:
        """Record which parts of the rules other processes have touched. `sync_due` checks and restores them."""
        now = self._clock()
        for family, state in self._families.items():
            tables = {table: touched for (owner, table), touched in changed.tables.items() if owner is family}
            if tables:
                state.repairs.touch(tables, now)

    def wait(self) -> float | None:
        """Return the seconds until `sync_due` must be called, or None if no call is needed before the next message."""
        if not self._ready:
            return None
        now = self._clock()
        waits = [self.sync_wait(), *(state.summary.wait(now) for state in self._families.values())]
        if self._next_check is not None:
            waits.append(max(0.0, self._next_check - now))
        for state in self._families.values():
            if not (state.syncing or state.checking):
                waits.append(state.repairs.wait(now))
                waits.append(max(0.0, state.next_step - now) if state.next_step is not None else None)
        return min((wait for wait in waits if wait is not None), default=None)

    def sync_wait(self) -> float | None:
        """Return the seconds until the next sync is due, or None if no sync is pending."""
        now = self._clock()
        waits = [self._wait_of(state, now) for state in self._families.values() if not state.syncing]
        return min((wait for wait in waits if wait is not None), default=None)

    def _wait_of(self, state: FamilyState, now: float) -> float | None:
        wait, retry = state.schedule.wait(now), state.sync.next_retry
        return max(0.0, retry - now) if wait is None and retry is not None else wait

    def sync_due(self) -> bool:
        """Check and sync every family that is due. Start the steps after the syncs that have ended.

        Return False if a sync has failed since the previous call.
        """
        if not self._ready:
            return True
        # The steps of a sync come before the next sync, whose rules they do not know.
        succeeded = self._start_steps()
        self._check_drift()
        self._start_repairs()
        now = self._clock()
        due = [
            family
            for family, state in self._families.items()
            if not state.syncing and (wait := self._wait_of(state, now)) is not None and wait <= 0
        ]
        for family in due:
            self._start_sync(family)
        for state in self._families.values():
            if text := state.summary.flush(self._clock()):
                log.info("%s", text)
        # Jobs that run at once have ended. Their steps do not run between the syncs, because health waits for all
        # families.
        return self._start_steps() and succeeded

    def _start_steps(self) -> bool:
        """Start the steps after the attempts that have been received. Return False if one of these failed."""
        succeeded = True
        for state in self._families.values():
            while state.reports:
                report = state.reports[0]
                self._start(report.family, partial(self._run_steps, report))
                del state.reports[0]
                succeeded = succeeded and report.result is not None
        return succeeded

    def _check_drift(self) -> None:
        if self._next_check is None or self._check_interval is None or self._clock() < self._next_check:
            return
        full = self._clock() >= self._next_full_check
        if full:
            self._next_full_check += self._full_check_interval or math.inf
        for state in self._families.values():
            if full:
                state.compare_all = True
                state.schedule.request()
            elif state.next_step is None:
                state.next_step = self._clock()
        self._next_check = self._clock() + self._check_interval

    def _start_repairs(self) -> None:
        """Start checking the touched parts of each family, or else the next step of its comparison.

        A check runs between two syncs: after the steps of the first, which do not know the rules that the check may
        write. It does not wait until all jobs have ended: under constant changes, they never do.
        """
        now = self._clock()
        for family, state in self._families.items():
            if state.syncing or state.checking:
                continue
            if touched := state.repairs.take(now):
                self._start_check(family, partial(self._repair, family, touched))
            elif state.next_step is not None and state.next_step <= now:
                state.next_step = now + STEP_SECONDS
                self._start_check(family, partial(self._compare, family))

    # Jobs. With `execute`, they run in another thread. They must not change the reconciler's state.

    def _start(self, family: Family, work: Job) -> None:
        idle = Idle(family)

        def job(deliver: Deliver) -> None:
            try:
                work(deliver)
            finally:
                _deliver_surely(deliver, idle)

        state = self._families[family]
        jobs = state.jobs
        try:
            state.jobs += 1
            self._execute(family, job)
        except MemoryError:
            state.jobs = jobs
            raise

    def _start_sync(self, family: Family) -> None:
        state = self._families[family]
        state.schedule.started(self._clock())
        state.syncing = True
        compare_all, state.compare_all = state.compare_all, False
        try:
            self._start(family, partial(self._sync, family, compare_all=compare_all))
        except MemoryError:
            state.syncing = False
            raise

    def _start_check(self, family: Family, work: Job) -> None:
        state = self._families[family]
        state.checking = True
        try:
            self._start(family, work)
        except MemoryError:
            state.checking = False
            raise

    def _sync(self, family: Family, deliver: Deliver, *, compare_all: bool) -> None:
        sync = self._families[family].sync
        started = self._clock()
        try:
            if compare_all:
                sync.forget()
            outcome: SyncResult | Exception = sync.sync(self._store, started)
        except Exception as error:  # noqa: BLE001 - a bug must not stop the reconciler: it is logged, and retried
            outcome = error
        deliver(Attempted(family, started, self._clock(), outcome))

    def _repair(self, family: Family, touched: Mapping[str, Touched], deliver: Deliver) -> None:
        by = frozenset().union(*(each.by for each in touched.values()))
        parts = frozenset(part for table, each in touched.items() for part in each.parts(table))
        try:
            outcome: RepairResult | Exception = self._families[family].sync.repair(self._store, touched)
        except Exception as error:  # noqa: BLE001 - a full sync follows, which logs the error if it persists
            outcome = error
        deliver(Repaired(family, outcome, parts, by))

    def _compare(self, family: Family, deliver: Deliver) -> None:
        try:
            outcome: RepairResult | Exception | None = self._families[family].sync.compare_next(self._store)
        except Exception as error:  # noqa: BLE001 - as above
            outcome = error
        deliver(Compared(family, outcome))

    def _run_steps(self, report: SyncReport, deliver: Deliver) -> None:  # noqa: ARG002 - a job, without an outcome
        for _ in range(OUT_OF_MEMORY_RETRIES):
            try:
                _call_each(self._after_sync, report)
            except MemoryError:
                time.sleep(OUT_OF_MEMORY_SECONDS)
            else:
                return

    # Outcomes

    def _receive(self, outcome: Outcome) -> None:
        state = self._families[outcome.family]
        if isinstance(outcome, Idle):
            if state.jobs <= 1:
                self._receive_lost_outcomes(state, outcome.family)
            # At the end, because the message is applied again if there was not enough memory.
            state.jobs = max(0, state.jobs - 1)
        elif isinstance(outcome, Repaired):
            state.checking = False
            self._receive_check(state, outcome.family, outcome.outcome, outcome.parts, outcome.by)
        elif isinstance(outcome, Compared):
            state.checking = False
            if not isinstance(outcome.outcome, RepairResult) or outcome.outcome.needs_full_sync:
                state.next_step = None  # a full sync compares all rules as well
            if outcome.outcome is not None:
                self._receive_check(state, outcome.family, outcome.outcome)
        else:
            self._receive_attempt(state, outcome)

    def _receive_lost_outcomes(self, state: FamilyState, family: Family) -> None:
        """Once the last job has ended, receive the failures of those that have not delivered an outcome."""
        if state.syncing:
            now = self._clock()
            failure = SyncError("the sync ended without an outcome")
            state.compare_all = True  # the changes may no longer be pending
            self._receive_attempt(state, Attempted(family, now, now, failure))
        if state.checking:
            state.checking = False
            self._receive_check(state, family, SyncError("the check ended without an outcome"))

    def _receive_check(
        self,
        state: FamilyState,
        family: Family,
        outcome: RepairResult | Exception,
        parts: frozenset[Part] = frozenset(),
        by: Collection[str] = (),
    ) -> None:
        """Receive the outcome of checking `parts`, or of a step of a comparison.

        A full sync that becomes necessary starts at once. But while other programs cause such syncs again and again,
        the next check of the tables waits.
        """
        now = self._clock()
        tables = {part.table for part in parts}
        if isinstance(outcome, Exception):
            log.warning("%s: cannot check kproxy's rules: %s; comparing all of them", family.value, outcome)
            log.debug("%s: cannot check kproxy's rules", family.value, exc_info=outcome)
            state.repairs.full_sync_needed(tables, now)
            state.compare_all = True
            self._request_full_sync(state)
            return
        if outcome.skipped:
            return
        delayed = state.repairs.repaired(outcome.repaired, now)
        if outcome.needs_full_sync:
            delayed |= state.repairs.full_sync_needed(tables, now)
        report = RepairReport(family, outcome, tuple(sorted(by)), delayed, parts)
        _call_each(self._on_repair, report)
        if outcome.needs_full_sync:
            state.log_next_sync = True
            self._request_full_sync(state)

    def _request_full_sync(self, state: FamilyState) -> None:
        """Request a sync, unless a failed one is going to be retried: a request would end the growing delays."""
        if state.failing_since is None or state.syncing:
            state.schedule.request()

    def _receive_attempt(self, state: FamilyState, attempt: Attempted) -> None:
        family, outcome = attempt.family, attempt.outcome
        state.syncing = False
        if isinstance(outcome, Exception):
            if isinstance(outcome, MemoryError):
                state.compare_all = True  # the changes may no longer be pending
            state.schedule.failed(self._clock())
            if state.failing_since is None:
                state.failing_since = attempt.started
            delay = state.schedule.wait(self._clock()) or 0.0
            reason = str(outcome) if isinstance(outcome, SyncError) else f"unexpected {outcome!r}"
            if self._programs_stopped():
                log.info("%s: sync canceled, because kproxy is stopping: %s", family.value, reason)
            else:
                log.error("%s: sync failed, retrying in %.1f s: %s", family.value, delay, reason)
            log.debug("%s: sync failed", family.value, exc_info=outcome)
            report = SyncReport(family, attempt.started, attempt.finished, None, reason)
        else:
            state.schedule.succeeded()
            if outcome.complete:
                state.repairs.full_sync_ended(self._clock())
                if outcome.applied.compare_soon and state.next_step is None:
                    state.next_step = self._clock() + STEP_SECONDS
            report = SyncReport(family, attempt.started, attempt.finished, outcome)
            self._log_sync(state, report, outcome)
        state.reports.append(report)
        _call_each(self._on_sync, report)
        if state.schedule.wait(self._clock()) is not None and report.result is not None:
            # A change arrived during the sync. The listeners must not take it for programmed.
            _call_each(self._on_queue, family, self._clock())

    def _log_sync(self, state: FamilyState, report: SyncReport, result: SyncResult) -> None:
        """Log a successful sync.

        The first sync, a sync after failures, and a sync that restores removed rules are logged at once. All other
        syncs are logged at level V2, and added to the summary.
        """
        seconds = report.finished - report.started
        text = synced_text(report.family, result.services, seconds, result.counts, complete=result.complete)
        if state.failing_since is not None:
            text += f", after failures for {seconds_text(report.finished - state.failing_since)}"
        if state.failing_since is not None or state.log_next_sync:
            state.failing_since = None
            state.log_next_sync = False
            log.info("%s", text)
            return
        state.summary.add(report.finished, result.services, seconds, result.counts, complete=result.complete)
        log.log(V2, "%s", text)


def _deliver_surely(deliver: Deliver, outcome: Outcome) -> None:
    """Deliver an outcome without which the family would never be synced again."""
    while True:
        try:
            deliver(outcome)
        except MemoryError:
            time.sleep(OUT_OF_MEMORY_SECONDS)
        else:
            return


def _call_each(callbacks: Iterable[Callable[_P, None]], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """Call each callback. If one raises an exception, log it and continue. Raises `MemoryError`."""
    for callback in callbacks:
        try:
            callback(*args, **kwargs)
        except MemoryError:
            raise
        except Exception as error:
            name = getattr(callback, "__qualname__", repr(callback))
            log.error("%s failed: unexpected %r", name, error)
            log.debug("%s failed", name, exc_info=error)
