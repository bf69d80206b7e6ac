"""`FamilySync`: which Services a sync plans, endpoint counts, and the plans that its result keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.iptables.backend import IptablesBackend
from kproxy.model.context import Context
from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.endpoints import endpoints_by_socket
from kproxy.model.plan import ServicePortPlan, count_endpoints, plan_service
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncError, SyncResult
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.nftables.backend import NftablesBackend
from kproxy.sync import family_sync as family_module
from kproxy.sync.family_sync import LARGE_CLUSTER_ENDPOINTS, Backend, StorePlans
from tests.fakekernel import FakeKernel
from tests.faketable import FakeTable
from tests.inprocess import SingleFamilyProxy
from tests.unit.strategies import deltas, endpoint_slices, services

V4 = Family.IPV4
HTTP, DNS = ServicePort("http", 80, "TCP"), ServicePort("dns", 53, "UDP")


def service(number: int, port: ServicePort = HTTP) -> Service:
    return Service("ns", f"s{number}", (f"10.96.0.{number}",), (port,))


def slices(number: int, endpoints: int, port: ServicePort = HTTP) -> EndpointSlice:
    endpoint_list = tuple(Endpoint(f"10.244.{number}.{index}", "node-2") for index in range(endpoints))
    ports = (EndpointPort(port.name, 8080, port.protocol),)
    return EndpointSlice("ns", f"s{number}", f"ns/s{number}", V4, endpoint_list, ports)


class DeltaProxy(SingleFamilyProxy):
    """An IPv4 proxy that is synced after each call with deltas."""

    def __init__(self, backend: Backend, large_cluster_endpoints: float = LARGE_CLUSTER_ENDPOINTS) -> None:
        super().__init__(backend, Context(V4, "node-1"), large_cluster_endpoints=large_cluster_endpoints)

    def sync_deltas(self, *deltas: Delta) -> SyncResult:
        return self.apply(*deltas).sync().result


MODES: dict[str, Callable[[], tuple[Backend, float]]] = {
    "iptables": lambda: (IptablesBackend(FakeKernel()), 25.0),
    "nftables": lambda: (NftablesBackend(FakeTable(V4)), math.inf),
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many times each Service was planned."""
    counts: Counter[str] = Counter()

    def counting(service: Service, *more: Any, key: str) -> Sequence[ServicePortPlan]:
        counts[service.key] += 1
        return plan_service(service, *more, key=key)

    monkeypatch.setattr(family_module, "plan_service", counting)
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_each_service_is_planned_once(planned: Counter[str], mode: str) -> None:
    proxy = DeltaProxy(*MODES[mode]())
    numbers = range(1, 11)
    proxy.sync_deltas(
        Replace(Service, tuple(map(service, numbers))),
        Replace(EndpointSlice, tuple(slices(number, 2) for number in numbers)),
        Replace(Node, ()),
    )
    assert planned == {f"ns/s{number}": 1 for number in numbers}
    planned.clear()
    proxy.sync_deltas(Upsert(slices(3, 3)))
    assert planned == {"ns/s3": 1}
    planned.clear()
    proxy.forget()
    assert proxy.sync_deltas(Upsert(slices(4, 3))).complete
    assert planned == {f"ns/s{number}": 1 for number in numbers}
    planned.clear()
    # With more than 25 endpoints, iptables mode drops the comments of rules, so all rules are rewritten.
    assert proxy.sync_deltas(Upsert(slices(5, 10))).complete is (mode == "iptables")
    assert planned == ({f"ns/s{number}": 1 for number in numbers} if mode == "iptables" else {"ns/s5": 1})


def test_cluster_is_large_while_it_exceeds_the_endpoint_threshold() -> None:
    proxy = DeltaProxy(IptablesBackend(FakeKernel()), 25.0)

    def is_large(*changes: Delta) -> bool:
        return proxy.sync_deltas(*changes).context.large_cluster

    assert not is_large(Upsert(service(1)), Upsert(slices(1, 25)), Upsert(slices(2, 5)))
    assert is_large(Upsert(service(2)))
    assert not is_large(Upsert(slices(2, 0)))
    assert is_large(Upsert(slices(2, 1)))
    assert not is_large(Delete(Service, "ns", "s1"))
    assert is_large(Upsert(service(1)))
    assert not is_large(Delete(EndpointSlice, "ns", "s2"))


def test_endpoints_of_failed_syncs_are_counted_once() -> None:
    kernel = FakeKernel()
    proxy = DeltaProxy(IptablesBackend(kernel), 25.0)
    proxy.sync_deltas(Upsert(service(1)), Upsert(slices(1, 10)))
    kernel.reject = lambda _: "no"
    for _ in range(3):
        with pytest.raises(SyncError):
            proxy.sync_deltas(Upsert(slices(1, 20)))
    kernel.reject = lambda _: None
    assert not proxy.sync_deltas().context.large_cluster


@pytest.mark.parametrize("mode", MODES)
def test_result_keeps_only_plans_that_later_steps_need(mode: str) -> None:
    proxy = DeltaProxy(*MODES[mode]())
    numbers = range(1, 9)
    first = proxy.sync_deltas(
        *(Upsert(service(number, DNS if number == 3 else HTTP)) for number in numbers),
        *(Upsert(slices(number, 1, DNS if number == 3 else HTTP)) for number in numbers),
    )
    assert (first.services, first.complete, set(first.plans)) == (8, True, {"ns/s3"})
    second = proxy.sync_deltas(Upsert(slices(3, 2, DNS)), Upsert(slices(4, 2)), Delete(Service, "ns", "s5"))
    assert (second.services, second.complete) == (3, False)
    assert {key: len(plans) for key, plans in second.plans.items()} == {"ns/s3": 1, "ns/s4": 0, "ns/s5": 0}


def planned_endpoints(service: Service, owned: list[EndpointSlice], family: Family) -> int:
    """Return how many endpoints planning finds for a Service."""
    ports = plan_service(service, owned, Context(family, "node-1"))
    return sum(len(endpoints_by_socket(owned, family, plan.port_name, plan.protocol)) for plan in ports)


@given(services(), st.lists(endpoint_slices(), max_size=4))
def test_endpoint_count_matches_planning(service: Service, owned: list[EndpointSlice]) -> None:
    for family in Family:
        assert count_endpoints(service, owned, family) == planned_endpoints(service, owned, family)


@given(st.lists(deltas(), max_size=30))
def test_endpoint_total_is_correct_after_any_changes(changes: list[Delta]) -> None:
    proxy = DeltaProxy(IptablesBackend(FakeKernel()))
    for number, delta in enumerate(changes):
        proxy.apply(delta)
        if number % 3 == 0:
            proxy.sync()
    proxy.sync()
    store, family = proxy.store, proxy.families[V4]
    expected = 0
    for key in store.service_keys():
        svc = store.service(key)
        assert svc is not None
        expected += planned_endpoints(svc, store.slices(key), V4)
    assert family._endpoints is not None
    assert family._endpoints.total == expected


def test_what_a_sync_keeps_is_what_it_has_planned_last() -> None:
    """The store changes during a sync, and the backend plans some Services a second time to write their rules again."""
    store = Store("node-1")
    first, second = slices(1, 1, DNS), slices(1, 2, DNS)
    for each in (service(1, DNS), first, service(2)):
        store.apply(Upsert(each))
    plans = StorePlans(store, Context(V4, "node-1"), {"ns/s1": None, "ns/s2": None})
    assert [key for key, _ in plans.by_service()] == ["ns/s1", "ns/s2"]
    assert (set(plans.lasting), set(plans.conditions)) == ({"ns/s1"}, {"ns/s2"})
    store.apply(Upsert(second))
    store.apply(Upsert(slices(2, 1)))
    assert plans.lasting["ns/s1"] != plans.of("ns/s1")
    assert plans.lasting["ns/s1"] == plans.of("ns/s1")
    plans.of("ns/s2")
    assert plans.conditions == {}
    store.apply(Delete(EndpointSlice, "ns", "s1"))
    assert plans.exist("ns/s1")
    assert plans.conditions == {}
    store.apply(Delete(Service, "ns", "s1"))
    assert not plans.exist("ns/s1")
    assert set(plans.lasting) == {"ns/s1"}
    plans.of("ns/s1")
    assert plans.lasting == {}
