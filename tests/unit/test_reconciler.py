"""What is synced when, what stays pending, and what never ends the thread."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Sequence

import pytest

from kproxy.model.context import Context
from kproxy.model.delta import Delete, Kind, Replace, Upsert
from kproxy.model.log_throttle import V2
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import AfterSyncStep, ApplyResult, Plans, SyncError, SyncReport
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServicePort
from kproxy.serve.health import Health
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.reconciler import Message, Reconciler, Resync, Stop
from kproxy.sync.schedule import Schedule
from tests.inprocess import EMPTY_LISTS, ReconciledProxy

HANG_GUARD = 30.0


def service(name: str, port: int = 80) -> Service:
    return Service("ns", name, (f"10.96.0.{ord(name[0])}", f"fd00::{ord(name[0])}"), (ServicePort("", port, "TCP"),))


class Recorder:
    """A backend that remembers what it was given and fails as it is told."""

    def __init__(self) -> None:
        self.syncs: list[set[str]] = []
        self.contexts: list[Context] = []
        self.errors: list[Exception] = []
        self.needs_full_sync = True
        self.looks = 0
        self.intact = True
        self.done: queue.SimpleQueue[set[str]] = queue.SimpleQueue()

    def verify(self, context: Context) -> bool:
        self.looks += 1
        self.needs_full_sync = self.needs_full_sync or not self.intact
        return self.intact

    def forget(self) -> None:
        self.needs_full_sync = True

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        keys = {key for key, _ in plans.by_service()}
        self.syncs.append(keys)
        self.contexts.append(context)
        self.done.put(keys)
        if self.errors:
            raise self.errors.pop(0)
        self.needs_full_sync = False
        return ApplyResult({}, {})


class Watcher:
    """A listener that keeps what it is notified of."""

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
    """A reconciler of two families whose backends record what they are given."""

    def __init__(
        self,
        *,
        listed: bool = True,
        listeners: Sequence[Watcher] = (),
        after_sync: Sequence[AfterSyncStep] = (),
        looks: tuple[float, float] | None = None,
    ) -> None:
        """`listed` starts with a synced empty cluster; `looks` are the intervals of drift checks and full checks."""
        self.four, self.six = Recorder(), Recorder()
        self.watcher = Watcher()
        notified = [*listeners, self.watcher]
        super().__init__(
            {
                Family.IPV4: FamilySync(self.four, lambda node: context(Family.IPV4, node)),
                Family.IPV6: FamilySync(self.six, lambda node: context(Family.IPV6, node)),
            },
            on_queue=[each.on_queue for each in notified],
            on_change=[each.on_change for each in notified],
            on_sync=[each.on_sync for each in notified],
            after_sync=after_sync,
            check_interval=looks[0] if looks else None,
            full_check_interval=looks[1] if looks else None,
        )
        if listed:
            self.apply(*EMPTY_LISTS)
            self.sync_after()
            self.clock.now = 100.0
            self.four.syncs.clear()
            self.six.syncs.clear()


def context(family: Family, node: Node | None) -> Context:
    return Context(family, "node-1", zone=node.zone if node else "")


# Nothing before everything is known.


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


def test_an_empty_cluster_is_programmed_too() -> None:
    proxy = TwoFamilyProxy(listed=False)
    proxy.apply(*EMPTY_LISTS)
    assert proxy.reconciler.wait() == 0
    proxy.sync_after(0)
    assert proxy.four.syncs == proxy.six.syncs == [set()]


# When.


def test_the_first_change_goes_at_once_and_the_next_ones_together() -> None:
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


def test_what_changes_nothing_makes_no_sync() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")))
    proxy.sync_after(0)
    proxy.apply(Upsert(service("a")), Delete(Service, "ns", "x"), Upsert(Node("node-2")))
    assert proxy.reconciler.sync_wait() is None


def test_a_resync_asks_for_the_context_again() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Resync())
    assert proxy.reconciler.wait() == 0
    proxy.sync_after(0)
    assert proxy.four.syncs == proxy.six.syncs == [set()]


# What.


def test_only_what_changed_is_looked_at() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.apply(Upsert(service("b", 81)), Upsert(EndpointSlice("ns", "c-1", "ns/c", Family.IPV4)))
    proxy.sync_after(5)
    proxy.apply(Delete(Service, "ns", "a"))
    proxy.sync_after(5)
    assert proxy.four.syncs == [{"ns/a", "ns/b"}, {"ns/b", "ns/c"}, {"ns/a"}]


def test_a_changed_node_makes_everything_dirty_if_it_matters() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.apply(Upsert(Node("node-1", uid="irrelevant")))
    proxy.sync_after(5)
    proxy.apply(Upsert(Node("node-1", zone="zone-a")))
    proxy.sync_after(5)
    assert proxy.four.syncs[1:] == [set(), {"ns/a", "ns/b"}]
    assert proxy.four.contexts[-1].zone == "zone-a"


def test_a_backend_that_knows_nothing_gets_everything() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.four.needs_full_sync = True
    proxy.apply(Delete(Service, "ns", "b"))
    proxy.sync_after(5)
    assert proxy.four.syncs[-1] == {"ns/a", "ns/b"}
    assert proxy.six.syncs[-1] == {"ns/b"}


# Failures.


def test_pending_changes_stay_until_the_kernel_accepted_them() -> None:
    proxy = TwoFamilyProxy()
    proxy.four.errors = [SyncError("no"), SyncError("no")]
    proxy.apply(Upsert(service("a")))
    assert proxy.sync_after(0) is False
    proxy.apply(Upsert(service("b")))
    assert proxy.sync_after(1) is False
    assert proxy.sync_after(1) is True
    assert proxy.four.syncs == [{"ns/a"}, {"ns/a", "ns/b"}, {"ns/a", "ns/b"}]
    assert proxy.reconciler.sync_wait() is None


def test_a_context_that_was_refused_is_not_taken_for_applied() -> None:
    proxy = TwoFamilyProxy()
    proxy.apply(Upsert(service("a")), Upsert(service("b")))
    proxy.sync_after(0)
    proxy.four.errors = [SyncError("no")]
    proxy.apply(Upsert(Node("node-1", zone="zone-a")))
    proxy.sync_after(5)
    proxy.sync_after(5)
    assert proxy.four.syncs[1:] == [{"ns/a", "ns/b"}] * 2


def test_a_failure_is_retried_without_another_change_after_growing_pauses() -> None:
    proxy = TwoFamilyProxy()
    proxy.four.errors = [SyncError("no")] * 4
    proxy.apply(Upsert(service("a")))
    waits = []
    for _ in range(4):
        proxy.sync_after(proxy.reconciler.wait() or 0)
        waits.append(proxy.reconciler.wait())
    assert waits == [1.0, 1.0, 2.0, 4.0]
    assert proxy.sync_after(4) is True


def test_a_family_that_fails_does_not_hold_up_the_other() -> None:
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


def test_a_bug_is_told_and_retried(caplog: pytest.LogCaptureFixture) -> None:
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


def test_by_default_a_log_has_the_first_sync_failures_recoveries_and_one_summary_a_minute(
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
    proxy.four.errors.append(SyncError("refused"))
    proxy.apply(Upsert(service("i")))
    proxy.sync_after(2)
    proxy.sync_after(1)
    assert logged(caplog) == [
        ("ERROR", "IPv4: sync failed, retrying in 1.0 s: refused"),
        ("INFO", "IPv4: synced 1 changed service in 0 ms (9 without endpoints), after failures for 1.0 s"),
    ]
    caplog.clear()
    proxy.sync_after(proxy.reconciler.wait() or 0.0)
    assert logged(caplog) == [
        ("INFO", "IPv4: 8 syncs in the last 60 s: 8 changed services, the longest took 0 ms (8 without endpoints)")
    ]
    assert proxy.reconciler.wait() is None


def test_that_rules_are_back_which_somebody_else_removed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    proxy = TwoFamilyProxy(looks=(30.0, 3600.0))
    proxy.apply(Upsert(service("a")))
    proxy.sync_after(2)
    caplog.clear()
    proxy.four.intact = False
    proxy.sync_after(30)
    assert logged(caplog) == [
        ("WARNING", "IPv4: another process removed kproxy's rules; restoring them"),
        ("INFO", "IPv4: synced 1 service in 0 ms (1 without endpoints)"),
    ]


def test_each_sync_is_logged_from_verbosity_2(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    with caplog.at_level(V2):
        for name in "ab":
            proxy.apply(Upsert(service(name)))
            proxy.sync_after(2)
    assert [(record.levelno, record.getMessage()) for record in caplog.records if "IPv4" in record.getMessage()] == [
        (V2, f"IPv4: synced 1 changed service in 0 ms ({number} without endpoints)") for number in (1, 2)
    ]


def test_a_refusal_is_logged_on_one_line_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    proxy.six.errors = [SyncError("line 3 failed")]
    proxy.apply(Upsert(service("a")))
    with caplog.at_level(logging.ERROR):
        proxy.sync_after(0)
    assert [each.getMessage() for each in caplog.records] == [
        "IPv6: sync failed, retrying in 1.0 s: line 3 failed",
    ]


class Faulty(Watcher):
    """A listener with a bug."""

    def on_queue(self, family: Family, now: float) -> None:
        raise KeyError("queue")

    def on_sync(self, report: SyncReport) -> None:
        raise KeyError("sync")


def test_a_listener_or_step_with_a_bug_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    reports: list[SyncReport] = []

    def faulty_step(report: SyncReport) -> None:
        raise KeyError("step")

    proxy = TwoFamilyProxy(listeners=[Faulty()], after_sync=[faulty_step, reports.append])
    proxy.apply(Upsert(service("a")))
    reports.clear()
    assert proxy.sync_after(0) is True
    assert proxy.four.syncs == [{"ns/a"}]
    assert "Faulty.on_sync failed: unexpected KeyError('sync')" in caplog.text
    assert "faulty_step failed: unexpected KeyError('step')" in caplog.text
    assert reports == proxy.watcher.reports[-2:]


def test_health_reports_a_sync_while_a_step_after_it_still_blocks() -> None:
    health = Health(Family, 60.0, wall=lambda: 1)
    blocking, release = threading.Event(), threading.Event()

    def step(report: SyncReport) -> None:
        blocking.set()
        assert release.wait(HANG_GUARD)

    reconciler = Reconciler(
        Store("node-1"),
        {
            Family.IPV4: FamilySync(Recorder(), lambda node: context(Family.IPV4, node)),
            Family.IPV6: FamilySync(Recorder(), lambda node: context(Family.IPV6, node)),
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
        assert health.is_healthy(0.0), "both families are synced: no step may hold this up"
    finally:
        release.set()
        messages.put(Stop())
        thread.join(HANG_GUARD)
    assert not thread.is_alive()


def test_a_message_that_cannot_be_taken_in_is_told_and_the_next_one_works(caplog: pytest.LogCaptureFixture) -> None:
    proxy = TwoFamilyProxy()
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    messages.put(Upsert(None))  # type: ignore[arg-type] # what no source sends
    messages.put(Upsert(service("a")))
    messages.put(Stop())
    proxy.reconciler.run(messages)
    assert "cannot apply a change: unexpected AttributeError" in caplog.text
    assert proxy.sync_after(0) is True
    assert proxy.four.syncs == [{"ns/a"}]


# Those who watch.


def test_listeners_are_notified_of_changes_and_of_what_became_of_them() -> None:
    proxy = TwoFamilyProxy()
    proxy.watcher.queued_at.clear()
    proxy.watcher.reports.clear()
    proxy.four.errors = [SyncError("no")]
    slice_ = EndpointSlice("ns", "a-1", "ns/a", Family.IPV4, last_change=7.0)
    proxy.apply(Upsert(service("a")), Upsert(slice_))
    proxy.sync_after(0)
    assert proxy.watcher.queued_at == [(Family.IPV4, 100.0), (Family.IPV6, 100.0)] * 2
    assert proxy.watcher.changes == [(Service, frozenset({"ns/a"})), (EndpointSlice, frozenset({"ns/a"}))]
    failed, done = proxy.watcher.reports
    assert (failed.family, failed.error, failed.result) == (Family.IPV4, "no", None)
    assert (done.family, done.error) == (Family.IPV6, "")
    assert done.result is not None
    assert (done.result.applied, done.result.complete) == (ApplyResult({}, {}), False)
    assert (set(done.result.plans), done.result.last_changes) == ({"ns/a"}, ())
    proxy.sync_after(1)
    retried = proxy.watcher.reports[-1]
    assert retried.result is not None
    assert (retried.family, retried.error, retried.result.last_changes) == (Family.IPV4, "", (7.0,))


def test_a_sync_of_everything_is_reported_as_complete() -> None:
    proxy = TwoFamilyProxy(listed=False)
    proxy.apply(*EMPTY_LISTS)
    proxy.sync_after(0)
    assert [each.result and each.result.complete for each in proxy.watcher.reports] == [True, True]


# The thread.


class Running:
    """A reconciler in a thread of its own, with a clock on which every interval has long passed."""

    def __init__(self) -> None:
        self.backend = Recorder()
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

    def stopped(self) -> bool:
        self.send(Stop())
        self.thread.join(HANG_GUARD)
        return not self.thread.is_alive()


def test_stop_ends_the_thread_whatever_is_known() -> None:
    for start in ((), EMPTY_LISTS[:1], EMPTY_LISTS):
        running = Running()
        running.send(*start)
        running.thread.start()
        assert running.stopped()


def test_what_has_arrived_is_one_sync() -> None:
    running = Running()
    running.send(*EMPTY_LISTS, Upsert(service("a")), (Upsert(service("b")), Upsert(service("c"))))
    running.thread.start()
    assert running.backend.done.get(timeout=HANG_GUARD) == {"ns/a", "ns/b", "ns/c"}
    running.send(Upsert(service("d")))
    assert running.backend.done.get(timeout=HANG_GUARD) == {"ns/d"}
    assert running.stopped()


def test_a_failure_is_retried_by_the_thread_itself() -> None:
    running = Running()
    running.backend.errors = [SyncError("no"), ZeroDivisionError()]
    running.send(*EMPTY_LISTS, Upsert(service("a")))
    running.thread.start()
    found = [running.backend.done.get(timeout=HANG_GUARD) for _ in range(3)]
    assert found == [{"ns/a"}] * 3
    assert running.stopped()


def test_stop_comes_before_anything_behind_it() -> None:
    running = Running()
    running.send(Stop(), *EMPTY_LISTS)
    running.thread.start()
    running.thread.join(HANG_GUARD)
    assert not running.thread.is_alive()
    assert running.backend.syncs == []


# Looks at what others may have done.


def test_a_look_every_so_often_and_everything_now_and_then() -> None:
    proxy = TwoFamilyProxy(looks=(30.0, 300.0))
    proxy.apply(Upsert(service("a")))
    proxy.sync_after(0)
    assert proxy.four.syncs == [{"ns/a"}]
    looked = []
    for _ in range(20):
        proxy.clock.now += proxy.reconciler.wait() or 0.0
        looked.append(proxy.four.looks)
        proxy.reconciler.sync_due()
    assert looked[:3] == [1, 2, 3]
    # Each full look stands for a usual one, and leads to one sync of everything.
    assert proxy.clock.now == pytest.approx(100 + 20 * 30)
    assert proxy.four.syncs == proxy.six.syncs == [{"ns/a"}] * 3
    assert proxy.four.looks + 2 == 21
