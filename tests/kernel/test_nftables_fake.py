"""The fake table accepts and rejects the same transactions as the kernel, with the same result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import SERVICE_KEY
from kproxy.nftables.elements import DROP, SetElement, pack_address, service_key
from kproxy.nftables.kernel import GenerationChangedError, NetlinkCommit, NftTable, TableError
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.ruleset import (
    DnatMap,
    Drop,
    Goto,
    Jump,
    KeyField,
    Lookup,
    MapValue,
    NftChain,
    NftHook,
    NftSet,
    Return,
    UpdateSet,
    VerdictMap,
    rule,
)
from kproxy.nftables.transaction import Transaction
from tests.faketable import FakeTable
from tests.kernel.test_nftables_commit import normalized
from tests.lab.namespace import Namespace
from tests.unit.test_nftables_incremental import (
    SIZES,
    Contexts,
    Damaged,
    Event,
    TablesProxy,
    family_contexts,
    histories,
    replay,
)

MEMBERS = NftSet(names.CLUSTER_IPS, (KeyField.DESTINATION,))
VERDICTS = NftSet(names.SERVICE_IPS, SERVICE_KEY, MapValue.VERDICT)
ENDPOINTS = NftSet(names.SERVICE_ENDPOINTS, (*SERVICE_KEY, KeyField.NUMGEN), MapValue.ENDPOINT)
ADDRESS = pack_address("192.0.2.1")
KEY = service_key("192.0.2.1", "TCP", 80)
NUMBERED = KEY + bytes(4)
VALUE = ADDRESS + b"\x00\x50\x00\x00"
USER = NftChain("user", (rule(Goto("used")), rule(Lookup((KeyField.DESTINATION,), MEMBERS.name), Return())))
BASE = NftChain("base", (rule(Jump("user")),), hook=NftHook("filter", "input", 0))


def table_in_use() -> Transaction:
    """Return a transaction for a table whose chains and sets are all in use."""
    chains = [NftChain("used", ()), NftChain("mapped", (rule(Drop()),)), USER, BASE]
    change = Transaction(
        create_table=True, added_sets=[MEMBERS, VERDICTS, ENDPOINTS], added_chains=chains, added_rules=chains
    )
    change.add_element(MEMBERS.name, SetElement(ADDRESS))
    change.add_element(VERDICTS.name, SetElement(KEY, "mapped", "ns/web"))
    change.add_element(ENDPOINTS.name, SetElement(NUMBERED, VALUE))
    return change


def adding(name: str, *elements: SetElement) -> Transaction:
    return Transaction(added_elements={name: list(elements)})


def removing(name: str, *elements: SetElement) -> Transaction:
    return Transaction(deleted_elements={name: list(elements)})


def rules(*chains: NftChain) -> Transaction:
    return Transaction(added_rules=list(chains))


REJECTED = {
    "delete a chain that a rule jumps to": Transaction(flushed_chains=["used"], deleted_chains=["used"]),
    "delete a chain that a verdict names": Transaction(flushed_chains=["mapped"], deleted_chains=["mapped"]),
    "delete a set that a rule uses": Transaction(deleted_sets=[MEMBERS.name]),
    "delete a missing chain": Transaction(deleted_chains=["none"]),
    "delete a missing set": Transaction(deleted_sets=["none"]),
    "flush a missing chain": Transaction(flushed_chains=["none"]),
    "delete a missing element": removing(MEMBERS.name, SetElement(pack_address("192.0.2.2"))),
    "delete an element twice": removing(MEMBERS.name, SetElement(ADDRESS), SetElement(ADDRESS)),
    "delete from a missing set": removing(names.HAIRPINS, SetElement(ADDRESS)),
    "add to a missing set": adding(names.NODE_PORT_IPS, SetElement(ADDRESS)),
    "change a verdict": adding(VERDICTS.name, SetElement(KEY, DROP)),
    "change an endpoint": adding(ENDPOINTS.name, SetElement(NUMBERED, ADDRESS + b"\x00\x51\x00\x00")),
    "verdict to a missing chain": adding(VERDICTS.name, SetElement(service_key("192.0.2.2", "TCP", 80), "none")),
    "verdict to a base chain": adding(VERDICTS.name, SetElement(service_key("192.0.2.2", "TCP", 80), "base")),
    "rule in a missing chain": rules(NftChain("none", (rule(Drop()),))),
    "rule to a missing chain": rules(NftChain("used", (rule(Goto("none")),))),
    "rule to a base chain": rules(NftChain("used", (rule(Goto("base")),))),
    "rule with a missing set": rules(NftChain("used", (rule(Lookup((KeyField.SOURCE,), "none")),))),
    "rule with a missing verdict map": rules(NftChain("used", (rule(VerdictMap(SERVICE_KEY, names.FIREWALL_IPS)),))),
    "rule with a missing endpoint map": rules(
        NftChain("used", (rule(DnatMap(SERVICE_KEY, 2, names.NODE_PORT_ENDPOINTS)),))
    ),
    "rule that updates a missing set": rules(NftChain("used", (rule(UpdateSet("none")),))),
    "change the type of a set": Transaction(added_sets=[NftSet(MEMBERS.name, SERVICE_KEY)]),
    "change the priority of a base chain": Transaction(
        added_chains=[NftChain("base", (), hook=NftHook("filter", "input", 1))]
    ),
    "valid and invalid change": Transaction(
        added_chains=[NftChain("new", ())], added_rules=[NftChain("new", (rule(Goto("none")),))]
    ),
}
ACCEPTED = {
    "same objects again": table_in_use(),
    "chain with its rules": Transaction(
        deleted_elements={VERDICTS.name: [SetElement(KEY)]}, deleted_chains=["mapped"], deleted_sets=[ENDPOINTS.name]
    ),
    "replace a verdict": Transaction(
        deleted_elements={VERDICTS.name: [SetElement(KEY)]}, added_elements={VERDICTS.name: [SetElement(KEY, DROP)]}
    ),
    "same verdict with another comment": adding(VERDICTS.name, SetElement(KEY, "mapped", "ns/other")),
    "chains before the chains they use": Transaction(
        flushed_chains=["base", "user", "used"], deleted_chains=["used", "user", "base"]
    ),
    "replace a set by one of the same name": Transaction(
        flushed_chains=["user"], deleted_sets=[MEMBERS.name], added_sets=[NftSet(MEMBERS.name, SERVICE_KEY)]
    ),
    "rewrite a chain": Transaction(flushed_chains=["user"], added_rules=[USER]),
    "replace the table": Transaction(create_table=True, replace_table=True, added_sets=[MEMBERS]),
    "delete the table": Transaction(delete_table=True),
}


class FakeAndRealTable:
    """A fake table and a table in the kernel."""

    def __init__(self, node: Namespace, family: Family) -> None:
        self._node = node
        self._family = family
        self.fake = FakeTable(family)
        self.real = NftTable(family, NetlinkCommit(family))

    def commit(self, change: Transaction) -> None:
        self.fake.commit(change)
        self.commit_real(change)

    def commit_real(self, change: Transaction, generation: int | None = None) -> None:
        self._node.call(lambda: self.real.commit(change, generation))

    def generation(self) -> int:
        return self._node.call(self.real.generation)

    def compare(self) -> None:
        """Check that both tables have the same content."""
        assert self._node.call(self.real.snapshot) == self.fake.snapshot()
        assert self._node.call(self.real.chain_use_counts) == self.fake.chain_use_counts()
        if self.fake.table is not None:
            listed = self._node.run(["nft", "list", "table", table_family(self._family), TABLE]).stdout
            assert normalized(listed) == normalized(self._text())

    def _text(self) -> str:
        assert self.fake.table is not None
        table = self.fake.table
        sets = [found.definition for found in table.sets.values()]
        elements = {name: list(found.elements.values()) for name, found in table.sets.items()}
        chains = [NftChain(name, tuple(each.rules), each.comment, each.hook) for name, each in table.chains.items()]
        return NftWriter(self._family).table(sets, elements, chains)


@pytest.fixture
def both(namespaces: Callable[[], Namespace]) -> FakeAndRealTable:
    return FakeAndRealTable(namespaces(), Family.IPV4)


@pytest.mark.parametrize("case", ACCEPTED)
def test_both_accept(both: FakeAndRealTable, case: str) -> None:
    for change in (table_in_use(), ACCEPTED[case]):
        both.commit(change)
        both.compare()


@pytest.mark.parametrize("case", REJECTED)
def test_both_reject_for_the_same_reason_and_stay_unchanged(both: FakeAndRealTable, case: str) -> None:
    both.commit(table_in_use())
    with pytest.raises(TableError) as fake:
        both.fake.commit(REJECTED[case])
    with pytest.raises(TableError) as real:
        both.commit_real(REJECTED[case])
    assert str(real.value).endswith(str(fake.value).rpartition(": ")[2])
    both.compare()


def test_both_count_generations_and_reject_outdated_transactions(both: FakeAndRealTable) -> None:
    both.commit(table_in_use())
    for number, commit in ((both.generation(), both.commit_real), (both.fake.generation(), both.fake.commit)):
        commit(Transaction(added_sets=[NftSet("first", SERVICE_KEY)]), number)
        with pytest.raises(GenerationChangedError):
            commit(Transaction(added_sets=[NftSet("second", SERVICE_KEY)]), number)
        commit(Transaction(added_sets=[NftSet("second", SERVICE_KEY)]), number + 1)
    both.compare()


@settings(deadline=None, max_examples=15)
@given(family_contexts(), histories(), st.sampled_from(SIZES))
def test_both_accept_the_transactions_of_a_proxy(
    kernel: None, contexts: Contexts, history: list[Event], size: int
) -> None:
    undamaged = [event for event in history if not isinstance(event, Damaged)]
    proxy = replay(TablesProxy(contexts, batch_frontends=size), undamaged)
    proxy.settle()
    node = Namespace("both")
    try:
        for family, fake in proxy.kernels.items():
            both = FakeAndRealTable(node, family)
            for change in fake.commits:
                both.commit(change)
            both.compare()
            assert both.fake.table == fake.table
    finally:
        node.close()
