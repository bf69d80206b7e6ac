"""One family's way from the desired state to the kernel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.context import Context
from kproxy.model.outcome import Plans, Written
from kproxy.model.plan import ServicePortPlan, plan_service
from kproxy.model.store import Changed, Store
from kproxy.model.types import Family, Node, ServiceKey
from kproxy.sync.backend import Backend

LARGE_CLUSTER_ENDPOINTS = 1000
"""Above this many endpoints, per-endpoint rules lose their comments (kube-proxy's threshold)."""


REMEMBERED_CHANGES = 1000
"""How many moments of changes are kept for the metrics while they cannot be programmed."""


class Outcome(Struct, frozen=True):
    """What the kernel accepted: see the fields of the same names of `kproxy.sync.report.SyncReport`."""

    plans: Plans
    complete: bool
    context: Context
    written: Written
    last_changes: tuple[float, ...]


class FamilySync:
    """Keeps track of what is not yet programmed in one family.

    Changes leave the pending set only when the kernel has accepted them.
    """

    def __init__(self, backend: Backend, make_context: Callable[[Node | None], Context]) -> None:
        self._backend = backend
        self._make_context = make_context
        self._applied: Context | None = None
        self._pending: set[ServiceKey] = set()
        self._last_changes: deque[tuple[Family, float]] = deque(maxlen=REMEMBERED_CHANGES)
        self._endpoints: dict[ServiceKey, int] = {}
        self._total_endpoints = 0

    def note(self, changed: Changed) -> None:
        """Take in what a delta changed."""
        self._pending |= changed.services
        self._last_changes += changed.last_changes

    def verify(self) -> bool:
        """Return whether the kernel still holds what it accepted, as far as a quick look tells."""
        return self._applied is None or self._backend.verify(self._applied)

    def sync(self, store: Store) -> Outcome:
        """Program what is pending. Raises `SyncError`."""
        everything = self._backend.needs_everything or self._applied is None
        context = self._make_context(store.node)
        if self._applied is not None and replace(context, large_cluster=self._applied.large_cluster) != self._applied:
            everything = True
        plans = self._plan(store, context, store.service_keys() if everything else ())
        context = replace(context, large_cluster=self._total_endpoints > LARGE_CLUSTER_ENDPOINTS)
        if not everything and context != self._applied:
            everything = True
            plans |= self._plan(store, context, (key for key in store.service_keys() if key not in plans))
        written = self._backend.sync(plans, context)
        self._applied = context
        self._pending.clear()
        last_changes = tuple(moment for family, moment in self._last_changes if family is context.family)
        self._last_changes.clear()
        return Outcome(plans, everything, context, written, last_changes)

    def _plan(
        self, store: Store, context: Context, more: Iterable[ServiceKey]
    ) -> dict[ServiceKey, tuple[ServicePortPlan, ...]]:
        plans: dict[ServiceKey, tuple[ServicePortPlan, ...]] = {}
        for key in chain(more, self._pending):
            if key in plans:
                continue
            service = store.service(key)
            plans[key] = plan_service(service, store.slices(key), context) if service else ()
            self._count(key, sum(plan.known_endpoints for plan in plans[key]))
        return plans

    def _count(self, key: ServiceKey, endpoints: int) -> None:
        self._total_endpoints += endpoints - self._endpoints.get(key, 0)
        if endpoints:
            self._endpoints[key] = endpoints
        else:
            self._endpoints.pop(key, None)
