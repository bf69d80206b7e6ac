"""A sync in nftables mode reads and writes as little as possible; Services share elements without conflicts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from msgspec.structs import replace

from kproxy.host.netlink_message import attributes
from kproxy.host.nf_tables_constants import NFTA_SET_DESC
from kproxy.model.types import EndpointPort, Service, ServicePort
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesPrinter
from kproxy.nftables.comments import MAX_COMMENT_LENGTH
from kproxy.nftables.elements import endpoint_key, hairpin_key, pack_address, service_key
from kproxy.nftables.encode import TransactionEncoder
from kproxy.nftables.ruleset import KeyField, NftSet
from kproxy.nftables.transaction import Transaction
from tests.inprocess import SingleFamilyProxy
from tests.unit.nftables_proxy import (
    CONTEXT,
    FIRST,
    IPV4,
    NftablesProxy,
    endpoint_slice,
    nonempty_fields,
    service,
    synced_proxy,
)


def element_counts(transaction: Transaction) -> tuple[int, int]:
    """Return how many elements a transaction deletes and adds."""
    added = transaction.all_added_elements()
    return sum(map(len, transaction.deleted_elements.values())), sum(map(len, added.values()))


# Amounts read and written


@pytest.mark.parametrize(
    ("numbers", "deleted", "added"),
    [
        ((*range(101, 110), 120), 1, 1),
        (range(101, 112), 0, 1),
        (range(101, 110), 1, 0),
        ((101, 102, 120, *range(104, 111)), 8, 8),
        (range(102, 111), 10, 9),
    ],
    ids=["last endpoint replaced", "one added", "last removed", "third replaced", "first removed"],
)
def test_endpoint_change_takes_few_elements_and_at_most_two_messages(
    numbers: Iterable[int], deleted: int, added: int
) -> None:
    proxy = synced_proxy(10)
    reads = proxy.kernel.reads
    proxy.put(endpoint_slice("web", numbers)).sync()
    assert proxy.kernel.reads == reads
    transaction = proxy.kernel.commits[-1]
    assert element_counts(transaction) == (deleted, added)
    assert nonempty_fields(transaction) <= {"deleted_elements", "added_elements"}
    assert len(list(TransactionEncoder(IPV4).encode(transaction))) == (deleted > 0) + (added > 0)
    assert proxy.kernel.table == proxy.table_of_first_sync()


def test_verdict_and_chains_change_only_when_the_chain_capacity_does() -> None:
    proxy = synced_proxy(9)
    for count in (10, 11, 12, 9):
        (transaction,) = proxy.put(endpoint_slice("web", range(FIRST, FIRST + count))).checked_sync()
        assert nonempty_fields(transaction) <= {"deleted_elements", "added_elements"}
        assert names.SERVICE_IPS not in transaction.deleted_elements | transaction.added_elements
    # The new chain needs a transaction of its own, before the verdict: otherwise, packets in flight would find the
    # chain empty.
    new_chains, transaction = proxy.put(endpoint_slice("web", range(FIRST, FIRST + 13))).checked_sync()
    assert nonempty_fields(new_chains) == {"added_chains", "added_rules"}
    assert [chain.name for chain in new_chains.added_chains] == ["service-any-16"]
    assert not transaction.added_chains
    assert transaction.deleted_chains == ["service-any-12"]
    assert len(transaction.added_elements[names.SERVICE_IPS]) == 1


def test_sync_without_changes_reads_and_writes_nothing() -> None:
    proxy = synced_proxy()
    reads = proxy.kernel.reads
    proxy.put(service("web", "10.96.0.1"), endpoint_slice("none", [1])).sync()
    assert (len(proxy.kernel.commits), proxy.kernel.reads) == (1, reads)


def test_restart_reads_the_table_once_and_rewrites_no_element() -> None:
    proxy = synced_proxy()
    reads = proxy.kernel.reads
    proxy.restart_process()
    proxy.sync()
    assert proxy.kernel.reads == reads + 1
    assert nonempty_fields(proxy.kernel.commits[-1]) == {"flushed_chains", "added_rules"}


def test_restart_replaces_endpoints_behind_a_missing_one() -> None:
    """As after another process has deleted one endpoint and changed the next one while kproxy was not running."""
    proxy = synced_proxy()
    elements = proxy.table.sets["service-endpoints"].elements
    keys = [endpoint_key(service_key("10.96.0.1", "TCP", 80), index) for index in range(3)]
    del elements[keys[1]]
    elements[keys[2]] = replace(elements[keys[2]], value=elements[keys[0]].value)
    proxy.restart_process()
    assert len(proxy.checked_sync()) == 1


def test_changed_affinity_timeout_recreates_the_affinity_sets() -> None:
    proxy = NftablesProxy()
    proxy.put(service("web", "10.96.0.1", affinity=60), endpoint_slice("web", range(FIRST, FIRST + 2))).checked_sync()
    (transaction,) = proxy.put(service("web", "10.96.0.1", affinity=61)).checked_sync()
    assert sorted(transaction.deleted_sets) == sorted(nft_set.name for nft_set in transaction.added_sets)
    assert [nft_set.timeout for nft_set in transaction.added_sets] == [61, 61]


def test_affinity_sets_of_remaining_endpoints_are_kept() -> None:
    proxy = NftablesProxy()
    proxy.put(service("web", "10.96.0.1", affinity=60), endpoint_slice("web", (101, 102))).checked_sync()
    new_chains, transaction = proxy.put(endpoint_slice("web", (102, 103))).checked_sync()
    assert [nft_set.name.rpartition("__")[2] for nft_set in new_chains.added_sets] == ["10.244.0.103/8080"]
    assert [name.rpartition("__")[2] for name in transaction.deleted_sets] == ["10.244.0.101/8080"]
    assert transaction.added_sets == []


def test_services_without_affinity_add_no_chains_sets_or_rules() -> None:
    rules = []
    for count in (1, 300):
        proxy = NftablesProxy()
        for number in range(count):
            name, ports = f"s{number}", (ServicePort("", 80, "TCP", 30000 + number),)
            proxy.put(service(name, f"10.96.{number // 250}.{number % 250 + 1}", *ports))
            proxy.put(endpoint_slice(name, range(FIRST, FIRST + 3)))
        proxy.checked_sync()
        rules.append({name: chain.rules for name, chain in proxy.table.chains.items()})
        assert len(proxy.table.sets[names.SERVICE_IPS].elements) == count
        assert len(proxy.table.sets) == 13
    assert rules[0] == rules[1]


def test_batches_never_split_a_service() -> None:
    proxy = NftablesProxy(batch_frontends=2)
    ports = tuple(ServicePort(f"p{number}", number, "TCP") for number in range(1, 6))
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")):
        proxy.put(service(name, ip, *ports if name == "b" else ports[:1]))
    transactions = proxy.checked_sync()
    added = [len(transaction.added_elements.get(names.NO_ENDPOINT_SERVICES, ())) for transaction in transactions]
    assert added == [6, 1]


# Elements that several Services share


def test_hairpin_element_stays_until_no_service_has_the_endpoint() -> None:
    proxy = NftablesProxy()
    for name, ip in (("a", "10.96.0.1"), ("b", "10.96.0.2")):
        proxy.put(service(name, ip), endpoint_slice(name, [1], node="node-1"))
    hairpin = hairpin_key("10.244.0.1:8080", "TCP")
    proxy.checked_sync()
    assert list(proxy.table.sets[names.HAIRPINS].elements) == [hairpin]
    proxy.put(endpoint_slice("a", [1], node="node-2"))
    assert [nonempty_fields(transaction) for transaction in proxy.checked_sync()] == []
    assert list(proxy.table.sets[names.HAIRPINS].elements) == [hairpin]
    proxy.delete(Service, "b").checked_sync()
    assert not proxy.table.sets[names.HAIRPINS].elements


def test_ports_of_a_service_share_its_cluster_ip_and_hairpin_elements() -> None:
    ports = (ServicePort("x", 80, "TCP"), ServicePort("y", 81, "TCP"))
    endpoint_ports = (EndpointPort("x", 8080, "TCP"), EndpointPort("y", 8080, "TCP"))
    proxy = NftablesProxy()
    proxy.put(service("web", "10.96.0.1", *ports), endpoint_slice("web", [1], *endpoint_ports, node="node-1"))
    proxy.checked_sync()
    proxy.put(service("web", "10.96.0.1", ports[1])).checked_sync()
    assert list(proxy.table.sets[names.CLUSTER_IPS].elements) == [pack_address("10.96.0.1")]
    assert len(proxy.table.sets[names.HAIRPINS].elements) == 1
    proxy.delete(Service, "web").checked_sync()
    assert not proxy.table.sets[names.CLUSTER_IPS].elements
    assert not proxy.table.sets[names.HAIRPINS].elements


@pytest.mark.parametrize("claimant_first", [True, False])
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_cluster_ip_stays_with_its_service_if_another_claims_it(claimant_first: bool, batch_frontends: int) -> None:
    owner = service("web", "10.96.0.1")
    claimant = replace(service("a-claimant", "10.96.0.9"), external_ips=("10.96.0.1",))
    proxy = NftablesProxy(batch_frontends=batch_frontends)
    proxy.put(*(claimant, owner) if claimant_first else (owner, claimant))
    proxy.checked_sync()
    key = service_key("10.96.0.1", "TCP", 80)
    assert proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements[key].comment == "ns/web"
    proxy.delete(Service, "web").checked_sync()
    assert proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements[key].comment == "ns/a-claimant"


# Names and sizes


def test_long_names_are_truncated_and_stay_distinct() -> None:
    truncated_names = []
    for port_name in ("p" * 14 + "x", "p" * 14 + "y"):
        long = Service("n" * 63, "s" * 63, ("10.96.0.1",), (ServicePort(port_name, 80, "TCP"),), affinity_seconds=60)
        endpoints = replace(endpoint_slice("x", [1], EndpointPort(port_name, 8080, "TCP")), service=long.key)
        printed: list[str] = []
        SingleFamilyProxy(NftablesPrinter(IPV4, printed.append), CONTEXT).sync(long, endpoints)
        text = "".join(printed)
        objects = {name for keyword, name in pairwise(text.split()) if keyword in {"chain", "set"}}
        assert all(len(name) <= names.MAX_NAME_LENGTH for name in objects)
        comments = [line.split('"')[1] for line in text.splitlines() if "comment" in line]
        assert max(map(len, comments)) == MAX_COMMENT_LENGTH
        truncated_names.append({name for name in objects if "..." in name})
    assert len(truncated_names[0]) == len(truncated_names[1]) == 3
    assert not truncated_names[0] & truncated_names[1]


def test_affinity_sets_have_no_size() -> None:
    """With a size, the kernel would allocate memory for all elements at once: 2 MB for each endpoint."""
    affinity_set = NftSet("affinity-A", (KeyField.SOURCE,), timeout=60)
    (message,) = TransactionEncoder(IPV4).encode(Transaction(added_sets=[affinity_set]))
    assert NFTA_SET_DESC not in attributes(message.payload, 4, len(message.payload))
