"""Errors name the object that the kernel rejected, and drift of the table is detected and repaired."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from ipaddress import ip_address
from typing import Self

import pytest

from kproxy.host.netlink import MAX_REJECTIONS
from kproxy.model.context import Context
from kproxy.model.delta import Upsert
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesBackend, NftablesPrinter
from kproxy.nftables.base_table import SERVICE_KEY, SETS
from kproxy.nftables.elements import DROP, EndpointElements, SetElement, endpoint_elements, endpoint_key, service_key
from kproxy.nftables.encode import TransactionEncoder
from kproxy.nftables.kernel import (
    Commit,
    GenerationChangedError,
    NetlinkCommit,
    NftCommit,
    NftTable,
    OwnGenerations,
    TableError,
)
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.ruleset import Drop, Goto, KeyField, Lookup, NftChain, NftHook, NftSet, rule
from kproxy.nftables.transaction import Transaction
from tests.inprocess import SingleFamilyProxy
from tests.kernel.test_nftables_commit import dump_table, normalized
from tests.kernel.test_nftables_restart import RecordingTable, without_comments
from tests.lab.namespace import Namespace

IPV4 = Family.IPV4
KEY = {Family.IPV4: service_key("192.0.2.1", "TCP", 80), Family.IPV6: service_key("2001:db8::1", "TCP", 80)}
KEY_TEXT = {Family.IPV4: "192.0.2.1 . tcp . 80", Family.IPV6: "2001:db8::1 . tcp . 80"}
VALUE_SIZE = {Family.IPV4: 8, Family.IPV6: 20}
MANY = 5_000
SIZES = {Family.IPV4: 4, Family.IPV6: 16}


def values(family: Family, count: int) -> bytes:
    return b"".join(number.to_bytes(VALUE_SIZE[family] - 4, "big") + b"\0\x50\0\0" for number in range(1, count + 1))


def pool(family: Family, count: int) -> list[EndpointElements]:
    return list(endpoint_elements(KEY[family], values(family, count), VALUE_SIZE[family]))


def table(family: Family) -> Transaction:
    chains = [NftChain("a", ()), NftChain("b", ())]
    change = Transaction(create_table=True, added_sets=list(SETS), added_chains=chains)
    change.add_element(names.SERVICE_IPS, SetElement(KEY[family], "a", "ns/web:http"))
    change.add_element(names.SERVICE_ENDPOINTS, SetElement(endpoint_key(KEY[family], 3_210), bytes(VALUE_SIZE[family])))
    return change


def rejection(namespaces: Callable[[], Namespace], family: Family, change: Transaction) -> str:
    """Return the error of a change to `table` that the kernel must reject."""
    node, commit = namespaces(), NetlinkCommit(family)
    node.call(lambda: commit(table(family)))
    before = dump_table(node, family)
    with pytest.raises(TableError) as rejected:
        node.call(lambda: commit(change))
    assert dump_table(node, family) == before
    node.call(lambda: commit(Transaction(delete_table=True)))
    return str(rejected.value)


@pytest.mark.parametrize("family", Family)
def test_error_names_the_element_and_its_service(namespaces: Callable[[], Namespace], family: Family) -> None:
    other = service_key("192.0.2.9" if family is IPV4 else "2001:db8::9", "UDP", 53)
    change = Transaction()
    change.add_element(names.SERVICE_IPS, SetElement(other, DROP, "ns/dns:udp"))
    change.add_element(names.SERVICE_IPS, SetElement(KEY[family], "b", "ns/web:http"))
    error = rejection(namespaces, family, change)
    assert error == f"element {KEY_TEXT[family]} of service-ips of ns/web:http: File exists"
    change = Transaction()
    change.delete_element(names.SERVICE_IPS, SetElement(KEY[family], "a", "ns/web:http"))
    change.delete_element(names.SERVICE_IPS, SetElement(other, DROP, "ns/dns:udp"))
    error = rejection(namespaces, family, change)
    gone = f"{KEY_TEXT[family][:-12]}9 . udp . 53"
    assert error == f"element {gone} of service-ips of ns/dns:udp: No such file or directory"


@pytest.mark.parametrize("family", Family)
def test_error_names_one_endpoint_of_thousands(namespaces: Callable[[], Namespace], family: Family) -> None:
    error = rejection(namespaces, family, Transaction(added_endpoints={names.SERVICE_ENDPOINTS: pool(family, MANY)}))
    assert error == f"element {KEY_TEXT[family]} . 3210 of service-endpoints: File exists"


def test_error_names_the_rule_chain_or_set(namespaces: Callable[[], Namespace]) -> None:
    rules = NftChain("a", (rule(Drop()), rule(Goto("none")), rule(Goto("none"))))
    error = rejection(namespaces, IPV4, Transaction(added_rules=[rules]))
    assert error == "rule 2 of chain a: No such file or directory (and 1 more)"
    assert rejection(namespaces, IPV4, Transaction(flushed_chains=["none"])) == (
        "the rules of chain none: No such file or directory"
    )
    error = rejection(namespaces, IPV4, Transaction(deleted_chains=["a"]))
    assert error == "chain a: Device or resource busy"
    error = rejection(namespaces, IPV4, Transaction(deleted_sets=["none"]))
    assert error == "set none: No such file or directory"
    error = rejection(namespaces, IPV4, Transaction(added_sets=[NftSet(names.CLUSTER_IPS, SERVICE_KEY)]))
    assert error == "set cluster-ips: File exists"


def test_error_names_a_missing_table(namespaces: Callable[[], Namespace]) -> None:
    with pytest.raises(TableError, match=r"^table kube-proxy: No such file or directory$"):
        namespaces().call(lambda: NetlinkCommit(IPV4)(Transaction(delete_table=True)))


def test_loop_of_chains_is_an_error(namespaces: Callable[[], Namespace]) -> None:
    start = NftChain("start", (rule(Goto("a")),), hook=NftHook("filter", "input", 0))
    loop = [NftChain("a", (rule(Goto("b")),)), NftChain("b", (rule(Goto("a")),)), start]
    error = rejection(namespaces, IPV4, Transaction(added_chains=[start], added_rules=loop))
    assert error.endswith((": Too many links", ": Too many levels of symbolic links"))  # kernels differ


@pytest.mark.parametrize(("count", "more"), [(100, 99), (20_000, MAX_REJECTIONS - 1)])
def test_socket_overrun_by_errors_keeps_the_first_error_and_the_next_change(
    namespaces: Callable[[], Namespace], count: int, more: int
) -> None:
    node, commit = namespaces(), NetlinkCommit(IPV4)
    rejected_change = Transaction(added_rules=[NftChain("a", (rule(Drop()),) * count)])
    for _ in range(2):
        with pytest.raises(TableError, match=rf"^rule 1 of chain a: No such file or directory \(and {more} more\)$"):
            node.call(lambda: commit(rejected_change))
        node.call(lambda: commit(table(IPV4)))
        node.call(lambda: commit(Transaction(delete_table=True)))


def test_nft_error_is_one_line(namespaces: Callable[[], Namespace]) -> None:
    node, commit = namespaces(), NftCommit(IPV4)
    node.call(lambda: commit(table(IPV4)))
    with pytest.raises(TableError) as rejected:
        node.call(lambda: commit(Transaction(added_rules=[NftChain("a", (rule(Lookup((KeyField.SOURCE,), "none")),))])))
    assert str(rejected.value).startswith("nft: ")
    assert "No such file or directory" in str(rejected.value)
    assert "\n" not in str(rejected.value)


def test_missing_nft_is_an_error(namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TableError, match=r"^cannot run nft: No such file or directory$"):
        namespaces().call(lambda: NftCommit(IPV4)(table(IPV4)))


def test_transaction_of_an_outdated_generation_is_not_applied(namespaces: Callable[[], Namespace]) -> None:
    node, kernel = namespaces(), RecordingTable(IPV4)
    generation = node.call(kernel.generation)
    node.run(["nft", "add table ip others"])
    with pytest.raises(GenerationChangedError):
        node.call(lambda: kernel.commit(table(IPV4), generation))
    assert node.call(kernel.snapshot) is None
    node.call(lambda: kernel.commit(table(IPV4), generation + 1))
    assert node.call(kernel.snapshot) is not None
    assert node.call(kernel.generation) == generation + 2


# A proxy on the real kernel.


class NftablesProxy(SingleFamilyProxy):
    """One family in nftables mode in a network namespace."""

    def __init__(self, node: Namespace, family: Family = IPV4, own: OwnGenerations | None = None) -> None:
        self.node = node
        self.kernel = RecordingTable(family)
        context = Context(family, "node-1", node_port_addresses=())
        super().__init__(NftablesBackend(self.kernel, own), context, namespace=node)

    def put_service(self, name: str, count: int, *, affinity: int = 0, port: str = "") -> Self:
        """Create or update a Service with `count` endpoints."""
        family = self.context.family
        six = family is Family.IPV6
        first = ip_address("fd00:1::" if six else "10.244.0.0")
        ip = f"{'fd00::' if six else '10.96.0.'}{len(name) % 200 + 1}"
        ports = (EndpointPort(port, 8080, "TCP"),)
        endpoints = tuple(Endpoint(str(first + number)) for number in range(1, count + 1))
        service = Service("ns", name, (ip,), (ServicePort(port, 80, "TCP"),), affinity_seconds=affinity)
        return self.put(service, EndpointSlice("ns", name, f"ns/{name}", family, endpoints, ports))


@pytest.mark.parametrize("family", Family)
def test_thousands_of_endpoints_are_added_and_removed(namespaces: Callable[[], Namespace], family: Family) -> None:
    proxy = NftablesProxy(namespaces(), family)
    for count in (MANY, 3, MANY - 1, MANY, 0, MANY):
        proxy.put_service("web", count).sync()
        fresh = NftablesProxy(namespaces(), family).put_service("web", count).sync()
        assert dump_table(proxy.node, family) == dump_table(fresh.node, family)
        assert proxy.verify()
    view = proxy.node.call(proxy.kernel.snapshot)
    assert view is not None
    assert len(view.elements[names.SERVICE_ENDPOINTS]) == MANY
    assert max(len(list(TransactionEncoder(family).encode(change))) for change in proxy.kernel.commits) > 5


def test_small_change_needs_one_commit_no_reads_and_no_process(
    namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = NftablesProxy(namespaces()).put_service("web", 10).put_service("other", 5_000).sync()

    def fail(*args: object, **options: object) -> None:
        raise AssertionError(f"started a process: {args}")

    monkeypatch.setattr(subprocess, "Popen", fail)
    commits, reads = len(proxy.kernel.commits), proxy.kernel.reads
    for count in (11, 12, 9, 30):
        proxy.put_service("web", count).sync()
    # The last sync needs a chain for another endpoint count. It must exist before a verdict names it.
    assert (len(proxy.kernel.commits), proxy.kernel.reads) == (commits + 5, reads)
    assert "added_rules" not in fields_used(proxy, 5, 3)


def test_changes_of_the_other_family_are_not_mistaken_for_drift(namespaces: Callable[[], Namespace]) -> None:
    node, own = namespaces(), OwnGenerations()
    proxies = [NftablesProxy(node, family, own).put_service("web", 10).sync() for family in Family]
    proxies[0].put_service("web", 11).sync()  # its first check since the other family created its table
    reads = [proxy.kernel.reads for proxy in proxies]
    for count in (12, 9, 10, 11):
        for proxy in proxies:
            proxy.put_service("web", count).sync()
    assert [proxy.kernel.reads for proxy in proxies] == reads
    # Both detect a change by another process, whichever syncs first.
    node.run(["nft", "flush table ip kube-proxy; flush table ip6 kube-proxy"])
    for proxy, family in zip(proxies, Family, strict=True):
        proxy.put_service("web", 12).sync()
        fresh = NftablesProxy(namespaces(), family).put_service("web", 12).sync()
        assert without_comments(dump_table(node, family)) == without_comments(dump_table(fresh.node, family))


def fields_used(proxy: NftablesProxy, count: int, of: int) -> set[str]:
    """Return the non-empty fields of the first `of` of the last `count` transactions."""
    recent = proxy.kernel.commits[-count:][:of]
    return {name for change in recent for name in change.__struct_fields__ if getattr(change, name)}


DAMAGE = {
    "table deleted": ["delete table ip kube-proxy"],
    "all deleted": ["flush ruleset"],
    "all rules deleted": ["flush table ip kube-proxy"],
    "rules of a chain deleted": ["flush chain ip kube-proxy services"],
    "rule added": ["insert rule ip kube-proxy services drop"],
    "frontend deleted": ["delete element ip kube-proxy service-ips { 10.96.0.4 . tcp . 80 }"],
    "frontends deleted": ["flush map ip kube-proxy service-ips"],
    "frontend added": ["add element ip kube-proxy service-ips { 192.0.2.1 . tcp . 80 : goto reject-chain }"],
    "chain deleted": ["flush map ip kube-proxy service-ips", "delete chain ip kube-proxy service-any-12"],
    "base chain added that jumps to kproxy's": [
        "add chain ip kube-proxy mine { type nat hook output priority 0; }",
        "add rule ip kube-proxy mine jump services",
    ],
    "table deleted and created again": ["delete table ip kube-proxy", "add table ip kube-proxy"],
}


@pytest.mark.parametrize("checked", [True, False], ids=["drift check", "next change"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_repaired(namespaces: Callable[[], Namespace], damage: str, checked: bool) -> None:
    proxy = NftablesProxy(namespaces()).put_service("web", 10).put_service("affine", 3, affinity=60).sync()
    assert proxy.verify()
    proxy.node.run(["nft", "; ".join(DAMAGE[damage])])
    if checked:
        assert not proxy.verify()
    fresh = NftablesProxy(namespaces()).put_service("web", 10).put_service("affine", 3, affinity=60)
    if not checked:
        for each in (proxy, fresh):
            each.put_service("other-one", 1)
    assert without_comments(dump_table(proxy.sync().node, IPV4)) == without_comments(
        dump_table(fresh.sync().node, IPV4)
    )
    assert proxy.verify()


@pytest.mark.parametrize("commit_type", [NetlinkCommit, NftCommit])
def test_longest_names_that_kubernetes_allows(
    namespaces: Callable[[], Namespace], commit_type: Callable[[Family], Commit]
) -> None:
    node, kernel = namespaces(), NftTable(IPV4, commit_type(IPV4))
    context = Context(IPV4, "node-1")
    store, texts = Store("node-1"), list[str]()
    for number, end in enumerate("xy", 1):
        port = "p" * 14 + end
        service = Service(
            "n" * 63,
            "s" * 62 + end,
            (f"10.96.0.{number}",),
            (ServicePort(port, 80, "TCP", 30000 + number), ServicePort(f"{port[1:]}{end}", 81, "TCP")),
            affinity_seconds=60,
            vips=(f"203.0.113.{number}",),
            source_ranges=("198.51.100.0/24",),
        )
        found = (Endpoint("10.244.100.100"), Endpoint("10.244.100.101"))
        slices = EndpointSlice("n" * 63, end, service.key, IPV4, found, (EndpointPort(port, 8080, "TCP"),))
        store.apply(Upsert(service))
        store.apply(Upsert(slices))
    proxy = SingleFamilyProxy(NftablesBackend(kernel), context, store=store, namespace=node).sync()
    assert proxy.verify()
    SingleFamilyProxy(NftablesPrinter(IPV4, texts.append), context, store=store).sync()
    listed = node.run(["nft", "list", "table", table_family(IPV4), TABLE]).stdout
    assert normalized(listed) == normalized("".join(texts))
    again = namespaces()
    again.run(["nft", "-f", "-"], "".join(texts))
    assert dump_table(again, IPV4) == dump_table(node, IPV4)


def test_families_that_sync_at_the_same_time_do_not_mistake_each_other_for_another_process(
    namespaces: Callable[[], Namespace],
) -> None:
    node, own = namespaces(), OwnGenerations()
    tables = {family: NftTable(family, NetlinkCommit(family)) for family in Family}
    start = node.call(tables[IPV4].generation)
    generations: dict[Family, int] = {}

    def commit_often(family: Family) -> None:
        generation = own.commit(tables[family].commit, table(family), start)
        for number in range(200):
            change = Transaction(
                added_elements={names.CLUSTER_IPS: [SetElement(number.to_bytes(SIZES[family], "big"))]}
            )
            generation = own.commit(tables[family].commit, change, generation)
        generations[family] = generation

    def run() -> None:
        threads = [threading.Thread(target=commit_often, args=[family]) for family in Family]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    node.call(run)
    assert generations.keys() == set(Family)
    assert own.newest_after(start) == node.call(tables[IPV4].generation) == start + 402
