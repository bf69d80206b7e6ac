"""One process of kproxy in a simulation: the real reconciler and backends, whose threads take turns."""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self, cast

from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import BASIC_KINDS, Kind
from kproxy.model.drift import RulesChanged
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import SyncError, SyncReport
from kproxy.model.types import Family, Node, ServiceCIDR, ServiceKey
from kproxy.serve.health import Health
from kproxy.serve.metrics import Metrics
from kproxy.sync.family_sync import Backend, FamilySync
from kproxy.sync.reconciler import Job, Message, Outcome, Reconciler
from kproxy.sync.schedule import Schedule
from tests.simulation.cluster import NODE
from tests.simulation.faults import Faults
from tests.simulation.outcomes import LOCAL_PODS

CHECK_INTERVAL = 30.0
FORGIVEN = 1e-6
"""A wait that is shorter than this many seconds counts as over: clocks are not exact."""


class PausedError(BaseException):
    """The reconciler's thread waits for a message: another thread goes on."""


class Messages:
    """The reconciler's queue. One run of the reconciler gets at most `allowed` messages and then waits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: deque[Message] = deque()
        self._begun = False
        self.allowed = 0
        self.wake = -math.inf
        """When the reconciler wants to wake up."""

    def put(self, message: Message) -> None:
        self._waiting.append(message)

    def empty(self) -> bool:
        return not self._waiting or not self.allowed

    @property
    def has_messages(self) -> bool:
        return bool(self._waiting)

    def has_notices(self) -> bool:
        """Return whether changes by other processes have been reported, but not received."""
        return any(isinstance(message, RulesChanged) for message in self._waiting)

    def begin(self, allowed: int) -> None:
        """Begin a run."""
        self._begun, self.allowed = False, allowed

    def get(self, timeout: float | None = None) -> Message:
        if not self.empty():
            self._begun = True
            self.allowed -= 1
            return self._waiting.popleft()
        if not self._begun:
            self._begun = True
            raise queue.Empty
        self.wake = math.inf if timeout is None else self._clock() + timeout
        raise PausedError


class CheckedLock:
    """A lock of which the simulation knows whether it is held."""

    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> Self:
        self.depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.depth -= 1


def make_context(family: Family, options: Context, node: Node | None) -> Context:
    """Return the context of a family on this node."""
    mark = ":" if family is Family.IPV6 else "."
    addresses = [each for each in node.addresses if mark in each] if node else []
    return Context(
        family,
        NODE,
        zone=node.zone if node else "",
        node_address=addresses[0] if addresses else "",
        local_traffic=LocalTraffic(cidr=LOCAL_PODS[family]),
        masquerade_all=options.masquerade_all,
        node_port_addresses=options.node_port_addresses,
        localhost_traffic=options.localhost_traffic,
    )


class Process:
    """A process of kproxy. `step_reconciler` and `step_worker` let one of its threads make a step."""

    def __init__(
        self,
        backends: dict[Family, Backend],
        options: Context,
        clock: Callable[[], float],
        faults: Faults,
        *,
        nftables: bool,
        check_interval: float | None,
        on_outcome: Callable[[Outcome], None],
        on_start: Callable[[Family, bool], None],
        with_metrics: bool,
    ) -> None:
        self.lock = CheckedLock()
        kinds: tuple[Kind, ...] = (*BASIC_KINDS, ServiceCIDR) if nftables else BASIC_KINDS
        self.store = Store(NODE, kinds, lock=self.lock)
        self.messages = Messages(clock)
        self.jobs: dict[Family, deque[Job]] = {family: deque() for family in backends}
        self.busy: set[Family] = set()
        self.reports: list[SyncReport] = []
        self.changed: set[ServiceKey] | None = set()
        """The Services that changed since `take_changed` was last called; None means all."""
        self.health = Health(backends, 2 * CHECK_INTERVAL, wall=lambda: 1)
        self.metrics = self._metrics(backends, nftables=nftables) if with_metrics else None
        self._options = options
        self._faults = faults
        self._on_outcome = on_outcome
        self._on_start = on_start
        self.backends = backends
        large = math.inf
        self.syncs = {
            family: FamilySync(backend, partial(self._make_context, family), large_cluster_endpoints=large)
            for family, backend in backends.items()
        }
        self.reconciler = Reconciler(
            self.store,
            self.syncs,
            make_schedule=lambda: Schedule(min_interval=1.0, max_retry=CHECK_INTERVAL),
            clock=clock,
            on_queue=[self.health.on_queue, *([self.metrics.on_queue] if self.metrics else [])],
            on_change=[self._on_change, *([self.metrics.on_change] if self.metrics else [])],
            on_sync=[self.reports.append, self.health.on_sync, *([self.metrics.on_sync] if self.metrics else [])],
            on_repair=[self.metrics.on_repair] if self.metrics else [],
            check_interval=check_interval,
            full_check_interval=None,
            execute=self._execute,
        )

    @staticmethod
    def _metrics(backends: dict[Family, Backend], *, nftables: bool) -> Metrics:
        return Metrics("nftables" if nftables else "iptables", tuple(backends), {}, wall=lambda: 1.0)

    def context(self, family: Family) -> Context:
        """Return the context that a sync would use now."""
        return make_context(family, self._options, self.store.node)

    def _make_context(self, family: Family, node: Node | None) -> Context:
        if self._faults.strikes("context"):
            raise SyncError("cannot list the addresses of this node: No buffer space available")
        return make_context(family, self._options, node)

    def _on_change(self, kind: Kind, change: StoreChange) -> None:
        if change.node or self.changed is None:
            self.changed = None
        else:
            self.changed |= change.services

    def _execute(self, family: Family, job: Job) -> None:
        self.jobs[family].append(job)

    def step_reconciler(self, allowed: int) -> None:
        """Let the reconciler apply at most this many messages and start what is due."""
        self.messages.begin(allowed)
        with suppress(PausedError):
            self.reconciler.run(cast("queue.SimpleQueue[Message]", self.messages))

    def step_worker(self, family: Family) -> None:
        """Let the thread of a family run its next job."""
        job = self.jobs[family].popleft()
        self.busy.add(family)
        self._on_start(family, self.backends[family].needs_full_sync)
        job(self._deliver)
        self.busy.discard(family)

    def _deliver(self, outcome: Outcome) -> None:
        self._on_outcome(outcome)
        self.messages.put(outcome)

    def may_step_reconciler(self, now: float) -> bool:
        """Return whether the reconciler's thread has something to do."""
        return self.messages.has_messages or self.messages.wake <= now + FORGIVEN

    def oversleeps(self, now: float) -> str:
        """Return which family's sync will be late because the reconciler's thread does not wake up in time, if any."""
        for family, state in self.reconciler._families.items():
            wait = state.schedule.wait(now)
            if wait is not None and not state.syncing and self.messages.wake > now + wait + 1.0:
                return family.value
        return ""

    def is_settled(self) -> bool:
        """Return whether nothing is left to do, except comparisons."""
        return (
            not self.messages.has_messages
            and not any(self.jobs.values())
            and not self.busy
            and all(
                state.schedule.wait(0.0) is None
                and state.repairs.wait(0.0) is None
                and state.sync.next_retry is None
                and state.next_step is None
                for state in self.reconciler._families.values()
            )
        )

    def is_comparing(self, family: Family) -> bool:
        """Return whether a comparison of a family's rules has begun and is not complete."""
        return self.reconciler._families[family].next_step is not None
