"""Syncs in nftables mode stay correct when other processes change tables or the kernel rejects transactions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import pytest
from msgspec.structs import replace

from kproxy.model.sync_report import SyncError
from kproxy.nftables import names
from kproxy.nftables.backend import MAX_READS
from kproxy.nftables.elements import SetElement, service_key
from kproxy.nftables.kernel import TableChangingError, TableError
from kproxy.nftables.ruleset import Drop, Goto, NftChain, NftHook, rule
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction
from tests.faketable import FakeTable
from tests.unit.nftables_proxy import (
    FIRST,
    IPV4,
    NftablesProxy,
    endpoint_slice,
    nonempty_fields,
    service,
    synced_proxy,
)


def test_change_of_another_table_costs_one_drift_check() -> None:
    proxy = synced_proxy()
    proxy.kernel.increment_generation()
    reads = proxy.kernel.reads
    proxy.put(service("more", "10.96.0.2")).sync()
    assert proxy.kernel.reads == reads + 1
    proxy.put(service("even-more", "10.96.0.3")).sync()
    assert proxy.kernel.reads == reads + 1
    assert proxy.kernel.table == proxy.table_of_first_sync()


# Changes of kproxy's table by another process


def delete_table(kernel: FakeTable) -> None:
    kernel.table = None


def flush_chain(kernel: FakeTable) -> None:
    kernel.existing_table.chains["services"].rules.clear()


def delete_frontend(kernel: FakeTable) -> None:
    kernel.existing_table.sets[names.SERVICE_IPS].elements.clear()


def delete_chain(kernel: FakeTable) -> None:
    delete_frontend(kernel)
    del kernel.existing_table.chains["service-any-12"]


def add_rule(kernel: FakeTable) -> None:
    kernel.existing_table.chains["services"].rules.insert(0, rule(Drop()))


def add_chain(kernel: FakeTable) -> None:
    chain = NftChain("foreign", (rule(Goto("services")),))
    kernel.commit(Transaction(added_chains=[chain], added_rules=[chain]))


def add_frontend(kernel: FakeTable) -> None:
    element = SetElement(service_key("192.0.2.1", "TCP", 80), names.REJECT)
    kernel.commit(Transaction(added_elements={names.SERVICE_IPS: [element]}))


DAMAGES = (delete_table, flush_chain, delete_frontend, delete_chain, add_rule, add_chain, add_frontend)


def change_another_table(kernel: FakeTable) -> None:
    """Leave this table as it is."""


def change_externally(kernel: FakeTable, change: Callable[[FakeTable], None]) -> None:
    """Make a change as another process does: it increments the generation ID."""
    change(kernel)
    kernel.increment_generation()


@pytest.mark.parametrize("damage", DAMAGES)
def test_drift_check_detects_damage_and_the_next_sync_repairs_it(damage: Callable[[FakeTable], None]) -> None:
    proxy = synced_proxy()
    assert proxy.verify()
    change_externally(proxy.kernel, damage)
    assert not proxy.verify()
    proxy.checked_sync()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_sync_detects_and_repairs_damage_since_the_previous_sync(
    damage: Callable[[FakeTable], None], batch_frontends: int
) -> None:
    proxy = synced_proxy()
    proxy.restart_process(batch_frontends)
    proxy.checked_sync()
    change_externally(proxy.kernel, damage)
    proxy.put(service("more", "10.96.0.2"), endpoint_slice("more", [1]), service("web", "10.96.0.1", affinity=60))
    proxy.checked_sync()


class ConcurrentlyChangedTable(FakeTable):
    """A table with changes by another process right before or after certain calls.

    `changes` maps "commit", "before snapshot" and "after snapshot" to the changes at the next such calls (None: no
    change).
    """

    def __init__(self) -> None:
        super().__init__(IPV4)
        self.changes: dict[str, list[Callable[[FakeTable], None] | None]] = {}

    def _change(self, when: str) -> None:
        changes = self.changes.get(when)
        if changes and (change := changes.pop(0)) is not None:
            change_externally(self, change)

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        self._change("commit")
        super().commit(transaction, generation)

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        self._change("before snapshot")
        snapshot = super().snapshot(allow_interrupted=allow_interrupted)
        self._change("after snapshot")
        return snapshot


@pytest.mark.parametrize("change", [change_another_table, *DAMAGES])
@pytest.mark.parametrize(
    ("when", "calls_before"),
    [("before snapshot", 0), ("after snapshot", 0), ("after snapshot", MAX_READS), ("commit", 0), ("commit", 1)],
)
def test_first_sync_after_a_restart_repairs_concurrent_changes(
    change: Callable[[FakeTable], None], when: str, calls_before: int
) -> None:
    kernel = ConcurrentlyChangedTable()
    proxy = NftablesProxy(kernel=kernel)
    ips = {"web": "10.96.0.1", "b": "10.96.0.2", "c": "10.96.0.3"}
    for name, ip in ips.items():
        proxy.put(service(name, ip), endpoint_slice(name, range(FIRST, FIRST + 10)))
    proxy.checked_sync()
    proxy.restart_process(batch_frontends=1)
    for name, ip in ips.items():
        proxy.put(service(name, ip, affinity=60))
    # A sync takes more than MAX_READS snapshots only if a table changes during each of the first MAX_READS.
    earlier = change_another_table if calls_before == MAX_READS else None
    kernel.changes = {when: [*[earlier] * calls_before, change]}
    proxy.checked_sync()
    assert not any(kernel.changes.values())


@pytest.mark.parametrize("changes", [1, MAX_READS - 1, MAX_READS, MAX_READS + 1])
def test_restart_keeps_the_table_however_often_other_tables_change(changes: int) -> None:
    kernel = ConcurrentlyChangedTable()
    proxy = NftablesProxy(kernel=kernel)
    proxy.put(service("web", "10.96.0.1", affinity=60), endpoint_slice("web", [FIRST])).checked_sync()
    proxy.restart_process()
    kernel.changes = {"after snapshot": [change_another_table] * changes}
    (transaction,) = proxy.checked_sync()
    assert not kernel.changes["after snapshot"]
    assert nonempty_fields(transaction) == {"flushed_chains", "added_rules"}


def test_table_that_changes_during_every_read_is_replaced() -> None:
    kernel = ConcurrentlyChangedTable()
    proxy = NftablesProxy(kernel=kernel)
    proxy.put(service("web", "10.96.0.1"), endpoint_slice("web", [FIRST])).checked_sync()
    proxy.restart_process()
    kernel.changes = {"after snapshot": [*[change_another_table] * MAX_READS, delete_frontend]}
    proxy.put(service("web", "10.96.0.1", affinity=60))
    *_, transaction = proxy.checked_sync()
    assert transaction.replace_table


def test_endpoints_after_a_missing_index_are_replaced_on_a_contested_frontend() -> None:
    """A restart does not find these endpoints by their frontend, but they must not block the new ones."""
    claimant = replace(service("claimant", "10.96.0.9"), external_ips=("10.96.0.1",))
    proxy = NftablesProxy()
    proxy.put(claimant, service("web", "10.96.0.1"), endpoint_slice("web", range(FIRST, FIRST + 5))).checked_sync()
    elements = proxy.table.sets[names.SERVICE_ENDPOINTS].elements
    for index, key in enumerate(list(elements)):
        if index in {0, 2}:
            del elements[key]
        else:
            elements[key] = replace(elements[key], value=bytes(8))
    proxy.restart_process(batch_frontends=1)
    proxy.checked_sync()


def test_generation_id_wraps_around_to_1() -> None:
    proxy = synced_proxy()
    proxy.kernel.generation_id = 0xFFFFFFFF
    proxy.restart_process()
    proxy.put(service("more", "10.96.0.2"))
    proxy.sync()
    assert proxy.kernel.generation_id == 1
    reads = proxy.kernel.reads
    proxy.put(service("even-more", "10.96.0.3")).sync()
    assert proxy.kernel.reads == reads


# Errors of the kernel


class UnreadableTable(FakeTable):
    """A table whose chains cannot be read while there is an `error`."""

    error: TableError | None = None

    def chain_use_counts(self) -> Counter[str]:
        if self.error is not None:
            self.reads += 1
            raise self.error
        return super().chain_use_counts()

    def chains(self, names: Collection[str] | None = None) -> dict[str, NftHook | None]:
        if self.error is not None:
            raise self.error
        return super().chains(names)


def test_accepted_transactions_are_not_repeated_if_the_drift_check_is_interrupted() -> None:
    kernel = UnreadableTable(IPV4)
    proxy = NftablesProxy(kernel=kernel)
    proxy.put(service("web", "10.96.0.1")).checked_sync()
    kernel.error = TableChangingError("tables keep changing while they are read")
    for number in range(2, 5):
        kernel.increment_generation()
        commits = len(kernel.commits)
        proxy.put(service(f"web-{number}", f"10.96.0.{number}")).sync()
        assert len(kernel.commits) == commits + 1
    kernel.error = None
    change_externally(kernel, add_frontend)
    proxy.put(service("more", "10.96.0.9")).checked_sync()


def test_failed_comparison_is_an_error_and_requires_a_full_sync() -> None:
    kernel = UnreadableTable(IPV4)
    proxy = synced_proxy(kernel=kernel)
    change_externally(kernel, change_another_table)
    kernel.error = TableError("cannot read the table: Operation not permitted")
    with pytest.raises(SyncError, match=r"^cannot read the table: Operation not permitted$"):
        proxy.verify()
    assert proxy.backend.needs_full_sync


def test_rejected_transaction_is_reported_and_retried_from_the_current_table() -> None:
    proxy = synced_proxy()
    proxy.kernel.reject = lambda _: "element 10.96.0.2 of cluster-ips: Cannot allocate memory"
    proxy.put(service("more", "10.96.0.2"))
    with pytest.raises(SyncError, match=r"^element 10\.96\.0\.2 of cluster-ips: Cannot allocate memory$"):
        proxy.sync()
    proxy.kernel.reject = lambda _: None
    (transaction,) = proxy.checked_sync()
    assert nonempty_fields(transaction) == {"flushed_chains", "added_rules", "added_elements"}
    assert [element.comment for element in transaction.added_elements[names.NO_ENDPOINT_SERVICES]] == ["ns/more"]
