"""What a sync writes and what it reads, for whom, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import pairwise

import pytest
from msgspec.structs import replace

from kproxy.host.netlink_message import attributes
from kproxy.model.context import Context
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesBackend, NftablesPrinter
from kproxy.nftables.elements import hairpin_key, pack_address, service_key
from kproxy.nftables.encode import TransactionEncoder
from kproxy.nftables.ruleset import KeyField, NftSet
from kproxy.nftables.transaction import Transaction
from tests.faketable import FakeTable, TableState
from tests.inprocess import SingleFamilyProxy

IPV4 = Family.IPV4
CONTEXT = Context(IPV4, "node-1", node_port_addresses=("10.99.0.2",))


def service(name: str, ip: str, *ports: ServicePort, affinity: int = 0) -> Service:
    return Service("ns", name, (ip,), ports or (ServicePort("", 80, "TCP"),), affinity_seconds=affinity)


def endpoints(name: str, numbers: Iterable[int], *ports: EndpointPort, node: str = "node-9") -> EndpointSlice:
    found = tuple(Endpoint(str(ip_address("10.244.0.0") + number), node) for number in numbers)
    return EndpointSlice("ns", f"{name}-1", f"ns/{name}", IPV4, found, ports or (EndpointPort("", 8080, "TCP"),))


class NftablesProxy(SingleFamilyProxy):
    """One family in nftables mode on a table in memory."""

    def __init__(self, *, batch_frontends: int = 2_000, kernel: FakeTable | None = None) -> None:
        self.kernel = kernel or FakeTable(IPV4)
        super().__init__(self._backend(batch_frontends), CONTEXT, large_cluster_endpoints=math.inf)

    def _backend(self, batch_frontends: int) -> NftablesBackend:
        return NftablesBackend(self.kernel, batch_frontends=batch_frontends)

    def restart_batching(self, batch_frontends: int = 2_000) -> None:
        """Continue as a new process on the same table."""
        self.restart(self._backend(batch_frontends))

    def checked_sync(self) -> list[Transaction]:
        """Return what a sync wrote, after checking that the result is what a first sync would write."""
        before = len(self.kernel.commits)
        self.sync()
        assert self.kernel.table == self.fresh()
        assert self.verify()
        return self.kernel.commits[before:]

    def fresh(self) -> TableState | None:
        """Return the table as a first sync writes it."""
        kernel = FakeTable(IPV4)
        backend = NftablesBackend(kernel)
        SingleFamilyProxy(backend, CONTEXT, store=self.store, large_cluster_endpoints=math.inf).sync()
        return kernel.table

    @property
    def table(self) -> TableState:
        assert self.kernel.table is not None
        return self.kernel.table


FIRST = 101
"""Endpoints from here on, below 200, are in the same order as numbers and as text."""


def web(count: int = 10) -> NftablesProxy:
    proxy = NftablesProxy().put(service("web", "10.96.0.1"), endpoints("web", range(FIRST, FIRST + count)))
    proxy.checked_sync()
    return proxy


def elements(change: Transaction) -> tuple[int, int]:
    """How many elements a transaction removes and adds."""
    return sum(map(len, change.deleted_elements.values())), sum(map(len, change.all_added_elements().values()))


def written(change: Transaction) -> set[str]:
    """The parts of a transaction that say something."""
    return {name for name in change.__struct_fields__ if getattr(change, name)}


# Counts


@pytest.mark.parametrize(
    ("after", "removed", "added"),
    [
        ((*range(101, 110), 120), 1, 1),
        (range(101, 112), 0, 1),
        (range(101, 110), 1, 0),
        ((101, 102, 120, *range(104, 111)), 8, 8),
        (range(102, 111), 10, 9),
    ],
    ids=["last moves", "one more", "one less", "another moves", "first goes"],
)
def test_a_changed_endpoint_is_a_few_elements_and_two_messages(after: Iterable[int], removed: int, added: int) -> None:
    proxy = web(10)
    reads = proxy.kernel.reads
    proxy.put(endpoints("web", after)).sync()
    assert proxy.kernel.reads == reads
    change = proxy.kernel.commits[-1]
    assert elements(change) == (removed, added)
    assert written(change) <= {"deleted_elements", "added_elements"}
    assert len(list(TransactionEncoder(IPV4).encode(change))) == (removed > 0) + (added > 0)
    assert proxy.kernel.table == proxy.fresh()


def test_no_verdict_and_no_chain_changes_while_a_size_lasts() -> None:
    proxy = web(9)
    for count in (10, 11, 12, 9):
        (change,) = proxy.put(endpoints("web", range(FIRST, FIRST + count))).checked_sync()
        assert written(change) <= {"deleted_elements", "added_elements"}
        assert names.SERVICE_IPS not in change.deleted_elements | change.added_elements
    new, change = proxy.put(endpoints("web", range(FIRST, FIRST + 13))).checked_sync()
    # A verdict must not come at once with its chain: a packet under way would find the chain empty.
    assert written(new) == {"added_chains", "added_rules"}
    assert [chain.name for chain in new.added_chains] == ["service-any-16"]
    assert not change.added_chains
    assert change.deleted_chains == ["service-any-12"]
    assert len(change.added_elements[names.SERVICE_IPS]) == 1


def test_nothing_to_change_is_nothing_written_and_nothing_read() -> None:
    proxy = web()
    reads = proxy.kernel.reads
    proxy.put(service("web", "10.96.0.1"), endpoints("none", [1])).sync()
    assert (len(proxy.kernel.commits), proxy.kernel.reads) == (1, reads)


def test_a_start_reads_the_table_once_and_writes_no_element_anew() -> None:
    proxy = web()
    reads = proxy.kernel.reads
    proxy.restart_batching()
    proxy.sync()
    assert proxy.kernel.reads == reads + 1
    assert written(proxy.kernel.commits[-1]) == {"flushed_chains", "added_rules"}


def test_clients_are_remembered_anew_when_the_time_for_it_changes() -> None:
    proxy = NftablesProxy().put(service("web", "10.96.0.1", affinity=60), endpoints("web", range(FIRST, FIRST + 2)))
    proxy.checked_sync()
    (change,) = proxy.put(service("web", "10.96.0.1", affinity=61)).checked_sync()
    assert sorted(change.deleted_sets) == sorted(found.name for found in change.added_sets)
    assert [found.timeout for found in change.added_sets] == [61, 61]


def test_clients_stay_with_the_endpoints_that_stay() -> None:
    proxy = NftablesProxy().put(service("web", "10.96.0.1", affinity=60), endpoints("web", (101, 102)))
    proxy.checked_sync()
    new, change = proxy.put(endpoints("web", (102, 103))).checked_sync()
    assert [found.name.rpartition("__")[2] for found in new.added_sets] == ["10.244.0.103/8080"]
    assert [name.rpartition("__")[2] for name in change.deleted_sets] == ["10.244.0.101/8080"]
    assert change.added_sets == []


def test_plain_services_have_no_chains_sets_or_rules_of_their_own() -> None:
    made = []
    for count in (1, 300):
        proxy = NftablesProxy()
        for number in range(count):
            name, ports = f"s{number}", (ServicePort("", 80, "TCP", 30000 + number),)
            proxy.put(service(name, f"10.96.{number // 250}.{number % 250 + 1}", *ports))
            proxy.put(endpoints(name, range(FIRST, FIRST + 3)))
        proxy.checked_sync()
        made.append({name: chain.rules for name, chain in proxy.table.chains.items()})
        assert len(proxy.table.sets[names.SERVICE_IPS].elements) == count
        assert len(proxy.table.sets) == 12
    assert made[0] == made[1]


def test_batches_never_split_a_service() -> None:
    proxy = NftablesProxy(batch_frontends=2)
    ports = tuple(ServicePort(f"p{number}", number, "TCP") for number in range(1, 6))
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")):
        proxy.put(service(name, ip, *ports if name == "b" else ports[:1]))
    added = [len(change.added_elements.get(names.NO_ENDPOINT_SERVICES, ())) for change in proxy.checked_sync()]
    assert added == [6, 1]


# Who shares what


def test_an_endpoint_on_this_node_that_two_services_share_stays_while_one_of_them_has_it() -> None:
    proxy = NftablesProxy()
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2")):
        proxy.put(service(name, ip), endpoints(name, [1], node="node-1"))
    hairpin = hairpin_key("10.244.0.1:8080", "TCP")
    proxy.checked_sync()
    assert list(proxy.table.sets[names.HAIRPINS].elements) == [hairpin]
    proxy.put(endpoints("a", [1], node="node-2"))
    assert [written(change) for change in proxy.checked_sync()] == []
    assert list(proxy.table.sets[names.HAIRPINS].elements) == [hairpin]
    proxy.delete(Service, "b").checked_sync()
    assert not proxy.table.sets[names.HAIRPINS].elements


def test_two_ports_of_a_service_share_its_cluster_ip_and_endpoint() -> None:
    ports = (ServicePort("x", 80, "TCP"), ServicePort("y", 81, "TCP"))
    targets = (EndpointPort("x", 8080, "TCP"), EndpointPort("y", 8080, "TCP"))
    proxy = NftablesProxy().put(service("web", "10.96.0.1", *ports), endpoints("web", [1], *targets, node="node-1"))
    proxy.checked_sync()
    proxy.put(service("web", "10.96.0.1", ports[1])).checked_sync()
    assert list(proxy.table.sets[names.CLUSTER_IPS].elements) == [pack_address("10.96.0.1")]
    assert len(proxy.table.sets[names.HAIRPINS].elements) == 1
    proxy.delete(Service, "web").checked_sync()
    assert not proxy.table.sets[names.CLUSTER_IPS].elements
    assert not proxy.table.sets[names.HAIRPINS].elements


@pytest.mark.parametrize("thief_first", [True, False])
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_a_cluster_ip_stays_with_its_service_whoever_claims_it(thief_first: bool, batch_frontends: int) -> None:
    owner, thief = service("web", "10.96.0.1"), service("a-thief", "10.96.0.9")
    thief = replace(thief, external_ips=("10.96.0.1",))
    proxy = NftablesProxy(batch_frontends=batch_frontends)
    proxy.put(*(thief, owner) if thief_first else (owner, thief))
    proxy.checked_sync()
    key = service_key("10.96.0.1", "TCP", 80)
    assert proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements[key].comment == "ns/web"
    proxy.delete(Service, "web").checked_sync()
    assert proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements[key].comment == "ns/a-thief"


def test_names_are_cut_where_they_are_too_long_and_stay_apart() -> None:
    long = [Service("n" * 63, "s" * 63, ("10.96.0.1",), (ServicePort("p" * 14 + end, 80, "TCP"),)) for end in "xy"]
    texts = []
    for found in long:
        pages: list[str] = []
        port = found.ports[0]
        slices = replace(endpoints("x", [1], EndpointPort(port.name, 8080, "TCP")), service=found.key)
        SingleFamilyProxy(NftablesPrinter(IPV4, pages.append), CONTEXT).sync(
            replace(found, affinity_seconds=60), slices
        )
        words = "".join(pages).split()
        texts.append({word for before, word in pairwise(words) if before in {"chain", "set"}})
        assert all(len(word) <= names.MAX_NAME_LENGTH for word in texts[-1])
        comments = [line.split('"')[1] for line in "".join(pages).splitlines() if "comment" in line]
        assert max(map(len, comments)) == names.MAX_COMMENT_LENGTH
    own = [{word for word in words if "..." in word} for words in texts]
    assert len(own[0]) == len(own[1]) == 3
    assert not own[0] & own[1]


def test_no_room_is_set_aside_for_clients_to_come() -> None:
    """Told a size, the kernel takes 2 MB for each endpoint of a Service with affinity."""
    found = NftSet("affinity-A", (KeyField.SOURCE,), timeout=60)
    (message,) = TransactionEncoder(IPV4).encode(Transaction(added_sets=[found]))
    assert 9 not in attributes(message.payload, 4, len(message.payload))
