"""If the kernel rejects some Services in nftables mode, all others are programmed, and the ledger equals the kernel."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.model.store import Store
from kproxy.model.sync_report import DriftError, SyncError
from kproxy.model.types import Family, Service
from kproxy.nftables import names
from kproxy.nftables import ruleset as nft
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.diff import NftablesDiff
from kproxy.nftables.elements import pack_address, service_key
from kproxy.nftables.kernel import TransactionRejectedError
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.rejection import RejectedObject
from kproxy.nftables.render import RenderedService, render_service
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import FamilySync, StorePlans
from tests.faketable import FakeTable, TableState
from tests.unit.nftables_proxy import CONTEXT, FIRST, IPV4, NftablesProxy, endpoint_slice, service
from tests.unit.test_nftables_incremental import (
    SIZES,
    Contexts,
    Event,
    TablesProxy,
    family_contexts,
    histories,
    replay,
)

ALWAYS = 1e9
"""A time at which the retry of every quarantined Service is due, in seconds. Later times are multiples of it."""


class RefusingTable(FakeTable):
    """A table whose kernel rejects certain objects.

    `refuse` gets each object that a transaction adds or deletes, and may return an errno. `names_objects` tells whether
    the error contains the rejected objects, and `attempts` counts the commits, including rejected ones.
    """

    def __init__(self, family: Family = IPV4) -> None:
        super().__init__(family)
        self.refuse: Callable[[RejectedObject], int] = lambda _: 0
        self.names_objects = True
        self.attempts = 0

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        self.attempts += 1
        found = [(each, code) for each in objects(transaction) if (code := self.refuse(each))]
        if found and generation in {None, self.generation_id}:
            rejected = [replace(each, code=code, reason=f"{each.name}: {os.strerror(code)}") for each, code in found]
            text = rejected[0].reason if self.names_objects else os.strerror(rejected[0].code)
            raise TransactionRejectedError(text, rejected if self.names_objects else ())
        super().commit(transaction, generation)

    def refuse_addresses(self, *addresses: str, code: int = errno.EINVAL) -> None:
        """Reject all elements of frontends with these addresses."""
        keys = {service_key(address, "TCP", 80)[:-8] for address in addresses}
        self.refuse = lambda each: code * any(each.key.startswith(key) for key in keys)


def objects(transaction: Transaction) -> Iterator[RejectedObject]:
    """Yield the objects of a transaction in the order in which the kernel processes them."""
    if transaction.create_table:
        yield RejectedObject("table", names.TABLE, "")
    for deleted, elements in transaction.deleted_elements.items():
        yield from (RejectedObject("element", deleted, "", each.key) for each in elements)
    for kind, found in (
        ("chain", transaction.flushed_chains),
        ("set", transaction.deleted_sets),
        ("chain", transaction.deleted_chains),
        ("set", [each.name for each in transaction.added_sets]),
        ("chain", [each.name for each in (*transaction.added_chains, *transaction.added_rules)]),
    ):
        yield from (RejectedObject(kind, name, "") for name in found)  # type: ignore[arg-type]  # literals
    for added, elements in transaction.all_added_elements().items():
        yield from (RejectedObject("element", added, "", each.key) for each in elements)


def table_of_ledger(backend: NftablesBackend) -> TableState:
    """Return the table that the ledger describes."""
    ledger = backend._ledger
    assert ledger is not None
    assert ledger.context is not None
    copy = NftablesLedger()
    diff = NftablesDiff(copy, ledger.context, create=True)
    for key, each in ledger.services.items():
        diff.put(key, each)
    table = FakeTable(ledger.context.family)
    table.commit(diff.last_transaction())
    for name in ("frontends", "contested", "element_references", "verdict_counts", "node_port_ips", "chains"):
        assert getattr(ledger, name) == getattr(copy, name), name
    return table.existing_table


class RefusingProxy(NftablesProxy):
    """The IPv4 family on a table that rejects certain objects."""

    def __init__(self, *, batch_frontends: int = 2_000) -> None:
        self.refusing = RefusingTable()
        super().__init__(kernel=self.refusing, batch_frontends=batch_frontends)
        self.moments = 0

    def put_many(self, count: int) -> None:
        """Create Services that get these ClusterIPs: 10.96.1.0, 10.96.1.1 and so on."""
        for number in range(count):
            name = f"s{number:04}"
            self.put(service(name, address(number)), endpoint_slice(name, range(FIRST, FIRST + 2)))

    def retry(self) -> Mapping[str, str]:
        """Sync all changes and all quarantined Services. Return the rejected Services."""
        self.moments += 1
        (family,) = self.families.values()
        self.results[IPV4] = family.sync(self.store, ALWAYS * self.moments)
        assert self.kernel.table == table_of_ledger(self.nftables)
        assert self.verify()
        return self.result.applied.rejected

    @property
    def nftables(self) -> NftablesBackend:
        assert isinstance(self.backend, NftablesBackend)
        return self.backend

    def programmed(self) -> set[str]:
        """Return the Services whose frontends are in the table."""
        elements = self.table.sets[names.SERVICE_IPS].elements.values()
        return {each.comment.removeprefix("ns/") for each in elements}

    def table_of_first_sync(self) -> TableState:
        fresh = NftablesProxy(store=self.store)
        fresh.context = self.context
        return fresh.sync().table

    def settle(self) -> None:
        """Let the kernel accept everything, and check that everything is programmed without another read."""
        self.refusing.refuse = lambda _: 0
        reads = self.kernel.reads
        assert not self.retry()
        assert self.kernel.reads == reads
        assert self.kernel.table == self.table_of_first_sync()


def address(number: int) -> str:
    return f"10.96.{1 + number // 256}.{number % 256}"


MAPPABLE = pytest.mark.parametrize("names_objects", [True, False], ids=["named", "not named"])
BATCHES = pytest.mark.parametrize("batch_frontends", [1, 7, 2_000])


@MAPPABLE
@BATCHES
@pytest.mark.parametrize("culprits", [(0,), (59,), (10, 11, 12, 40)])
def test_all_other_services_are_programmed_at_the_first_sync(
    culprits: tuple[int, ...], batch_frontends: int, names_objects: bool
) -> None:
    proxy = RefusingProxy(batch_frontends=batch_frontends)
    proxy.refusing.names_objects = names_objects
    proxy.put_many(60)
    proxy.refusing.refuse_addresses(*map(address, culprits))
    rejected = proxy.retry()
    assert set(rejected) == {f"ns/s{number:04}" for number in culprits}
    assert all("Invalid argument" in reason and "\n" not in reason for reason in rejected.values())
    assert proxy.programmed() == {f"s{number:04}" for number in range(60) if number not in culprits}
    proxy.settle()


@MAPPABLE
@BATCHES
def test_all_other_changes_are_programmed_in_the_same_sync(batch_frontends: int, names_objects: bool) -> None:
    proxy = RefusingProxy(batch_frontends=batch_frontends)
    proxy.refusing.names_objects = names_objects
    proxy.put_many(40)
    proxy.retry()
    before = dict(proxy.table.sets[names.SERVICE_ENDPOINTS].elements)
    proxy.refusing.refuse_addresses(address(3), address(17))
    for number in range(40):
        proxy.put(endpoint_slice(f"s{number:04}", range(FIRST + 1, FIRST + 9)))
    reads = proxy.kernel.reads
    assert set(proxy.retry()) == {"ns/s0003", "ns/s0017"}
    assert proxy.kernel.reads == reads
    after = proxy.table.sets[names.SERVICE_ENDPOINTS].elements
    kept = {key: each for key, each in before.items() if key[:4] in {b"\x0a\x60\x01\x03", b"\x0a\x60\x01\x11"}}
    assert kept.items() <= after.items()
    assert len(after) == 38 * 8 + 2 * 2
    assert len(proxy.programmed()) == 40
    proxy.settle()


def test_few_commits_find_one_culprit_among_a_thousand() -> None:
    proxy = RefusingProxy()
    proxy.put_many(1_000)
    proxy.refusing.refuse_addresses(address(700))
    assert set(proxy.retry()) == {"ns/s0700"}
    assert proxy.refusing.attempts == 2
    assert len(proxy.programmed()) == 999


def test_bisection_takes_a_logarithmic_number_of_commits() -> None:
    proxy = RefusingProxy()
    proxy.refusing.names_objects = False
    proxy.put_many(1_000)
    proxy.refusing.refuse_addresses(address(700))
    assert set(proxy.retry()) == {"ns/s0700"}
    assert proxy.refusing.attempts <= 3 * math.ceil(math.log2(1_000))
    assert len(proxy.programmed()) == 999


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOENT])
def test_retry_changes_nothing_and_reads_nothing(code: int) -> None:
    proxy = RefusingProxy()
    proxy.put_many(10)
    proxy.retry()
    proxy.refusing.refuse_addresses(address(5), code=code)
    proxy.put(endpoint_slice("s0005", (1, 2)))
    assert set(proxy.retry()) == {"ns/s0005"}
    table, commits, reads = proxy.kernel.table, len(proxy.kernel.commits), proxy.kernel.reads
    for _ in range(3):
        assert set(proxy.retry()) == {"ns/s0005"}
    assert (proxy.kernel.table, len(proxy.kernel.commits)) == (table, commits)
    assert proxy.kernel.reads == reads
    proxy.settle()


@MAPPABLE
def test_many_rejected_services_are_retried_without_a_read(names_objects: bool) -> None:
    proxy = RefusingProxy()
    proxy.refusing.names_objects = names_objects
    proxy.put_many(20)
    proxy.refusing.refuse_addresses(*map(address, range(5, 12)))
    expected = {f"ns/s{number:04}" for number in range(5, 12)}
    assert set(proxy.retry()) == expected
    reads = proxy.kernel.reads
    assert set(proxy.retry()) == expected
    assert proxy.kernel.reads == reads
    proxy.settle()


@MAPPABLE
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_restart_keeps_what_a_rejected_service_has(batch_frontends: int, names_objects: bool) -> None:
    proxy = RefusingProxy()
    proxy.put_many(30)
    proxy.retry()
    kept = {
        name: {key: each for key, each in fake_set.elements.items() if key[:4] == b"\x0a\x60\x01\x04"}
        for name, fake_set in proxy.table.sets.items()
    }
    proxy.restart_process(batch_frontends)
    proxy.refusing.names_objects = names_objects
    proxy.put(*(endpoint_slice(f"s{number:04}", range(FIRST, FIRST + 7)) for number in range(30)))
    proxy.refusing.refuse_addresses(address(4))
    assert set(proxy.retry()) == {"ns/s0004"}
    for name, elements in kept.items():
        assert elements.items() <= proxy.table.sets[name].elements.items()
    assert len(proxy.table.sets[names.SERVICE_ENDPOINTS].elements) == 29 * 7 + 2
    proxy.settle()


def affinity_proxy() -> RefusingProxy:
    proxy = RefusingProxy()
    proxy.put_many(6)
    proxy.put(service("sticky", "10.96.0.9", affinity=60), endpoint_slice("sticky", [101, 102]))
    return proxy


@MAPPABLE
@pytest.mark.parametrize("kind", ["set", "chain"])
def test_refused_set_or_chain_is_mapped_to_its_service(kind: str, names_objects: bool) -> None:
    proxy = affinity_proxy()
    proxy.refusing.names_objects = names_objects
    proxy.refusing.refuse = lambda each: errno.EINVAL * (each.kind == kind and "sticky" in each.name)
    assert set(proxy.retry()) == {"ns/sticky"}
    assert len(proxy.programmed()) == 6
    assert not [name for name in (*proxy.table.sets, *proxy.table.chains) if "sticky" in name]
    proxy.settle()


@MAPPABLE
def test_chains_and_sets_that_were_created_in_advance_are_deleted_again(names_objects: bool) -> None:
    proxy = affinity_proxy()
    proxy.delete(Service, "sticky").retry()
    proxy.refusing.names_objects = names_objects
    proxy.put(service("sticky", "10.96.0.9", affinity=60), endpoint_slice("s0001", range(1, 40)))
    proxy.refusing.refuse_addresses("10.96.0.9", address(1))
    assert set(proxy.retry()) == {"ns/sticky", "ns/s0001"}
    assert not [name for name in (*proxy.table.sets, *proxy.table.chains) if "sticky" in name]
    proxy.settle()


@MAPPABLE
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_restart_keeps_a_rejected_service_with_chains_of_its_own(batch_frontends: int, names_objects: bool) -> None:
    proxy = affinity_proxy()
    proxy.put(replace(service("sticky", "10.96.0.9", affinity=60), external_ips=("192.0.2.1",)))
    proxy.put(endpoint_slice("sticky", [101, 102], node="node-1"))
    proxy.retry()
    before = deepcopy(proxy.table)
    proxy.restart_process(batch_frontends)
    proxy.refusing.names_objects = names_objects
    proxy.put(endpoint_slice("sticky", [102, 103]))
    proxy.refusing.refuse = lambda each: errno.EINVAL * each.name.endswith("103/8080")
    assert set(proxy.retry()) == {"ns/sticky"}
    assert proxy.table == before
    proxy.put(endpoint_slice("s0001", [1]))
    assert set(proxy.retry()) == {"ns/sticky"}
    before.sets[names.SERVICE_ENDPOINTS] = proxy.table.sets[names.SERVICE_ENDPOINTS]
    assert {name: chain for name, chain in proxy.table.chains.items() if "sticky" in name} == {
        name: chain for name, chain in before.chains.items() if "sticky" in name
    }
    proxy.settle()


@pytest.mark.parametrize("damage", ["foreign rule", "no rules", "another timeout", "missing set"])
def test_restart_removes_a_rejected_service_whose_chains_another_program_changed(damage: str) -> None:
    proxy = affinity_proxy()
    proxy.retry()
    chain = next(chain for name, chain in proxy.table.chains.items() if name.startswith("endpoint-"))
    if damage == "foreign rule":
        chain.rules.insert(0, nft.rule(nft.CtStateNew(), nft.Drop()))
    elif damage == "no rules":
        chain.rules.clear()
    else:
        found = next(each for name, each in proxy.table.sets.items() if "sticky" in name)
        found.layout = replace(found.layout, **({"timeout": 0} if damage == "another timeout" else {"key_type": 9}))
    proxy.restart_process()
    proxy.put(endpoint_slice("sticky", [101, 102, 103]))
    proxy.refusing.refuse = lambda each: errno.EINVAL * each.name.endswith("103/8080")
    assert set(proxy.retry()) == {"ns/sticky"}
    assert len(proxy.programmed()) == 6
    assert not [name for name in (*proxy.table.sets, *proxy.table.chains) if "sticky" in name]
    proxy.settle()


@MAPPABLE
@pytest.mark.parametrize("damage", ["nothing", "rules", "table"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_full_sync_keeps_what_was_accepted_for_a_rejected_service(damage: str, when: str, names_objects: bool) -> None:
    """Also for Services with chains of their own, and if the Service was rejected only in the full sync."""
    proxy = affinity_proxy()
    proxy.retry()
    before = deepcopy(proxy.table)
    proxy.refusing.names_objects = names_objects
    proxy.put(endpoint_slice("sticky", [101, 102, 103]))
    proxy.refusing.refuse = lambda each: errno.EINVAL * each.name.endswith("103/8080")
    if when == "before":
        assert set(proxy.retry()) == {"ns/sticky"}
    if damage == "rules":
        for chain in proxy.table.chains.values():
            chain.rules.clear()
    elif damage == "table":
        proxy.kernel.table = None
    proxy.forget()
    assert set(proxy.retry()) == {"ns/sticky"}
    assert proxy.table == before
    proxy.settle()
    proxy.delete(Service, "sticky").retry()
    assert not proxy.nftables._accepted


@pytest.mark.parametrize("damage", ["nothing", "flushed", "admits all", "admits others"])
def test_restart_never_opens_a_frontend_that_only_some_sources_may_use(damage: str) -> None:
    proxy = RefusingProxy()
    restricted = replace(service("restricted", "10.96.0.9"), vips=("192.0.2.1",), source_ranges=("192.0.2.128/25",))
    proxy.put(restricted, endpoint_slice("restricted", [1]), service("other", "10.96.0.10")).retry()
    key = service_key("192.0.2.1", "TCP", 80)
    assert key in proxy.table.sets[names.FIREWALL_IPS].elements
    before = deepcopy(proxy.table)
    firewall = next(chain for name, chain in proxy.table.chains.items() if "ns/restricted" in name)
    if damage == "flushed":
        firewall.rules.clear()
    elif damage == "admits all":
        del firewall.rules[-1]
    elif damage == "admits others":
        firewall.rules.insert(0, nft.rule(nft.MatchDaddr("192.0.2.1"), nft.Return()))
    proxy.restart_process()
    proxy.put(endpoint_slice("restricted", [1, 2]))
    proxy.refusing.refuse = lambda each: (
        errno.EINVAL * (each.name == names.SERVICE_ENDPOINTS and each.key[-4:] != bytes(4))
    )
    assert set(proxy.retry()) == {"ns/restricted"}
    if damage == "nothing":
        assert proxy.table == before
    else:
        assert key not in proxy.table.sets[names.SERVICE_IPS].elements
    assert service_key("10.96.0.9", "TCP", 80) in proxy.table.sets[names.SERVICE_IPS].elements
    proxy.settle()


# Frontends that several Services claim


@pytest.mark.parametrize("rejected", ["a-first", "b-second"])
def test_contested_frontend_belongs_to_the_service_that_the_kernel_accepts(rejected: str) -> None:
    ips = {"a-first": "10.96.0.1", "b-second": "10.96.0.2"}
    proxy = RefusingProxy()
    proxy.put_many(3)
    proxy.retry()
    for name, ip in ips.items():
        proxy.put(replace(service(name, ip), external_ips=("192.0.2.1",)), endpoint_slice(name, [1]))
    proxy.refusing.refuse_addresses(ips[rejected])
    assert set(proxy.retry()) == {f"ns/{rejected}"}
    (accepted,) = ips.keys() - {rejected}
    frontend = proxy.table.sets[names.SERVICE_IPS].elements[service_key("192.0.2.1", "TCP", 80)]
    assert frontend.comment == f"ns/{accepted}"
    assert not proxy.result.applied.conflicts
    proxy.settle()
    assert len(proxy.result.applied.conflicts) == 1


def test_refused_element_of_a_contested_frontend_is_that_of_its_new_owner() -> None:
    proxy = RefusingProxy()
    proxy.put_many(3)
    proxy.retry()
    for name, ip in (("a-first", "10.96.0.1"), ("b-second", "10.96.0.2")):
        proxy.put(replace(service(name, ip), external_ips=("192.0.2.1",)), endpoint_slice(name, [1]))
    proxy.refusing.refuse = lambda each: errno.EINVAL * (each.key == service_key("192.0.2.1", "TCP", 80))
    # The second Service is the next owner, and refused in turn.
    assert set(proxy.retry()) == {"ns/a-first", "ns/b-second"}
    proxy.settle()


def test_rejected_service_stays_although_the_owner_of_its_contested_frontend_is_deleted_in_a_full_sync() -> None:
    proxy = RefusingProxy()
    shared, own = service_key("192.0.2.1", "TCP", 80), service_key("10.96.0.2", "TCP", 80)
    owner = replace(service("a-owner", "10.96.0.1"), external_ips=("192.0.2.1",))
    proxy.put(owner, endpoint_slice("a-owner", [1])).retry()
    # With chains of its own, so that the backend remembers what the kernel has accepted.
    other = replace(service("other", "10.96.0.2"), external_ips=("192.0.2.1",), vips=("192.0.2.2",))
    proxy.put(replace(other, source_ranges=("192.0.2.128/25",))).retry()
    no_endpoints = proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements
    assert own in no_endpoints
    assert shared not in no_endpoints
    proxy.refusing.refuse = lambda each: errno.EINVAL * (each.key == shared and each.name == names.NO_ENDPOINT_SERVICES)
    proxy.delete(Service, "a-owner").forget()
    assert set(proxy.retry()) == {"ns/other"}
    no_endpoints = proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements
    assert own in no_endpoints
    assert shared not in no_endpoints
    proxy.settle()
    assert shared in proxy.table.sets[names.NO_ENDPOINT_SERVICES].elements


# Changes of a rejected Service


def test_rejected_service_can_be_changed_and_deleted() -> None:
    proxy = RefusingProxy()
    proxy.put_many(5)
    proxy.refusing.refuse_addresses(address(2))
    assert set(proxy.retry()) == {"ns/s0002"}
    assert not proxy.put(service("s0002", "10.96.9.9")).retry()
    assert len(proxy.programmed()) == 5
    assert set(proxy.put(service("s0002", address(2))).retry()) == {"ns/s0002"}
    assert len(proxy.programmed()) == 5  # with the accepted ClusterIP
    assert not proxy.delete(Service, "s0002").retry()
    assert len(proxy.programmed()) == 4
    proxy.settle()


@MAPPABLE
def test_rest_of_the_table_is_programmed_even_if_all_services_are_rejected(names_objects: bool) -> None:
    proxy = RefusingProxy()
    proxy.refusing.names_objects = names_objects
    proxy.put_many(2)
    proxy.refusing.refuse_addresses(address(0), address(1))
    assert len(proxy.retry()) == 2
    assert "nat-prerouting" in proxy.table.chains
    proxy.context = replace(CONTEXT, node_port_addresses=("10.99.0.3",))
    assert len(proxy.retry()) == 2
    assert list(proxy.table.sets[names.NODE_PORT_IPS].elements) == [pack_address("10.99.0.3")]
    proxy.settle()


def test_changed_context_is_programmed_despite_a_rejected_service() -> None:
    proxy = RefusingProxy(batch_frontends=2)
    proxy.put_many(9)
    proxy.refusing.refuse_addresses(address(0), address(8))
    assert len(proxy.retry()) == 2
    proxy.context = replace(CONTEXT, masquerade_mark=1 << 20, node_port_addresses=("10.99.0.3",))
    assert len(proxy.retry()) == 2
    proxy.settle()


# Failures that hit everything


def refuse_shared_chain(each: RejectedObject) -> int:
    return errno.EINVAL * each.name.startswith("service-any")


def refuse_base_set(each: RejectedObject) -> int:
    return errno.EINVAL * (each.kind == "set" and each.name == names.SERVICE_IPS)


def refuse_base_chain(each: RejectedObject) -> int:
    return errno.EINVAL * (each.name == "services")


def refuse_table(each: RejectedObject) -> int:
    return errno.EINVAL * (each.kind == "table")


def refuse_elements(each: RejectedObject) -> int:
    return errno.EINVAL * (each.kind == "element")


@MAPPABLE
@pytest.mark.parametrize(
    "refuse", [refuse_shared_chain, refuse_base_set, refuse_base_chain, refuse_table, refuse_elements]
)
def test_failure_that_hits_everything_is_a_sync_error(
    refuse: Callable[[RejectedObject], int], names_objects: bool
) -> None:
    proxy = RefusingProxy()
    proxy.refusing.names_objects = names_objects
    proxy.put_many(200)
    proxy.refusing.refuse = refuse
    with pytest.raises(SyncError, match="Invalid argument") as failed:
        proxy.retry()
    assert not isinstance(failed.value, DriftError)
    assert proxy.nftables.needs_full_sync
    assert proxy.refusing.attempts == 1 if names_objects else proxy.refusing.attempts < 20
    proxy.refusing.refuse = lambda _: 0
    proxy.retry()
    assert proxy.kernel.table == proxy.table_of_first_sync()


def test_missing_element_is_drift_and_read_once() -> None:
    """An element that cannot be deleted because it is missing shows that another process changed the table."""
    proxy = RefusingProxy()
    proxy.put_many(5)
    proxy.retry()
    refused: list[RejectedObject] = []

    def refuse(each: RejectedObject) -> int:
        if refused or each.kind != "element":
            return 0
        refused.append(each)
        return errno.ENOENT

    proxy.refusing.refuse = refuse
    proxy.put(endpoint_slice("s0001", [1]))
    snapshots = proxy.kernel.snapshots
    assert not proxy.retry()
    assert proxy.kernel.snapshots == snapshots + 1
    assert proxy.kernel.table == proxy.table_of_first_sync()


# Any history


def settled(proxy: TablesProxy) -> TablesProxy:
    """Let the kernels accept everything, and retry everything."""
    for family, sync in proxy.families.items():
        kernel = proxy.kernels[family]
        assert isinstance(kernel, RefusingTable)
        kernel.reject = lambda _: None
        kernel.refuse = lambda _: 0
        sync.sync(proxy.store, ALWAYS)
    return proxy


def accepted_services(sync: FamilySync, store: Store) -> dict[str, RenderedService]:
    """Return all Services that are not quarantined, as they must be in the table."""
    context, quarantine = sync._applied, sync._quarantine
    assert context is not None
    assert quarantine is not None
    plans = StorePlans(store, context, ())
    rendered = {key: render_service(plans.of(key), context) for key in store.service_keys()}
    return {key: each for key, each in rendered.items() if each is not None and key not in quarantine.services}


def programmed_services(sync: FamilySync, backend: NftablesBackend) -> dict[str, RenderedService]:
    """Return all Services in the ledger that are not quarantined."""
    ledger, quarantine = backend._ledger, sync._quarantine
    assert ledger is not None
    assert quarantine is not None
    return {key: each for key, each in ledger.services.items() if key not in quarantine.services}


class CheckedProxy(TablesProxy):
    """Both families on tables that reject certain objects. Each sync is checked."""

    def try_sync(self) -> None:
        for family, sync in self.families.items():
            self._check(sync, self.kernels[family])

    def _check(self, sync: FamilySync, kernel: FakeTable) -> None:
        with suppress(SyncError):
            result = sync.sync(self.store)
            backend = sync._backend
            assert isinstance(backend, NftablesBackend)
            assert kernel.table == table_of_ledger(backend)
            assert accepted_services(sync, self.store) == programmed_services(sync, backend)
            assert result.applied.rejected.keys() <= sync._quarantine.services.keys()  # type: ignore[union-attr]

    def restarted(self, batch_frontends: int) -> TablesProxy:
        return CheckedProxy(self.contexts, batch_frontends=batch_frontends, kernels=self.kernels, store=self.store)


def refusals() -> st.SearchStrategy[Callable[[RejectedObject], int]]:
    """Kernels that reject some objects of Services, selected by a checksum."""

    def refusing(modulus: int, rest: int, code: int) -> Callable[[RejectedObject], int]:
        def refuse(each: RejectedObject) -> int:
            of_service = each.name != names.NODE_PORT_IPS if each.kind == "element" else "/" in each.name
            return code * (of_service and sum(each.name.encode() + each.key) % modulus == rest)

        return refuse

    return st.builds(refusing, st.integers(3, 40), st.integers(0, 2), st.sampled_from([errno.EINVAL, errno.ENOENT]))


@settings(deadline=None, max_examples=300)
@given(
    family_contexts(),
    st.lists(st.tuples(refusals(), st.booleans(), histories(3)), min_size=1, max_size=3),
    st.sampled_from(SIZES),
)
def test_ledger_equals_the_kernel_after_any_rejection(
    contexts: Contexts, phases: list[tuple[Callable[[RejectedObject], int], bool, list[Event]]], size: int
) -> None:
    kernels = {family: RefusingTable(family) for family in Family}
    proxy: TablesProxy = CheckedProxy(contexts, batch_frontends=size, kernels=kernels)
    for refuse, names_objects, history in phases:
        for kernel in kernels.values():
            kernel.reject = lambda _: None
            kernel.refuse, kernel.names_objects = refuse, names_objects
        proxy = replay(proxy, history)
        proxy.try_sync()
    settled(proxy)
    assert proxy.tables() == proxy.tables_of_fresh_start()
    assert proxy.verify()
