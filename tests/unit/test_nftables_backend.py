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
from kproxy.model.delta import Delete, Upsert
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesBackend, NftablesPrinter
from kproxy.nftables.elements import hairpin_key, pack_address, service_key
from kproxy.nftables.encode import TransactionEncoder
from kproxy.nftables.ruleset import KeyField, NftSet
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family import FamilySync
from tests.faketable import FakeTable, TableState

IPV4 = Family.IPV4
CONTEXT = Context(IPV4, "node-1", node_port_addresses=("10.99.0.2",))


def service(name: str, ip: str, *ports: ServicePort, affinity: int = 0) -> Service:
    return Service("ns", name, (ip,), ports or (ServicePort("", 80, "TCP"),), affinity_seconds=affinity)


def endpoints(name: str, numbers: Iterable[int], *ports: EndpointPort, node: str = "node-9") -> EndpointSlice:
    found = tuple(Endpoint(str(ip_address("10.244.0.0") + number), node) for number in numbers)
    return EndpointSlice("ns", f"{name}-1", f"ns/{name}", IPV4, found, ports or (EndpointPort("", 8080, "TCP"),))


class Cluster:
    """A store and one family's backend on a table in memory."""

    def __init__(self, *, batch_frontends: int = 2_000, kernel: FakeTable | None = None) -> None:
        self.kernel = kernel or FakeTable(IPV4)
        self.store = Store("node-1")
        self.family = self.start(batch_frontends)

    def start(self, batch_frontends: int = 2_000) -> FamilySync:
        backend = NftablesBackend(self.kernel, batch_frontends=batch_frontends)
        self.family = FamilySync(backend, lambda _: CONTEXT, large_cluster_endpoints=math.inf)
        return self.family

    def put(self, *objects: Service | EndpointSlice) -> Cluster:
        for each in objects:
            self.family.note(self.store.apply(Upsert(each)))
        return self

    def delete(self, name: str) -> Cluster:
        self.family.note(self.store.apply(Delete(Service, "ns", name)))
        return self

    def sync(self) -> list[Transaction]:
        """Return what was written; make sure that it adds up to what a start from nothing writes."""
        before = len(self.kernel.commits)
        self.family.sync(self.store)
        assert self.kernel.table == self.fresh()
        assert self.family.verify()
        return self.kernel.commits[before:]

    def fresh(self) -> TableState | None:
        kernel = FakeTable(IPV4)
        FamilySync(NftablesBackend(kernel), lambda _: CONTEXT, large_cluster_endpoints=math.inf).sync(self.store)
        return kernel.table

    @property
    def table(self) -> TableState:
        assert self.kernel.table is not None
        return self.kernel.table


FIRST = 101
"""Endpoints from here on, below 200, are in the same order as numbers and as text."""


def web(count: int = 10) -> Cluster:
    cluster = Cluster().put(service("web", "10.96.0.1"), endpoints("web", range(FIRST, FIRST + count)))
    cluster.sync()
    return cluster


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
    cluster = web(10)
    reads = cluster.kernel.reads
    cluster.put(endpoints("web", after)).family.sync(cluster.store)
    assert cluster.kernel.reads == reads
    change = cluster.kernel.commits[-1]
    assert elements(change) == (removed, added)
    assert written(change) <= {"deleted_elements", "added_elements"}
    assert len(list(TransactionEncoder(IPV4).encode(change))) == (removed > 0) + (added > 0)
    assert cluster.kernel.table == cluster.fresh()


def test_no_verdict_and_no_chain_changes_while_a_size_lasts() -> None:
    cluster = web(9)
    for count in (10, 11, 12, 9):
        (change,) = cluster.put(endpoints("web", range(FIRST, FIRST + count))).sync()
        assert written(change) <= {"deleted_elements", "added_elements"}
        assert names.SERVICE_IPS not in change.deleted_elements | change.added_elements
    new, change = cluster.put(endpoints("web", range(FIRST, FIRST + 13))).sync()
    # A verdict must not come at once with its chain: a packet under way would find the chain empty.
    assert written(new) == {"added_chains", "added_rules"}
    assert [chain.name for chain in new.added_chains] == ["service-any-16"]
    assert not change.added_chains
    assert change.deleted_chains == ["service-any-12"]
    assert len(change.added_elements[names.SERVICE_IPS]) == 1


def test_nothing_to_change_is_nothing_written_and_nothing_read() -> None:
    cluster = web()
    reads = cluster.kernel.reads
    cluster.put(service("web", "10.96.0.1"), endpoints("none", [1])).family.sync(cluster.store)
    assert (len(cluster.kernel.commits), cluster.kernel.reads) == (1, reads)


def test_a_start_reads_the_table_once_and_writes_no_element_anew() -> None:
    cluster = web()
    reads = cluster.kernel.reads
    cluster.start()
    cluster.family.sync(cluster.store)
    assert cluster.kernel.reads == reads + 1
    assert written(cluster.kernel.commits[-1]) == {"flushed_chains", "added_rules"}


def test_clients_are_remembered_anew_when_the_time_for_it_changes() -> None:
    cluster = Cluster().put(service("web", "10.96.0.1", affinity=60), endpoints("web", range(FIRST, FIRST + 2)))
    cluster.sync()
    (change,) = cluster.put(service("web", "10.96.0.1", affinity=61)).sync()
    assert sorted(change.deleted_sets) == sorted(found.name for found in change.added_sets)
    assert [found.timeout for found in change.added_sets] == [61, 61]


def test_clients_stay_with_the_endpoints_that_stay() -> None:
    cluster = Cluster().put(service("web", "10.96.0.1", affinity=60), endpoints("web", (101, 102)))
    cluster.sync()
    new, change = cluster.put(endpoints("web", (102, 103))).sync()
    assert [found.name.rpartition("__")[2] for found in new.added_sets] == ["10.244.0.103/8080"]
    assert [name.rpartition("__")[2] for name in change.deleted_sets] == ["10.244.0.101/8080"]
    assert change.added_sets == []


def test_plain_services_have_no_chains_sets_or_rules_of_their_own() -> None:
    made = []
    for count in (1, 300):
        cluster = Cluster()
        for number in range(count):
            name, ports = f"s{number}", (ServicePort("", 80, "TCP", 30000 + number),)
            cluster.put(service(name, f"10.96.{number // 250}.{number % 250 + 1}", *ports))
            cluster.put(endpoints(name, range(FIRST, FIRST + 3)))
        cluster.sync()
        made.append({name: chain.rules for name, chain in cluster.table.chains.items()})
        assert len(cluster.table.sets[names.SERVICE_IPS].elements) == count
        assert len(cluster.table.sets) == 12
    assert made[0] == made[1]


def test_batches_never_split_a_service() -> None:
    cluster = Cluster(batch_frontends=2)
    ports = tuple(ServicePort(f"p{number}", number, "TCP") for number in range(1, 6))
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")):
        cluster.put(service(name, ip, *ports if name == "b" else ports[:1]))
    added = [len(change.added_elements.get(names.NO_ENDPOINT_SERVICES, ())) for change in cluster.sync()]
    assert added == [6, 1]


# Who shares what


def test_an_endpoint_on_this_node_that_two_services_share_stays_while_one_of_them_has_it() -> None:
    cluster = Cluster()
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2")):
        cluster.put(service(name, ip), endpoints(name, [1], node="node-1"))
    hairpin = hairpin_key("10.244.0.1:8080", "TCP")
    cluster.sync()
    assert list(cluster.table.sets[names.HAIRPINS].elements) == [hairpin]
    cluster.put(endpoints("a", [1], node="node-2"))
    assert [written(change) for change in cluster.sync()] == []
    assert list(cluster.table.sets[names.HAIRPINS].elements) == [hairpin]
    cluster.delete("b").sync()
    assert not cluster.table.sets[names.HAIRPINS].elements


def test_two_ports_of_a_service_share_its_cluster_ip_and_endpoint() -> None:
    ports = (ServicePort("x", 80, "TCP"), ServicePort("y", 81, "TCP"))
    targets = (EndpointPort("x", 8080, "TCP"), EndpointPort("y", 8080, "TCP"))
    cluster = Cluster().put(service("web", "10.96.0.1", *ports), endpoints("web", [1], *targets, node="node-1"))
    cluster.sync()
    cluster.put(service("web", "10.96.0.1", ports[1])).sync()
    assert list(cluster.table.sets[names.CLUSTER_IPS].elements) == [pack_address("10.96.0.1")]
    assert len(cluster.table.sets[names.HAIRPINS].elements) == 1
    cluster.delete("web").sync()
    assert not cluster.table.sets[names.CLUSTER_IPS].elements
    assert not cluster.table.sets[names.HAIRPINS].elements


@pytest.mark.parametrize("thief_first", [True, False])
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_a_cluster_ip_stays_with_its_service_whoever_claims_it(thief_first: bool, batch_frontends: int) -> None:
    owner, thief = service("web", "10.96.0.1"), service("a-thief", "10.96.0.9")
    thief = replace(thief, external_ips=("10.96.0.1",))
    cluster = Cluster(batch_frontends=batch_frontends)
    cluster.put(*(thief, owner) if thief_first else (owner, thief))
    cluster.sync()
    key = service_key("10.96.0.1", "TCP", 80)
    assert cluster.table.sets[names.NO_ENDPOINT_SERVICES].elements[key].comment == "ns/web"
    cluster.delete("web").sync()
    assert cluster.table.sets[names.NO_ENDPOINT_SERVICES].elements[key].comment == "ns/a-thief"


def test_names_are_cut_where_they_are_too_long_and_stay_apart() -> None:
    long = [Service("n" * 63, "s" * 63, ("10.96.0.1",), (ServicePort("p" * 14 + end, 80, "TCP"),)) for end in "xy"]
    texts = []
    for found in long:
        pages: list[str] = []
        store = Store("node-1")
        store.apply(Upsert(replace(found, affinity_seconds=60)))
        port = found.ports[0]
        slices = replace(endpoints("x", [1], EndpointPort(port.name, 8080, "TCP")), service=found.key)
        store.apply(Upsert(slices))
        FamilySync(NftablesPrinter(IPV4, pages.append), lambda _: CONTEXT).sync(store)
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
