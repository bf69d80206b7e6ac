"""Which UDP flows are stale, after which change, and who is told when they cannot be deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
from kproxy.model.udp_flows import UdpFrontends, accepts_node_ports, udp_frontends
from kproxy.sync.conntrack import ConntrackCleaner, ConntrackCleanup

A, B, C = "10.244.1.1:53", "10.244.1.2:53", "10.244.2.3:53"
DNS = "10.96.0.10:53"
OWN = "192.0.2.1"

Flow = tuple[str, str]


def plan(*endpoints: str, **fields: Any) -> ServicePortPlan:
    defaults: dict[str, Any] = {
        "service": "ns/dns",
        "port_name": "dns",
        "protocol": "UDP",
        "cluster_ip": "10.96.0.10",
        "port": 53,
        "node_port": 0,
        "external_ips": (),
        "vips": (),
        "source_ranges": (),
        "vips_are_sources": False,
        "health_check_node_port": 0,
        "affinity_seconds": 0,
        "internal_local": False,
        "external_local": False,
        "internal": TrafficDecision.FORWARD if endpoints else TrafficDecision.REJECT,
        "external": TrafficDecision.FORWARD if endpoints else TrafficDecision.REJECT,
        "cluster_endpoints": endpoints,
        "local_endpoints": (),
        "known_endpoints": len(endpoints),
    }
    return ServicePortPlan(**defaults | fields)


def accepted(*ports: ServicePortPlan, key: str = "ns/dns") -> UdpFrontends:
    """Frontends with one Service whose flows have been looked at."""
    frontends = UdpFrontends()
    frontends.accept({key: ports}, complete=True)
    frontends.cleaned()
    return frontends


def stale(frontends: UdpFrontends, flows: Iterable[Flow]) -> set[Flow]:
    return {flow for flow in flows if frontends.is_stale(*flow, {OWN}.__contains__)}


# Which changes put which flows under suspicion.


def test_at_a_new_frontend_only_its_endpoints_are_valid() -> None:
    frontends = UdpFrontends()
    frontends.accept({"ns/dns": [plan(A, B)]}, complete=False)
    assert set(frontends.suspects) == {DNS}
    assert stale(frontends, [(DNS, A), (DNS, B), (DNS, C), (DNS, DNS)]) == {(DNS, C), (DNS, DNS)}


def test_the_endpoint_that_left_is_stale() -> None:
    frontends = accepted(plan(A, B))
    frontends.accept({"ns/dns": [plan(B, C)]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, B), (DNS, C)]) == {(DNS, A)}


@pytest.mark.parametrize("endpoints", [(A, B), (A, B, C)], ids=["the-same", "one-more"])
def test_nothing_is_looked_at_when_no_endpoint_left(endpoints: tuple[str, ...]) -> None:
    frontends = accepted(plan(A, B))
    frontends.accept({"ns/dns": [plan(*endpoints)]}, complete=False)
    assert not frontends.suspects


def test_without_endpoints_everything_is_stale() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/dns": [plan()]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, DNS)]) == {(DNS, A), (DNS, DNS)}


HERE: dict[str, Any] = {"internal_local": True, "external_local": True, "node_port": 30053, "vips": ("203.0.113.2",)}
"""A Service that only endpoints on this node serve, by its ClusterIP, its NodePort and its load balancer."""

ELSEWHERE: dict[str, Any] = {"internal": TrafficDecision.DROP, "external": TrafficDecision.DROP}


@pytest.mark.parametrize(
    ("before", "after", "frontend"),
    [
        (HERE | ELSEWHERE, HERE | {"local_endpoints": (A,)}, DNS),
        (HERE | ELSEWHERE, HERE | {"local_endpoints": (A,)}, f"{OWN}:30053"),
        (HERE | ELSEWHERE, HERE | {"local_endpoints": (A,)}, "203.0.113.2:53"),
        (HERE | ELSEWHERE, HERE | {"internal_local": False, "external_local": False}, DNS),
        (HERE | ELSEWHERE, HERE | {"internal_local": False, "external_local": False}, f"{OWN}:30053"),
        (
            {"vips": ("203.0.113.2",), "source_ranges": ("198.51.100.0/24",)},
            {"vips": ("203.0.113.2",), "source_ranges": ("198.51.100.0/24", "192.0.2.0/24")},
            "203.0.113.2:53",
        ),
        ({"internal": TrafficDecision.REJECT, "cluster_endpoints": ()}, {}, DNS),
    ],
    ids=[
        "a-pod-comes-here:cluster-ip",
        "a-pod-comes-here:node-port",
        "a-pod-comes-here:load-balancer",
        "policy-cluster:cluster-ip",
        "policy-cluster:node-port",
        "another-source-range",
        "serving-but-not-ready-before",
    ],
)
def test_what_left_untranslated_is_stale_once_it_would_be_translated(
    before: dict[str, Any], after: dict[str, Any], frontend: str
) -> None:
    """The endpoints that serve stay the same: only the decision about the client's packets changes."""
    serving = {"serving_endpoints": (A, B)}
    frontends = accepted(plan(A, B, **before | serving))
    frontends.accept({"ns/dns": [plan(A, B, **after | serving)]}, complete=False)
    assert stale(frontends, [(frontend, frontend), (frontend, A)]) == {(frontend, frontend)}


def test_of_a_deleted_service_what_was_translated_is_stale() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/dns": ()}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, C), (DNS, DNS)]) == {(DNS, A), (DNS, C)}
    frontends.cleaned()
    assert stale(frontends, [(DNS, A)]) == set()


def test_a_deleted_service_is_noticed_by_its_absence_from_the_whole() -> None:
    frontends = accepted(plan(A))
    frontends.accept({}, complete=True)
    assert stale(frontends, [(DNS, A)]) == {(DNS, A)}


def test_a_part_says_nothing_of_other_services() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/other": [plan(B, cluster_ip="10.96.0.11")]}, complete=False)
    assert set(frontends.suspects) == {"10.96.0.11:53"}


def test_a_changed_port_leaves_the_old_one() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/dns": [plan(A, port=5353)]}, complete=False)
    assert stale(frontends, [(DNS, A), ("10.96.0.10:5353", A)]) == {(DNS, A)}


def test_a_changed_target_port_is_another_endpoint() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/dns": [plan("10.244.1.1:5353")]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, "10.244.1.1:5353")]) == {(DNS, A)}


def test_the_whole_is_looked_at_as_a_whole() -> None:
    frontends = accepted(plan(A, node_port=30053))
    frontends.accept({"ns/dns": [plan(A, node_port=30053)]}, complete=True)
    assert set(frontends.suspects) == {DNS, ":30053"}


def test_suspicion_stays_until_it_is_cleared() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/dns": [plan(B)]}, complete=False)
    frontends.accept({"ns/other": [plan(B, cluster_ip="10.96.0.11")]}, complete=False)
    assert stale(frontends, [(DNS, A)]) == {(DNS, A)}
    frontends.cleaned()
    assert not frontends.suspects


def test_what_left_and_came_back_is_valid() -> None:
    frontends = accepted(plan(A))
    frontends.accept({"ns/dns": [plan(B)]}, complete=False)
    frontends.accept({"ns/dns": [plan(A)]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, B)]) == {(DNS, B)}


def test_other_protocols_are_not_kept() -> None:
    frontends = UdpFrontends()
    frontends.accept({"ns/web": [plan(A, protocol="TCP"), plan(A, protocol="SCTP")]}, complete=True)
    assert not frontends.suspects


def test_of_two_services_with_one_frontend_only_the_flows_of_its_holder_stay() -> None:
    """Rules let one of them have all traffic (`kproxy.model.frontend_conflicts`), whichever it is, at any time."""
    shared, flows = "203.0.113.1:53", [("203.0.113.1:53", A), ("203.0.113.1:53", B)]
    first, second = plan(A, external_ips=("203.0.113.1",)), plan(B, service="ns/other", cluster_ip="10.96.0.11")
    second = replace(second, external_ips=("203.0.113.1",))
    frontends = accepted(first)
    frontends.accept({"ns/other": [second]}, complete=False)
    assert stale(frontends, flows) == {(shared, B)}
    for holder, state, lost in (
        ("the other, as the first has no endpoints", [plan(external_ips=("203.0.113.1",))], A),
        ("the first by name", [first], B),
        ("the other, as the first is gone", [], A),
    ):
        frontends.cleaned()
        frontends.accept({"ns/dns": state}, complete=False)
        assert stale(frontends, flows) == {(shared, lost)}, holder
    frontends.cleaned()
    frontends.accept({"ns/other": ()}, complete=False)
    assert stale(frontends, flows[1:]) == {(shared, B)}


def test_many_services_with_one_frontend_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may create Services could else stop a node's proxy for minutes."""
    number, compared = 200, []
    best = UdpFrontends._best

    def counting(self: UdpFrontends, frontend: str, keys: Collection[str]) -> str:
        compared.append(len(keys))
        return best(self, frontend, keys)

    monkeypatch.setattr(UdpFrontends, "_best", counting)
    plans = {
        f"ns/s{n}": [plan(A, service=f"ns/s{n}", cluster_ip=f"10.96.1.{n}", external_ips=("203.0.113.1",))]
        for n in range(number)
    }
    frontends = UdpFrontends()
    for _ in range(2):
        frontends.accept(plans, complete=True)
        stale(frontends, [("203.0.113.1:53", A)] * number)
    assert sum(compared) <= 4 * number


def test_who_claims_the_cluster_ip_of_another_service_takes_no_flow_of_it() -> None:
    frontends = accepted(plan())
    frontends.accept(
        {"ns/a": [plan(B, service="ns/a", cluster_ip="10.96.0.11", external_ips=("10.96.0.10",))]}, complete=False
    )
    assert stale(frontends, [(DNS, B)]) == {(DNS, B)}


# NodePorts.


def test_node_ports_count_on_own_addresses_only() -> None:
    frontends = accepted(plan(A, node_port=30053))
    frontends.accept({"ns/dns": [plan(B, node_port=30053)]}, complete=False)
    flows = [(f"{OWN}:30053", A), ("198.51.100.1:30053", A), ("198.51.100.1:30053", "198.51.100.1:30053")]
    assert stale(frontends, flows) == {(f"{OWN}:30053", A)}


def test_what_a_host_process_serves_on_a_former_node_port_is_left_alone() -> None:
    frontends = accepted(plan(A, node_port=30053))
    frontends.accept({"ns/dns": [plan(A)]}, complete=False)
    flows = [(f"{OWN}:30053", A), (f"{OWN}:30053", f"{OWN}:30053")]
    assert stale(frontends, flows) == {(f"{OWN}:30053", A)}


def test_an_address_comes_before_the_node_port_on_it() -> None:
    frontends = accepted(plan(A, external_ips=(OWN,), port=30053))
    frontends.accept({"ns/other": [plan(B, cluster_ip="10.96.0.11", node_port=30053)]}, complete=False)
    assert stale(frontends, [(f"{OWN}:30053", A), (f"{OWN}:30053", B)]) == {(f"{OWN}:30053", B)}
    frontends.accept({"ns/dns": ()}, complete=False)
    assert stale(frontends, [(f"{OWN}:30053", A), (f"{OWN}:30053", B)]) == {(f"{OWN}:30053", A)}


@pytest.mark.parametrize(
    ("context", "address", "expected"),
    [
        (Context(Family.IPV4, "n"), OWN, True),
        (Context(Family.IPV4, "n"), "198.51.100.1", False),
        (Context(Family.IPV4, "n"), "127.0.0.1", False),
        (Context(Family.IPV4, "n", localhost_node_ports=True), "127.0.0.1", True),
        (Context(Family.IPV4, "n", localhost_node_ports=True), "127.0.0.2", True),
        (Context(Family.IPV6, "n", localhost_node_ports=True), "::1", False),
        (Context(Family.IPV4, "n", node_port_addresses=("192.0.2.2",)), OWN, False),
        (Context(Family.IPV4, "n", node_port_addresses=("192.0.2.2",)), "192.0.2.2", True),
        (Context(Family.IPV4, "n", node_port_addresses=()), OWN, False),
    ],
)
def test_where_node_ports_answer(context: Context, address: str, expected: bool) -> None:
    assert accepts_node_ports(context, address, lambda: {OWN, "127.0.0.1", "::1"}) is expected


# What a frontend's endpoints are.


def endpoints_by_frontend(ports: Sequence[ServicePortPlan]) -> dict[str, frozenset[str]]:
    return {name: frontend.endpoints for name, frontend in udp_frontends(ports).items()}


def test_all_frontends_of_policy_cluster_have_its_endpoints() -> None:
    port = plan(A, B, external_ips=("203.0.113.1",), vips=("203.0.113.2",), node_port=30053)
    expected = frozenset({A, B})
    assert endpoints_by_frontend([port]) == {
        DNS: expected,
        "203.0.113.1:53": expected,
        "203.0.113.2:53": expected,
        ":30053": expected,
    }


def test_policy_local_counts_for_its_kind_of_frontend() -> None:
    internal = plan(A, B, local_endpoints=(A,), internal_local=True, node_port=30053)
    assert endpoints_by_frontend([internal]) == {DNS: {A}, ":30053": {A, B}}
    external = plan(A, B, local_endpoints=(A, C), external_local=True, node_port=30053)
    assert endpoints_by_frontend([external]) == {DNS: {A, B}, ":30053": {A, B, C}}


def test_frontends_of_ipv6() -> None:
    port = plan("[fd00::1]:53", cluster_ip="fd00:96::a", node_port=30053)
    assert set(endpoints_by_frontend([port])) == {"[fd00:96::a]:53", ":30053"}


# Any history.

SERVICES = {"ns/a": ("10.96.0.1", 30001), "ns/b": ("10.96.0.2", 30001), "ns/c": ("10.96.0.3", 30003)}
states = st.dictionaries(
    st.sampled_from(sorted(SERVICES)),
    st.tuples(st.frozensets(st.sampled_from([A, B, C])), st.booleans(), st.sampled_from([53, 5353]), st.booleans()),
)


def plans_of(state: Mapping[str, Any]) -> dict[str, list[ServicePortPlan]]:
    found = {}
    for key, (endpoints, node_port, port, shares) in state.items():
        address, number = SERVICES[key]
        external_ips = ("203.0.113.1",) if shares else ()
        fields = {"cluster_ip": address, "port": port, "node_port": number * node_port, "external_ips": external_ips}
        found[key] = [plan(*sorted(endpoints), service=key, **fields)]
    return found


def flows_into(plans: Mapping[str, Sequence[ServicePortPlan]]) -> set[Flow]:
    """The flows that new connections make, to every frontend and endpoint of the Service that holds it."""
    held: dict[str, frozenset[str]] = {}
    for ports in sorted(plans.values(), key=lambda ports: (not ports[0].cluster_endpoints, ports[0].name)):
        held = endpoints_by_frontend(ports) | held
    return {(OWN + front if front[0] == ":" else front, to) for front, endpoints in held.items() for to in endpoints}


@given(history=st.lists(states, min_size=1, max_size=6))
def test_after_any_history_the_flows_are_those_that_new_ones_would_be(history: list[Mapping[str, Any]]) -> None:
    frontends, table = UdpFrontends(), set[Flow]()
    before: dict[str, list[ServicePortPlan]] = {}
    for number, state in enumerate(history):
        now = plans_of(state)
        changed = {key: now.get(key, []) for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        frontends.accept(changed, complete=number == 0)
        living = flows_into(now)
        assert not stale(frontends, living)
        table = (table - stale(frontends, table)) | living
        assert table == living
        frontends.cleaned()
        before = now


# The cleaner.


class Table:
    """A flow table in memory, which fails on demand."""

    def __init__(self, *flows: Flow) -> None:
        self.flows = set(flows)
        self.error: OSError | None = None
        self.calls = 0

    def clean(self, destinations: Collection[str], is_stale: Callable[[str, str], bool]) -> int:
        self.calls += 1
        if self.error:
            raise self.error
        asked = {flow for flow in self.flows if not {flow[0], flow[0][flow[0].rindex(":") :]}.isdisjoint(destinations)}
        gone = {flow for flow in asked if is_stale(*flow)}
        self.flows -= gone
        return len(gone)


class Bench:
    """A cleaner over a table, and what it told."""

    def __init__(self, *flows: Flow) -> None:
        self.table = Table(*flows)
        self.told: list[ConntrackCleanup] = []
        self.asked: list[Family] = []
        ticks = iter(range(1000))
        self._cleaner = ConntrackCleaner(
            {Family.IPV4: self.table}, self._own, clock=lambda: float(next(ticks)), tell=self.told.append
        )

    def _own(self, family: Family) -> Collection[str]:
        self.asked.append(family)
        return {OWN}

    def synced(self, *ports: ServicePortPlan, complete: bool = False, family: Family = Family.IPV4) -> None:
        report = SyncReport(family, 0.0, 1.0, complete, {"ns/dns": ports}, Context(family, "node-1"), None)
        self._cleaner.synced(report)

    def failed(self) -> None:
        plans, context = {"ns/dns": (plan(B),)}, Context(Family.IPV4, "node-1")
        self._cleaner.synced(SyncReport(Family.IPV4, 0.0, 1.0, False, plans, context, None, error="refused"))


def test_a_first_sync_deletes_what_died_before() -> None:
    bench = Bench((DNS, A), (DNS, B))
    bench.synced(plan(A), complete=True)
    assert bench.table.flows == {(DNS, A)}
    assert bench.told == [ConntrackCleanup(Family.IPV4, deleted=1, seconds=1.0)]


def test_a_sync_without_stale_flows_costs_nothing() -> None:
    bench = Bench()
    bench.synced(plan(A), complete=True)
    bench.synced(plan(A, B))
    bench.synced(plan(A, B, protocol="TCP"), family=Family.IPV6)
    assert bench.table.calls == 1
    assert len(bench.told) == 1


def test_own_addresses_are_read_once_and_only_for_node_ports() -> None:
    bench = Bench((DNS, A), (f"{OWN}:30053", A), ("198.51.100.1:30053", A))
    bench.synced(plan(B), complete=True)
    assert bench.asked == []
    bench.synced(plan(B, node_port=30053))
    assert bench.asked == [Family.IPV4]
    assert bench.table.flows == {("198.51.100.1:30053", A)}


def test_flows_stay_when_the_sync_failed_and_go_after_the_next() -> None:
    bench = Bench((DNS, A))
    bench.synced(plan(A), complete=True)
    bench.failed()
    assert bench.table.flows == {(DNS, A)}
    bench.synced(plan(B), complete=True)
    assert bench.table.flows == set()


def test_what_could_not_be_deleted_is_deleted_after_the_next_sync(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench((DNS, A))
    bench.synced(plan(A), complete=True)
    bench.table.error = PermissionError(1, "Operation not permitted")
    with caplog.at_level(logging.WARNING):
        bench.synced(plan(B))
        bench.synced(plan(B))
    assert [record.message for record in caplog.records] == [
        "IPv4: UDP flows to removed endpoints may live on: conntrack: Operation not permitted"
    ]
    assert bench.told[-1].error == "Operation not permitted"
    bench.table.error = None
    bench.synced(plan(B))
    assert bench.table.flows == set()
    assert bench.told[-1] == ConntrackCleanup(Family.IPV4, deleted=1, seconds=1.0)


def test_a_new_trouble_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING):
        for error in (OSError("one"), None, OSError("two")):
            bench.table.error = error
            bench.synced(plan(A), complete=True)
    assert len(caplog.records) == 2


def test_what_came_while_there_were_no_endpoints_is_stale_once_there_are() -> None:
    """The node's own packets to a NodePort or an external address are not refused on their way out."""
    frontends = accepted(plan(external_ips=("203.0.113.5",)))
    frontends.accept({"ns/dns": (plan(A, external_ips=("203.0.113.5",)),)}, complete=False)
    early = ("203.0.113.5:53", "203.0.113.5:53")
    assert stale(frontends, [early, ("203.0.113.5:53", A)]) == {early}
