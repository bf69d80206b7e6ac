"""How many rules and elements kproxy writes for clusters and changes: performance that does not depend on hardware."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from math import isqrt

import pytest

from kproxy.iptables.backend import INCREMENTAL_FACTOR, IptablesBackend
from kproxy.iptables.dispatch import MAX_SHARD_RULES
from kproxy.iptables.names import ChainName
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import Backend
from tests.fakekernel import FakeKernel
from tests.faketable import FakeTable
from tests.inprocess import SingleFamilyProxy

ENDPOINTS = 10
SMALL, LARGE, SPLIT = 30, 300, 1200
"""Numbers of Services: SMALL and LARGE clusters have a flat dispatch chain, SPLIT clusters a split one."""

CONTEXT = Context(Family.IPV4, "node-1", local_traffic=LocalTraffic(cidr="10.244.0.0/16"))


class LoadedProxy(SingleFamilyProxy):
    """A proxy that has programmed Services of ten endpoints each."""

    def __init__(self, backend: Backend, services: int) -> None:
        # As in kube-proxy, rules of large clusters have no comments. No cluster counts as large here, so that clusters
        # of different sizes have the same rules per Service.
        super().__init__(backend, CONTEXT, large_cluster_endpoints=math.inf)
        self.apply(
            Replace(Node, ()),
            Replace(Service, tuple(service(number) for number in range(services))),
            Replace(EndpointSlice, tuple(endpoint_slice(number) for number in range(services))),
        ).sync()

    def sync_deltas(self, *deltas: Delta) -> None:
        self.apply(*deltas).sync()


def service(number: int) -> Service:
    ports = (ServicePort("http", 80, "TCP"),)
    return Service("ns", f"service-{number}", (f"10.96.{number // 250}.{number % 250}",), ports)


def endpoint_slice(number: int, *, last: int = 9) -> EndpointSlice:
    indexes = (*range(ENDPOINTS - 1), last)
    endpoints = tuple(Endpoint(f"10.{128 + n}.{number // 250}.{number % 250}", "node-2") for n in indexes)
    ports = (EndpointPort("http", 8080, "TCP"),)
    return EndpointSlice("ns", f"service-{number}", f"ns/service-{number}", Family.IPV4, endpoints, ports)


# iptables

SERVICE_RULES = (1 + ENDPOINTS) + 2 * ENDPOINTS
"""Rules in the chains of one Service: a masquerade rule, one per endpoint, and two in each endpoint chain."""


def iptables(services: int) -> tuple[FakeKernel, LoadedProxy]:
    kernel = FakeKernel()
    return kernel, LoadedProxy(IptablesBackend(kernel), services)


def rules_of(kernel: FakeKernel) -> int:
    return sum(len(rules) for chains in kernel.tables.values() for rules in chains.values())


def written(kernel: FakeKernel, begin: int) -> list[str]:
    """Return the lines that change chains or rules, from input `begin` on."""
    lines = [line for text in kernel.inputs[begin:] for line in text.splitlines()]
    return [line for line in lines if line[0] in ":-"]


def test_iptables_rules_per_service() -> None:
    base = rules_of(iptables(0)[0])
    for services in (SMALL, LARGE):
        kernel, _ = iptables(services)
        assert rules_of(kernel) == base + services * (1 + SERVICE_RULES)


@pytest.mark.parametrize("services", [SMALL, LARGE, SPLIT])
def test_iptables_endpoint_change_cost_does_not_depend_on_cluster_size(services: int) -> None:
    kernel, proxy = iptables(services)
    begin = len(kernel.inputs)
    proxy.sync_deltas(Upsert(endpoint_slice(services // 2, last=20)))
    lines = written(kernel, begin)
    # The chains of the new and the old endpoint are flushed, the old one is deleted, and one rule of the Service's
    # chain is replaced.
    assert sorted(line.split(" ")[0][:2] for line in lines) == sorted([":K", ":K", "-A", "-A", "-R", "-X"])
    assert kernel.reads == 1


@pytest.mark.parametrize("changed", [SMALL // 3, SMALL])
def test_iptables_burst_is_one_transaction(changed: int) -> None:
    kernel, proxy = iptables(SMALL)
    begin = len(kernel.inputs)
    proxy.sync_deltas(*(Upsert(endpoint_slice(number, last=20)) for number in range(changed)))
    assert len(kernel.inputs) == begin + 1
    assert len(written(kernel, begin)) == 6 * changed


def rules_in(text: str) -> int:
    return sum(line.startswith(("-A", "-R", "-X")) for line in text.splitlines())


class UncountableKernel(FakeKernel):
    """A fake kernel whose rules can never be counted, as if another process changed rules all the time."""

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        return {chain: 0 for chain in chains if not self.tables}


@pytest.mark.parametrize(
    ("make_kernel", "services", "rules_per_service", "weight"),
    [(FakeKernel, 2 * LARGE, 4, 5), (UncountableKernel, LARGE, 2 + ENDPOINTS + 2, 2 + ENDPOINTS + 2)],
)
def test_iptables_large_burst_is_split_into_several_transactions(
    make_kernel: type[FakeKernel], services: int, rules_per_service: int, weight: int
) -> None:
    """For chains in use, the maximum size of a transaction grows with the square root of the number of rules."""
    kernel = make_kernel()
    proxy = LoadedProxy(IptablesBackend(kernel, max_transaction_rules=services), services)
    begin = len(kernel.inputs)
    assert max(map(rules_in, kernel.inputs)) <= services + SERVICE_RULES
    proxy.sync_deltas(*(Upsert(endpoint_slice(number, last=20)) for number in range(services)))
    sizes = [rules_in(text) for text in kernel.inputs[begin:]]
    limit = INCREMENTAL_FACTOR * isqrt(rules_of(kernel))
    assert sum(sizes) == rules_per_service * services
    assert max(sizes) <= limit
    # The chains of old endpoints are deleted only after all other changes.
    assert max(text.count("\n-R") * (weight - 1) for text in kernel.inputs[begin:]) <= limit
    assert len(sizes) == math.ceil(weight * services / limit) > 1


@pytest.mark.parametrize("services", [SMALL, LARGE])
def test_iptables_service_change_rewrites_a_flat_dispatch_chain(services: int) -> None:
    kernel, proxy = iptables(services)
    proxy.sync_deltas(Upsert(endpoint_slice(services)))
    begin = len(kernel.inputs)
    proxy.sync_deltas(Upsert(service(services)))
    appended = [line for line in written(kernel, begin) if line.startswith("-A")]
    # The dispatch chain is rewritten. As in kube-proxy, its last rule jumps to the NodePorts.
    assert len(appended) == (services + 1 + 1) + SERVICE_RULES
    begin = len(kernel.inputs)
    proxy.sync_deltas(Delete(Service, "ns", f"service-{services}"))
    assert len([line for line in written(kernel, begin) if line.startswith("-A")]) == services + 1


def test_iptables_service_change_rewrites_few_rules_of_a_split_dispatch_chain() -> None:
    kernel, proxy = iptables(SPLIT)
    proxy.sync_deltas(Upsert(endpoint_slice(SPLIT)))
    begin = len(kernel.inputs)
    proxy.sync_deltas(Upsert(service(SPLIT)))
    proxy.sync_deltas(Delete(Service, "ns", f"service-{SPLIT}"))
    shared = len([line for line in written(kernel, begin) if line.startswith(("-A", "-I", "-D"))]) - SERVICE_RULES
    assert shared <= 2 * MAX_SHARD_RULES


# nftables


def nftables(services: int) -> tuple[FakeTable, LoadedProxy]:
    kernel = FakeTable(Family.IPV4)
    return kernel, LoadedProxy(NftablesBackend(kernel), services)


def elements_of(kernel: FakeTable) -> int:
    assert kernel.table is not None
    return sum(len(set_.elements) for set_ in kernel.table.sets.values())


def chains_of(kernel: FakeTable) -> dict[str, int]:
    assert kernel.table is not None
    return {name: len(chain.rules) for name, chain in kernel.table.chains.items()}


def elements_in(commits: list[Transaction]) -> Iterator[int]:
    for change in commits:
        assert (change.added_rules, change.added_chains, change.added_sets) == ([], [], []), "only elements may change"
        yield sum(map(len, change.deleted_elements.values())) + sum(map(len, change.all_added_elements().values()))


def test_nftables_elements_per_service() -> None:
    kernels = {services: nftables(services)[0] for services in (1, SMALL, LARGE)}
    # One for the ClusterIP, one for the frontend, and one per endpoint.
    elements_per_service = 1 + 1 + ENDPOINTS
    assert {services: elements_of(kernel) for services, kernel in kernels.items()} == {
        services: services * elements_per_service for services in kernels
    }
    assert chains_of(kernels[1]) == chains_of(kernels[SMALL]) == chains_of(kernels[LARGE])


@pytest.mark.parametrize("services", [SMALL, LARGE])
def test_nftables_endpoint_change_cost_does_not_depend_on_cluster_size(services: int) -> None:
    kernel, proxy = nftables(services)
    begin = len(kernel.commits)
    proxy.sync_deltas(Upsert(endpoint_slice(services // 2, last=20)))
    assert list(elements_in(kernel.commits[begin:])) == [1 + 1]
    assert kernel.reads == 1


@pytest.mark.parametrize("services", [SMALL, LARGE])
def test_nftables_service_change_cost_does_not_depend_on_cluster_size(services: int) -> None:
    kernel, proxy = nftables(services)
    proxy.sync_deltas(Upsert(endpoint_slice(services)))
    begin = len(kernel.commits)
    proxy.sync_deltas(Upsert(service(services)))
    proxy.sync_deltas(Delete(Service, "ns", f"service-{services}"))
    assert list(elements_in(kernel.commits[begin:])) == [1 + 1 + ENDPOINTS] * 2
    assert kernel.reads == 1
