"""What the backends can do, found by trying it: repair exactly what was touched, and quarantine a rejected Service."""

from __future__ import annotations

from functools import cache

from kproxy.model.delta import Upsert
from kproxy.model.drift import Touched
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.inprocess import EMPTY_LISTS, FakeKernelProxy


def _proxy(mode: str) -> FakeKernelProxy:
    proxy = FakeKernelProxy(mode)
    proxy.apply(*EMPTY_LISTS)
    for number, name in enumerate("ab", 1):
        endpoints = (Endpoint(f"10.244.0.{number}", "node-2"),)
        port = EndpointPort("", 8080, "TCP")
        proxy.apply(Upsert(Service("ns", name, (f"10.96.0.{number}",), (ServicePort("", 80, "TCP"),))))
        proxy.apply(Upsert(EndpointSlice("ns", name, f"ns/{name}", Family.IPV4, endpoints, (port,))))
    return proxy


@cache
def repairs_exactly(mode: str) -> bool:
    """Return whether a mode's backend restores an endpoint that another process changed."""
    proxy = _proxy(mode).sync()
    sync = proxy.families[Family.IPV4]
    if mode == "nftables":
        elements = proxy.table.existing_table.sets["service-endpoints"].elements
        key = next(iter(elements))
        removed: object = elements.pop(key)
        touched = {"kube-proxy": Touched(elements={"service-endpoints": {key}})}
        proxy.table.increment_generation()
        sync.repair(proxy.store, touched)
        return (
            elements is not None and proxy.table.existing_table.sets["service-endpoints"].elements.get(key) == removed
        )
    chains = proxy.kernel.tables["nat"]
    name = next(name for name in chains if name.startswith("KUBE-SEP-"))
    rules = list(chains[name])
    chains[name].pop()
    sync.repair(proxy.store, {"nat": Touched(chains={name})})
    return proxy.kernel.tables["nat"].get(name) == rules


@cache
def quarantines(mode: str) -> bool:
    """Return whether a mode's backend programs the other Services if the kernel rejects one."""
    proxy = _proxy(mode)
    proxy.kernel.reject = lambda text: "rejected" if "ns/b" in text else None
    proxy.table.reject = lambda transaction: "rejected" if "ns/b" in str(transaction) else None
    try:
        proxy.sync()
    except SyncError:
        return False
    return "ns/b" in proxy.result.applied.rejected
