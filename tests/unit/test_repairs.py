"""Drift: when touched parts are checked, what a comparison covers, and how repairs are logged and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise

import pytest

from kproxy.model.context import Context
from kproxy.model.delta import Upsert
from kproxy.model.drift import MAX_TOUCHED_ELEMENTS, Part, RepairResult, Touched
from kproxy.model.sync_report import ApplyResult, Plans, RepairReport, SyncError
from kproxy.model.types import Family, Node, Service, ServicePort
from kproxy.serve.http import HttpRequest
from kproxy.serve.metrics import Metrics
from kproxy.sync.drift_listener import LISTED_PARTS, DriftListener
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.reconciler import STEP_SECONDS, Resync
from kproxy.sync.repair_schedule import (
    BURST,
    FIRST_DELAY_SECONDS,
    INTACT_SECONDS,
    MAX_DELAY_SECONDS,
    REFILL_SECONDS,
    RepairSchedule,
)
from tests.inprocess import EMPTY_LISTS, FakeKernelProxy, ReconciledProxy, StubBackend

V4, V6 = Family.IPV4, Family.IPV6
CHAIN = Part("nat", "chain", "KUBE-SERVICES")
ELEMENT = Part("kube-proxy", "element", "service-ips", b"key")


class DriftingBackend(StubBackend):
    """A backend that records what it was asked to check. Each check raises or returns the next of `results`."""

    def __init__(self) -> None:
        self.syncs = 0
        self.touched: list[dict[str, Touched]] = []
        self.results: list[RepairResult | Exception | None] = []
        self.steps = 0
        self.error: SyncError | None = None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        assert list(plans.by_service()) is not None
        self.syncs += 1
        if self.error is not None:
            raise self.error
        self.needs_full_sync = False
        return ApplyResult({}, {})

    def _next(self) -> RepairResult | None:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        self.needs_full_sync = result is not None and result.needs_full_sync
        return result

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        self.touched.append(dict(touched))
        result = self._next() if self.results else RepairResult()
        assert result is not None
        return result

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        self.steps += 1
        return self._next() if self.results else None


class DriftingProxy(ReconciledProxy):
    """A dual-stack proxy, synced once."""

    def __init__(self, check_interval: float = 30.0) -> None:
        self.four, self.six = DriftingBackend(), DriftingBackend()
        self.has_context = True
        self.reports: list[RepairReport] = []
        self.events: list[tuple[str, str]] = []
        listener = DriftListener(lambda reason, text: self.events.append((reason, text)))
        super().__init__(
            {
                V4: FamilySync(self.four, self._context),
                V6: FamilySync(self.six, lambda _: Context(V6, "node-1")),
            },
            min_interval=0.0,
            on_repair=[self.reports.append, listener.on_repair],
            check_interval=check_interval,
            full_check_interval=1e9,
        )
        self.apply(*EMPTY_LISTS, Upsert(Service("ns", "a", ("10.96.0.1",), (ServicePort("", 80, "TCP"),))))
        self.sync_after()
        self.four.syncs = self.six.syncs = 0

    def _context(self, _: Node | None) -> Context:
        if not self.has_context:
            raise SyncError("cannot list the addresses")
        return Context(V4, "node-1")


@pytest.fixture
def proxy() -> DriftingProxy:
    return DriftingProxy()


def test_touched_parts_are_checked_at_once_and_only_in_their_family(proxy: DriftingProxy) -> None:
    touched = Touched(chains={"KUBE-SERVICES"}, by={"iptables"})
    proxy.touch({(V4, "nat"): touched})
    assert proxy.reconciler.wait() == 0
    proxy.sync_after()
    assert (proxy.four.touched, proxy.six.touched) == ([{"nat": touched}], [])
    assert (proxy.four.syncs, proxy.six.syncs) == (0, 0)
    proxy.sync_after()
    assert len(proxy.four.touched) == 1


def test_repair_is_logged_with_the_process_and_recorded_as_an_event(
    proxy: DriftingProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.four.results = [RepairResult((CHAIN, ELEMENT))]
    proxy.touch({(V4, "nat"): Touched(chains={"KUBE-SERVICES"}, by={"nft"})})
    with caplog.at_level(logging.WARNING):
        proxy.sync_after()
    text = (
        "IPv4: restored chain KUBE-SERVICES of table nat, element of set service-ips of table kube-proxy, "
        "which nft had changed"
    )
    assert [record.getMessage() for record in caplog.records] == [text]
    assert proxy.events == [("RulesRestored", text)]


def test_long_list_of_repairs_is_shortened(proxy: DriftingProxy, caplog: pytest.LogCaptureFixture) -> None:
    elements = [Part("kube-proxy", "element", "service-ips", bytes([number])) for number in range(40)]
    chains = [Part("nat", "chain", f"KUBE-SEP-{number}") for number in range(LISTED_PARTS)]
    proxy.four.results = [RepairResult((*elements, *chains))]
    proxy.touch({(V4, "nat"): Touched(everything=True)})
    with caplog.at_level(logging.WARNING):
        proxy.sync_after()
    assert "restored 40 elements of set service-ips of table kube-proxy, chain KUBE-SEP-0" in caplog.text
    assert "and 1 other part, which another process had changed" in caplog.text


def test_damage_that_only_a_full_sync_repairs_is_logged_with_that_sync(
    proxy: DriftingProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.four.results = [RepairResult(needs_full_sync=True)]
    proxy.touch({(V4, "nat"): Touched(everything=True, by={"iptables"})})
    with caplog.at_level(logging.INFO):
        proxy.sync_after()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "IPv4: iptables changed kproxy's rules; restoring them"),
        ("INFO", "IPv4: synced 1 service in 0 ms (1 without endpoints)"),
    ]
    assert (proxy.four.syncs, proxy.six.syncs) == (1, 0)


def test_check_that_fails_leads_to_a_full_sync(proxy: DriftingProxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.four.results = [SyncError("cannot read the table")]
    proxy.touch({(V4, "nat"): Touched(chains={"KUBE-SERVICES"})})
    proxy.sync_after()
    assert "IPv4: cannot check kproxy's rules: cannot read the table; comparing all of them" in caplog.text
    assert proxy.four.syncs == 1


def test_findings_are_logged_once(proxy: DriftingProxy, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        proxy.four.results = [RepairResult(findings=("chain INPUT drops packets", *["another"] * number))]
        proxy.touch({(V4, "nat"): Touched(chains={"INPUT"})})
        proxy.sync_after(1)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "IPv4: chain INPUT drops packets",
        "IPv4: another",
    ]
    assert [reason for reason, _ in proxy.events] == ["ForeignRule", "ForeignRule"]


def test_parts_that_are_changed_again_and_again_are_checked_less_and_less_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy, delays = DriftingProxy(check_interval=1e6), []
    for _ in range(BURST + 10):
        proxy.four.results = [RepairResult((CHAIN,))]
        proxy.touch({(V4, "nat"): Touched(chains={"KUBE-SERVICES"})})
        before = proxy.clock.now
        while proxy.four.results:
            proxy.sync_after(proxy.reconciler.wait() or 0.0)
        delays.append(proxy.clock.now - before)
    assert delays[: BURST + 1] == [0.0] * (BURST + 1)
    assert delays[BURST + 1] == FIRST_DELAY_SECONDS
    assert max(delays) > FIRST_DELAY_SECONDS
    assert "; this happens often, so the next check is in 1 s" in caplog.text


def test_other_parts_are_checked_at_once_during_a_fight(proxy: DriftingProxy) -> None:
    for _ in range(BURST + 2):
        proxy.four.results = [RepairResult((CHAIN,))]
        proxy.touch({(V4, "nat"): Touched(chains={"KUBE-SERVICES"})})
        proxy.sync_after()
    proxy.touch({(V4, "nat"): Touched(chains={"KUBE-SERVICES", "KUBE-MARK-MASQ"})})
    proxy.four.touched.clear()
    proxy.sync_after()
    assert proxy.four.touched == [{"nat": Touched(chains={"KUBE-MARK-MASQ"})}]


DAMAGED_TABLE = {(V4, "nat"): Touched(everything=True, by={"nft"})}


@pytest.mark.parametrize("period", [1, 10, 19])
def test_intervals_between_repairs_grow_to_the_maximum_during_a_fight(period: int) -> None:
    """Times are tenths of a second. Another program changes the chain every `period`."""
    schedule, times = RepairSchedule(), []
    for tenth in range(36_000):
        if tenth % period == 0:
            schedule.touch({"nat": Touched(chains={"KUBE-SERVICES"})}, tenth / 10)
        if schedule.take(tenth / 10):
            schedule.repaired([CHAIN], tenth / 10)
            times.append(tenth)
    intervals = [later - earlier for earlier, later in pairwise(times)]
    assert intervals[: BURST - 1] == [period] * (BURST - 1)
    longest = int(10 * MAX_DELAY_SECONDS)
    assert max(intervals) <= longest + period
    first = next(index for index, each in enumerate(intervals) if each >= longest)
    assert all(each >= longest for each in intervals[first:]), "the maximum applies until the end of the fight"
    assert len(intervals[first:]) > 40


def test_fight_for_a_table_that_only_full_syncs_restore_is_limited() -> None:
    proxy, times = DriftingProxy(check_interval=1e6), []
    for _ in range(600):
        proxy.four.results = [RepairResult(needs_full_sync=True)]
        proxy.touch(DAMAGED_TABLE)
        before = proxy.four.syncs
        proxy.sync_after(1.0)
        times += [proxy.clock.now] * (proxy.four.syncs - before)
    assert len(times) < 30
    assert times[-1] - times[-2] == MAX_DELAY_SECONDS
    assert len(proxy.events) == len(times)
    text = "IPv4: nft changed kproxy's rules; restoring them"
    assert proxy.events[0] == ("RulesChanged", text)
    assert proxy.events[-1] == ("RulesChanged", f"{text}; this happens often, so the next check is in 60 s")
    assert proxy.six.syncs == 0
    proxy.four.touched.clear()
    proxy.touch({(V4, "nat"): Touched(chains={"KUBE-SERVICES"}), (V4, "filter"): Touched(chains={"KUBE-FORWARD"})})
    proxy.four.results = [RepairResult()]
    proxy.sync_after()
    assert [list(each) for each in proxy.four.touched] == [["filter"]], "only the damaged table waits"


def test_checks_that_fail_again_and_again_are_limited(caplog: pytest.LogCaptureFixture) -> None:
    proxy = DriftingProxy(check_interval=1e6)
    for _ in range(600):
        proxy.four.results = [SyncError("the kernel rejected the repair")]
        proxy.touch(DAMAGED_TABLE)
        proxy.sync_after(1.0)
    assert proxy.four.syncs == len(caplog.records) < 30


def test_pause_after_a_full_sync_begins_when_the_sync_ends() -> None:
    schedule, now, pauses = RepairSchedule(), 0.0, []
    for _ in range(20):
        schedule.touch({"nat": Touched(chains={"KUBE-SERVICES"})}, now)
        wait = schedule.wait(now)
        assert wait is not None
        pauses.append(wait)
        now += wait
        assert schedule.take(now)
        schedule.full_sync_needed(["nat"], now)
        now += 10.0
        schedule.touch({"nat": Touched(chains={"KUBE-SERVICES"})}, now)
        schedule.full_sync_ended(now)
    assert pauses[0] == 0.0
    assert pauses[-1] == MAX_DELAY_SECONDS


@pytest.mark.parametrize("touched", ["DOCKER", "KUBE-SERVICES"])
def test_touched_rules_do_not_speed_up_the_retries_of_a_failed_sync(touched: str) -> None:
    proxy = DriftingProxy(check_interval=1e6)
    proxy.four.error = SyncError("no")
    proxy.four.needs_full_sync = True
    proxy.apply(Resync())
    for _ in range(6000):
        proxy.touch({(V4, "nat"): Touched(chains={touched}, by={"dockerd"})})
        proxy.sync_after(0.1)
    assert proxy.four.syncs < 30
    assert proxy.events == []
    assert proxy.four.touched == [], "a full sync is pending, which finds all damage"


def test_damage_does_not_speed_up_the_retries_of_a_sync_that_has_no_context() -> None:
    """The backend, which has not seen the failed sync, still compares rules."""
    proxy = DriftingProxy(check_interval=1e6)
    proxy.has_context = False
    proxy.apply(Resync())
    for _ in range(6):
        proxy.sync_after(proxy.reconciler.sync_wait() or 0.0)
    wait = proxy.reconciler.sync_wait()
    assert wait is not None
    assert wait > 10
    proxy.four.results = [RepairResult(needs_full_sync=True)]
    proxy.touch(DAMAGED_TABLE)
    proxy.sync_after()
    assert proxy.events
    assert proxy.reconciler.sync_wait() == wait


def test_iptables_reads_no_rules_for_foreign_chains_while_syncs_fail() -> None:
    proxy = FakeKernelProxy("iptables")
    proxy.apply(*EMPTY_LISTS).sync()
    proxy.kernel.reject = lambda _: "RULE_APPEND failed (No such file or directory): base rule"
    proxy.kernel.tables["nat"]["KUBE-SERVICES"].clear()
    proxy.forget()
    with pytest.raises(SyncError):
        proxy.sync()
    reads = proxy.kernel.reads
    for _ in range(3):
        assert proxy.families[V4].repair(proxy.store, {"nat": Touched(chains={"DOCKER"})}).skipped
    assert proxy.kernel.reads == reads


def test_comparison_that_fails_is_replaced_by_one_full_sync(caplog: pytest.LogCaptureFixture) -> None:
    proxy = DriftingProxy()
    proxy.four.results = [SyncError("cannot read"), *[SyncError("again")] * 9]
    for _ in range(20):
        proxy.sync_after(30.0 if not proxy.four.syncs else STEP_SECONDS)
    assert (proxy.four.steps, proxy.four.syncs, len(caplog.records)) == (1, 1, 1)


def test_process_is_blamed_only_for_what_it_touched() -> None:
    schedule = RepairSchedule()
    for _ in range(BURST + 1):
        schedule.repaired([CHAIN], 0.0)
    schedule.touch({"nat": Touched(chains={"KUBE-SERVICES"}, by={"fighter"})}, 0.0)
    schedule.touch({"nat": Touched(chains={"KUBE-MARK-MASQ"}, by={"innocent"})}, 0.0)
    assert schedule.take(0.0) == {"nat": Touched(chains={"KUBE-MARK-MASQ"}, by={"innocent"})}
    schedule.touch({"nat": Touched(chains={"KUBE-SERVICES"}, by={"second"})}, 0.0)
    both = {"nat": Touched(chains={"KUBE-SERVICES"}, by={"fighter", "second"})}
    assert schedule.take(FIRST_DELAY_SECONDS) == both


def test_part_that_others_touch_all_the_time_but_do_not_damage_is_checked_a_few_times_a_second() -> None:
    schedule = RepairSchedule()
    checks = []
    for step in range(1000):
        now = step / 100
        schedule.touch({"nat": Touched(chains={"POSTROUTING"})}, now)
        checks += [now] if schedule.take(now) else []
    assert checks[0] == 0.0
    assert 30 <= len(checks) <= 10 / INTACT_SECONDS + 1
    assert schedule.wait(10.0) is not None  # the last change is checked, too


def test_next_check_of_a_repaired_part_does_not_wait() -> None:
    schedule = RepairSchedule()
    for step in range(BURST):
        schedule.touch({"nat": Touched(chains={CHAIN.name})}, step / 100)
        assert schedule.take(step / 100)
        schedule.repaired([CHAIN], step / 100)


OUTPUT_RULE = "a rule of another program in chain OUTPUT of table nat decides: -A OUTPUT -j DROP"
INPUT_RULE = "a rule of another program in chain INPUT of table nat decides: -A INPUT -j DROP"


def test_finding_that_ended_is_reported_again_when_it_returns(proxy: DriftingProxy) -> None:
    def check(chains: set[str], *findings: str) -> list[str]:
        proxy.events.clear()
        proxy.four.results = [RepairResult(findings=findings)]
        proxy.touch({(V4, "nat"): Touched(chains=chains)})
        proxy.sync_after(INTACT_SECONDS)
        return [text for _, text in proxy.events]

    assert check({"OUTPUT", "INPUT"}, OUTPUT_RULE, INPUT_RULE) == [f"IPv4: {OUTPUT_RULE}", f"IPv4: {INPUT_RULE}"]
    assert check({"OUTPUT"}) == []
    assert check({"OUTPUT-2", "PUT"}) == []
    assert check({"OUTPUT", "INPUT"}, OUTPUT_RULE, INPUT_RULE) == [f"IPv4: {OUTPUT_RULE}"]
    proxy.four.results = [RepairResult()]
    proxy.touch({(V4, "nat"): Touched(everything=True)})
    proxy.sync_after()
    assert check({"INPUT"}, INPUT_RULE) == [f"IPv4: {INPUT_RULE}"]


def test_findings_stay_known_while_nothing_is_checked(proxy: DriftingProxy) -> None:
    proxy.four.results = [RepairResult(findings=(OUTPUT_RULE,))]
    proxy.touch({(V4, "nat"): Touched(chains={"OUTPUT"})})
    proxy.sync_after()
    # A comparison, a check that ends early, and one that is skipped.
    proxy.four.results = [RepairResult(), None]
    proxy.sync_after(30)
    proxy.sync_after(STEP_SECONDS)
    proxy.four.results = [RepairResult(needs_full_sync=True), RepairResult(findings=(OUTPUT_RULE,))]
    for _ in range(2):
        proxy.touch({(V4, "nat"): Touched(everything=True)})
        proxy.sync_after()
    proxy.four.needs_full_sync = True
    proxy.touch({(V4, "nat"): Touched(everything=True)})
    proxy.sync_after()
    proxy.four.needs_full_sync = False
    proxy.four.results = [RepairResult(findings=(OUTPUT_RULE,))]
    proxy.touch({(V4, "nat"): Touched(everything=True)})
    proxy.sync_after()
    assert [reason for reason, _ in proxy.events] == ["ForeignRule", "RulesChanged"]


def test_ended_findings_take_no_memory() -> None:
    listener = DriftListener(lambda *_: None)
    for number in range(100):
        finding = OUTPUT_RULE.replace("-j DROP", f"-s 10.0.0.{number} -j DROP")
        report = RepairReport(
            V4, RepairResult(findings=(finding,)), checked=frozenset({Part("nat", "chain", "OUTPUT")})
        )
        listener.on_repair(report)
    assert len(listener._findings[V4]) == 1


def test_delays_grow_to_a_maximum_and_end_after_a_calm_time() -> None:
    schedule, now = RepairSchedule(), 0.0
    for _ in range(BURST):
        assert schedule.repaired([CHAIN], now) == {}
    delays = []
    for _ in range(9):
        delays.append(schedule.repaired([CHAIN], now)[CHAIN])
        now += delays[-1]
    assert delays == [min(FIRST_DELAY_SECONDS * 2**number, MAX_DELAY_SECONDS) for number in range(9)]
    now += REFILL_SECONDS
    assert schedule.repaired([CHAIN], now) == {}, "one repair after a calm time"
    assert schedule.repaired([CHAIN], now) == {CHAIN: MAX_DELAY_SECONDS}, "the delay was halved"
    now += MAX_DELAY_SECONDS + 10 * REFILL_SECONDS
    for _ in range(10):
        assert schedule.repaired([CHAIN], now) == {}
    assert schedule.repaired([CHAIN], now) == {CHAIN: FIRST_DELAY_SECONDS}
    for repair in range(100):
        now += 2 * REFILL_SECONDS * BURST if not repair else REFILL_SECONDS
        assert schedule.repaired([CHAIN], now) == {}, "one repair in this time is never delayed"


def test_comparison_runs_in_steps_until_it_is_complete(proxy: DriftingProxy) -> None:
    proxy.four.results = [RepairResult(), RepairResult((CHAIN,)), None]
    times: list[float] = []
    while not times or proxy.four.results:
        steps = proxy.four.steps
        proxy.sync_after(proxy.reconciler.wait() or 0.0)
        if proxy.four.steps > steps:
            times.append(proxy.clock.now)
    assert times == [30.0, 30.0 + STEP_SECONDS, 30.0 + 2 * STEP_SECONDS]
    assert [report.result.repaired for report in proxy.reports] == [(), (CHAIN,)]
    assert proxy.six.steps == 1
    proxy.sync_after(30)
    assert (proxy.four.steps, proxy.six.steps) == (4, 2)


def test_comparison_that_finds_large_damage_is_followed_by_a_full_sync(proxy: DriftingProxy) -> None:
    proxy.four.results = [RepairResult(needs_full_sync=True)]
    proxy.sync_after(30)
    assert (proxy.four.syncs, proxy.six.syncs) == (1, 0)


def test_nothing_is_checked_before_the_first_sync() -> None:
    sync = FamilySync(DriftingBackend(), lambda _: Context(V4, "node-1"))
    proxy = ReconciledProxy({V4: sync})
    assert sync.compare_next(proxy.store) is None
    assert sync.repair(proxy.store, {"nat": Touched(everything=True)}) == RepairResult(skipped=True)


def test_many_touched_elements_count_as_their_set() -> None:
    touched = Touched()
    for number in range(MAX_TOUCHED_ELEMENTS + 1):
        touched.add_element("service-ips", number.to_bytes(2, "big"))
    touched.add_element("service-ips", b"another")
    assert touched == Touched(sets={"service-ips"})
    merged = Touched(elements={"service-ips": {b"key"}, "other": {b"key"}})
    for part in touched.parts("kube-proxy"):
        merged.add_part(part)
    assert merged == Touched(sets={"service-ips"}, elements={"other": {b"key"}})


def test_repairs_are_counted_by_kind() -> None:
    metrics = Metrics("nftables", [V4], {}, wall=lambda: 0.0)
    metrics.on_repair(RepairReport(V4, RepairResult((CHAIN, ELEMENT, ELEMENT), needs_full_sync=True)))
    text = metrics.page(HttpRequest("GET", "/metrics", {}, persistent=False)).body.decode()
    counts = {kind: f'kproxy_drift_repairs_total{{ip_family="IPv4",kind="{kind}"}}' for kind in ("chain", "element")}
    assert f"{counts['chain']} 1.0" in text
    assert f"{counts['element']} 2.0" in text
    assert 'kproxy_drift_repairs_total{ip_family="IPv4",kind="table"} 1.0' in text
    assert 'kproxy_drift_repairs_total{ip_family="IPv4",kind="set"} 0.0' in text
