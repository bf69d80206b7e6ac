"""Patches change single rules of a long chain by number; the result is the same as rewriting the chain."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import ChainName
from kproxy.iptables.patch import MIN_PATCHABLE_RULES, RULES_PER_COMMAND, ChainPatch, make_patch
from kproxy.iptables.save_restore import RestoreInput
from kproxy.model.context import Context
from kproxy.model.types import Family
from tests.fakekernel import FakeKernel
from tests.inprocess import SingleServiceProxy

NAME = "KUBE-SVC-A"
CHAIN = ChainName("nat", NAME)


def lines(rules: Sequence[str]) -> str:
    return "\n".join(f"-A {NAME} {rule}" for rule in rules)


def patch_between(existing: Sequence[str], desired: Sequence[str]) -> ChainPatch | None:
    return make_patch(NAME, [hash(f"-A {NAME} {rule}") for rule in existing], lines(desired))


def kernel_with(rules: Sequence[str]) -> FakeKernel:
    kernel = FakeKernel()
    kernel.restore(RestoreInput({CHAIN: lines(rules)}).text())
    return kernel


@settings(max_examples=300)
@given(st.data())
def test_patch_produces_the_desired_chain(data: st.DataObject) -> None:
    rule = st.integers(0, 40).map(lambda number: f"-s 10.0.0.{number}")
    existing = data.draw(st.lists(rule, min_size=MIN_PATCHABLE_RULES, max_size=40))
    desired = list(existing)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(desired)))
        end = begin + data.draw(st.integers(0, 4))
        desired[begin:end] = data.draw(st.lists(rule, max_size=4))
    patch = patch_between(existing, desired)
    if patch is None:
        return
    assert patch.old_length == len(existing)
    assert len(patch.commands) * RULES_PER_COMMAND <= len(desired)
    kernel = kernel_with(existing)
    kernel.restore(RestoreInput(patches={CHAIN: patch}).text())
    assert kernel.tables["nat"][NAME] == desired


@pytest.mark.parametrize("count", [MIN_PATCHABLE_RULES, 10, 100])
@pytest.mark.parametrize("index", [0, 1, -2, -1])
def test_one_changed_rule_is_one_command(count: int, index: int) -> None:
    existing = [f"-s 10.0.0.{number}" for number in range(count)]
    desired = list(existing)
    desired[index] = "-s 10.1.0.1"
    number = index % count + 1
    assert patch_between(existing, desired) == ChainPatch((f"-R {NAME} {number} -s 10.1.0.1",), count, lines(desired))


def test_one_added_or_deleted_rule_is_one_command() -> None:
    existing = [f"-s 10.0.0.{number}" for number in range(9)]
    deletion = patch_between(existing, existing[:2] + existing[3:])
    addition = patch_between(existing, [*existing[:2], "-s 10.1.0.1", *existing[2:]])
    assert deletion is not None
    assert deletion.commands == (f"-D {NAME} 3",)
    assert addition is not None
    assert addition.commands == (f"-I {NAME} 3 -s 10.1.0.1",)


def test_chain_of_equal_rules_is_patched_correctly() -> None:
    existing = ["-s 10.0.0.1"] * 9
    for desired in (existing[1:], [*existing, "-s 10.0.0.1"], [*existing[2:], "-s 10.0.0.2"]):
        patch = patch_between(existing, desired)
        assert patch is not None
        kernel = kernel_with(existing)
        kernel.restore(RestoreInput(patches={CHAIN: patch}).text())
        assert kernel.tables["nat"][NAME] == desired


def test_short_or_very_different_chains_are_not_patched() -> None:
    few = [f"-s 10.0.0.{number}" for number in range(MIN_PATCHABLE_RULES - 1)]
    assert patch_between([*few, "-s 10.1.0.1"], few) is None
    many = [f"-s 10.0.0.{number}" for number in range(3 * RULES_PER_COMMAND)]
    assert patch_between(many, ["-s 10.1.0.1"] * 3 + many[3:]) is not None
    assert patch_between(many, ["-s 10.1.0.1"] * 4 + many[4:]) is None
    assert patch_between(many, many[:2]) is None
    assert make_patch(NAME, [hash(rule) for rule in many], "") is None


def test_patch_is_replaced_by_a_rewrite_unless_the_chain_has_the_expected_length() -> None:
    other = ChainName("nat", "KUBE-SVL-A")
    applicable = ChainPatch((f"-R {NAME} 1 -j ACCEPT",), 4, "-A x")
    outdated = ChainPatch(
        ("-R KUBE-SVL-A 1 -j ACCEPT", "-D KUBE-SVL-A 2"), 4, "-A KUBE-SVL-A -j ACCEPT\n-A KUBE-SVL-A -j DROP"
    )
    change = RestoreInput(
        {ChainName("nat", "KUBE-SEP-A"): ""},
        {CHAIN: applicable, other: outdated},
        [("nat", "-I INPUT 1 -j DROP")],
        [],
        best_effort=True,
    )
    assert change.with_applicable_patches({CHAIN: 4, other: 4}) is change
    # The cost of a patch includes reading the existing rules; these chains are too short for it to count.
    assert change.cost == 4
    assert ChainPatch(outdated.commands, 1000, outdated.rules).cost > 2 + 1000 // 10
    assert change.rules_by_table() == {"nat": 2}
    remaining = change.with_applicable_patches({CHAIN: 4, other: 5})
    assert remaining.patches == {CHAIN: applicable}
    assert remaining.chains == {ChainName("nat", "KUBE-SEP-A"): "", other: outdated.rules}
    assert (remaining.edits, remaining.best_effort) == (change.edits, True)
    assert change.with_applicable_patches({}).patches == {}


# Patches in a whole sync.

SIZES = (1, 3, 4, 9, 30)


class PatchingProxy(SingleServiceProxy):
    """A proxy of one Service whose endpoints change, on a fake kernel."""

    def __init__(
        self,
        kernel: FakeKernel | None = None,
        *,
        patching: bool = True,
        affinity: int = 0,
        ports: int = 1,
        max_transaction_rules: int = 1200,
    ) -> None:
        self.kernel = kernel or FakeKernel()
        backend = IptablesBackend(self.kernel, patching=patching, max_transaction_rules=max_transaction_rules)
        super().__init__(backend, Context(Family.IPV4, "node-1"), affinity=affinity, ports=ports)

    def written_for(self, addresses: Sequence[str]) -> str:
        """Make these addresses the endpoints and return what this wrote."""
        self.kernel.inputs.clear()
        self.sync_endpoints(addresses)
        return "".join(self.kernel.inputs)

    @property
    def written_rules(self) -> int:
        """The number of rules of the nat table that the last sync wrote."""
        return self.result.applied.written_rules["nat"]

    @property
    def chains(self) -> list[str]:
        """The KUBE-SVC chains, one for each port."""
        return [name for name in self.kernel.tables["nat"] if name.startswith("KUBE-SVC")]


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.lists(st.sampled_from(SIZES), min_size=1, max_size=6))
def test_changed_endpoints_leave_the_same_rules_as_a_fresh_start(seed: int, sizes: list[int]) -> None:
    rng = random.Random(seed)
    proxy = PatchingProxy(affinity=60)
    addresses: list[str] = []
    for size in sizes:
        addresses = rng.sample(addresses, min(size, len(addresses)))
        addresses += [f"10.244.{rng.randrange(9)}.{number}" for number in range(size - len(addresses))]
        for _ in range(3):
            proxy.sync_endpoints(addresses)
            fresh = PatchingProxy(affinity=60)
            fresh.sync_endpoints(addresses)
            assert proxy.kernel.dump() == fresh.kernel.dump()
            addresses[rng.randrange(size)] = f"10.245.{rng.randrange(9)}.{rng.randrange(250)}"


MANY = [f"10.244.1.{number}" for number in range(10, 40)]


def test_chain_modified_by_another_process_is_rewritten() -> None:
    proxy = PatchingProxy(affinity=60)
    assert "-R KUBE-SVC" not in proxy.written_for(MANY)
    assert proxy.written_for([*MANY[:-1], "10.244.1.98"]).count("-R KUBE-SVC") == 2
    # The other two are the rules of the new endpoint's own chain.
    assert proxy.written_rules == 4
    (name,) = proxy.chains
    proxy.kernel.restore(f"*nat\n-I {name} 1 -j ACCEPT\nCOMMIT\n")
    assert "-R KUBE-SVC" not in proxy.written_for([*MANY[:-1], "10.244.1.99"])
    assert proxy.written_rules == 2 + 2 * len(MANY)
    assert "-j ACCEPT" not in proxy.kernel.tables["nat"][name]
    assert proxy.written_for(MANY).count("-R KUBE-SVC") == 2
    del proxy.kernel.tables["nat"][name][3:]
    proxy.sync_endpoints([*MANY[:-1], "10.244.1.99"])
    assert len(proxy.kernel.tables["nat"][name]) == 2 * len(MANY)
    assert proxy.kernel.reads == 1


class ConcurrentlyChangedKernel(FakeKernel):
    """A fake kernel in which another process restores `concurrent_input` right before the next restore."""

    def __init__(self) -> None:
        super().__init__()
        self.concurrent_input = ""

    def restore(self, text: str) -> None:
        concurrent_input, self.concurrent_input = self.concurrent_input, ""
        if concurrent_input:
            super().restore(concurrent_input)
        super().restore(text)


def test_only_the_chain_changed_concurrently_by_another_process_is_rewritten() -> None:
    kernel = ConcurrentlyChangedKernel()
    proxy, fresh = PatchingProxy(kernel, ports=3), PatchingProxy(ports=3)
    proxy.sync_endpoints(MANY)
    changed = proxy.chains[1]
    kernel.concurrent_input = f"*nat\n-D {changed} 1\nCOMMIT\n"
    written = proxy.written_for(MANY[1:])
    fresh.sync_endpoints(MANY[1:])
    assert kernel.dump() == fresh.kernel.dump()
    patched = [line.split()[1] for line in written.splitlines() if line.startswith("-D")]
    assert sorted(patched) == sorted([*proxy.chains, changed])
    assert {line.split()[1] for line in written.splitlines() if line.startswith("-A KUBE-SVC")} == {changed}
    assert proxy.written_rules == len(MANY) - 1
    assert kernel.reads == 1
    assert ":KUBE-SVC" not in proxy.written_for(MANY), "the ledger does not know the rewritten chain"


class OnceCountingKernel(FakeKernel):
    """A fake kernel that counts rules only once; later counts find no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = 0

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        self.counts += 1
        return super().count_rules(chains) if self.counts == 1 else {}


def test_chain_is_rewritten_if_its_rules_cannot_be_counted_after_the_patch() -> None:
    proxy, fresh = PatchingProxy(OnceCountingKernel()), PatchingProxy()
    proxy.sync_endpoints(MANY)
    assert "-D KUBE-SVC" in proxy.written_for(MANY[1:])
    assert proxy.kernel.inputs[-1].count("-A KUBE-SVC") == len(MANY) - 1
    fresh.sync_endpoints(MANY[1:])
    assert proxy.kernel.dump() == fresh.kernel.dump()


def test_without_patching_chains_are_always_rewritten() -> None:
    proxy = PatchingProxy(patching=False)
    proxy.sync_endpoints(MANY)
    assert "-R KUBE-SVC" not in proxy.written_for([*MANY[:-1], "10.244.1.98"])


def test_chain_with_the_minimum_number_of_rules_is_patched() -> None:
    proxy = PatchingProxy()
    proxy.sync_endpoints(MANY[:MIN_PATCHABLE_RULES])
    assert "-R KUBE-SVC" in proxy.written_for([*MANY[: MIN_PATCHABLE_RULES - 1], "10.244.1.98"])


def test_chain_of_each_port_is_patched() -> None:
    proxy, fresh = PatchingProxy(ports=3), PatchingProxy(ports=3)
    proxy.sync_endpoints(MANY)
    assert {
        line.split()[1] for line in proxy.written_for([*MANY[:-1], "10.244.1.98"]).splitlines() if line[:2] == "-R"
    } == {*proxy.chains}
    fresh.sync_endpoints([*MANY[:-1], "10.244.1.98"])
    assert len(proxy.chains) == 3
    assert proxy.kernel.dump() == fresh.kernel.dump()
