"""After any history of changes, failures and restarts, the kernel has the same rules as after a fresh start."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.iptables.backend import IptablesBackend
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.reconciler import Resync
from tests.fakekernel import FakeKernel
from tests.inprocess import EMPTY_LISTS, ReconciledProxy
from tests.unit.strategies import deltas

NAMED = {"old": "10.96.0.1", "new": "10.96.0.2"}
THRESHOLDS = (1, 3, 1000)
"""Dispatch thresholds: with up to three Services, chains are always split, split at times, and never split."""


class KernelsProxy(ReconciledProxy):
    """Both families of iptables mode on two fake kernels."""

    def __init__(
        self,
        *,
        max_transaction_rules: int = 600,
        dispatch_threshold: int = 1000,
        kernels: dict[Family, FakeKernel] | None = None,
    ) -> None:
        self.kernels = kernels or {family: FakeKernel() for family in Family}
        self.families = {
            family: FamilySync(
                IptablesBackend(
                    kernel, max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold
                ),
                partial(context, family),
            )
            for family, kernel in self.kernels.items()
        }
        super().__init__(self.families)
        self.apply(*EMPTY_LISTS)

    def dump(self) -> dict[Family, list[str]]:
        return {family: kernel.dump() for family, kernel in self.kernels.items()}


def context(family: Family, node: Node | None) -> Context:
    prefix = "10." if family is Family.IPV4 else "fd00:"
    addresses = [item for item in node.addresses if item.startswith(prefix)] if node else []
    return Context(
        family,
        "node-1",
        zone=node.zone if node else "",
        node_address=addresses[0] if addresses else "",
        local_traffic=LocalTraffic(cidr="10.244.0.0/16") if family is Family.IPV4 else LocalTraffic(),
        localhost_node_ports=family is Family.IPV4,
    )


def from_scratch(store: Store, dispatch_threshold: int = 1000) -> dict[Family, list[str]]:
    fresh = KernelsProxy(dispatch_threshold=dispatch_threshold)
    fresh.apply(Replace(Service, tuple(item for key in store.service_keys() if (item := store.service(key)))))
    owners = {f"ns/{name}" for name in "abc"}
    fresh.apply(Replace(EndpointSlice, tuple(item for key in owners for item in store.slices(key))))
    fresh.apply(Replace(Node, (store.node,) if store.node else ()))
    fresh.settle()
    return fresh.dump()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(deltas(), st.booleans(), st.booleans()), max_size=25),
    st.sampled_from((1, 6, 600)),
    st.sampled_from(THRESHOLDS),
)
def test_any_history_leaves_the_rules_of_a_fresh_start(
    history: list[tuple[Delta, bool, bool]], max_transaction_rules: int, dispatch_threshold: int
) -> None:
    proxy = KernelsProxy(max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold)
    for delta, pause, rejected in history:
        proxy.apply(delta)
        for kernel in proxy.kernels.values():
            kernel.reject = (lambda _: "out of memory") if rejected else (lambda _: None)
        if pause:
            proxy.sync_after(100)
    for kernel in proxy.kernels.values():
        kernel.reject = lambda _: None
    proxy.settle()
    assert proxy.dump() == from_scratch(proxy.store, dispatch_threshold)


@settings(deadline=None, max_examples=50)
@given(st.lists(deltas(), max_size=15), st.sampled_from(THRESHOLDS))
def test_restart_changes_nothing(history: list[Delta], dispatch_threshold: int) -> None:
    proxy = KernelsProxy(dispatch_threshold=dispatch_threshold)
    for delta in history:
        proxy.apply(delta)
    proxy.settle()
    for kernel in proxy.kernels.values():
        kernel.inputs.clear()
    again = KernelsProxy(kernels=proxy.kernels, dispatch_threshold=dispatch_threshold)
    again.store = proxy.store
    for delta in history:
        again.apply(delta)
    again.settle()
    assert [kernel.inputs for kernel in again.kernels.values()] == [[], []]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(deltas(), max_size=15),
    st.lists(deltas(), max_size=8),
    st.sampled_from(THRESHOLDS),
    st.sampled_from(THRESHOLDS),
)
def test_restart_after_missed_changes_leaves_the_rules_of_a_fresh_start(
    before: list[Delta], missed: list[Delta], previous_threshold: int, dispatch_threshold: int
) -> None:
    proxy = KernelsProxy(dispatch_threshold=previous_threshold)
    for delta in before:
        proxy.apply(delta)
    proxy.settle()
    again = KernelsProxy(kernels=proxy.kernels, dispatch_threshold=dispatch_threshold)
    for delta in (*before, *missed):
        again.apply(delta)
    again.settle()
    assert again.dump() == from_scratch(again.store, dispatch_threshold)


@settings(deadline=None, max_examples=50)
@given(st.lists(deltas(), min_size=1, max_size=10))
def test_relisting_unchanged_objects_writes_nothing(history: list[Delta]) -> None:
    proxy = KernelsProxy()
    for delta in history:
        proxy.apply(delta)
    proxy.settle()
    for kernel in proxy.kernels.values():
        kernel.inputs.clear()
    proxy.apply(
        Replace(Service, tuple(item for key in proxy.store.service_keys() if (item := proxy.store.service(key))))
    )
    proxy.settle()
    assert [kernel.inputs for kernel in proxy.kernels.values()] == [[], []]


def test_deleted_node_keeps_its_addresses_and_zone() -> None:
    proxy = KernelsProxy()
    proxy.apply(Upsert(Node("node-1", addresses=("10.99.0.2",), zone="zone-a")))
    service = Service("ns", "a", ("10.96.0.1",), (ServicePort("", 80, "TCP", 30080),), vips=("203.0.113.1",))
    proxy.apply(Upsert(replace(service, source_ranges=("10.99.0.0/24",))))
    near, far = (Endpoint(f"10.244.0.{n}", for_zones=(zone,)) for n, zone in ((1, "zone-a"), (2, "zone-b")))
    proxy.apply(Upsert(EndpointSlice("ns", "s", "ns/a", Family.IPV4, (near, far), (EndpointPort("", 8080, "TCP"),))))
    proxy.settle()
    before = proxy.dump()
    proxy.apply(Delete(Node, "", "node-1"))
    proxy.settle()
    assert proxy.dump() == before


@pytest.mark.parametrize("restarted", [False, True])
def test_stale_chain_in_use_by_another_process_does_not_block_syncs(restarted: bool) -> None:
    endpoint = EndpointSlice(
        "ns", "s", "ns/old", Family.IPV4, (Endpoint("10.244.0.1"),), (EndpointPort("", 8080, "TCP"),)
    )
    old, new = (Service("ns", name, (ip,), (ServicePort("", 80, "TCP"),)) for name, ip in NAMED.items())
    proxy = KernelsProxy()
    proxy.apply(Upsert(endpoint))
    proxy.apply(Upsert(old))
    proxy.settle()
    kernel = proxy.kernels[Family.IPV4]
    used = next(name for name in kernel.tables["nat"] if name.startswith("KUBE-SEP-"))
    kernel.tables["nat"]["DEBUG"] = [f"-j {used}"]
    if restarted:
        proxy = KernelsProxy(kernels=proxy.kernels)
    proxy.apply(Replace(Service, (new,)))
    proxy.settle()
    nat = kernel.tables["nat"]
    assert [name for name in nat if name.startswith(("KUBE-SVC-", "KUBE-SEP-"))] == [used]
    assert any("10.96.0.2" in rule for rule in kernel.tables["filter"]["KUBE-SERVICES"])
    proxy.apply(Replace(Service, ()))
    proxy.settle()
    assert not kernel.tables["filter"]["KUBE-SERVICES"]


def test_full_sync_repairs_rules_modified_by_another_process() -> None:
    proxy = KernelsProxy()
    proxy.apply(Upsert(Service("ns", "a", ("10.96.0.1",), (ServicePort("", 80, "TCP"),))))
    proxy.settle()
    expected = proxy.dump()
    chains = proxy.kernels[Family.IPV4].tables["nat"]
    own = next(name for name in chains if name.startswith("KUBE-SERVICES"))
    chains[own].pop()
    chains["KUBE-MARK-MASQ"].append("-j RETURN")
    for sync in proxy.families.values():
        sync.forget()
    proxy.apply(Resync())
    proxy.settle()
    assert proxy.dump() == expected
