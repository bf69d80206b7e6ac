"""Whatever other processes change in the table, a check of exactly that restores it and writes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.model.drift import RepairResult, Touched
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import DROP, SetElement, set_layout
from kproxy.nftables.repair import POLICY_DROP
from kproxy.nftables.rule_content import rule_content
from kproxy.nftables.ruleset import Drop, Goto, KeyField, MapValue, NftRule, NftSet, Return, rule
from tests.faketable import FakeChain, FakeSet, FakeTable, TableState
from tests.unit.nftables_proxy import FIRST, IPV4, NftablesProxy, endpoint_slice, service
from tests.unit.test_nftables_drift import change_another_table, change_externally
from tests.unit.test_nftables_statements import STATEMENTS

DORMANT, OWNED = 1, 2
EVERYTHING = Touched(everything=True)


def full_proxy() -> NftablesProxy:
    proxy = NftablesProxy()
    proxy.put(
        service("web", "10.96.0.1"),
        endpoint_slice("web", range(FIRST, FIRST + 5)),
        service("sticky", "10.96.0.2", affinity=60),
        endpoint_slice("sticky", [1, 2]),
        service("empty", "10.96.0.3"),
    )
    return proxy.sync()


def repair(proxy: NftablesProxy, touched: Touched) -> RepairResult:
    return proxy.families[IPV4].repair(proxy.store, {names.TABLE: touched})


def differences(before: TableState, after: TableState) -> Touched:
    """Return what a process touched that changed a table."""
    touched = Touched()
    touched.chains = {
        name for name in before.chains | after.chains if before.chains.get(name) != after.chains.get(name)
    }
    for name in before.sets | after.sets:
        old, new = before.sets.get(name), after.sets.get(name)
        if old is None or new is None or old.layout != new.layout:
            touched.add_set(name)
            continue
        for key in old.elements | new.elements:
            if old.elements.get(key) != new.elements.get(key):
                touched.add_element(name, key)
    return touched


Damage = Callable[[st.DataObject, TableState], None]


def change_rules(data: st.DataObject, table: TableState) -> None:
    chain = table.chains[data.draw(st.sampled_from(sorted(table.chains)))]
    own = data.draw(st.permutations(chain.rules))
    added = data.draw(st.lists(st.sampled_from([rule(Drop()), rule(Return(), comment="mine")]), max_size=2))
    chain.rules = [*added, *own[: data.draw(st.integers(0, len(own)))]]


def change_hook(data: st.DataObject, table: TableState) -> None:
    base_chains = [chain for chain in table.chains.values() if chain.hook is not None]
    hook = (chain := data.draw(st.sampled_from(base_chains))).hook
    assert hook is not None
    dropping: Any = f"{hook.hook.removesuffix(POLICY_DROP)}{POLICY_DROP}"
    chain.hook = data.draw(st.sampled_from([replace(hook, priority=hook.priority + 1), replace(hook, hook=dropping)]))


def delete_unused_chain(data: st.DataObject, table: TableState) -> None:
    name = data.draw(st.sampled_from(sorted(table.chains)))
    if table.chain_use_counts()[name] == len(table.chains[name].rules):
        del table.chains[name]


def delete_unused_set(data: st.DataObject, table: TableState) -> None:
    name = data.draw(st.sampled_from(sorted(table.sets)))
    if not table.set_use_count(name):
        del table.sets[name]


def flush_set(data: st.DataObject, table: TableState) -> None:
    table.sets[data.draw(st.sampled_from(sorted(table.sets)))].elements.clear()


def change_element(data: st.DataObject, table: TableState) -> None:
    definition = data.draw(st.sampled_from([each for each in SETS if each.name in table.sets]))
    elements = table.sets[definition.name].elements
    foreign = bytes(range(set_layout(definition, IPV4).key_size))
    key = data.draw(st.sampled_from([*sorted(elements), foreign]))
    elements.pop(key, None)
    if data.draw(st.booleans()):
        values = {MapValue.NONE: None, MapValue.VERDICT: DROP, MapValue.ENDPOINT: bytes(8)}
        elements[key] = SetElement(key, values[definition.value])


def add_chain(data: st.DataObject, table: TableState) -> None:
    table.chains[data.draw(st.sampled_from(["mine", "yours"]))] = FakeChain(None, "", [rule(Drop())])


def add_set(data: st.DataObject, table: TableState) -> None:
    foreign = NftSet(data.draw(st.sampled_from(["mine", "yours"])), (KeyField.SOURCE,))
    table.sets[foreign.name] = FakeSet(foreign, set_layout(foreign, IPV4))


DAMAGES: tuple[Damage, ...] = (
    change_rules,
    change_hook,
    delete_unused_chain,
    delete_unused_set,
    flush_set,
    change_element,
    add_chain,
    add_set,
)


def contents(table: TableState) -> object:
    """Return the contents of a table. The order in which chains and sets were created does not matter."""
    sets = {name: (each.layout, each.elements) for name, each in table.sets.items()}
    return {name: (each.hook, each.rules) for name, each in table.chains.items()}, sets


@settings(deadline=None)
@given(st.data(), st.sampled_from(["touched", "everything", "compared"]))
def test_random_damage_is_repaired_exactly(data: st.DataObject, how: str) -> None:
    proxy = full_proxy()
    proxy.verify()
    intact = deepcopy(proxy.table)
    damaged = deepcopy(intact)
    for damage in data.draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=4)):
        damage(data, damaged)
    proxy.kernel.table = deepcopy(damaged)
    proxy.kernel.increment_generation()
    touched = differences(intact, damaged)
    commits = len(proxy.kernel.commits)
    if how == "compared":
        assert proxy.verify() == (not touched)
    else:
        result = repair(proxy, touched if how == "touched" else EVERYTHING)
        assert not result.needs_full_sync
        assert set(result.repaired) <= {*touched.parts(names.TABLE)}
        assert bool(result.repaired) == bool(touched)
    assert contents(proxy.table) == contents(intact)
    assert bool(len(proxy.kernel.commits) - commits) == bool(touched)
    assert not proxy.backend.needs_full_sync


def test_intact_parts_are_read_and_not_written() -> None:
    proxy = full_proxy()
    commits = len(proxy.kernel.commits)
    touched = Touched(
        chains={"services", "gone"}, sets={names.SERVICE_IPS, "gone"}, elements={names.CLUSTER_IPS: {b"abcd"}}
    )
    assert repair(proxy, touched) == RepairResult()
    assert repair(proxy, EVERYTHING) == RepairResult()
    assert len(proxy.kernel.commits) == commits


def test_touched_element_is_read_alone() -> None:
    proxy = full_proxy()

    def unused(*args: object) -> dict[bytes, SetElement]:
        raise AssertionError

    proxy.kernel.elements = proxy.kernel.walk_elements = unused  # type: ignore[method-assign,assignment]
    elements = proxy.table.sets[names.SERVICE_ENDPOINTS].elements
    key = next(iter(elements))
    lost = elements.pop(key)
    assert len(repair(proxy, Touched(elements={names.SERVICE_ENDPOINTS: {key}})).repaired) == 1
    assert elements | proxy.table.sets[names.SERVICE_ENDPOINTS].elements == elements | {key: lost}


def test_elements_of_affinity_sets_are_left_alone() -> None:
    proxy = full_proxy()
    name = next(name for name in proxy.table.sets if name.startswith("affinity-"))
    clients = {b"\x0a\0\0\1": SetElement(b"\x0a\0\0\1")}
    proxy.table.sets[name].elements.update(clients)
    assert repair(proxy, Touched(sets={name}, elements={name: {b"\x0a\0\0\2"}})) == RepairResult()
    assert repair(proxy, EVERYTHING) == RepairResult()
    assert proxy.table.sets[name].elements == clients


@pytest.mark.parametrize("flags", [OWNED, DORMANT | OWNED])
def test_flags_that_cannot_be_cleared_need_a_full_sync(flags: int) -> None:
    proxy = full_proxy()
    proxy.kernel.table_flags = flags
    assert repair(proxy, EVERYTHING) == RepairResult(needs_full_sync=True)
    assert proxy.backend.needs_full_sync


def test_dormant_table_is_awakened_before_anything_is_read() -> None:
    proxy = full_proxy()
    proxy.kernel.table_flags = DORMANT
    commits = len(proxy.kernel.commits)
    assert [part.kind for part in repair(proxy, EVERYTHING).repaired] == ["table"]
    assert proxy.kernel.table_flags == 0
    (awakening,) = proxy.kernel.commits[commits:]
    assert awakening.create_table
    assert not awakening.replace_table


def test_deleted_table_needs_a_full_sync() -> None:
    proxy = full_proxy()
    proxy.kernel.table = None
    assert repair(proxy, EVERYTHING).needs_full_sync
    proxy.checked_sync()


def test_set_of_another_type_needs_a_full_sync() -> None:
    proxy = full_proxy()
    other = NftSet(names.CLUSTER_IPS, (KeyField.PORT,))
    proxy.table.sets[names.CLUSTER_IPS] = FakeSet(other, set_layout(other, IPV4))
    assert repair(proxy, Touched(sets={names.CLUSTER_IPS})).needs_full_sync


class BusyTable(FakeTable):
    """A table of a namespace in which another process commits before each of the next commits."""

    busy = 0

    def commit(self, transaction, generation=None, /) -> None:  # type: ignore[no-untyped-def]
        if self.busy:
            self.busy -= 1
            change_externally(self, change_another_table)
        super().commit(transaction, generation)


@pytest.mark.parametrize("busy", [1, 4, 100])
def test_repair_succeeds_while_other_processes_make_commits(busy: int) -> None:
    kernel = BusyTable(IPV4)
    proxy = NftablesProxy(kernel=kernel).put(service("web", "10.96.0.1"), endpoint_slice("web", [1])).sync()
    intact = deepcopy(kernel.table)
    kernel.existing_table.chains["services"].rules.clear()
    kernel.busy = busy
    assert [part.name for part in repair(proxy, Touched(chains={"services"})).repaired] == ["services"]
    assert kernel.table == intact


def test_rejected_repair_needs_a_full_sync() -> None:
    proxy = full_proxy()
    proxy.table.chains["services"].rules.clear()
    proxy.kernel.reject = lambda _: "Operation not permitted"
    with pytest.raises(Exception, match="Operation not permitted"):
        repair(proxy, Touched(chains={"services"}))
    assert proxy.backend.needs_full_sync


def test_comparison_costs_one_generation_id_if_only_kproxy_made_commits() -> None:
    proxy = full_proxy()
    assert proxy.verify()
    reads = proxy.kernel.reads
    proxy.put(endpoint_slice("web", [1])).sync()
    assert proxy.verify()
    assert proxy.kernel.reads == reads
    change_externally(proxy.kernel, change_another_table)
    assert proxy.verify()
    assert proxy.kernel.reads > reads


@pytest.mark.parametrize("family", Family)
def test_different_rules_have_different_contents(family: Family) -> None:
    rules = [*(rule(each) for each in STATEMENTS if family is IPV4 or not hasattr(each, "network"))]
    rules += [NftRule(each.statements, "comment") for each in rules] + [rule(Goto("other")), rule()]
    if family is Family.IPV6:
        rules = [each for each in rules if not any(hasattr(part, "address") for part in each.statements)]
    for one, other in combinations(rules, 2):
        assert rule_content(one, family) != rule_content(other, family)
    assert all(rule_content(each, family) == rule_content(each, family) for each in rules)
