"""Nothing is lost when memory runs out: what could not be done is done later, and all rules are compared."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from kproxy.model.context import Context
from kproxy.model.delta import Upsert
from kproxy.model.store import Store
from kproxy.model.sync_report import ApplyResult, Plans, SyncReport
from kproxy.model.types import Family, Service, ServicePort
from kproxy.sync import family_worker, reconciler
from kproxy.sync.family_sync import FamilySync, PendingChanges
from kproxy.sync.family_worker import FamilyWorker
from kproxy.sync.reconciler import Attempted, Idle, Job, Message, Outcome, Reconciler, Stop
from kproxy.sync.schedule import Schedule
from tests.inprocess import EMPTY_LISTS, StubBackend
from tests.lab.waiting import HANG_GUARD, wait_until


def service(name: str) -> Service:
    return Service("ns", name, (f"10.96.0.{ord(name[0])}",), (ServicePort("", 80, "TCP"),))


class Backend(StubBackend):
    """A backend that records what it has programmed, and raises `MemoryError` after `failures` syncs have begun."""

    def __init__(self) -> None:
        self.programmed: set[str] = set()
        self.full_syncs = 0
        self.failures = 0

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        self.full_syncs += self.needs_full_sync
        for key, ports in plans.by_service():
            if self.failures:
                self.failures -= 1
                raise MemoryError
            if ports:
                self.programmed.add(key)
        self.needs_full_sync = False
        return ApplyResult({}, {})


class Running:
    """A reconciler and the worker of one family, in threads."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.store = Store("node-1", lock=threading.RLock())
        self.worker = FamilyWorker("worker")
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.reports: list[SyncReport] = []
        self.steps: list[SyncReport] = []
        self.deliver: Callable[[Outcome], None] = self.messages.put
        self.ticks = 0.0
        self.reconciler = Reconciler(
            self.store,
            {Family.IPV4: FamilySync(self.backend, lambda _: Context(Family.IPV4, "node-1"))},
            make_schedule=lambda: Schedule(min_interval=0.0, max_retry=0.0),
            clock=self.clock,
            on_sync=[self.reports.append],
            after_sync=[self.steps.append],
            execute=self.execute,
        )
        self.ended: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def clock(self) -> float:
        self.ticks += 1.0
        return self.ticks

    def execute(self, _: Family, job: Job) -> None:
        self.worker.submit(partial(job, self.deliver))

    def run(self) -> None:
        try:
            self.reconciler.run(self.messages)
        except MemoryError as error:
            self.ended = error

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.messages.put(message)

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: {f"ns/{name}" for name in names} <= self.backend.programmed, "the Services are programmed")


class Once:
    """A function that raises `MemoryError` at its first call, either `before` or after it calls the real function."""

    def __init__(self, real: Callable[..., Any], *, before: bool) -> None:
        self._real = real
        self._before = before
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.failed and self._before:
            self.failed = True
            raise MemoryError
        result = self._real(*args, **kwargs)
        if not self.failed:
            self.failed = True
            raise MemoryError
        return result

    def as_method(self) -> Callable[..., Any]:
        """Return a function, which becomes a method when it is an attribute of a class."""

        def method(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return method


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A reconciler that has programmed one Service."""
    monkeypatch.setattr(reconciler, "OUT_OF_MEMORY_SECONDS", 0.001)
    monkeypatch.setattr(family_worker, "OUT_OF_MEMORY_SECONDS", 0.001)
    running = Running()
    running.worker.start()
    running.thread.start()
    running.send(*EMPTY_LISTS, Upsert(service("a")))
    running.wait_for("a")
    wait_until(lambda: len(running.steps) == len(running.reports) > 0, "the steps after the sync have run")
    yield running
    running.send(Stop())
    running.thread.join(HANG_GUARD)
    running.worker.stop(HANG_GUARD)
    assert not running.thread.is_alive()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "part",
    [
        (Store, "apply"),
        (FamilySync, "add_changes"),
        (FamilySync, "sync"),
        (PendingChanges, "add_later"),
        (Schedule, "request"),
        (Schedule, "started"),
        (Schedule, "succeeded"),
        (FamilyWorker, "submit"),
        (Reconciler, "_receive"),
        (Reconciler, "_start_steps"),
    ],
    ids=lambda part: part[1],
)
def test_change_arrives_although_a_part_ran_out_of_memory(
    running: Running, monkeypatch: pytest.MonkeyPatch, part: tuple[type, str], *, before: bool
) -> None:
    owner, name = part
    once = Once(getattr(owner, name), before=before)
    monkeypatch.setattr(owner, name, once.as_method())
    if name == "add_later":
        running.backend.failures = 1
    running.send(Upsert(service("b")))
    running.wait_for("b")
    assert once.failed
    running.send(Upsert(service("c")))
    running.wait_for("c")
    wait_until(lambda: running.backend.full_syncs >= 1 and not running.backend.needs_full_sync, "no sync is due")


def test_listener_that_ran_out_of_memory_gets_a_complete_report(running: Running) -> None:
    once = Once(running.reports.append, before=True)
    running.reconciler._on_sync = [once]
    running.send(Upsert(service("b")))
    running.wait_for("b")
    wait_until(lambda: any(r.result is not None and r.result.complete for r in running.reports[1:]), "a full sync")


def test_step_that_ran_out_of_memory_runs_again(running: Running) -> None:
    before = len(running.steps)
    once = Once(running.steps.append, before=True)
    running.reconciler._after_sync = [once]
    running.send(Upsert(service("b")))
    wait_until(lambda: len(running.steps) > before, "the step has run")
    assert once.failed


@pytest.mark.parametrize("lost", [Attempted, Idle])
def test_outcome_for_which_there_was_no_memory(running: Running, lost: type) -> None:
    failed: list[Outcome] = []

    def deliver(outcome: Outcome) -> None:
        if isinstance(outcome, lost) and not failed:
            failed.append(outcome)
            raise MemoryError
        running.messages.put(outcome)

    running.deliver = deliver
    running.send(Upsert(service("b")))
    wait_until(lambda: bool(failed), "an outcome is lost")
    reports = len(running.reports)
    running.send(Upsert(service("c")))
    running.wait_for("b", "c")
    wait_until(lambda: any(report.result is not None for report in running.reports[reports:]), "a sync is reported")


def test_reconciler_ends_if_memory_does_not_return(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reconciler, "OUT_OF_MEMORY_RETRIES", 2)
    monkeypatch.setattr(Store, "apply", fail)
    running.send(Upsert(service("b")))
    running.thread.join(HANG_GUARD)
    assert isinstance(running.ended, MemoryError)
