"""Each family is programmed in a thread of its own: a blocked family delays neither the other nor the reconciler."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

import pytest

from kproxy.model.context import Context
from kproxy.model.delta import Upsert
from kproxy.model.drift import RepairResult, RulesChanged, Touched
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import AfterSyncStep, ApplyResult, Plans, SyncError, SyncReport
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.serve.health import Health
from kproxy.sync.conntrack_cleanup import ConntrackCleaner
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.family_worker import FamilyWorker
from kproxy.sync.reconciler import Attempted, Job, Message, Outcome, Reconciler, Repaired, Resync, Stop
from kproxy.sync.schedule import Schedule
from tests.inprocess import EMPTY_LISTS, StubBackend
from tests.lab.waiting import HANG_GUARD, wait_until


def service(name: str) -> Service:
    return Service("ns", name, (f"10.96.0.{ord(name[0])}", f"fd00::{ord(name[0])}"), (ServicePort("", 80, "TCP"),))


class BlockableBackend(StubBackend):
    """A backend whose syncs wait while `block` is set, after reading the plan of the first Service."""

    def __init__(self) -> None:
        self.syncs: queue.SimpleQueue[set[str]] = queue.SimpleQueue()
        self.blocked = threading.Event()
        self.may_continue = threading.Event()
        self.may_continue.set()
        self._permits = threading.Semaphore(0)
        self.error: Exception | None = None
        self.order: list[str] = []
        self.on_programmed: Callable[[set[str]], object] = lambda _: None
        """Called when a sync has been programmed, with the addresses of the endpoints."""

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        self.order.append("check")
        return RepairResult()

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        keys = set()
        endpoints: set[str] = set()
        for key, ports in plans.by_service():
            keys.add(key)
            endpoints.update(each.rpartition(":")[0] for port in ports for each in port.cluster_endpoints)
            if not self.may_continue.is_set():
                self.blocked.set()
                wait_until(lambda: self.may_continue.is_set() or self._permits.acquire(blocking=False), "a permit")
        error = self.error  # the test may change it as soon as it sees the sync
        self.order.append("sync")
        self.on_programmed(endpoints)
        self.syncs.put(keys)
        if error is not None:
            raise error
        self.needs_full_sync = False
        return ApplyResult({}, {})

    def release_one(self) -> None:
        """Let one blocked sync continue to its next Service."""
        self._permits.release()

    def synced(self) -> set[str]:
        """Wait for the next sync to end. Return the Services that it covered."""
        return self.syncs.get(timeout=HANG_GUARD)


class ThreadedProxy:
    """A dual-stack reconciler in a thread, with one worker for each family."""

    def __init__(self, after_sync: Sequence[AfterSyncStep] = ()) -> None:
        self.backends = {family: BlockableBackend() for family in Family}
        self.workers = {family: FamilyWorker(family.value) for family in Family}
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.health = Health(Family, 60.0, wall=lambda: 1)
        self.reports: list[SyncReport] = []
        self.steps: list[tuple[Family, str]] = []
        self.step_threads: set[str] = set()
        self.now = 0.0
        self.reconciler = Reconciler(
            Store("node-1", lock=threading.RLock()),
            {
                family: FamilySync(backend, partial(lambda family, _: Context(family, "node-1"), family))
                for family, backend in self.backends.items()
            },
            make_schedule=lambda: Schedule(min_interval=0.0, max_retry=30.0),
            clock=lambda: self.now,
            on_queue=[self.health.on_queue],
            on_sync=[self.health.on_sync, self.reports.append],
            after_sync=[*after_sync, self._step],
            execute=lambda family, job: self.workers[family].submit(partial(job, self.messages.put)),
        )
        self.thread = threading.Thread(target=self.reconciler.run, args=(self.messages,), daemon=True)
        for worker in self.workers.values():
            worker.start()
        self.thread.start()

    def _step(self, report: SyncReport) -> None:
        self.step_threads.add(threading.current_thread().name)
        self.steps.append((report.family, report.error))
        self.backends[report.family].order.append("step")

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.messages.put(message)

    def stop(self) -> None:
        self.send(Stop())
        self.thread.join(HANG_GUARD)
        assert not self.thread.is_alive()
        for worker in self.workers.values():
            worker.stop(HANG_GUARD)


@pytest.fixture
def proxy() -> ThreadedProxy:
    proxy = ThreadedProxy()
    proxy.send(*EMPTY_LISTS, Upsert(service("a")))
    for backend in proxy.backends.values():
        assert "ns/a" in backend.synced()
    wait_until(lambda: len(proxy.steps) >= 2, "the steps after the first syncs")
    return proxy


def test_blocked_family_does_not_delay_the_other(proxy: ThreadedProxy) -> None:
    four, six = proxy.backends[Family.IPV4], proxy.backends[Family.IPV6]
    four.may_continue.clear()
    proxy.send(Upsert(service("b")))
    assert four.blocked.wait(HANG_GUARD)
    assert six.synced() == {"ns/b"}
    for name in "cde":
        proxy.send(Upsert(service(name)))
        assert six.synced() == {f"ns/{name}"}
    assert four.syncs.empty()
    four.may_continue.set()
    assert four.synced() == {"ns/b"}
    assert four.synced() == {"ns/c", "ns/d", "ns/e"}, "what arrived meanwhile is programmed in one sync"
    proxy.stop()


def test_change_that_arrives_during_a_sync_still_counts_as_waiting(proxy: ThreadedProxy) -> None:
    four, six = proxy.backends[Family.IPV4], proxy.backends[Family.IPV6]
    four.may_continue.clear()
    proxy.send(Upsert(service("b")))
    assert four.blocked.wait(HANG_GUARD)
    assert six.synced() == {"ns/b"}
    four.blocked.clear()
    proxy.send(Upsert(service("c")))
    assert six.synced() == {"ns/c"}
    four.release_one()
    assert four.synced() == {"ns/b"}
    assert four.blocked.wait(HANG_GUARD), "the sync of the second change has begun"
    assert not proxy.health.families(100.0)[Family.IPV4].healthy, "the second change has been waiting since 0.0"
    four.may_continue.set()
    wait_until(lambda: proxy.health.is_healthy(100.0), "healthy IPv4")
    proxy.stop()


def test_failed_sync_keeps_the_changes_of_before_and_during_it(proxy: ThreadedProxy) -> None:
    four = proxy.backends[Family.IPV4]
    four.may_continue.clear()
    four.error = SyncError("no")
    proxy.send(Upsert(service("b")))
    assert four.blocked.wait(HANG_GUARD)
    assert proxy.backends[Family.IPV6].synced() == {"ns/b"}
    proxy.send(Upsert(service("c")), Upsert(EndpointSlice("ns", "c-1", "ns/c", Family.IPV4, last_change=7.0)))
    assert "ns/c" in proxy.backends[Family.IPV6].synced()
    four.may_continue.set()
    assert four.synced() == {"ns/b"}
    four.error = None
    proxy.now += 1.0
    proxy.send(Resync())
    assert four.synced() == {"ns/b", "ns/c"}
    proxy.stop()


def test_steps_after_a_sync_run_in_the_thread_of_the_family(proxy: ThreadedProxy) -> None:
    proxy.stop()
    assert proxy.step_threads == {"IPv4", "IPv6"}


def test_steps_and_checks_run_between_a_sync_and_the_next(proxy: ThreadedProxy) -> None:
    """They do so although the next sync is due at once, because a change arrived during the sync."""
    four = proxy.backends[Family.IPV4]
    four.order.clear()
    four.may_continue.clear()
    proxy.send(Upsert(service("b")))
    assert four.blocked.wait(HANG_GUARD)
    proxy.send(Upsert(service("c")), RulesChanged({(Family.IPV4, "nat"): Touched(chains={"KUBE-SERVICES"})}))
    wait_until(proxy.messages.empty, "the change to be applied")
    four.may_continue.set()
    wait_until(lambda: len(four.order) >= 5, "both syncs")
    proxy.stop()
    assert four.order == ["sync", "step", "check", "sync", "step"]


class FlowTable:
    """UDP conntrack entries of flows to one destination, by the address of the endpoint."""

    def __init__(self) -> None:
        self.endpoints: set[str] = set()

    def clean(self, destinations: Collection[str], is_stale: Callable[[str, str], bool]) -> int:
        assert list(destinations) == ["10.96.0.100:53"]
        stale = {each for each in self.endpoints if is_stale("10.96.0.100:53", f"{each}:53")}
        self.endpoints -= stale
        return len(stale)


def test_conntrack_cleanup_deletes_no_flows_to_endpoints_of_the_next_sync() -> None:
    def endpoints(*addresses: str) -> Upsert:
        port = EndpointPort("", 53, "UDP")
        return Upsert(EndpointSlice("ns", "d-1", "ns/d", Family.IPV4, tuple(map(Endpoint, addresses)), (port,)))

    flows = FlowTable()
    cleaner = ConntrackCleaner({Family.IPV4: flows}, lambda _: (), clock=lambda: 0.0, on_cleanup=lambda _: None)
    proxy = ThreadedProxy([cleaner.clean])
    four = proxy.backends[Family.IPV4]
    four.on_programmed = flows.endpoints.update  # clients use each endpoint at once
    proxy.send(*EMPTY_LISTS, Upsert(Service("ns", "d", ("10.96.0.100",), (ServicePort("", 53, "UDP"),))))
    proxy.send(endpoints("10.1.0.1"))
    wait_until(lambda: flows.endpoints == {"10.1.0.1"}, "the first endpoint")
    four.may_continue.clear()
    proxy.send(endpoints("10.1.0.2"))
    assert four.blocked.wait(HANG_GUARD)
    proxy.send(endpoints("10.1.0.2", "10.1.0.3"))
    wait_until(proxy.messages.empty, "the change to be applied")
    four.may_continue.set()
    wait_until(lambda: "10.1.0.3" in flows.endpoints, "the third endpoint")
    proxy.stop()
    assert flows.endpoints == {"10.1.0.2", "10.1.0.3"}


def test_reconciler_that_stops_waits_for_the_sync_in_progress(proxy: ThreadedProxy) -> None:
    four = proxy.backends[Family.IPV4]
    four.may_continue.clear()
    proxy.send(Upsert(service("b")))
    assert four.blocked.wait(HANG_GUARD)
    number = len(proxy.reports)
    proxy.send(Stop(), Upsert(service("c")))
    assert proxy.thread.is_alive()
    four.may_continue.set()
    proxy.thread.join(HANG_GUARD)
    assert not proxy.thread.is_alive()
    assert [report.family for report in proxy.reports[number:] if report.family is Family.IPV4] == [Family.IPV4]


def test_store_changes_while_its_services_are_planned() -> None:
    """Every deletion and creation of a Service races with the planning of the others."""
    proxy = ThreadedProxy()
    proxy.send(*EMPTY_LISTS)
    names = [f"{letter}{number}" for letter in "abcdef" for number in range(20)]
    for _ in range(10):
        proxy.send(*(Upsert(service(name)) for name in names))
    wait_until(proxy.messages.empty, "all changes to be applied")
    proxy.stop()
    assert all(report.error == "" for report in proxy.reports)


def test_jobs_run_in_order_and_stop_after_the_last() -> None:
    worker = FamilyWorker("worker")
    done: list[int] = []
    for number in range(3):
        worker.submit(partial(done.append, number))
    worker.start()
    worker.stop(HANG_GUARD)
    assert done == [0, 1, 2]


def test_changes_of_a_family_are_taken_at_its_next_sync() -> None:
    sync = FamilySync(BlockableBackend(), lambda _: Context(Family.IPV4, "node-1"))
    store = Store("node-1")
    sync.sync(store)
    sync.add_changes(StoreChange(frozenset({"ns/a"})))
    assert sync.sync(store).services == 1
    assert sync.sync(store).services == 0


def test_failed_job_does_not_end_the_thread(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.01)
    done = threading.Event()

    def fail() -> None:
        raise MemoryError

    worker = FamilyWorker("sync-ipv4")
    worker.start()
    worker.submit(fail)
    worker.submit(done.set)
    assert done.wait(HANG_GUARD)
    worker.stop(HANG_GUARD)
    assert [record.message for record in caplog.records] == ["sync-ipv4: unexpected MemoryError(); trying again"]


def test_check_without_an_outcome_is_replaced_by_a_full_sync() -> None:
    outcomes: list[Outcome] = []
    now = 0.0

    def execute(_: Family, job: Job) -> None:
        def deliver(message: Outcome) -> None:
            if isinstance(message, Repaired):
                raise MemoryError
            outcomes.append(message)

        with suppress(MemoryError):
            job(deliver)

    backend = BlockableBackend()
    reconciler = Reconciler(
        Store("node-1", lock=threading.RLock()),
        {Family.IPV4: FamilySync(backend, lambda _: Context(Family.IPV4, "node-1"))},
        make_schedule=lambda: Schedule(min_interval=0.0, max_retry=30.0),
        clock=lambda: now,
        execute=execute,
    )

    def run() -> None:
        while reconciler.wait() == 0.0 or outcomes:
            reconciler.sync_due()
            while outcomes:
                reconciler._receive(outcomes.pop(0))

    for empty in EMPTY_LISTS:
        reconciler.apply(empty)
    run()
    for _ in range(2):
        now += 1.0
        reconciler.touch(RulesChanged({(Family.IPV4, "nat"): Touched(chains={"KUBE-SERVICES"})}))
        run()
    assert backend.order == ["sync", "check", "sync", "check", "sync"]


def test_sync_without_an_outcome_counts_as_failed_and_is_retried() -> None:
    reports: list[SyncReport] = []
    outcomes: list[Outcome] = []
    failures = 1

    def execute(_: Family, job: Job) -> None:
        def deliver(message: Outcome) -> None:
            nonlocal failures
            if isinstance(message, Attempted) and failures:
                failures -= 1
                raise MemoryError
            outcomes.append(message)

        with suppress(MemoryError):
            job(deliver)

    backend = BlockableBackend()
    now = 0.0
    reconciler = Reconciler(
        Store("node-1", lock=threading.RLock()),
        {Family.IPV4: FamilySync(backend, lambda _: Context(Family.IPV4, "node-1"))},
        make_schedule=lambda: Schedule(min_interval=0.0, max_retry=30.0),
        clock=lambda: now,
        on_sync=[reports.append],
        execute=execute,
    )
    for empty in EMPTY_LISTS:
        reconciler.apply(empty)
    while len(reports) < 2:
        reconciler.sync_due()
        while outcomes:
            reconciler._receive(outcomes.pop(0))
        now += reconciler.wait() or 0.0
    assert [report.error for report in reports] == ["the sync ended without an outcome", ""]
