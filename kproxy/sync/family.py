"""One family's way from the desired state to the kernel."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, plan_service
from kproxy.model.store import Store, StoreChange
from kproxy.model.sync_report import ApplyResult, ConditionTransition, DriftError, Plans, ServiceCounts
from kproxy.model.types import Family, Node, ServiceKey
from kproxy.sync.conditions import ConditionTracker, ServiceCondition, service_condition


class Backend(Protocol):
    """Keeps one family's kernel state equal to the plans that it is given."""

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` must be given the plans of all Services, because nothing is known."""

    def verify(self, context: Context) -> bool:
        """Return whether the kernel still holds what it must; if not, forget what is known of it."""

    def forget(self) -> None:
        """Forget what is known of the kernel: the next `sync` looks at all that is there."""

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program the plans of the Services that may have changed; those without plans are gone.

        Raises `SyncError` if the kernel refused.
        """


LARGE_CLUSTER_ENDPOINTS = 1000
"""Above this many endpoints, per-endpoint rules lose their comments (kube-proxy's threshold)."""


REMEMBERED_CHANGES = 1000
"""How many moments of changes are kept for the metrics while they cannot be programmed."""


class FamilySyncResult(Struct, frozen=True):
    """What the kernel accepted: see the fields of the same names of `kproxy.model.sync_report.SyncReport`."""

    plans: Plans
    services: int
    complete: bool
    context: Context
    written: ApplyResult
    last_changes: tuple[float, ...]
    tally: ServiceCounts
    notices: tuple[ConditionTransition, ...]


class FamilySync:
    """Keeps track of what is not yet programmed in one family.

    Changes leave the pending set only when the kernel has accepted them.
    """

    def __init__(
        self,
        backend: Backend,
        make_context: Callable[[Node | None], Context],
        *,
        large_cluster_endpoints: float = LARGE_CLUSTER_ENDPOINTS,
    ) -> None:
        """`make_context` returns what the Services share, less what the store knows; it is called for each sync."""
        self._backend = backend
        self._large_cluster_endpoints = large_cluster_endpoints
        self._make_context = make_context
        self._applied: Context | None = None
        self._pending: set[ServiceKey] = set()
        self._appeared: set[ServiceKey] = set()
        self._conditions: ConditionTracker | None = None
        self._last_changes: deque[tuple[Family, float]] = deque(maxlen=REMEMBERED_CHANGES)
        self._endpoints: dict[ServiceKey, int] = {}
        self._total_endpoints = 0

    def note(self, changed: StoreChange) -> None:
        """Take in what a delta changed."""
        self._pending |= changed.services
        if self._conditions is not None:  # at the first sync, all Services count as new
            self._appeared |= changed.appeared
        self._last_changes += changed.last_changes

    def verify(self) -> bool:
        """Return whether the kernel still holds what it accepted, as far as a quick look tells."""
        return self._applied is None or self._backend.verify(self._applied)

    def forget(self) -> None:
        """Let the next sync compare all that the kernel holds with what it should."""
        self._backend.forget()

    def sync(self, store: Store) -> FamilySyncResult:
        """Program what is pending. Raises `SyncError`."""
        try:
            return self._sync(store)
        except DriftError:
            return self._sync(store)

    def _sync(self, store: Store) -> FamilySyncResult:
        context = self._context(store)
        everything = self._backend.needs_full_sync or self._applied is None or not _alike(context, self._applied)
        planner = Planner(store, context, everything=everything, pending=self._pending)
        plans: Plans = planner if everything else dict(planner)
        if self._counts_endpoints:
            self._count(plans)
            context = replace(context, large_cluster=self._total_endpoints > self._large_cluster_endpoints)
            if not everything and context != self._applied:
                everything = True
                plans = planner = Planner(store, context, everything=True, pending=self._pending)
        written = self._backend.sync(plans, context)
        notices = self._notice(planner, written, everything=everything)
        self._applied = context
        self._pending.clear()
        self._appeared.clear()
        last_changes = tuple(moment for family, moment in self._last_changes if family is context.family)
        self._last_changes.clear()
        told = planner.plans_that_outlive_sync() if everything else plans
        tally = self._conditions.tally(store) if self._conditions else ServiceCounts()
        return FamilySyncResult(told, len(plans), everything, context, written, last_changes, tally, notices)

    def _notice(self, planner: Planner, written: ApplyResult, *, everything: bool) -> tuple[ConditionTransition, ...]:
        """Take in the conditions that the Services are in now; return what is worth telling."""
        if self._conditions is None:
            self._conditions = ConditionTracker(planner.family)
        examined = None if everything else self._pending
        troubled = self._conditions.troubled(examined)
        left = [key for key in troubled if key not in planner.conditions and not planner[key]]
        return self._conditions.accept(planner.conditions, examined, self._appeared, written.conflicts, left)

    def _context(self, store: Store) -> Context:
        context = self._make_context(store.node)
        cidrs = tuple(cidr for cidr in store.service_cidrs if family_of(cidr) is context.family)
        return replace(context, service_cidrs=cidrs)

    @property
    def _counts_endpoints(self) -> bool:
        return self._large_cluster_endpoints < math.inf

    def _count(self, plans: Plans) -> None:
        for key, ports in plans.items():
            endpoints = sum(plan.known_endpoints for plan in ports)
            self._total_endpoints += endpoints - self._endpoints.get(key, 0)
            if endpoints:
                self._endpoints[key] = endpoints
            else:
                self._endpoints.pop(key, None)


class Planner(Mapping[ServiceKey, Sequence[ServicePortPlan]]):
    """The plans of Services, made each time they are asked for.

    All plans of a large cluster at once would take more memory than everything else that is kept of it.
    """

    def __init__(self, store: Store, context: Context, *, everything: bool, pending: Collection[ServiceKey]) -> None:
        """`pending` are Services that may have changed, and may be gone; `everything` adds all that there are."""
        self._store = store
        self._context = context
        self._keys = dict.fromkeys((*store.service_keys(), *pending) if everything else pending)
        self._interesting: dict[ServiceKey, Sequence[ServicePortPlan]] = {}
        self.family = context.family
        self.conditions: dict[ServiceKey, ServiceCondition] = {}
        """The Services in a condition among those whose plans were made so far."""

    def __getitem__(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        service = self._store.service(key)
        plans = plan_service(service, self._store.slices(key), self._context) if service else ()
        if any(plan.outlives_sync for plan in plans):
            self._interesting[key] = plans
        if (condition := service_condition(plans)) is not None:
            self.conditions[key] = condition
        return plans

    def __iter__(self) -> Iterator[ServiceKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def plans_that_outlive_sync(self) -> Plans:
        """Return those of the plans made so far that somebody must remember once the kernel has them."""
        return self._interesting


def _alike(context: Context, other: Context) -> bool:
    """Return whether two contexts differ at most in what follows from the Services themselves."""
    return replace(context, large_cluster=other.large_cluster) == other
