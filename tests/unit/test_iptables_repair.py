"""Whatever another process does to kproxy's iptables rules, a repair or a comparison restores exactly what differs."""

from __future__ import annotations

import errno
import queue
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kproxy.host.commands import CommandError
from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.comparison import CHAINS_PER_STEP, MAX_STEPS, MIN_RULES
from kproxy.iptables.foreign_changes import CONTENT_CPU_SHARE, GenerationCounter, TableObserver
from kproxy.iptables.foreign_rules import conditional_match, ends_evaluation, restore_commands
from kproxy.iptables.legacy_poll import LegacyPoll
from kproxy.iptables.names import ChainName
from kproxy.iptables.repair import Scope
from kproxy.iptables.runner import RestoreError
from kproxy.model.context import Context
from kproxy.model.delta import Delta, Upsert
from kproxy.model.drift import Part, RepairResult, RulesChanged, Touched
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.sync.family_sync import StorePlans
from tests.fakekernel import BUILTIN, FakeKernel, Table
from tests.unit.strategies import deltas
from tests.unit.test_iptables_incremental import THRESHOLDS, KernelsProxy

V4 = Family.IPV4
FOREIGN = ("-s 192.0.2.77/32 -j ACCEPT", "-j RETURN", "-j DROP")
"""Rules that another process inserts; only the first one has a match."""


def is_own(chain: str) -> bool:
    """Return whether all rules of a chain are kproxy's. KUBE-FIREWALL belongs to the kubelet, too."""
    return chain.startswith("KUBE-") and chain != "KUBE-FIREWALL"


class DamagedProxy(KernelsProxy):
    """A proxy on fake kernels. Another process changes the rules of IPv4."""

    def __init__(self, deltas: Sequence[Delta] = (), *, dispatch_threshold: int = 1000) -> None:
        super().__init__(dispatch_threshold=dispatch_threshold)
        for delta in deltas:
            self.apply(delta)
        self.settle()
        self.kernel = self.kernels[V4]
        self.intact = self.rules()

    def rules(self) -> dict[str, Table]:
        """Return the rules, without those in `FOREIGN` in shared chains. None of these may block rules of kproxy."""
        for table, chains in self.kernel.tables.items():
            for rules in (chains[name] for name in BUILTIN[table]):
                blocked = [index for index, rule in enumerate(rules) if rule in FOREIGN[1:]]
                assert not any("KUBE-" in rule for rule in rules[min(blocked, default=len(rules)) :])
        return {
            table: {
                name: [rule for rule in rules if is_own(name) or rule not in FOREIGN] for name, rules in chains.items()
            }
            for table, chains in self.kernel.tables.items()
        }

    def damage(self, change: Callable[[dict[str, Table]], object]) -> dict[str, Touched]:
        """Let another process change the tables. Return what it has touched."""
        before = deepcopy(self.kernel.tables)
        change(self.kernel.tables)
        self.kernel.foreign_commits += 1
        touched: dict[str, Touched] = {}
        for table, chains in self.kernel.tables.items():
            names = {name for name in {*chains, *before[table]} if chains.get(name) != before[table].get(name)}
            if names:
                touched[table] = Touched(chains=names)
        return touched

    def repair(self, touched: dict[str, Touched]) -> RepairResult:
        """Repair what was touched. If only a full sync can, run it."""
        result = self.families[V4].repair(self.store, touched)
        if result.needs_full_sync or result.skipped:
            self.families[V4].sync(self.store)
        return result

    def compare(self) -> list[RepairResult]:
        """Run a complete comparison."""
        results = []
        while (result := self.families[V4].compare_next(self.store)) is not None:
            results.append(result)
        return results


def flush(choose: random.Random, chains: Table, name: str) -> None:
    chains[name].clear()


def delete_rule(choose: random.Random, chains: Table, name: str) -> None:
    if rules := chains[name]:
        rules.pop(choose.randrange(len(rules)))


def insert_rule(choose: random.Random, chains: Table, name: str) -> None:
    chains[name].insert(choose.randint(0, len(chains[name])), choose.choice(FOREIGN))


def replace_rule(choose: random.Random, chains: Table, name: str) -> None:
    if rules := chains[name]:
        rules[choose.randrange(len(rules))] = choose.choice(FOREIGN)


def reorder_rules(choose: random.Random, chains: Table, name: str) -> None:
    if is_own(name):
        choose.shuffle(chains[name])


def delete_chain(choose: random.Random, chains: Table, name: str) -> None:
    """Delete a chain and the rules that jump to it. Otherwise, the kernel would not accept it."""
    if name.startswith("KUBE-"):
        del chains[name]
        for rules in chains.values():
            rules[:] = [rule for rule in rules if f"-j {name}" not in rule]


def create_stale_chain(choose: random.Random, chains: Table, name: str) -> None:
    if "KUBE-MARK-MASQ" in chains:
        chains["KUBE-SVC-AAAAAAAAAAAAAAAA"] = ["-j RETURN"]


def delete_everything(choose: random.Random, chains: Table, name: str) -> None:
    for each in list(chains):
        chains[each] = []
        if each.startswith("KUBE-"):
            del chains[each]


CHANGES = (flush, delete_rule, insert_rule, replace_rule, reorder_rules, delete_chain, create_stale_chain)


def random_change(seed: int, steps: int) -> Callable[[dict[str, Table]], None]:
    """Return a random change of the tables, as the kernel would accept it."""

    def change(tables: dict[str, Table]) -> None:
        choose = random.Random(seed)
        for _ in range(steps):
            chains = tables[choose.choice(list(tables))]
            kind = delete_everything if choose.random() < 0.05 else choose.choice(CHANGES)
            kind(choose, chains, choose.choice(list(chains)))

    return change


damages = st.builds(random_change, st.integers(0, 2**32), st.integers(1, 4))


@pytest.fixture(params=[(MIN_RULES, 0), (0, 0), (0, 1000)], ids=["small tables", "large tables", "large and listed"])
def _size_of_tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all tables as small or as large ones."""
    min_rules, max_listed_chains = request.param
    monkeypatch.setattr("kproxy.iptables.comparison.MIN_RULES", min_rules)
    monkeypatch.setattr("kproxy.iptables.table_content.MAX_LISTED_CHAINS", max_listed_chains)


@pytest.mark.usefixtures("_size_of_tables")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(deltas(), max_size=12), damages, st.sampled_from(THRESHOLDS), st.booleans())
def test_any_damage_is_repaired_exactly(
    history: list[Delta], change: Callable[[dict[str, Table]], None], threshold: int, everything: bool
) -> None:
    proxy = DamagedProxy(history, dispatch_threshold=threshold)
    proxy.compare()
    touched = proxy.damage(change)
    if everything:
        touched = {table: Touched(everything=True) for table in proxy.kernel.tables}
    proxy.repair(touched)
    assert proxy.rules() == proxy.intact
    proxy.kernel.inputs.clear()
    assert not proxy.repair({table: Touched(everything=True) for table in proxy.kernel.tables}).repaired
    assert not proxy.kernel.inputs


@settings(deadline=None, max_examples=100)
@given(st.lists(deltas(), max_size=12), damages, st.sampled_from(THRESHOLDS), st.booleans(), st.booleans())
def test_comparison_finds_and_repairs_any_damage(
    history: list[Delta],
    change: Callable[[dict[str, Table]], None],
    threshold: int,
    is_legacy: bool,
    has_learned: bool,
) -> None:
    proxy = DamagedProxy(history, dispatch_threshold=threshold)
    proxy.kernel.has_fingerprints = not is_legacy
    if has_learned:
        proxy.compare()
    proxy.damage(lambda tables: tables["filter"].update(OTHER=[]))
    proxy.compare()
    proxy.damage(change)
    proxy.compare()
    stale = "KUBE-SVC-AAAAAAAAAAAAAAAA"  # only a check of the table as a whole finds chains that nobody uses
    proxy.intact["filter"]["OTHER"] = []
    found = proxy.rules()
    for tables in (found, proxy.intact):
        tables["nat"].pop(stale, None)
        tables["filter"].pop("OTHER", None)
    assert found == proxy.intact


@settings(deadline=None, max_examples=50)
@given(st.lists(deltas(), max_size=8), st.lists(deltas(), max_size=4), damages)
def test_repair_between_changes_and_their_sync_leaves_the_rules_of_a_fresh_start(
    history: list[Delta], later: list[Delta], change: Callable[[dict[str, Table]], None]
) -> None:
    proxy = DamagedProxy(history)
    touched = proxy.damage(change)
    for delta in later:
        proxy.apply(delta)
    proxy.repair(touched)
    proxy.settle()
    fresh = DamagedProxy([*history, *later])
    assert proxy.rules() == fresh.rules()


def a_service(name: str = "a", number: int = 1, *, node_port: int = 0) -> list[Delta]:
    endpoints = tuple(Endpoint(f"10.244.{number}.{last}") for last in (1, 2))
    return [
        Upsert(Service("ns", name, (f"10.96.0.{number}",), (ServicePort("", 80, "TCP", node_port),))),
        Upsert(EndpointSlice("ns", name, f"ns/{name}", V4, endpoints, (EndpointPort("", 8080, "TCP"),))),
    ]


def test_only_the_damaged_chain_is_read_and_written() -> None:
    proxy = DamagedProxy([*a_service(), *a_service("b", 2)])
    chain = next(name for name in proxy.kernel.tables["nat"] if name.startswith("KUBE-SVC-"))
    touched = proxy.damage(lambda tables: tables["nat"][chain].pop())
    proxy.kernel.inputs.clear()
    reads = proxy.kernel.reads
    result = proxy.repair(touched)
    assert result == RepairResult(repaired=(Part("nat", "chain", chain),))
    assert proxy.kernel.reads == reads
    (text,) = proxy.kernel.inputs
    assert {line.split()[1] for line in text.splitlines() if line.startswith("-A")} == {chain}
    assert proxy.rules() == proxy.intact


def test_chains_of_other_tools_are_not_read() -> None:
    proxy = DamagedProxy(a_service())

    def unexpected(chains: object) -> dict[ChainName, list[str]]:
        raise AssertionError(chains)

    proxy.kernel.list_rules = unexpected  # type: ignore[method-assign]
    assert proxy.repair({"nat": Touched(chains={"DOCKER", "CNI-0"})}) == RepairResult()


def test_flushed_table_of_many_services_is_restored_by_a_full_sync() -> None:
    proxy = DamagedProxy([delta for number in range(1, 150) for delta in a_service(f"s{number}", number)])

    def flush_all(tables: dict[str, Table]) -> None:
        for rules in tables["nat"].values():
            rules.clear()

    assert proxy.repair(proxy.damage(flush_all)).needs_full_sync
    assert proxy.rules() == proxy.intact


def test_chain_that_disappears_during_a_repair_is_restored_as_well() -> None:
    proxy = DamagedProxy(a_service())
    service = next(name for name in proxy.kernel.tables["nat"] if name.startswith("KUBE-SVC-"))
    touched = proxy.damage(lambda tables: tables["nat"]["KUBE-SERVICES"].pop(0))
    proxy.damage(lambda tables: tables["nat"].pop(service))
    result = proxy.repair(touched)
    assert {Part("nat", "chain", "KUBE-SERVICES"), Part("nat", "chain", service)} <= set(result.repaired)
    assert proxy.rules() == proxy.intact


def test_rejected_repair_is_an_error_and_the_next_sync_is_full() -> None:
    proxy = DamagedProxy(a_service())
    touched = proxy.damage(lambda tables: tables["nat"]["KUBE-SERVICES"].clear())
    proxy.kernel.reject = lambda _: "out of memory"
    with pytest.raises(SyncError, match="out of memory"):
        proxy.repair(touched)
    proxy.kernel.reject = lambda _: None
    assert proxy.repair(touched).skipped, "a full sync is necessary anyway"
    assert proxy.rules() == proxy.intact


def test_dormant_table_is_awakened() -> None:
    proxy = DamagedProxy(a_service())
    proxy.kernel.dormant = {"nat"}
    assert proxy.repair({"nat": Touched(everything=True)}) == RepairResult((Part("nat", "table"),))
    assert not proxy.kernel.dormant


def test_comparison_awakens_a_dormant_table() -> None:
    proxy = DamagedProxy(a_service())
    proxy.damage(lambda _: proxy.kernel.dormant.update({"nat", "mangle"}))
    results = proxy.compare()
    assert {part for result in results for part in result.repaired} == {Part("nat", "table"), Part("mangle", "table")}
    assert not proxy.kernel.dormant


def test_full_sync_awakens_dormant_tables() -> None:
    proxy = DamagedProxy(a_service())
    proxy.kernel.dormant = {"filter", "nat"}
    proxy.families[V4].forget()
    proxy.families[V4].sync(proxy.store)
    assert not proxy.kernel.dormant


def test_dormant_table_that_cannot_be_awakened_is_a_finding() -> None:
    proxy = DamagedProxy(a_service())
    proxy.kernel.dormant = {"nat"}
    proxy.kernel.awakening_error = "cannot awaken table nat: Operation not permitted"
    result = proxy.repair({"nat": Touched(everything=True)})
    assert result == RepairResult(findings=(f"Services have no effect: {proxy.kernel.awakening_error}",))


def test_conditional_rule_before_the_jump_is_a_finding() -> None:
    proxy = DamagedProxy(a_service(node_port=30080))
    rules = ["-d 10.96.0.0/16 -j DROP", "-p tcp -m tcp --dport 30000:30100 -j REDIRECT", "-d 192.0.2.0/24 -j ACCEPT"]
    touched = proxy.damage(lambda tables: tables["nat"]["PREROUTING"].__setitem__(slice(0, 0), rules))
    result = proxy.repair(touched)
    assert not result.repaired
    assert [finding.partition("kproxy's rules: ")[2] for finding in result.findings] == [
        "-A PREROUTING -d 10.96.0.0/16 -j DROP",
        "-A PREROUTING -p tcp -m tcp --dport 30000:30100 -j REDIRECT",
    ]
    assert all("chain PREROUTING of table nat" in finding for finding in result.findings)


def test_full_sync_moves_jumps_before_a_rule_that_ends_evaluation() -> None:
    proxy = DamagedProxy(a_service())
    proxy.damage(lambda tables: tables["nat"]["OUTPUT"].insert(0, "-j RETURN"))
    proxy.families[V4].forget()
    proxy.families[V4].sync(proxy.store)
    assert proxy.rules() == proxy.intact
    assert proxy.kernel.tables["nat"]["OUTPUT"][-1] == "-j RETURN"


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        ("-A OUTPUT -j ACCEPT", True),
        ('-A OUTPUT -m comment --comment "all -s packets" -j DROP', True),
        ("-A OUTPUT -j REJECT --reject-with icmp-port-unreachable", True),
        ("-A OUTPUT -s 10.0.0.0/8 -j ACCEPT", False),
        ("-A OUTPUT -j LOG", False),
        ("-A OUTPUT -g NOWHERE", True),
        ("-A OUTPUT -j DROPS", True),
        ("-A OUTPUT -j RETURNS", False),
        ("-A OUTPUT -j NESTED", True),
        ("-A OUTPUT -j MAY-RETURN", False),
        ("-A OUTPUT -j LOOP", False),
    ],
)
def test_rules_that_end_the_evaluation_for_every_packet(rule: str, ends: bool) -> None:
    chains = {
        "DROPS": ["-A DROPS -s 10.0.0.1/32 -j LOG", "-A DROPS -j DROP"],
        "RETURNS": ["-A RETURNS -j RETURN", "-A RETURNS -j DROP"],
        "MAY-RETURN": ["-A MAY-RETURN -s 10.0.0.1/32 -j RETURN", "-A MAY-RETURN -j DROP"],
        "NESTED": ["-A NESTED -j RETURNS", "-A NESTED -j DROPS"],
        "LOOP": ["-A LOOP -j LOOP"],
    }
    assert ends_evaluation(rule, "filter", lambda chain: chains.get(chain.name, [])) is ends


def test_matches_without_destination_or_with_negation_are_no_findings() -> None:
    for rule in (
        "-A OUTPUT -s 10.0.0.1/32 -j DROP",
        "-A OUTPUT ! -d 10.96.0.0/12 -j DROP",
        "-A OUTPUT -d 10.0.0.1 -j LOG",
    ):
        assert conditional_match(rule) is None


def test_jumps_are_inserted_in_order_between_foreign_rules() -> None:
    ensured = [rule for rule in ensured_rules(Context(V4, "n")) if rule.chain == ChainName("filter", "INPUT")]
    assert len(ensured) > 2
    own = [rule.text for rule in ensured]
    foreign = "-A INPUT -s 192.0.2.1/32 -j LOG"
    commands = restore_commands([foreign, own[0], own[2]], ensured, 3)
    assert commands[0] == f"-I INPUT 3 {ensured[1].rule}"
    assert restore_commands([foreign, *own], ensured, len(own) + 1) == []
    assert restore_commands([], ensured, 0) == [f"-I INPUT {n} {rule.rule}" for n, rule in enumerate(ensured, 1)]


# Comparison


def test_fingerprints_of_all_chains_are_learned_soon_after_the_first_sync() -> None:
    proxy = DamagedProxy(a_service())
    assert {name for name in proxy.kernel.tables["nat"] if name.startswith("KUBE-S")} <= {
        chain.name for chain in proxy.kernel.fingerprinted
    }


def test_idle_comparison_reads_nothing_after_it_has_learned_the_fingerprints() -> None:
    proxy = DamagedProxy(a_service())
    proxy.compare()
    reads = proxy.kernel.reads
    proxy.kernel.fingerprinted.clear()
    assert proxy.compare() == []
    assert proxy.kernel.reads == reads
    assert not proxy.kernel.fingerprinted


@pytest.mark.parametrize("method", ["foreign_changes", "latest_foreign_changes", "fingerprints"])
@pytest.mark.parametrize("error", [CommandError("out of processes"), OSError(errno.ENOBUFS, "out of buffers")])
def test_kernel_that_cannot_tell_what_changed_is_an_error_of_the_comparison_only(
    method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    proxy = DamagedProxy(a_service())
    proxy.damage(lambda tables: tables["nat"]["KUBE-SERVICES"].clear())
    with monkeypatch.context() as patched:
        patched.setattr(proxy.kernel, method, fail)
        proxy.families[V4].forget()
        proxy.families[V4].sync(proxy.store)
        assert proxy.rules() == proxy.intact
        for delta in a_service("b", 2):  # the comparison does not know its fingerprint
            proxy.families[V4].add_changes(proxy.store.apply(delta))
        proxy.families[V4].sync(proxy.store)
        proxy.intact = proxy.rules()
        with pytest.raises(SyncError, match="out of"):
            proxy.compare()
    proxy.damage(lambda tables: tables["nat"]["KUBE-SERVICES"].clear())
    assert proxy.compare()
    assert proxy.rules() == proxy.intact


def test_comparison_that_finds_damage_also_deletes_stale_chains() -> None:
    """As after another process has restored an old rule set."""
    proxy = DamagedProxy(a_service())

    def restore(tables: dict[str, Table]) -> None:
        tables["nat"]["KUBE-SERVICES"].clear()
        tables["nat"]["KUBE-SVC-AAAAAAAAAAAAAAAA"] = ["-j RETURN"]

    proxy.damage(restore)
    assert proxy.compare()
    assert proxy.rules() == proxy.intact


def test_sync_makes_only_the_changed_services_unknown() -> None:
    proxy = DamagedProxy([*a_service(), *a_service("b", 2)])
    proxy.compare()
    proxy.kernel.fingerprinted.clear()
    for delta in a_service("b", 3):
        proxy.apply(delta)
    proxy.settle()
    proxy.compare()
    service = {rule.split()[-1] for rule in proxy.kernel.tables["nat"]["KUBE-SERVICES"] if "ns/b" in rule}
    assert service <= {chain.name for chain in proxy.kernel.fingerprinted}
    others = {rule.split()[-1] for rule in proxy.kernel.tables["nat"]["KUBE-SERVICES"] if "ns/a" in rule}
    assert not others & {chain.name for chain in proxy.kernel.fingerprinted}


def test_comparison_finds_a_flushed_chain_that_was_empty_when_its_fingerprint_was_recorded() -> None:
    proxy = DamagedProxy(a_service())
    assert proxy.kernel.tables["filter"]["KUBE-SERVICES"] == []
    proxy.compare()
    proxy.apply(Upsert(EndpointSlice("ns", "a", "ns/a", V4, (), ())))
    proxy.settle()
    intact = proxy.rules()
    assert intact["filter"]["KUBE-SERVICES"] != []
    proxy.damage(lambda tables: tables["filter"]["KUBE-SERVICES"].clear())
    assert proxy.compare()
    assert proxy.rules() == intact


def test_large_comparison_takes_several_steps() -> None:
    proxy = DamagedProxy([delta for number in range(1, 250) for delta in a_service(f"s{number}", number)])
    proxy.compare()
    proxy.damage(lambda tables: tables["nat"].update(OTHER=[]))
    chains = sum(name.startswith("KUBE-S") for name in proxy.kernel.tables["nat"])
    steps = proxy.compare()
    assert len(steps) >= 2
    assert len(proxy.kernel.fingerprinted) >= chains
    assert len(steps) <= chains // CHAINS_PER_STEP + 3


def test_comparison_of_many_services_takes_no_more_than_a_fixed_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is one step per second."""
    monkeypatch.setattr("kproxy.iptables.comparison.CHAINS_PER_STEP", 2)
    proxy = DamagedProxy([delta for number in range(1, 250) for delta in a_service(f"s{number}", number)])
    proxy.compare()
    proxy.damage(lambda tables: tables["nat"].update(OTHER=[]))
    chains = sum(name.startswith("KUBE-S") for name in proxy.kernel.tables["nat"])
    steps = proxy.compare()
    assert chains // 2 > MAX_STEPS
    assert MAX_STEPS // 2 < len(steps) <= MAX_STEPS + 1
    assert len(proxy.kernel.fingerprinted) >= chains


# Changes that do not concern kproxy


def listed_by(proxy: DamagedProxy, monkeypatch: pytest.MonkeyPatch, touched: dict[str, Touched]) -> set[str]:
    """Return the names of the chains that a check reads."""
    listed: set[str] = set()
    list_rules = proxy.kernel.list_rules

    def recorded(chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        names = list(chains)
        listed.update(chain.name for chain in names)
        return list_rules(names)

    monkeypatch.setattr(proxy.kernel, "list_rules", recorded)
    reads = proxy.kernel.reads
    assert proxy.repair(touched) == RepairResult()
    assert proxy.kernel.reads == reads
    return listed


def test_chains_of_other_tools_are_not_read_even_if_their_names_begin_with_kube(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = DamagedProxy(a_service())
    others = {"KUBE-POD-FW-ABCDEF", "KUBE-ROUTER-INPUT", "KUBE-NWPLCY-DEFAULT", "KUBE-SVC-ABCDEF", "CNI-X"}
    own = {"KUBE-FORWARD", "KUBE-PROXY-CANARY", "KUBE-SVC-10.96.0.0/20", "INPUT"}
    assert listed_by(proxy, monkeypatch, {"filter": Touched(chains=others | own)}) == own
    assert listed_by(proxy, monkeypatch, {"filter": Touched(chains=others)}) == set()


def test_all_chains_of_kproxy_are_checked() -> None:
    """Each of them is recognized by its name."""
    proxy = DamagedProxy([*a_service(), *a_service("b", 2)], dispatch_threshold=1)
    chains = {
        ChainName(table, name)
        for table, names in proxy.kernel.tables.items()
        for name in names
        if name not in BUILTIN[table]
    }
    assert len(chains) > 20
    assert Scope(chains=frozenset(chains)).relevant(Context(V4, "node-1")).chains == chains


def test_nothing_is_checked_while_a_full_sync_is_necessary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change by another process must not make the next attempt of a failing sync begin earlier."""
    proxy = DamagedProxy(a_service())
    backend = proxy.families[V4]._backend
    backend.forget()
    plans, context = StorePlans(proxy.store, Context(V4, "node-1"), ()), Context(V4, "node-1")
    for chain in ("DOCKER", "KUBE-SERVICES", "POSTROUTING"):
        assert backend.repair({"nat": Touched(chains={chain})}, plans, context) == RepairResult()
    assert backend.needs_full_sync


# Own and foreign changes


def test_transactions_of_both_families_are_not_foreign() -> None:
    generation = [7]
    counter = GenerationCounter(lambda: generation[0])
    before = counter.now()
    with counter.own_changes() as one, counter.own_changes() as two:
        assert counter.now() is None
        generation[0] += sum(1 for _ in one.counted(["*nat\nCOMMIT\n"]))
        generation[0] += 2 * sum(1 for _ in two.counted(["*nat\nCOMMIT\n*filter\nCOMMIT\n"]))
    assert counter.now() == before == counter.latest()
    generation[0] += 1
    assert counter.now() != before


def test_foreign_transaction_during_an_own_one_is_noticed() -> None:
    generation = [7]
    counter = GenerationCounter(lambda: generation[0])
    before = counter.now()
    with counter.own_changes() as commits:
        list(commits.counted(["*nat\nCOMMIT\n"]))
        generation[0] += 2
    assert counter.now() != before


def test_foreign_transaction_during_a_rejected_own_one_is_noticed() -> None:
    generation = [7]
    counter = GenerationCounter(lambda: generation[0])
    before = counter.now()

    def restore() -> None:
        with counter.own_changes() as commits:
            list(commits.counted(["*nat\nCOMMIT\n"]))
            generation[0] += 1  # by another process
            raise RestoreError("line 2: RULE_APPEND failed")

    with pytest.raises(RestoreError):
        restore()
    noticed = counter.now()
    assert noticed != before
    assert counter.now() == noticed


def test_layout_that_changed_before_an_own_change_is_noticed() -> None:
    layout = [1]
    observer = TableObserver(lambda: layout[0], lambda: None)
    before = observer.now()
    with observer.own_changes():
        layout[0] = 2
    assert observer.now() == before
    layout[0] = 3
    with observer.own_changes():
        layout[0] = 4
    assert observer.now() != before


class Clocks:
    """The clocks of a `TableObserver`. Reading the content takes `cost` seconds of CPU time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.cpu = 0.0
        self.cost = 0.001
        self.content: object = 1
        self.error: Exception | None = None
        monkeypatch.setattr("kproxy.iptables.foreign_changes.monotonic", lambda: self.now)
        monkeypatch.setattr("kproxy.iptables.foreign_changes.thread_time", lambda: self.cpu)

    def read_content(self) -> object:
        self.cpu += self.cost
        if self.error is not None:
            raise self.error
        return self.content

    def observer(self) -> TableObserver:
        """Return an observer of tables whose layout never changes."""
        return TableObserver(lambda: "layout", self.read_content)


def test_content_that_changed_in_the_same_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    observer = clocks.observer()
    before = observer.now()
    with observer.own_changes():
        clocks.content = 2
    clocks.now += 1.0
    assert observer.now() == before
    clocks.content = 3
    clocks.now += 1.0
    changed = observer.now()
    assert changed != before
    clocks.now += 1.0
    assert observer.now() == changed


def test_reading_the_content_never_takes_more_than_its_share_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    clocks.cost = 0.1
    observer = clocks.observer()
    before = observer.now()
    for _ in range(200):
        with observer.own_changes():
            pass
        observer.now()
        clocks.now += 1.0
    assert clocks.cpu <= CONTENT_CPU_SHARE * clocks.now + 2 * clocks.cost
    clocks.now += clocks.cost / CONTENT_CPU_SHARE
    assert observer.now() == before
    clocks.content = 2
    clocks.now += clocks.cost / CONTENT_CPU_SHARE
    assert observer.now() != before


def test_content_that_cannot_be_read_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    observer = clocks.observer()
    before = observer.now()
    errors = (OSError(12, "no memory"), MemoryError(), None)
    for error, content in (*((error, 1) for error in errors), (None, None), (None, 1)):
        clocks.error, clocks.content = error, content
        clocks.now += 100.0
        assert observer.now() == before
    clocks.content = 2
    clocks.now += 100.0
    assert observer.now() != before


def test_legacy_poll_reports_each_change_once() -> None:
    kernel = FakeKernel()
    reports: list[RulesChanged] = []
    poll = LegacyPoll({V4: kernel}, reports.append)
    poll.poll()
    poll.poll()
    assert reports == []
    kernel.foreign_commits += 1
    poll.poll()
    poll.poll()
    (report,) = reports
    assert {owner for owner, _ in report.tables} == {V4}
    assert all(touched.everything for touched in report.tables.values())


class Exhausted(FakeKernel):
    """Tables that cannot be read while `exhausted` is greater than 0. It counts down."""

    exhausted = 0

    def foreign_changes(self) -> int:
        if self.exhausted > 0:
            self.exhausted -= 1
            raise MemoryError
        return super().foreign_changes()


def test_legacy_poll_survives_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.001)
    kernel = Exhausted()
    kernel.exhausted = 2
    reports: queue.SimpleQueue[RulesChanged] = queue.SimpleQueue()
    polled = threading.Event()
    poll = LegacyPoll({V4: kernel}, reports.put, poll_seconds=0.001)
    original = poll.poll

    def poll_once() -> None:
        original()
        polled.set()

    monkeypatch.setattr(poll, "poll", poll_once)
    poll.start()  # the first poll fails, and the first one of the thread
    try:
        assert polled.wait(30)
        kernel.foreign_commits += 1
        assert {owner for owner, _ in reports.get(timeout=30).tables} == {V4}
    finally:
        poll.stop(30)
    assert [record.message for record in caplog.records] == [
        "polls of the iptables-legacy tables: unexpected MemoryError(); trying again"
    ]
