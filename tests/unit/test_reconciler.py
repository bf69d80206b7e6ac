"""The reconciler: what a sync covers and when it runs, retries after failures, drift checks, and its thread."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest

from kproxy.model.context import Context
from kproxy.model.delta import Delete, Kind, Replace, Upsert
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.log_throttle import V2
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import AfterSyncStep, ApplyResult, Plans, SyncError, SyncReport
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServicePort
from kproxy.serve.health import Health
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.reconciler import Message, Reconciler, Resync, Stop
from kproxy.sync.schedule import Schedule
from tests.inprocess import EMPTY_LISTS, ReconciledProxy, StubBackend
from tests.lab.waiting import HANG_GUARD


def service(name: str, port: int = 80) -> Service:
    return Service("ns", name, (f"10.96.0.{ord(name[0])}", f"fd00::{ord(name[0])}"), (ServicePort("", port, "TCP"),))


class RecordingBackend(StubBackend):
    """A backend that records its syncs and comparisons. Each sync raises the next of `errors`, if any.

    A comparison has as many steps as `steps` has items, which are their results.
    """

    def __init__(self) -> None:
        self.syncs: list[set[str]] = []
        self.contexts: list[Context] = []
        self.errors: list[Exception] = []
        self.checks = 0
        self.steps: list[RepairResult] = []
        self.touched: list[dict[str, Touched]] = []
        self.repairs: list[RepairResult | Exception] = []
        self.synced: queue.SimpleQueue[set[str]] = queue.SimpleQueue()

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        self.checks += 1
        if not self.steps:
            return None
        result = self.steps.pop(0)
        self.needs_full_sync = self.needs_full_sync or result.needs_full_sync
        return result

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        self.touched.append(dict(touched))
        result = self.repairs.pop(0) if self.repairs else RepairResult()
        if isinstance(result, Exception):
            raise result
        return result

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        keys = {key for key, _ in plans.by_service()}
        self.syncs.append(keys)
        self.contexts.append(context)
        self.synced.put(keys)
        if self.errors:
            raise self.errors.pop(0)
        self.needs_full_sync = False
        return ApplyResult({}, {})


class RecordingListener:
    """A listener that records its notifications."""

    def __init__(self) -> None:
        self.queued_at: list[tuple[Family, float]] = []
        self.changes: list[tuple[Kind, frozenset[str]]] = []
        self.reports: list[SyncReport] = []

    def on_queue(self, family: Family, now: float) -> None:
        self.queued_at.append((family, now))

    def on_change(self, kind: Kind, changed: StoreChange) -> None:
        self.changes.append((kind, changed.services))

    def on_sync(self, report: SyncReport) -> None:
        self.reports.append(report)


class TwoFamilyProxy(ReconciledProxy):
    """A dual-stack reconciler with recording backends and a recording listener."""

    def __init__(
        self,
        *,
        listed: bool = True,
        listeners: Sequence[RecordingListener] = (),
        after_sync: Sequence[AfterSyncStep] = (),
        check_intervals: tuple[float, float] | None = None,
        programs_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """`listed` starts with a synced empty cluster. `check_intervals` are of drift checks and of full checks."""
        self.four, self.six = RecordingBackend(), RecordingBackend()
        self.listener = RecordingListener()
        notified = [*listeners, self.listener]
        super().__init__(
            {
                Family.IPV4: FamilySync(self.four, lambda node: context(Family.IPV4, node)),
                Family.IPV6: FamilySync(self.six, lambda node: context(Family.IPV6, node)),
            },
            on_queue=[listener.on_queue for listener in notified],
            on_change=[listener.on_change for listener in notified],
            on_sync=[listener.on_sync for listener in notified],
            after_sync=after_sync,
            check_interval=check_intervals[0] if check_intervals else None,
            full_check_interval=check_intervals[1] if check_intervals else None,
            programs_stopped=programs_stopped,
        )
        if listed:
            self.apply(*EMPTY_LISTS)
            self.sync_after()
            self.clock.now = 100.0
            self.four.syncs.clear()
            self.six.syncs.clear()


def context(family: Family, node: Node | None) -> Context:
    return Context(family, "node-1", zone=node.zone if node else "")


# The first sync.


@pytest.mark.parametrize("order", list(itertools.permutations((Replace(Service, (service("web"),)), *EMPTY_LISTS[1:]))))
def test_nothing_is_programmed_before_all_kinds_are_listed(order: tuple[Replace, ...]) -> None:
    proxy = TwoFamilyProxy(listed=False)
    proxy.apply(Upsert(service("web")), Upsert(Node("node-1")))
    for delta in order:
        assert proxy.reconciler.wait() is None
        assert proxy.sync_after(5) is True
        assert proxy.four.syncs == []
        proxy.apply(delta)
    assert proxy.reconciler.wait() == 0
    assert proxy.sync_after(0) is True
    assert proxy.four.syncs == proxy.six.syncs == [{"ns/web"}]


def test_empty_cluster_is_programmed() -> None:
    proxy = TwoFamilyProxy(listed=False)
    proxy.apply(*EMPTY_LISTS)
    assert proxy.reconciler.wait() == 0
    proxy.sync_after(0)
    assert proxy.four.syncs == proxy.six.syncs == [set()]


# When families are synced.


def test_first_change_is_synced_at_once_and_later_ones_are_batched() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")))
    assert proxy.reconciler.wait() == 0
    proxy.sync_after(0)
    proxy.apply(Upsert(service("b")), Upsert(service("c")))
    assert proxy.reconciler.wait() == 1.0
    proxy.sync_after(0.5)
    assert proxy.four.syncs == [{"ns/a"}]
    proxy.sync_after(0.5)
    assert proxy.four.syncs == [{"ns/a"}, {"ns/b", "ns/c"}]
    assert proxy.reconciler.sync_wait() is None


def test_delta_without_a_change_causes_no_sync() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")))
    proxy.sync_after(0)
    proxy.apply(Upsert(service("a")), Delete(Service, "ns", "x"), Upsert(Node("node-2")))
    assert proxy.reconciler.sync_wait() is None


def test_resync_message_syncs_with_a_new_context() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Resync())
    assert proxy.reconciler.wait() == 0
    proxy.sync_after(0)
    assert proxy.four.syncs == proxy.six.syncs == [set()]


# What a sync covers.


def test_sync_covers_only_changed_services() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.apply(Upsert(service("b", 81)), Upsert(EndpointSlice("ns", "c-1", "ns/c", Family.IPV4)))
    proxy.sync_after(5)
    proxy.apply(Delete(Service, "ns", "a"))
    proxy.sync_after(5)
    assert proxy.four.syncs == [{"ns/a", "ns/b"}, {"ns/b", "ns/c"}, {"ns/a"}]


def test_node_change_that_affects_the_context_syncs_all_services() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.apply(Upsert(Node("node-1", uid="irrelevant")))
    proxy.sync_after(5)
    proxy.apply(Upsert(Node("node-1", zone="zone-a")))
    proxy.sync_after(5)
    assert proxy.four.syncs[1:] == [set(), {"ns/a", "ns/b"}]
    assert proxy.four.contexts[-1].zone == "zone-a"


def test_backend_that_needs_a_full_sync_gets_all_services() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.four.needs_full_sync = True
    proxy.apply(Delete(Service, "ns", "b"))
    proxy.sync_after(5)
    assert proxy.four.syncs[-1] == {"ns/a", "ns/b"}
    assert proxy.six.syncs[-1] == {"ns/b"}


# Failures.


def test_changes_stay_pending_until_a_sync_succeeds() -> None:
    proxy = TwoFamilyProxy()
    proxy.four.errors = [SyncError("no"), SyncError("no")]
    proxy.apply(Upsert(service("a")))
    assert proxy.sync_after(0) is False
    proxy.apply(Upsert(service("b")))
    assert proxy.sync_after(1) is False
    assert proxy.sync_after(1) is True
    assert proxy.four.syncs == [{"ns/a"}, {"ns/a", "ns/b"}, {"ns/a", "ns/b"}]
    assert proxy.reconciler.sync_wait() is None


def test_context_of_a_failed_sync_does_not_count_as_applied() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.four.errors = [SyncError("no")]
    proxy.apply(Upsert(Node("node-1", zone="zone-a")))
    proxy.sync_after(5)
    proxy.sync_after(5)
    assert proxy.four.syncs[1:] == [{"ns/a", "ns/b"}] * 2


def test_failed_sync_is_retried_with_backoff() -> None:
    proxy = TwoFamilyProxy()
    proxy.four.errors = [SyncError("no")] * 4
    proxy.apply(Upsert(service("a")))
    waits = []
    for _ in range(4):
        proxy.sync_after(proxy.reconciler.wait() or 0)
        waits.append(proxy.reconciler.wait())
    assert waits == [1.0, 1.0, 2.0, 4.0]
    assert proxy.sync_after(4) is True


def test_failing_family_does_not_delay_the_other() -> None:
    proxy = TwoFamilyProxy()
    proxy.four.errors = [SyncError("no")] * 3
    proxy.apply(Upsert(service("a")))
    assert proxy.sync_after(0) is False
    proxy.apply(Upsert(service("b")))
    assert proxy.sync_after(1) is False
    assert proxy.six.syncs == [{"ns/a"}, {"ns/b"}]
    assert proxy.sync_after(1) is False
    assert proxy.sync_after(2) is True
    assert proxy.six.syncs == [{"ns/a"}, {"ns/b"}]
    assert proxy.four.syncs[-1] == {"ns/a", "ns/b"}


def test_unexpected_exception_is_logged_and_the_sync_retried(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    proxy.four.errors = [KeyError("oops")]
    proxy.apply(Upsert(service("a")))
    with caplog.at_level(logging.ERROR):
        assert proxy.sync_after(0) is False
    (record,) = caplog.records
    assert record.getMessage() == "IPv4: sync failed, retrying in 1.0 s: unexpected KeyError('oops')"
    assert proxy.sync_after(1) is True
    assert proxy.four.syncs == [{"ns/a"}, {"ns/a"}]


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if "IPv4" in record.getMessage()]


def test_default_log_has_first_sync_failures_recoveries_and_a_summary_per_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    proxy = TwoFamilyProxy()
    assert logged(caplog) == [("INFO", "IPv4: synced 0 services in 0 ms")]
    caplog.clear()
    for name in "abcdefgh":
        proxy.apply(Upsert(service(name)))
        proxy.sync_after(2)
    assert logged(caplog) == []
    proxy.four.errors.append(SyncError("rejected"))
    proxy.apply(Upsert(service("i")))
    proxy.sync_after(2)
    proxy.sync_after(1)
    assert logged(caplog) == [
        ("ERROR", "IPv4: sync failed, retrying in 1.0 s: rejected"),
        ("INFO", "IPv4: synced 1 changed service in 0 ms (9 without endpoints), after failures for 1.0 s"),
    ]
    caplog.clear()
    proxy.sync_after(proxy.reconciler.wait() or 0.0)
    assert logged(caplog) == [
        ("INFO", "IPv4: 8 syncs in the last 60 s: 8 changed services, the longest took 0 ms (8 without endpoints)")
    ]
    assert proxy.reconciler.wait() is None


def test_every_sync_is_logged_from_verbosity_2_on(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    with caplog.at_level(V2):
        for name in "ab":
            proxy.apply(Upsert(service(name)))
            proxy.sync_after(2)
    assert [(record.levelno, record.getMessage()) for record in caplog.records if "IPv4" in record.getMessage()] == [
        (V2, f"IPv4: synced 1 changed service in 0 ms ({number} without endpoints)") for number in (1, 2)
    ]


def test_failed_sync_is_logged_on_one_line_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    proxy.six.errors = [SyncError("line 3 failed")]
    proxy.apply(Upsert(service("a")))
    with caplog.at_level(logging.ERROR):
        proxy.sync_after(0)
    assert [record.getMessage() for record in caplog.records] == [
        "IPv6: sync failed, retrying in 1.0 s: line 3 failed",
    ]


@pytest.mark.parametrize(
    ("programs_stopped", "level", "message"),
    [
        (False, logging.ERROR, "IPv6: sync failed, retrying in 1.0 s: line 3 failed"),
        (True, logging.INFO, "IPv6: sync canceled, because kproxy is stopping: line 3 failed"),
    ],
)
def test_sync_whose_programs_were_killed_by_the_stop_is_canceled(
    programs_stopped: bool, level: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = TwoFamilyProxy(programs_stopped=lambda: programs_stopped)
    proxy.six.errors = [SyncError("line 3 failed")]
    proxy.apply(Upsert(service("a")))
    with caplog.at_level(logging.INFO):
        proxy.sync_after(0)
    assert (level, message) in [(record.levelno, record.getMessage()) for record in caplog.records]


class FaultyListener(RecordingListener):
    """A listener with a bug."""

    def on_queue(self, family: Family, now: float) -> None:
        raise KeyError("queue")

    def on_sync(self, report: SyncReport) -> None:
        raise KeyError("sync")


def test_failing_listener_or_step_does_not_affect_the_others(caplog: pytest.LogCaptureFixture) -> None:
    reports: list[SyncReport] = []

    def faulty_step(report: SyncReport) -> None:
        raise KeyError("step")

    proxy = TwoFamilyProxy(listeners=[FaultyListener()], after_sync=[faulty_step, reports.append])
    proxy.apply(Upsert(service("a")))
    reports.clear()
    assert proxy.sync_after(0) is True
    assert proxy.four.syncs == [{"ns/a"}]
    assert "FaultyListener.on_sync failed: unexpected KeyError('sync')" in caplog.text
    assert "faulty_step failed: unexpected KeyError('step')" in caplog.text
    assert reports == proxy.listener.reports[-2:]


def test_health_reports_a_sync_although_a_later_step_blocks() -> None:
    health = Health(Family, 60.0, wall=lambda: 1)
    blocking, release = threading.Event(), threading.Event()

    def step(report: SyncReport) -> None:
        blocking.set()
        assert release.wait(HANG_GUARD)

    reconciler = Reconciler(
        Store("node-1"),
        {
            Family.IPV4: FamilySync(RecordingBackend(), lambda node: context(Family.IPV4, node)),
            Family.IPV6: FamilySync(RecordingBackend(), lambda node: context(Family.IPV6, node)),
        },
        make_schedule=lambda: Schedule(min_interval=1.0, max_retry=30.0),
        clock=lambda: 0.0,
        on_sync=[health.on_sync],
        after_sync=[step],
    )
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    messages.put(EMPTY_LISTS)
    thread = threading.Thread(target=reconciler.run, args=(messages,), daemon=True)
    thread.start()
    try:
        assert blocking.wait(HANG_GUARD)
        assert health.is_healthy(0.0), "both families are synced; no step may delay this"
    finally:
        release.set()
        messages.put(Stop())
        thread.join(HANG_GUARD)
    assert not thread.is_alive()


def test_message_that_cannot_be_applied_is_logged_and_the_next_one_applied(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    messages.put(Upsert(None))  # type: ignore[arg-type] # no source sends this
    messages.put(Upsert(service("a")))
    messages.put(Stop())
    proxy.reconciler.run(messages)
    assert "cannot apply a change: unexpected AttributeError" in caplog.text
    assert proxy.sync_after(0) is True
    assert proxy.four.syncs == [{"ns/a"}]


# Listeners.


def test_listeners_are_notified_of_changes_and_syncs() -> None:
    proxy = TwoFamilyProxy()
    proxy.listener.queued_at.clear()
    proxy.listener.reports.clear()
    proxy.four.errors = [SyncError("no")]
    slice_ = EndpointSlice("ns", "a-1", "ns/a", Family.IPV4, last_change=7.0)
    proxy.apply(Upsert(service("a")), Upsert(slice_))
    proxy.sync_after(0)
    assert proxy.listener.queued_at == [(Family.IPV4, 100.0), (Family.IPV6, 100.0), (Family.IPV4, 100.0)]
    assert proxy.listener.changes == [(Service, frozenset({"ns/a"})), (EndpointSlice, frozenset({"ns/a"}))]
    failed, succeeded = proxy.listener.reports
    assert (failed.family, failed.error, failed.result) == (Family.IPV4, "no", None)
    assert (succeeded.family, succeeded.error) == (Family.IPV6, "")
    assert succeeded.result is not None
    assert (succeeded.result.applied, succeeded.result.complete) == (ApplyResult({}, {}), False)
    assert (set(succeeded.result.plans), succeeded.result.last_changes) == ({"ns/a"}, ())
    proxy.sync_after(1)
    retried = proxy.listener.reports[-1]
    assert retried.result is not None
    assert (retried.family, retried.error, retried.result.last_changes) == (Family.IPV4, "", (7.0,))


def test_full_sync_is_reported_as_complete() -> None:
    proxy = TwoFamilyProxy(listed=False)
    proxy.apply(*EMPTY_LISTS)
    proxy.sync_after(0)
    assert [report.result and report.result.complete for report in proxy.listener.reports] == [True, True]


# The thread.


class RunningReconciler:
    """A reconciler in its own thread, on a clock that jumps so far that every interval has passed at each reading."""

    def __init__(self) -> None:
        self.backend = RecordingBackend()
        ticks = itertools.count(step=1000)
        self.reconciler = Reconciler(
            Store("node-1"),
            {Family.IPV4: FamilySync(self.backend, lambda node: context(Family.IPV4, node))},
            make_schedule=lambda: Schedule(min_interval=1.0, max_retry=30.0),
            clock=lambda: next(ticks),
        )
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.reconciler.run, args=(self.messages,), daemon=True)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.messages.put(message)

    def stop(self) -> bool:
        """Return whether the thread exits when asked to."""
        self.send(Stop())
        self.thread.join(HANG_GUARD)
        return not self.thread.is_alive()


def test_stop_ends_the_thread_whether_or_not_all_kinds_are_listed() -> None:
    for start in ((), EMPTY_LISTS[:1], EMPTY_LISTS):
        running = RunningReconciler()
        running.send(*start)
        running.thread.start()
        assert running.stop()


def test_queued_messages_are_one_sync() -> None:
    running = RunningReconciler()
    running.send(*EMPTY_LISTS, Upsert(service("a")), (Upsert(service("b")), Upsert(service("c"))))
    running.thread.start()
    assert running.backend.synced.get(timeout=HANG_GUARD) == {"ns/a", "ns/b", "ns/c"}
    running.send(Upsert(service("d")))
    assert running.backend.synced.get(timeout=HANG_GUARD) == {"ns/d"}
    assert running.stop()


def test_thread_retries_a_failed_sync() -> None:
    running = RunningReconciler()
    running.backend.errors = [SyncError("no"), ZeroDivisionError()]
    running.send(*EMPTY_LISTS, Upsert(service("a")))
    running.thread.start()
    syncs = [running.backend.synced.get(timeout=HANG_GUARD) for _ in range(3)]
    assert syncs == [{"ns/a"}] * 3
    assert running.stop()


def test_messages_after_stop_are_ignored() -> None:
    running = RunningReconciler()
    running.send(Stop(), *EMPTY_LISTS)
    running.thread.start()
    running.thread.join(HANG_GUARD)
    assert not running.thread.is_alive()
    assert running.backend.syncs == []


# Drift checks.


def test_drift_checks_and_full_checks_run_at_their_intervals() -> None:
    proxy = TwoFamilyProxy(check_intervals=(30.0, 300.0))
    proxy.apply(Upsert(service("a")))
    proxy.sync_after(0)
    assert proxy.four.syncs == [{"ns/a"}]
    checks = []
    for _ in range(20):
        proxy.clock.now += proxy.reconciler.wait() or 0.0
        checks.append(proxy.four.checks)
        proxy.reconciler.sync_due()
    assert checks[:3] == [1, 2, 3]
    # Each of the two full checks replaces a drift check and causes one full sync.
    assert proxy.clock.now == pytest.approx(100 + 20 * 30)
    assert proxy.four.syncs == proxy.six.syncs == [{"ns/a"}] * 3
    assert proxy.four.checks + 2 == 21
