"""Sync one IP family: plan the pending Services and pass the plans to the family's backend. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.plan import ServicePortPlan, cluster_ip_of, count_endpoints, plan_service
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import (
    ApplyResult,
    ConditionTransition,
    DriftError,
    Plans,
    SyncResult,
)
from kproxy.model.types import Family, Node, ServiceKey
from kproxy.sync.quarantine import Quarantine
from kproxy.sync.service_conditions import ConditionTracker, ServiceCondition, service_condition

LARGE_CLUSTER_ENDPOINTS = 1000
"""With more endpoints than this, per-endpoint rules have no comments (kube-proxy's threshold)."""
MAX_LAST_CHANGES = 1000
"""Maximum number of timestamps of endpoint changes that are kept for the metrics while syncs fail."""


class Backend(Protocol):
    """Programs the plans of one IP family into the kernel."""

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` must be a full sync, because the kernel's state is unknown.

        A full sync covers all Services.
        """

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        """Compare the parts that other processes touched with the desired state, and restore those that differ.

        `touched` is keyed by table. Only `plans.of` may be used, to render Services again. If only a full sync can
        restore the rules, `needs_full_sync` is true afterwards.

        Raises `SyncError` if the rules cannot be read from the kernel, or if the kernel rejects a change.
        """

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        """Compare the next part of the rules with the desired state, and restore it if it differs.

        Each call takes a small part, so that a complete comparison of a large cluster is spread over many calls. Return
        None if the comparison is complete; the next call then starts a new one. Otherwise, this is like `repair`.
        """

    def forget(self) -> None:
        """Make the next `sync` a full sync.

        That sync reads all rules from the kernel and compares them with the desired state.
        """

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program the plans of the Services that may have changed. Remove the rules of Services without plans.

        If the kernel rejects the rules of some Services, program all others in the same call, and return the rejected
        ones in `ApplyResult.rejected`. The rules that the kernel accepted last for such a Service stay active.

        Raises `SyncError` if the kernel's state cannot be read or the kernel rejects a change. Raises `DriftError` if
        another process changed kproxy's rules.
        """


class PendingChanges(Struct):
    """Changes to one family that have not been programmed yet.

    `services` are the Services that may have changed, and `appeared` are those of them that did not exist before.
    `last_changes` contains the families and trigger times of endpoint changes (see `StoreChange.last_changes`).
    """

    services: set[ServiceKey] = field(default_factory=set)
    appeared: set[ServiceKey] = field(default_factory=set)
    last_changes: deque[tuple[Family, float]] = field(default_factory=lambda: deque(maxlen=MAX_LAST_CHANGES))

    def add_later(self, later: PendingChanges) -> None:
        """Add changes that happened after these."""
        self.services |= later.services
        self.appeared |= later.appeared
        self.last_changes += later.last_changes


class FamilySync:
    """Tracks the pending changes to one family and programs them.

    A change stays pending until the kernel has accepted it. If the kernel rejects only some Services, these are
    quarantined, and everything else counts as programmed.

    While one thread calls `sync`, another thread may call `add_changes` if it holds the lock of the store, and the
    methods that describe the current state. All other methods must run in the thread that calls `sync`.
    """

    def __init__(
        self,
        backend: Backend,
        make_context: Callable[[Node | None], Context],
        *,
        large_cluster_endpoints: float = LARGE_CLUSTER_ENDPOINTS,
    ) -> None:
        """`make_context` is called at each sync, with this Node or None. It may raise `SyncError`.

        The fields `service_cidrs` and `large_cluster` of its result are replaced by values that are derived from the
        store. `large_cluster` is true if the family has more than `large_cluster_endpoints` endpoints.
        """
        self._backend = backend
        self._make_context = make_context
        self._applied: Context | None = None
        self._pending = PendingChanges()
        self._conditions: ConditionTracker | None = None
        self._quarantine: Quarantine | None = None
        self._large_cluster_endpoints = large_cluster_endpoints
        self._endpoints: EndpointCounts | None = None

    def add_changes(self, change: StoreChange) -> None:
        """Add the changes made by one delta to the pending changes."""
        self._pending.services |= change.services
        if self._conditions is not None:  # not before the first sync, in which all Services are new
            self._pending.appeared |= change.appeared
        self._pending.last_changes += change.last_changes

    @property
    def next_retry(self) -> float | None:
        """The time at which the next quarantined Service must be tried again, or None if no Service is quarantined.

        It is a time of the clock whose readings are passed to `sync`.
        """
        return self._quarantine.next_retry if self._quarantine is not None else None

    # The current state, for any thread. Copies of dictionaries are atomic.

    @property
    def applied_context(self) -> Context | None:
        """The context of the last successful sync, or None."""
        return self._applied

    def pending_services(self) -> Collection[ServiceKey]:
        """Return the Services whose changes wait for a sync. The caller must hold the lock of the store."""
        return self._pending.services

    def quarantined_services(self) -> dict[ServiceKey, str]:
        """Return the Services whose rules the kernel rejected, with the reasons."""
        services = dict(self._quarantine.services) if self._quarantine is not None else {}
        return {key: each.reason for key, each in services.items()}

    def service_problems(self) -> dict[ServiceKey, str]:
        """Return the Services with ports that get no connections, with the reasons."""
        return self._conditions.problems() if self._conditions is not None else {}

    def repair(self, store: Store, touched: Mapping[str, Touched]) -> RepairResult:
        """Compare the parts that other processes touched with the desired state, and restore those that differ.

        `touched` is keyed by table. Skip this if a full sync is necessary anyway: what was touched may be intact.
        Raises `SyncError`.
        """
        if self._applied is None or self._backend.needs_full_sync:
            return RepairResult(skipped=True)
        return self._backend.repair(touched, StorePlans(store, self._applied, ()), self._applied)

    def compare_next(self, store: Store) -> RepairResult | None:
        """Compare the next part of the rules with the desired state, and restore it if it differs.

        Return None if the comparison is complete, or if a full sync is necessary anyway. Raises `SyncError`.
        """
        if self._applied is None or self._backend.needs_full_sync:
            return None
        return self._backend.compare_next(StorePlans(store, self._applied, ()), self._applied)

    def forget(self) -> None:
        """Make the next sync read all rules from the kernel and compare them with the desired state."""
        self._backend.forget()

    def sync(self, store: Store, now: float = 0.0) -> SyncResult:
        """Program the pending changes. If another process changed kproxy's rules, retry once.

        `now` is a monotonic time in seconds. It decides which quarantined Services are tried again.

        Raises `SyncError` if the backend or `make_context` raises it.
        """
        with store.lock:
            pending, self._pending = self._pending, PendingChanges()
        try:
            try:
                return self._sync(store, pending, now)
            except DriftError:
                return self._sync(store, pending, now)
        except BaseException:
            with store.lock:
                pending.add_later(self._pending)
                self._pending = pending
            raise

    def _sync(self, store: Store, pending: PendingChanges, now: float) -> SyncResult:
        context = self._context(store, pending)
        if self._conditions is None or self._quarantine is None:
            self._conditions = ConditionTracker(context.family)
            self._quarantine = Quarantine(context.family)
        full = self._backend.needs_full_sync or context != self._applied
        covered = (*pending.services, *self._quarantine.due(now))
        with store.lock:
            keys = dict.fromkeys((*store.service_keys(), *covered) if full else covered)
        plans = StorePlans(store, context, keys)
        applied = self._backend.sync(plans, context)
        transitions = self._update_conditions(self._conditions, plans, None if full else keys, pending, applied)
        deleted = [key for key in self._quarantine.services if key in keys and not plans.exist(key)]
        transitions += self._quarantine.update(keys, applied.rejected, now, changed=pending.services, deleted=deleted)
        with store.lock:
            counts = self._conditions.counts(store)
        self._applied = context
        return SyncResult(
            services=len(keys),
            complete=full,
            plans=plans.lasting
            if full
            else {key: plans.lasting.get(key, ()) for key in keys if key not in applied.rejected},
            context=context,
            applied=applied,
            transitions=transitions,
            counts=replace(counts, quarantined=len(self._quarantine)),
            last_changes=tuple(moment for family, moment in pending.last_changes if family is context.family),
        )

    def _context(self, store: Store, pending: PendingChanges) -> Context:
        with store.lock:
            node = store.node
        context = self._make_context(node)
        with store.lock:
            cidrs = tuple(cidr for cidr in store.service_cidrs if family_of(cidr) is context.family)
            is_large = self._is_large(store, context.family, pending)
        return replace(context, service_cidrs=cidrs, large_cluster=is_large)

    def _is_large(self, store: Store, family: Family, pending: PendingChanges) -> bool:
        if math.isinf(self._large_cluster_endpoints):
            return False
        if self._endpoints is None:
            self._endpoints = EndpointCounts(family)
            self._endpoints.update(store, store.service_keys())
        self._endpoints.update(store, pending.services)
        return self._endpoints.total > self._large_cluster_endpoints

    def _update_conditions(
        self,
        conditions: ConditionTracker,
        plans: StorePlans,
        covered: Collection[ServiceKey] | None,
        pending: PendingChanges,
        applied: ApplyResult,
    ) -> tuple[ConditionTransition, ...]:
        """Update the conditions of the Services that the sync covered. Return the transitions to report."""
        deleted = [key for key in conditions.reported(covered) if key not in plans.conditions and not plans.exist(key)]
        return conditions.update(plans.conditions, covered, pending.appeared, applied.conflicts, deleted)


class StorePlans:
    """Plans Services of a store on demand (implements `kproxy.model.sync_report.Plans`).

    Also collects what is needed after the sync. If `ServicePortPlan.outlives_sync` is true for at least one plan of a
    Service, all plans of the Service are added to `lasting`. If a Service has a condition, the condition is added to
    `conditions`.

    The store may change during a sync. If a Service is planned several times, what is collected is that of its last
    plans, because a sync programs these last.
    """

    def __init__(self, store: Store, context: Context, keys: Collection[ServiceKey]) -> None:
        """`keys` are the Services that the sync covers."""
        self._store = store
        self._context = context
        self._keys = keys
        self.lasting: dict[ServiceKey, Sequence[ServicePortPlan]] = {}
        self.conditions: dict[ServiceKey, ServiceCondition] = {}

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        """Yield each Service that the sync covers, with its plans."""
        for key in self._keys:
            yield key, self.of(key)

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        """Return the plans of one Service."""
        plans = self._plan(key)
        if key in self._keys:
            if self.lasting:
                self.lasting.pop(key, None)
            if self.conditions:
                self.conditions.pop(key, None)
            if any(plan.outlives_sync for plan in plans):
                self.lasting[key] = plans
            if (condition := service_condition(plans)) is not None:
                self.conditions[key] = condition
        return plans

    def exist(self, key: ServiceKey) -> bool:
        """Return whether a Service has plans, without collecting anything."""
        return bool(self._plan(key))

    def _plan(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        with self._store.lock:
            service = self._store.service(key)
            if service is None or cluster_ip_of(service, self._context.family) is None:
                return ()
            slices = self._store.slices(key)
        return plan_service(service, slices, self._context, key=key)


class EndpointCounts:
    """The number of endpoints of each Service in one family, including unusable endpoints."""

    def __init__(self, family: Family) -> None:
        self.total = 0
        self._family = family
        self._counts: dict[ServiceKey, int] = {}

    def update(self, store: Store, keys: Iterable[ServiceKey]) -> None:
        """Recount the endpoints of these Services."""
        for key in keys:
            service = store.service(key)
            count = count_endpoints(service, store.slices(key), self._family) if service else 0
            self.total += count - self._counts.pop(key, 0)
            if count:
                self._counts[key] = count
