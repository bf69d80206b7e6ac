"""kproxy's store, planner and backends in the test process, without a daemon.

The backends write to a fake kernel (`tests.fakekernel`, `tests.faketable`) or to the real one in a network namespace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from kproxy.iptables.backend import IptablesBackend
from kproxy.model.context import Context
from kproxy.model.delta import Delete, Delta, Kind, Object, Replace, Upsert
from kproxy.model.drift import RepairResult, RulesChanged, Touched
from kproxy.model.store import Store
from kproxy.model.sync_report import Plans, SyncResult
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.nftables.backend import NftablesBackend
from kproxy.sync.family_sync import LARGE_CLUSTER_ENDPOINTS, Backend, FamilySync
from kproxy.sync.reconciler import Reconciler, Resync
from kproxy.sync.schedule import Schedule
from tests.clock import Clock
from tests.fakekernel import FakeKernel
from tests.faketable import FakeTable
from tests.lab.namespace import Namespace

_T = TypeVar("_T")

NODE = "node-1"
EMPTY_LISTS: tuple[Replace, ...] = (Replace(Service, ()), Replace(EndpointSlice, ()), Replace(Node, ()))
"""The first lists of an empty cluster."""


class InProcessProxy:
    """The pipeline from a store to one backend per IP family. It syncs when told to."""

    def __init__(
        self, families: Mapping[Family, FamilySync], *, store: Store | None = None, namespace: Namespace | None = None
    ) -> None:
        """Backends run in `namespace`, or in the calling thread without one."""
        self.families: Mapping[Family, FamilySync] = families
        self.store = store or Store(NODE)
        self.namespace = namespace
        self.results: dict[Family, SyncResult] = {}

    def apply(self, *deltas: Delta) -> Self:
        """Apply deltas to the store. The next sync programs what they changed."""
        for delta in deltas:
            changed = self.store.apply(delta)
            for family in self.families.values():
                family.add_changes(changed)
        return self

    def put(self, *objects: Object) -> Self:
        """Create or update objects in the store."""
        return self.apply(*map(Upsert, objects))

    def delete(self, kind: Kind, name: str, *, namespace: str = "ns") -> Self:
        """Delete one object from the store."""
        return self.apply(Delete(kind, namespace, name))

    def sync(self, *objects: Object) -> Self:
        """Put objects, if any, and sync each family once. Raises `SyncError`."""
        self.put(*objects)
        for family, sync in self.families.items():
            self.results[family] = self.call(lambda sync=sync: sync.sync(self.store))  # type: ignore[misc]
        return self

    def verify(self) -> bool:
        """Compare all rules with the desired state; return whether nothing had to be repaired."""
        return all(self.call(lambda sync=sync: self._is_intact(sync)) for sync in self.families.values())  # type: ignore[misc]

    def _is_intact(self, sync: FamilySync) -> bool:
        intact = True
        while (result := sync.compare_next(self.store)) is not None:
            if result.needs_full_sync:
                return False
            intact = intact and not result.repaired
        return intact

    def forget(self) -> None:
        """Make the next sync compare everything with the kernel."""
        for sync in self.families.values():
            sync.forget()

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function where the backends run."""
        return self.namespace.call(function) if self.namespace else function()


class StubBackend:
    """A backend without a kernel. Nothing ever drifts."""

    needs_full_sync = True

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        """Return that nothing differs."""
        return RepairResult()

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        """Return that the comparison is complete."""
        return None

    def forget(self) -> None:
        """Make the next sync a full sync."""
        self.needs_full_sync = True


class SingleFamilyProxy(InProcessProxy):
    """A proxy of one IP family."""

    def __init__(
        self,
        backend: Backend,
        context: Context,
        *,
        store: Store | None = None,
        namespace: Namespace | None = None,
        large_cluster_endpoints: float = LARGE_CLUSTER_ENDPOINTS,
    ) -> None:
        """`context` may be replaced between syncs."""
        self.context = context
        self._large_cluster_endpoints = large_cluster_endpoints
        super().__init__({}, store=store, namespace=namespace)
        self.restart(backend)

    def restart(self, backend: Backend) -> None:
        """Continue as a new process with this backend and the same objects."""
        self.backend = backend
        self.families = {
            self.context.family: FamilySync(
                backend, lambda _: self.context, large_cluster_endpoints=self._large_cluster_endpoints
            )
        }

    @property
    def result(self) -> SyncResult:
        """The result of the last sync."""
        return self.results[self.context.family]


class FakeKernelProxy(SingleFamilyProxy):
    """A proxy of one IP family in one mode, on a kernel in memory."""

    def __init__(self, mode: str, family: Family = Family.IPV4) -> None:
        """`mode` is "iptables" or "nftables"."""
        self.kernel = FakeKernel()
        self.table = FakeTable(family)
        nftables = mode == "nftables"
        super().__init__(
            NftablesBackend(self.table) if nftables else IptablesBackend(self.kernel),
            Context(family, NODE),
            large_cluster_endpoints=math.inf if nftables else LARGE_CLUSTER_ENDPOINTS,
        )


class SingleServiceProxy(SingleFamilyProxy):
    """A proxy of one IP family with one Service, ns/a, on an otherwise empty node; its endpoints change."""

    def __init__(
        self,
        backend: Backend,
        context: Context,
        *,
        affinity: int = 0,
        ports: int = 1,
        namespace: Namespace | None = None,
    ) -> None:
        """`affinity` is the session affinity timeout in seconds."""
        super().__init__(backend, context, namespace=namespace)
        cluster_ip = "10.96.0.1" if context.family is Family.IPV4 else "fd00:10:96::1"
        served = tuple(ServicePort(f"port-{number}", 80 + number, "TCP") for number in range(ports))
        self._ports = tuple(EndpointPort(port.name, 8000 + port.port, "TCP") for port in served)
        self.apply(*EMPTY_LISTS)
        self.put(Service("ns", "a", (cluster_ip,), served, affinity_seconds=affinity))

    def sync_endpoints(self, addresses: Sequence[str]) -> None:
        """Make these addresses, all on another node, the Service's endpoints and sync."""
        endpoints = tuple(Endpoint(address, "node-2") for address in addresses)
        self.sync(EndpointSlice("ns", "a", "ns/a", self.context.family, endpoints, self._ports))


class ReconciledProxy:
    """A `Reconciler` on in-process backends, driven by hand instead of by its own thread."""

    def __init__(
        self,
        families: Mapping[Family, FamilySync],
        *,
        min_interval: float = 1.0,
        max_retry: float = 30.0,
        store: Store | None = None,
        namespace: Namespace | None = None,
        **options: Any,
    ) -> None:
        """`min_interval` and `max_retry` are the schedule's seconds; `options` are passed on to the `Reconciler`."""
        self.clock = Clock()
        self.store = store or Store(NODE)
        self.namespace = namespace
        self.reconciler = Reconciler(
            self.store,
            families,
            make_schedule=lambda: Schedule(min_interval=min_interval, max_retry=max_retry),
            clock=self.clock,
            **options,
        )

    def apply(self, *messages: Delta | Resync) -> None:
        """Deliver messages to the reconciler."""
        for message in messages:
            self.reconciler.apply(message)

    def touch(self, tables: Mapping[tuple[Family, str], Touched]) -> None:
        """Tell the reconciler what other processes touched."""
        self.reconciler.touch(RulesChanged(tables))

    def sync_after(self, seconds: float = 0.0) -> bool:
        """Let time pass and sync the families that are due; return whether none failed."""
        self.clock.advance(seconds)
        return self.namespace.call(self.reconciler.sync_due) if self.namespace else self.reconciler.sync_due()

    def settle(self) -> None:
        """Let time pass and sync until nothing is left to do."""
        while (wait := self.reconciler.wait()) is not None:
            self.sync_after(wait)
