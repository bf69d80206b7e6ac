"""The table in memory takes and refuses what the kernel takes and refuses, and holds the same afterwards."""

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
from tests.kernel.test_nftables_commit import in_order
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


def held() -> Transaction:
    """A table where everything is in use."""
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


REFUSED = {
    "delete a chain that a rule goes to": Transaction(flushed_chains=["used"], deleted_chains=["used"]),
    "delete a chain that an element goes to": Transaction(flushed_chains=["mapped"], deleted_chains=["mapped"]),
    "delete a set that a rule looks at": Transaction(deleted_sets=[MEMBERS.name]),
    "delete what is not there": Transaction(deleted_chains=["none"]),
    "delete a set that is not there": Transaction(deleted_sets=["none"]),
    "flush what is not there": Transaction(flushed_chains=["none"]),
    "remove what is not there": removing(MEMBERS.name, SetElement(pack_address("192.0.2.2"))),
    "remove twice": removing(MEMBERS.name, SetElement(ADDRESS), SetElement(ADDRESS)),
    "remove from no set": removing(names.HAIRPINS, SetElement(ADDRESS)),
    "add to no set": adding(names.NODE_PORT_IPS, SetElement(ADDRESS)),
    "another verdict": adding(VERDICTS.name, SetElement(KEY, DROP)),
    "another endpoint": adding(ENDPOINTS.name, SetElement(NUMBERED, ADDRESS + b"\x00\x51\x00\x00")),
    "a verdict to no chain": adding(VERDICTS.name, SetElement(service_key("192.0.2.2", "TCP", 80), "none")),
    "a verdict to a base chain": adding(VERDICTS.name, SetElement(service_key("192.0.2.2", "TCP", 80), "base")),
    "a rule in no chain": rules(NftChain("none", (rule(Drop()),))),
    "a rule to no chain": rules(NftChain("used", (rule(Goto("none")),))),
    "a rule to a base chain": rules(NftChain("used", (rule(Goto("base")),))),
    "a rule with no set": rules(NftChain("used", (rule(Lookup((KeyField.SOURCE,), "none")),))),
    "a rule with no map": rules(NftChain("used", (rule(VerdictMap(SERVICE_KEY, names.FIREWALL_IPS)),))),
    "a rule with no map of endpoints": rules(
        NftChain("used", (rule(DnatMap(SERVICE_KEY, 2, names.NODE_PORT_ENDPOINTS)),))
    ),
    "a rule that remembers nowhere": rules(NftChain("used", (rule(UpdateSet("none")),))),
    "a set of another type": Transaction(added_sets=[NftSet(MEMBERS.name, SERVICE_KEY)]),
    "a base chain of another priority": Transaction(
        added_chains=[NftChain("base", (), hook=NftHook("filter", "input", 1))]
    ),
    "good and bad": Transaction(
        added_chains=[NftChain("new", ())], added_rules=[NftChain("new", (rule(Goto("none")),))]
    ),
}
TAKEN = {
    "the same once more": held(),
    "a chain with its rules": Transaction(
        deleted_elements={VERDICTS.name: [SetElement(KEY)]}, deleted_chains=["mapped"], deleted_sets=[ENDPOINTS.name]
    ),
    "another verdict after the first": Transaction(
        deleted_elements={VERDICTS.name: [SetElement(KEY)]}, added_elements={VERDICTS.name: [SetElement(KEY, DROP)]}
    ),
    "the same verdict with another comment": adding(VERDICTS.name, SetElement(KEY, "mapped", "ns/other")),
    "users before used": Transaction(flushed_chains=["base", "user", "used"], deleted_chains=["used", "user", "base"]),
    "a set in place of one of the same name": Transaction(
        flushed_chains=["user"], deleted_sets=[MEMBERS.name], added_sets=[NftSet(MEMBERS.name, SERVICE_KEY)]
    ),
    "a chain once more": Transaction(flushed_chains=["user"], added_rules=[USER]),
    "all anew": Transaction(create_table=True, replace_table=True, added_sets=[MEMBERS]),
    "nothing left": Transaction(delete_table=True),
}


class Both:
    """A table in memory, and one in the kernel."""

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
        """Make sure that they hold the same."""
        assert self._node.call(self.real.snapshot) == self.fake.snapshot()
        assert self._node.call(self.real.chain_use_counts) == self.fake.chain_use_counts()
        if self.fake.table is not None:
            listed = self._node.run(["nft", "list", "table", table_family(self._family), TABLE]).stdout
            assert in_order(listed) == in_order(self._text())

    def _text(self) -> str:
        assert self.fake.table is not None
        table = self.fake.table
        sets = [found.definition for found in table.sets.values()]
        elements = {name: list(found.elements.values()) for name, found in table.sets.items()}
        chains = [NftChain(name, tuple(each.rules), each.comment, each.hook) for name, each in table.chains.items()]
        return NftWriter(self._family).table(sets, elements, chains)


@pytest.fixture
def both(namespaces: Callable[[], Namespace]) -> Both:
    return Both(namespaces(), Family.IPV4)


@pytest.mark.parametrize("what", TAKEN)
def test_both_take(both: Both, what: str) -> None:
    for change in (held(), TAKEN[what]):
        both.commit(change)
        both.compare()


@pytest.mark.parametrize("what", REFUSED)
def test_both_refuse_for_the_same_reason_and_keep_what_they_had(both: Both, what: str) -> None:
    both.commit(held())
    with pytest.raises(TableError) as fake:
        both.fake.commit(REFUSED[what])
    with pytest.raises(TableError) as real:
        both.commit_real(REFUSED[what])
    assert str(real.value).endswith(str(fake.value).rpartition(": ")[2])
    both.compare()


def test_both_count_transactions_and_refuse_those_that_come_too_late(both: Both) -> None:
    both.commit(held())
    for number, commit in ((both.generation(), both.commit_real), (both.fake.generation(), both.fake.commit)):
        commit(Transaction(added_sets=[NftSet("first", SERVICE_KEY)]), number)
        with pytest.raises(GenerationChangedError):
            commit(Transaction(added_sets=[NftSet("second", SERVICE_KEY)]), number)
        commit(Transaction(added_sets=[NftSet("second", SERVICE_KEY)]), number + 1)
    both.compare()


@settings(deadline=None, max_examples=15)
@given(family_contexts(), histories(), st.sampled_from(SIZES))
def test_what_the_one_takes_of_a_proxy_the_other_takes(
    kernel: None, contexts: Contexts, history: list[Event], size: int
) -> None:
    undamaged = [event for event in history if not isinstance(event, Damaged)]
    proxy = replay(TablesProxy(contexts, batch_frontends=size), undamaged)
    proxy.settle()
    node = Namespace("both")
    try:
        for family, fake in proxy.kernels.items():
            both = Both(node, family)
            for change in fake.commits:
                both.commit(change)
            both.compare()
            assert both.fake.table == fake.table
    finally:
        node.close()
