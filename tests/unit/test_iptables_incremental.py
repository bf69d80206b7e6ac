"""Whatever happened on the way, the kernel ends up with what a start from the final objects would give."""

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
from kproxy.sync.family import FamilySync
from kproxy.sync.reconciler import Reconciler, Resync
from kproxy.sync.schedule import Schedule
from tests.fakekernel import FakeKernel
from tests.unit.strategies import deltas

NAMED = {"old": "10.96.0.1", "new": "10.96.0.2"}
THRESHOLDS = (1, 3, 1000)
"""Of dispatch rules: above, a chain is split. So few Services come and go above 3, always, and never."""

EMPTY = (Replace(Service, ()), Replace(EndpointSlice, ()), Replace(Node, ()))


class Proxy:
    """The real store, planner, renderer and reconciler on two fake kernels and a clock that is set by hand."""

    def __init__(
        self,
        *,
        max_transaction_rules: int = 600,
        dispatch_threshold: int = 1000,
        kernels: dict[Family, FakeKernel] | None = None,
    ) -> None:
        self.now = 0.0
        self.kernels = kernels or {family: FakeKernel() for family in Family}
        self.store = Store("node-1")
        families = {
            family: FamilySync(
                IptablesBackend(
                    kernel, max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold
                ),
                partial(context, family),
            )
            for family, kernel in self.kernels.items()
        }
        self.reconciler = Reconciler(
            self.store,
            families,
            make_schedule=lambda: Schedule(min_interval=1.0, max_retry=30.0),
            clock=lambda: self.now,
        )
        for delta in EMPTY:
            self.reconciler.take(delta)

    def take(self, delta: Delta) -> None:
        self.reconciler.take(delta)

    def settle(self) -> None:
        while (wait := self.reconciler.wait()) is not None:
            self.now += wait
            self.reconciler.sync_due()

    def dump(self) -> dict[Family, list[str]]:
        return {family: kernel.dump() for family, kernel in self.kernels.items()}


def context(family: Family, node: Node | None) -> Context:
    prefix = "10." if family is Family.IPV4 else "fd00:"
    addresses = [each for each in node.addresses if each.startswith(prefix)] if node else []
    return Context(
        family,
        "node-1",
        zone=node.zone if node else "",
        node_address=addresses[0] if addresses else "",
        local_traffic=LocalTraffic(cidr="10.244.0.0/16") if family is Family.IPV4 else LocalTraffic(),
        localhost_node_ports=family is Family.IPV4,
    )


def from_scratch(store: Store, dispatch_threshold: int = 1000) -> dict[Family, list[str]]:
    fresh = Proxy(dispatch_threshold=dispatch_threshold)
    fresh.take(Replace(Service, tuple(found for key in store.service_keys() if (found := store.service(key)))))
    owners = {f"ns/{name}" for name in "abc"}
    fresh.take(Replace(EndpointSlice, tuple(each for key in owners for each in store.slices(key))))
    fresh.take(Replace(Node, (store.node,) if store.node else ()))
    fresh.settle()
    return fresh.dump()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(deltas(), st.booleans(), st.booleans()), max_size=25),
    st.sampled_from((1, 6, 600)),
    st.sampled_from(THRESHOLDS),
)
def test_any_sequence_ends_like_a_fresh_start(
    history: list[tuple[Delta, bool, bool]], max_transaction_rules: int, dispatch_threshold: int
) -> None:
    proxy = Proxy(max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold)
    for delta, pause, refused in history:
        proxy.take(delta)
        for kernel in proxy.kernels.values():
            kernel.reject = (lambda _: "out of memory") if refused else (lambda _: None)
        if pause:
            proxy.now += 100
            proxy.reconciler.sync_due()
    for kernel in proxy.kernels.values():
        kernel.reject = lambda _: None
    proxy.settle()
    assert proxy.dump() == from_scratch(proxy.store, dispatch_threshold)


@settings(deadline=None, max_examples=50)
@given(st.lists(deltas(), max_size=15), st.sampled_from(THRESHOLDS))
def test_restart_changes_nothing(history: list[Delta], dispatch_threshold: int) -> None:
    proxy = Proxy(dispatch_threshold=dispatch_threshold)
    for delta in history:
        proxy.take(delta)
    proxy.settle()
    for kernel in proxy.kernels.values():
        kernel.inputs.clear()
    again = Proxy(kernels=proxy.kernels, dispatch_threshold=dispatch_threshold)
    again.store = proxy.store
    for delta in history:
        again.take(delta)
    again.settle()
    assert [kernel.inputs for kernel in again.kernels.values()] == [[], []]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(deltas(), max_size=15),
    st.lists(deltas(), max_size=8),
    st.sampled_from(THRESHOLDS),
    st.sampled_from(THRESHOLDS),
)
def test_restart_after_missed_changes_cleans_up(
    before: list[Delta], missed: list[Delta], former_threshold: int, dispatch_threshold: int
) -> None:
    proxy = Proxy(dispatch_threshold=former_threshold)
    for delta in before:
        proxy.take(delta)
    proxy.settle()
    again = Proxy(kernels=proxy.kernels, dispatch_threshold=dispatch_threshold)
    for delta in (*before, *missed):
        again.take(delta)
    again.settle()
    assert again.dump() == from_scratch(again.store, dispatch_threshold)


@settings(deadline=None, max_examples=50)
@given(st.lists(deltas(), min_size=1, max_size=10))
def test_repeated_objects_write_nothing(history: list[Delta]) -> None:
    proxy = Proxy()
    for delta in history:
        proxy.take(delta)
    proxy.settle()
    for kernel in proxy.kernels.values():
        kernel.inputs.clear()
    proxy.take(
        Replace(Service, tuple(each for key in proxy.store.service_keys() if (each := proxy.store.service(key))))
    )
    proxy.settle()
    assert [kernel.inputs for kernel in proxy.kernels.values()] == [[], []]


def test_a_node_that_goes_leaves_its_addresses_and_zone_in_force() -> None:
    proxy = Proxy()
    proxy.take(Upsert(Node("node-1", addresses=("10.99.0.2",), zone="zone-a")))
    service = Service("ns", "a", ("10.96.0.1",), (ServicePort("", 80, "TCP", 30080),), vips=("203.0.113.1",))
    proxy.take(Upsert(replace(service, source_ranges=("10.99.0.0/24",))))
    near, far = (Endpoint(f"10.244.0.{n}", for_zones=(zone,)) for n, zone in ((1, "zone-a"), (2, "zone-b")))
    proxy.take(Upsert(EndpointSlice("ns", "s", "ns/a", Family.IPV4, (near, far), (EndpointPort("", 8080, "TCP"),))))
    proxy.settle()
    before = proxy.dump()
    proxy.take(Delete(Node, "", "node-1"))
    proxy.settle()
    assert proxy.dump() == before


@pytest.mark.parametrize("restarted", [False, True])
def test_a_chain_that_somebody_else_uses_holds_up_nothing(restarted: bool) -> None:
    endpoint = EndpointSlice(
        "ns", "s", "ns/old", Family.IPV4, (Endpoint("10.244.0.1"),), (EndpointPort("", 8080, "TCP"),)
    )
    old, new = (Service("ns", name, (ip,), (ServicePort("", 80, "TCP"),)) for name, ip in NAMED.items())
    proxy = Proxy()
    proxy.take(Upsert(endpoint))
    proxy.take(Upsert(old))
    proxy.settle()
    kernel = proxy.kernels[Family.IPV4]
    used = next(name for name in kernel.tables["nat"] if name.startswith("KUBE-SEP-"))
    kernel.tables["nat"]["DEBUG"] = [f"-j {used}"]
    if restarted:
        proxy = Proxy(kernels=proxy.kernels)
    proxy.take(Replace(Service, (new,)))
    proxy.settle()
    nat = kernel.tables["nat"]
    assert [name for name in nat if name.startswith(("KUBE-SVC-", "KUBE-SEP-"))] == [used]
    assert any("10.96.0.2" in rule for rule in kernel.tables["filter"]["KUBE-SERVICES"])
    proxy.take(Replace(Service, ()))
    proxy.settle()
    assert not kernel.tables["filter"]["KUBE-SERVICES"]


def test_what_others_change_is_found_when_all_is_compared() -> None:
    proxy = Proxy()
    proxy.take(Upsert(Service("ns", "a", ("10.96.0.1",), (ServicePort("", 80, "TCP"),))))
    proxy.settle()
    wanted = proxy.dump()
    chains = proxy.kernels[Family.IPV4].tables["nat"]
    own = next(name for name in chains if name.startswith("KUBE-SERVICES"))
    chains[own].pop()
    chains["KUBE-MARK-MASQ"].append("-j RETURN")
    for sync, _ in proxy.reconciler._families.values():
        sync.forget()
    proxy.reconciler.take(Resync())
    proxy.settle()
    assert proxy.dump() == wanted
