"""Single rules of a long chain are changed, by numbers, and the chain ends as if it had been written anew."""

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


def way(held: Sequence[str], wanted: Sequence[str]) -> ChainPatch | None:
    return make_patch(NAME, [hash(f"-A {NAME} {rule}") for rule in held], lines(wanted))


def kernel_with(rules: Sequence[str]) -> FakeKernel:
    kernel = FakeKernel()
    kernel.restore(RestoreInput({CHAIN: lines(rules)}).text())
    return kernel


@settings(max_examples=300)
@given(st.data())
def test_a_patch_leads_to_what_is_wanted(data: st.DataObject) -> None:
    rule = st.integers(0, 40).map(lambda number: f"-s 10.0.0.{number}")
    held = data.draw(st.lists(rule, min_size=MIN_PATCHABLE_RULES, max_size=40))
    wanted = list(held)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(wanted)))
        end = begin + data.draw(st.integers(0, 4))
        wanted[begin:end] = data.draw(st.lists(rule, max_size=4))
    found = way(held, wanted)
    if found is None:
        return
    assert found.old_length == len(held)
    assert len(found.commands) * RULES_PER_COMMAND <= len(wanted)
    kernel = kernel_with(held)
    kernel.restore(RestoreInput(patches={CHAIN: found}).text())
    assert kernel.tables["nat"][NAME] == wanted


@pytest.mark.parametrize("count", [MIN_PATCHABLE_RULES, 10, 100])
@pytest.mark.parametrize("place", [0, 1, -2, -1])
def test_one_other_rule_is_one_command(count: int, place: int) -> None:
    held = [f"-s 10.0.0.{number}" for number in range(count)]
    wanted = list(held)
    wanted[place] = "-s 10.1.0.1"
    number = place % count + 1
    assert way(held, wanted) == ChainPatch((f"-R {NAME} {number} -s 10.1.0.1",), count, lines(wanted))


def test_a_rule_that_goes_or_comes_takes_no_more_than_those_that_differ() -> None:
    held = [f"-s 10.0.0.{number}" for number in range(9)]
    gone, more = way(held, held[:2] + held[3:]), way(held, [*held[:2], "-s 10.1.0.1", *held[2:]])
    assert gone is not None
    assert gone.commands == (f"-D {NAME} 3",)
    assert more is not None
    assert more.commands == (f"-I {NAME} 3 -s 10.1.0.1",)


def test_rules_that_are_alike_are_not_mixed_up() -> None:
    held = ["-s 10.0.0.1"] * 9
    for wanted in (held[1:], [*held, "-s 10.0.0.1"], [*held[2:], "-s 10.0.0.2"]):
        found = way(held, wanted)
        assert found is not None
        kernel = kernel_with(held)
        kernel.restore(RestoreInput(patches={CHAIN: found}).text())
        assert kernel.tables["nat"][NAME] == wanted


def test_what_is_written_anew() -> None:
    few = [f"-s 10.0.0.{number}" for number in range(MIN_PATCHABLE_RULES - 1)]
    assert way([*few, "-s 10.1.0.1"], few) is None
    many = [f"-s 10.0.0.{number}" for number in range(3 * RULES_PER_COMMAND)]
    assert way(many, ["-s 10.1.0.1"] * 3 + many[3:]) is not None
    assert way(many, ["-s 10.1.0.1"] * 4 + many[4:]) is None
    assert way(many, many[:2]) is None
    assert make_patch(NAME, [hash(rule) for rule in many], "") is None


def test_a_patch_stays_only_while_the_chain_is_as_long_as_it_says() -> None:
    other = ChainName("nat", "KUBE-SVL-A")
    fits = ChainPatch((f"-R {NAME} 1 -j ACCEPT",), 4, "-A x")
    late = ChainPatch(
        ("-R KUBE-SVL-A 1 -j ACCEPT", "-D KUBE-SVL-A 2"), 4, "-A KUBE-SVL-A -j ACCEPT\n-A KUBE-SVL-A -j DROP"
    )
    change = RestoreInput(
        {ChainName("nat", "KUBE-SEP-A"): ""},
        {CHAIN: fits, other: late},
        [("nat", "-I INPUT 1 -j DROP")],
        [],
        best_effort=True,
    )
    assert change.with_applicable_patches({CHAIN: 4, other: 4}) is change
    # The patch of a chain counts for the rules that have to be read, too: here too few to matter.
    assert change.cost == 4
    assert ChainPatch(late.commands, 1000, late.rules).cost > 2 + 1000 // 10
    assert change.rules_by_table() == {"nat": 2}
    settled = change.with_applicable_patches({CHAIN: 4, other: 5})
    assert settled.patches == {CHAIN: fits}
    assert settled.chains == {ChainName("nat", "KUBE-SEP-A"): "", other: late.rules}
    assert (settled.edits, settled.best_effort) == (change.edits, True)
    assert change.with_applicable_patches({}).patches == {}


# With the whole way of a change.

SIZES = (1, 3, 4, 9, 30)


class PatchingProxy(SingleServiceProxy):
    """One Service whose endpoints change, on a fake kernel."""

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
        return self.result.written.rules["nat"]

    @property
    def chains(self) -> list[str]:
        """The chains that pick endpoints, one for each port."""
        return [name for name in self.kernel.tables["nat"] if name.startswith("KUBE-SVC")]


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.lists(st.sampled_from(SIZES), min_size=1, max_size=6))
def test_endpoints_come_go_and_are_replaced(seed: int, sizes: list[int]) -> None:
    chance = random.Random(seed)
    proxy = PatchingProxy(affinity=60)
    addresses: list[str] = []
    for size in sizes:
        addresses = chance.sample(addresses, min(size, len(addresses)))
        addresses += [f"10.244.{chance.randrange(9)}.{number}" for number in range(size - len(addresses))]
        for _ in range(3):
            proxy.sync_endpoints(addresses)
            fresh = PatchingProxy(affinity=60)
            fresh.sync_endpoints(addresses)
            assert proxy.kernel.dump() == fresh.kernel.dump()
            addresses[chance.randrange(size)] = f"10.245.{chance.randrange(9)}.{chance.randrange(250)}"


MANY = [f"10.244.1.{number}" for number in range(10, 40)]


def test_a_chain_that_somebody_else_was_at_is_written_anew() -> None:
    proxy = PatchingProxy(affinity=60)
    assert "-R KUBE-SVC" not in proxy.written_for(MANY)
    assert proxy.written_for([*MANY[:-1], "10.244.1.98"]).count("-R KUBE-SVC") == 2
    # The two rules of the new endpoint's own chain as well.
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


class Crowded(FakeKernel):
    """A kernel in which somebody else makes a change right before ours."""

    def __init__(self) -> None:
        super().__init__()
        self.others = ""

    def restore(self, text: str) -> None:
        others, self.others = self.others, ""
        if others:
            super().restore(others)
        super().restore(text)


def test_of_chains_that_somebody_else_changed_at_the_same_moment_only_these_are_written_anew() -> None:
    kernel = Crowded()
    proxy, fresh = PatchingProxy(kernel, ports=3), PatchingProxy(ports=3)
    proxy.sync_endpoints(MANY)
    crossed = proxy.chains[1]
    kernel.others = f"*nat\n-D {crossed} 1\nCOMMIT\n"
    written = proxy.written_for(MANY[1:])
    fresh.sync_endpoints(MANY[1:])
    assert kernel.dump() == fresh.kernel.dump()
    patched = [line.split()[1] for line in written.splitlines() if line.startswith("-D")]
    assert sorted(patched) == sorted([*proxy.chains, crossed])
    assert {line.split()[1] for line in written.splitlines() if line.startswith("-A KUBE-SVC")} == {crossed}
    assert proxy.written_rules == len(MANY) - 1
    assert kernel.reads == 1
    assert ":KUBE-SVC" not in proxy.written_for(MANY), "and all that is there is known"


class Forgetful(FakeKernel):
    """A kernel that tells only once how many rules chains have."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        self.asked += 1
        return super().count_rules(chains) if self.asked == 1 else {}


def test_a_chain_of_which_nobody_can_tell_whether_it_was_left_alone_is_written_anew() -> None:
    proxy, fresh = PatchingProxy(Forgetful()), PatchingProxy()
    proxy.sync_endpoints(MANY)
    assert "-D KUBE-SVC" in proxy.written_for(MANY[1:])
    assert proxy.kernel.inputs[-1].count("-A KUBE-SVC") == len(MANY) - 1
    fresh.sync_endpoints(MANY[1:])
    assert proxy.kernel.dump() == fresh.kernel.dump()


def test_without_patching_chains_are_always_written_anew() -> None:
    proxy = PatchingProxy(patching=False)
    proxy.sync_endpoints(MANY)
    assert "-R KUBE-SVC" not in proxy.written_for([*MANY[:-1], "10.244.1.98"])


def test_the_shortest_chain_that_is_patched() -> None:
    proxy = PatchingProxy()
    proxy.sync_endpoints(MANY[:MIN_PATCHABLE_RULES])
    assert "-R KUBE-SVC" in proxy.written_for([*MANY[: MIN_PATCHABLE_RULES - 1], "10.244.1.98"])


def test_each_port_has_a_patch_of_its_own() -> None:
    proxy, fresh = PatchingProxy(ports=3), PatchingProxy(ports=3)
    proxy.sync_endpoints(MANY)
    assert {
        line.split()[1] for line in proxy.written_for([*MANY[:-1], "10.244.1.98"]).splitlines() if line[:2] == "-R"
    } == {*proxy.chains}
    fresh.sync_endpoints([*MANY[:-1], "10.244.1.98"])
    assert len(proxy.chains) == 3
    assert proxy.kernel.dump() == fresh.kernel.dump()
