"""What a sync does when others change tables at the same time, and when the kernel refuses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from kproxy.model.sync_report import SyncError
from kproxy.nftables import names
from kproxy.nftables.backend import MAX_READS
from kproxy.nftables.elements import SetElement, service_key
from kproxy.nftables.kernel import TableChangingError, TableError
from kproxy.nftables.ruleset import Drop, Goto, NftChain, rule
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction
from tests.faketable import FakeTable
from tests.unit.test_nftables_backend import FIRST, IPV4, NftablesProxy, endpoints, service, web, written


def test_a_change_of_others_elsewhere_costs_one_look_at_the_chains() -> None:
    proxy = web()
    proxy.kernel.current += 1
    reads = proxy.kernel.reads
    proxy.put(service("more", "10.96.0.2")).sync()
    assert proxy.kernel.reads == reads + 1
    proxy.put(service("even-more", "10.96.0.3")).sync()
    assert proxy.kernel.reads == reads + 1
    assert proxy.kernel.table == proxy.fresh()


def drop_table(kernel: FakeTable) -> None:
    kernel.table = None


def flush_chain(kernel: FakeTable) -> None:
    assert kernel.table is not None
    kernel.table.chains["services"].rules.clear()


def remove_frontend(kernel: FakeTable) -> None:
    assert kernel.table is not None
    kernel.table.sets[names.SERVICE_IPS].elements.clear()


def remove_chain(kernel: FakeTable) -> None:
    assert kernel.table is not None
    remove_frontend(kernel)
    del kernel.table.chains["service-any-12"]


def add_rule(kernel: FakeTable) -> None:
    assert kernel.table is not None
    kernel.table.chains["services"].rules.insert(0, rule(Drop()))


def add_chain(kernel: FakeTable) -> None:
    kernel.commit(
        Transaction(added_chains=[NftChain("mine", ())], added_rules=[NftChain("mine", (rule(Goto("services")),))])
    )


def add_frontend(kernel: FakeTable) -> None:
    element = SetElement(service_key("192.0.2.1", "TCP", 80), names.REJECT)
    kernel.commit(Transaction(added_elements={names.SERVICE_IPS: [element]}))


DAMAGES = (drop_table, flush_chain, remove_frontend, remove_chain, add_rule, add_chain, add_frontend)


def hurt(proxy: NftablesProxy, damage: Callable[[FakeTable], None]) -> None:
    damage(proxy.kernel)
    proxy.kernel.current += 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_look_notices_what_others_did_and_the_next_sync_repairs_it(damage: Callable[[FakeTable], None]) -> None:
    proxy = web()
    assert proxy.verify()
    hurt(proxy, damage)
    assert not proxy.verify()
    proxy.checked_sync()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("batch_frontends", [1, 2_000])
def test_a_sync_notices_what_others_did_since_the_last_and_repairs_it(
    damage: Callable[[FakeTable], None], batch_frontends: int
) -> None:
    proxy = web()
    proxy.restart_batching(batch_frontends)
    proxy.checked_sync()
    hurt(proxy, damage)
    proxy.put(
        service("more", "10.96.0.2"), endpoints("more", [1]), service("web", "10.96.0.1", affinity=60)
    ).checked_sync()


class Meddled(FakeTable):
    """A table to which others do something right before or after a certain call."""

    def __init__(self, calls: dict[str, list[Callable[[FakeTable], None] | None]]) -> None:
        super().__init__(IPV4)
        self.calls = calls

    def _meddle(self, when: str) -> None:
        todo = self.calls.get(when)
        if todo and (damage := todo.pop(0)) is not None:
            damage(self)
            self.current += 1

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        self._meddle("commit")
        super().commit(change, generation)

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        self._meddle("before snapshot")
        found = super().snapshot(allow_interrupted=allow_interrupted)
        self._meddle("after snapshot")
        return found


def nothing(kernel: FakeTable) -> None:
    """Change another table."""


@pytest.mark.parametrize("damage", [nothing, *DAMAGES])
@pytest.mark.parametrize(
    "when",
    [{"before snapshot": 0}, {"after snapshot": 0}, {"after snapshot": MAX_READS}, {"commit": 0}, {"commit": 1}],
    ids=str,
)
def test_others_who_meddle_with_a_load_take_nothing_away(
    damage: Callable[[FakeTable], None], when: dict[str, int]
) -> None:
    kernel = Meddled({})
    proxy = NftablesProxy(kernel=kernel)
    ips = {"web": "10.96.0.1", "b": "10.96.0.2", "c": "10.96.0.3"}
    for name, ip in ips.items():
        proxy.put(service(name, ip), endpoints(name, range(FIRST, FIRST + 10)))
    proxy.checked_sync()
    proxy.restart_batching(batch_frontends=1)
    for name, ip in ips.items():
        proxy.put(service(name, ip, affinity=60))
    # Before MAX_READS snapshots are of no use, something else has to change each time.
    kernel.calls = {call: [*[nothing if place == MAX_READS else None] * place, damage] for call, place in when.items()}
    proxy.checked_sync()
    assert not any(kernel.calls.values())


@pytest.mark.parametrize("times", [1, MAX_READS - 1, MAX_READS, MAX_READS + 1])
def test_a_table_is_taken_over_however_often_others_change_theirs(times: int) -> None:
    kernel = Meddled({})
    proxy = NftablesProxy(kernel=kernel).put(service("web", "10.96.0.1", affinity=60), endpoints("web", [FIRST]))
    proxy.checked_sync()
    proxy.restart_batching()
    kernel.calls = {"after snapshot": [nothing] * times}
    (change,) = proxy.checked_sync()
    assert not kernel.calls["after snapshot"]
    assert written(change) == {"flushed_chains", "added_rules"}


def test_a_table_that_changes_all_the_time_is_replaced_in_the_end() -> None:
    kernel = Meddled({})
    proxy = NftablesProxy(kernel=kernel).put(service("web", "10.96.0.1"), endpoints("web", [FIRST]))
    proxy.checked_sync()
    proxy.restart_batching()
    kernel.calls = {"after snapshot": [*[nothing] * MAX_READS, remove_frontend]}
    proxy.put(service("web", "10.96.0.1", affinity=60))
    *_, change = proxy.checked_sync()
    assert change.replace_table


class Restless(FakeTable):
    """A table that cannot be looked at, since others change tables all the time."""

    restless = False

    def chain_use_counts(self) -> Counter[str]:
        if self.restless:
            self.reads += 1
            raise TableChangingError("tables keep changing while they are read")
        return super().chain_use_counts()


def test_what_the_kernel_took_counts_though_there_was_no_time_for_a_look() -> None:
    kernel = Restless(IPV4)
    proxy = NftablesProxy(kernel=kernel).put(service("web", "10.96.0.1"))
    proxy.checked_sync()
    kernel.restless = True
    for number in range(2, 5):
        kernel.current += 1
        begin = len(kernel.commits)
        proxy.put(service(f"web-{number}", f"10.96.0.{number}")).sync()
        assert len(kernel.commits) == begin + 1
    kernel.restless = False
    add_frontend(kernel)
    kernel.current += 1
    proxy.put(service("more", "10.96.0.9")).checked_sync()


def test_what_was_refused_is_told_and_tried_again_from_what_is_there() -> None:
    proxy = web()
    proxy.kernel.refuse = lambda _: "element 10.96.0.2 of cluster-ips: Cannot allocate memory"
    proxy.put(service("more", "10.96.0.2"))
    with pytest.raises(SyncError, match=r"^element 10\.96\.0\.2 of cluster-ips: Cannot allocate memory$"):
        proxy.sync()
    proxy.kernel.refuse = lambda _: None
    (change,) = proxy.checked_sync()
    assert written(change) == {"flushed_chains", "added_rules", "added_elements"}
    assert [element.comment for element in change.added_elements[names.NO_ENDPOINT_SERVICES]] == ["ns/more"]


def test_endpoints_that_others_left_behind_a_gap_make_way_whoever_claims_the_address_first() -> None:
    thief = replace(service("thief", "10.96.0.9"), external_ips=("10.96.0.1",))
    proxy = NftablesProxy().put(thief, service("web", "10.96.0.1"), endpoints("web", range(FIRST, FIRST + 5)))
    proxy.checked_sync()
    assert proxy.kernel.table is not None
    left = proxy.kernel.table.sets[names.SERVICE_ENDPOINTS].elements
    for place, key in enumerate(list(left)):
        if place in {0, 2}:
            del left[key]
        else:
            left[key] = replace(left[key], value=bytes(8))
    proxy.restart_batching(batch_frontends=1)
    proxy.checked_sync()


def test_a_look_that_fails_says_so_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    proxy = web()

    def fail() -> None:
        raise TableError("cannot read the table: Operation not permitted")

    proxy.kernel.chain_use_counts = fail  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.WARNING):
        assert proxy.verify()
    assert "IPv4: cannot check the table for drift: cannot read the table: Operation not permitted" in caplog.text
    proxy.put(service("more", "10.96.0.2")).sync()
    assert len(proxy.kernel.commits) == 2


def test_generations_begin_anew_after_the_last() -> None:
    proxy = web()
    proxy.kernel.current = 0xFFFFFFFF
    proxy.restart_batching()
    proxy.put(service("more", "10.96.0.2"))
    proxy.sync()
    assert proxy.kernel.current == 1
    reads = proxy.kernel.reads
    proxy.put(service("even-more", "10.96.0.3")).sync()
    assert proxy.kernel.reads == reads
