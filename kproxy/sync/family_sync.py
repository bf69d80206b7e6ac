"""Sync one IP family: plan the pending Services and pass the plans to the family's backend. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

from msgspec.structs import replace

from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, count_endpoints, plan_service
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import (
    ApplyResult,
    ConditionTransition,
    DriftError,
    Plans,
    SyncResult,
)
from kproxy.model.types import Family, Node, ServiceKey
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

    def verify(self, context: Context) -> bool:
        """Run a quick drift check. Return False if it finds that another process changed kproxy's rules.

        If it returns False, `needs_full_sync` is true afterwards.
        """

    def forget(self) -> None:
        """Make the next `sync` a full sync.

        That sync reads all rules from the kernel and compares them with the desired state.
        """

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program the plans of the Services that may have changed. Remove the rules of Services without plans.

        Raises `SyncError` if the kernel's state cannot be read or the kernel rejects a change. Raises `DriftError` if
        another process changed kproxy's rules.
        """


class FamilySync:
    """Tracks the pending changes to one family and programs them.

    A change stays pending until the kernel has accepted it.
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
        self._pending: set[ServiceKey] = set()
        self._appeared: set[ServiceKey] = set()
        self._conditions: ConditionTracker | None = None
        self._last_changes: deque[tuple[Family, float]] = deque(maxlen=MAX_LAST_CHANGES)
        self._large_cluster_endpoints = large_cluster_endpoints
        self._endpoints: EndpointCounts | None = None

    def add_changes(self, change: StoreChange) -> None:
        """Add the changes made by one delta to the pending changes."""
        self._pending |= change.services
        if self._conditions is not None:  # not before the first sync, in which all Services are new
            self._appeared |= change.appeared
        self._last_changes += change.last_changes

    def verify(self) -> bool:
        """Run a quick drift check. Return False if it finds that another process changed kproxy's rules."""
        return self._applied is None or self._backend.verify(self._applied)

    def forget(self) -> None:
        """Make the next sync read all rules from the kernel and compare them with the desired state."""
        self._backend.forget()

    def sync(self, store: Store) -> SyncResult:
        """Program the pending changes. If another process changed kproxy's rules, retry once.

        Raises `SyncError` if the backend or `make_context` raises it.
        """
        try:
            return self._sync(store)
        except DriftError:
            return self._sync(store)

    def _sync(self, store: Store) -> SyncResult:
        context = self._context(store)
        full = self._backend.needs_full_sync or context != self._applied
        keys = dict.fromkeys((*store.service_keys(), *self._pending) if full else self._pending)
        plans = StorePlans(store, context, keys)
        applied = self._backend.sync(plans, context)
        if self._conditions is None:
            self._conditions = ConditionTracker(context.family)
        result = SyncResult(
            services=len(keys),
            complete=full,
            plans=plans.lasting if full else {key: plans.lasting.get(key, ()) for key in keys},
            context=context,
            applied=applied,
            transitions=self._update_conditions(self._conditions, plans, applied, full=full),
            counts=self._conditions.counts(store),
            last_changes=tuple(moment for family, moment in self._last_changes if family is context.family),
        )
        self._applied = context
        self._pending.clear()
        self._appeared.clear()
        self._last_changes.clear()
        return result

    def _context(self, store: Store) -> Context:
        context = self._make_context(store.node)
        cidrs = tuple(cidr for cidr in store.service_cidrs if family_of(cidr) is context.family)
        return replace(context, service_cidrs=cidrs, large_cluster=self._is_large(store, context.family))

    def _is_large(self, store: Store, family: Family) -> bool:
        if math.isinf(self._large_cluster_endpoints):
            return False
        if self._endpoints is None:
            self._endpoints = EndpointCounts(family)
            self._endpoints.update(store, store.service_keys())
        self._endpoints.update(store, self._pending)
        return self._endpoints.total > self._large_cluster_endpoints

    def _update_conditions(
        self, conditions: ConditionTracker, plans: StorePlans, applied: ApplyResult, *, full: bool
    ) -> tuple[ConditionTransition, ...]:
        """Update the conditions of the Services that the sync covered. Return the transitions to report."""
        covered = None if full else self._pending
        deleted = [key for key in conditions.reported(covered) if key not in plans.conditions and not plans.of(key)]
        return conditions.update(plans.conditions, covered, self._appeared, applied.conflicts, deleted)


class StorePlans:
    """Plans Services of a store on demand (implements `kproxy.model.sync_report.Plans`).

    `by_service` also collects what is needed after the sync. If `ServicePortPlan.outlives_sync` is true for at least
    one plan of a Service, all plans of the Service are added to `lasting`. If a Service has a condition, the condition
    is added to `conditions`.
    """

    def __init__(self, store: Store, context: Context, keys: Collection[ServiceKey]) -> None:
        self._store = store
        self._context = context
        self._keys = keys
        self.lasting: dict[ServiceKey, Sequence[ServicePortPlan]] = {}
        self.conditions: dict[ServiceKey, ServiceCondition] = {}

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        """Yield each Service with its plans, and collect what is needed after the sync."""
        for key in self._keys:
            plans = self.of(key)
            if any(plan.outlives_sync for plan in plans):
                self.lasting[key] = plans
            if (condition := service_condition(plans)) is not None:
                self.conditions[key] = condition
            yield key, plans

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        """Return the plans of one Service, without collecting anything."""
        service = self._store.service(key)
        return plan_service(service, self._store.slices(key), self._context) if service else ()


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
