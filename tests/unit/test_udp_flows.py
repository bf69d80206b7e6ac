"""Stale UDP flows: which changes make them stale, and how they are deleted."""

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
from kproxy.model.types import Family
from kproxy.model.udp_flows import UdpFrontends, accepts_node_ports, udp_frontends
from kproxy.sync.conntrack_cleanup import ConntrackCleaner, ConntrackCleanup
from tests.reports import failed, succeeded

A, B, C = "10.244.1.1:53", "10.244.1.2:53", "10.244.2.3:53"
DNS = "10.96.0.10:53"
NODE_ADDRESS = "192.0.2.1"

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
    }
    return ServicePortPlan(**defaults | fields)


def accepted_frontends(*ports: ServicePortPlan, key: str = "ns/dns") -> UdpFrontends:
    """Return the frontends of one Service after its flows were cleaned."""
    frontends = UdpFrontends()
    frontends.update({key: ports}, complete=True)
    frontends.mark_checked()
    return frontends


def stale(frontends: UdpFrontends, flows: Iterable[Flow]) -> set[Flow]:
    return {flow for flow in flows if frontends.is_stale(*flow, {NODE_ADDRESS}.__contains__)}


# Which changes make which flows suspect.


def test_new_frontend_keeps_only_flows_to_its_endpoints() -> None:
    frontends = UdpFrontends()
    frontends.update({"ns/dns": [plan(A, B)]}, complete=False)
    assert set(frontends.unchecked) == {DNS}
    assert stale(frontends, [(DNS, A), (DNS, B), (DNS, C), (DNS, DNS)]) == {(DNS, C), (DNS, DNS)}


def test_flows_to_a_removed_endpoint_are_stale() -> None:
    frontends = accepted_frontends(plan(A, B))
    frontends.update({"ns/dns": [plan(B, C)]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, B), (DNS, C)]) == {(DNS, A)}


@pytest.mark.parametrize("endpoints", [(A, B), (A, B, C)], ids=["unchanged", "one-added"])
def test_no_frontend_is_suspect_unless_an_endpoint_was_removed(endpoints: tuple[str, ...]) -> None:
    frontends = accepted_frontends(plan(A, B))
    frontends.update({"ns/dns": [plan(*endpoints)]}, complete=False)
    assert not frontends.unchecked


def test_without_endpoints_all_flows_are_stale() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/dns": [plan()]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, DNS)]) == {(DNS, A), (DNS, DNS)}


LOCAL_POLICY: dict[str, Any] = {
    "internal_local": True,
    "external_local": True,
    "node_port": 30053,
    "vips": ("203.0.113.2",),
}
"""A Service with traffic policy Local for its ClusterIP, NodePort and load balancer address."""

NO_LOCAL_ENDPOINT: dict[str, Any] = {"internal": TrafficDecision.DROP, "external": TrafficDecision.DROP}


@pytest.mark.parametrize(
    ("before", "after", "frontend"),
    [
        (LOCAL_POLICY | NO_LOCAL_ENDPOINT, LOCAL_POLICY | {"local_endpoints": (A,)}, DNS),
        (LOCAL_POLICY | NO_LOCAL_ENDPOINT, LOCAL_POLICY | {"local_endpoints": (A,)}, f"{NODE_ADDRESS}:30053"),
        (LOCAL_POLICY | NO_LOCAL_ENDPOINT, LOCAL_POLICY | {"local_endpoints": (A,)}, "203.0.113.2:53"),
        (LOCAL_POLICY | NO_LOCAL_ENDPOINT, LOCAL_POLICY | {"internal_local": False, "external_local": False}, DNS),
        (
            LOCAL_POLICY | NO_LOCAL_ENDPOINT,
            LOCAL_POLICY | {"internal_local": False, "external_local": False},
            f"{NODE_ADDRESS}:30053",
        ),
        (
            {"vips": ("203.0.113.2",), "source_ranges": ("198.51.100.0/24",)},
            {"vips": ("203.0.113.2",), "source_ranges": ("198.51.100.0/24", "192.0.2.0/24")},
            "203.0.113.2:53",
        ),
        ({"internal": TrafficDecision.REJECT, "cluster_endpoints": ()}, {}, DNS),
    ],
    ids=[
        "pod-added-on-node:cluster-ip",
        "pod-added-on-node:node-port",
        "pod-added-on-node:load-balancer",
        "policy-cluster:cluster-ip",
        "policy-cluster:node-port",
        "source-range-added",
        "endpoint-becomes-ready",
    ],
)
def test_untranslated_flows_are_stale_once_their_packets_would_be_translated(
    before: dict[str, Any], after: dict[str, Any], frontend: str
) -> None:
    """The serving endpoints stay the same; only the decision about the client's packets changes."""
    serving = {"serving_endpoints": (A, B)}
    frontends = accepted_frontends(plan(A, B, **before | serving))
    frontends.update({"ns/dns": [plan(A, B, **after | serving)]}, complete=False)
    assert stale(frontends, [(frontend, frontend), (frontend, A)]) == {(frontend, frontend)}


def test_translated_flows_of_a_deleted_service_are_stale() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/dns": ()}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, C), (DNS, DNS)]) == {(DNS, A), (DNS, C)}
    frontends.mark_checked()
    assert stale(frontends, [(DNS, A)]) == set()


def test_service_missing_from_a_complete_sync_is_deleted() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({}, complete=True)
    assert stale(frontends, [(DNS, A)]) == {(DNS, A)}


def test_partial_sync_does_not_affect_other_services() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/other": [plan(B, cluster_ip="10.96.0.11")]}, complete=False)
    assert set(frontends.unchecked) == {"10.96.0.11:53"}


def test_flows_to_the_previous_service_port_are_stale() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/dns": [plan(A, port=5353)]}, complete=False)
    assert stale(frontends, [(DNS, A), ("10.96.0.10:5353", A)]) == {(DNS, A)}


def test_changed_target_port_is_a_different_endpoint() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/dns": [plan("10.244.1.1:5353")]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, "10.244.1.1:5353")]) == {(DNS, A)}


def test_complete_sync_makes_every_frontend_suspect() -> None:
    frontends = accepted_frontends(plan(A, node_port=30053))
    frontends.update({"ns/dns": [plan(A, node_port=30053)]}, complete=True)
    assert set(frontends.unchecked) == {DNS, ":30053"}


def test_frontends_stay_suspect_until_cleaned() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/dns": [plan(B)]}, complete=False)
    frontends.update({"ns/other": [plan(B, cluster_ip="10.96.0.11")]}, complete=False)
    assert stale(frontends, [(DNS, A)]) == {(DNS, A)}
    frontends.mark_checked()
    assert not frontends.unchecked


def test_flows_to_an_endpoint_that_returned_are_valid() -> None:
    frontends = accepted_frontends(plan(A))
    frontends.update({"ns/dns": [plan(B)]}, complete=False)
    frontends.update({"ns/dns": [plan(A)]}, complete=False)
    assert stale(frontends, [(DNS, A), (DNS, B)]) == {(DNS, B)}


def test_other_protocols_are_ignored() -> None:
    frontends = UdpFrontends()
    frontends.update({"ns/web": [plan(A, protocol="TCP"), plan(A, protocol="SCTP")]}, complete=True)
    assert not frontends.unchecked


def test_only_flows_of_the_owner_of_a_shared_frontend_are_kept() -> None:
    """One Service at a time owns a shared frontend (`kproxy.model.frontend_conflicts`) and receives all its traffic."""
    shared, flows = "203.0.113.1:53", [("203.0.113.1:53", A), ("203.0.113.1:53", B)]
    first, second = plan(A, external_ips=("203.0.113.1",)), plan(B, service="ns/other", cluster_ip="10.96.0.11")
    second = replace(second, external_ips=("203.0.113.1",))
    frontends = accepted_frontends(first)
    frontends.update({"ns/other": [second]}, complete=False)
    assert stale(frontends, flows) == {(shared, B)}
    for owner, state, stale_endpoint in (
        ("the second, because the first has no endpoints", [plan(external_ips=("203.0.113.1",))], A),
        ("the first, by name", [first], B),
        ("the second, because the first was deleted", [], A),
    ):
        frontends.mark_checked()
        frontends.update({"ns/dns": state}, complete=False)
        assert stale(frontends, flows) == {(shared, stale_endpoint)}, owner
    frontends.mark_checked()
    frontends.update({"ns/other": ()}, complete=False)
    assert stale(frontends, flows[1:]) == {(shared, B)}


def test_services_with_a_shared_frontend_are_compared_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quadratic time would let anyone who may create Services block the proxy of a node for minutes."""
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
        frontends.update(plans, complete=True)
        stale(frontends, [("203.0.113.1:53", A)] * number)
    assert sum(compared) <= 4 * number


def test_external_ip_that_equals_a_cluster_ip_takes_over_no_flows() -> None:
    frontends = accepted_frontends(plan())
    frontends.update(
        {"ns/a": [plan(B, service="ns/a", cluster_ip="10.96.0.11", external_ips=("10.96.0.10",))]}, complete=False
    )
    assert stale(frontends, [(DNS, B)]) == {(DNS, B)}


# NodePorts.


def test_node_port_flows_are_stale_on_node_addresses_only() -> None:
    frontends = accepted_frontends(plan(A, node_port=30053))
    frontends.update({"ns/dns": [plan(B, node_port=30053)]}, complete=False)
    flows = [(f"{NODE_ADDRESS}:30053", A), ("198.51.100.1:30053", A), ("198.51.100.1:30053", "198.51.100.1:30053")]
    assert stale(frontends, flows) == {(f"{NODE_ADDRESS}:30053", A)}


def test_host_process_on_a_former_node_port_keeps_its_flows() -> None:
    frontends = accepted_frontends(plan(A, node_port=30053))
    frontends.update({"ns/dns": [plan(A)]}, complete=False)
    flows = [(f"{NODE_ADDRESS}:30053", A), (f"{NODE_ADDRESS}:30053", f"{NODE_ADDRESS}:30053")]
    assert stale(frontends, flows) == {(f"{NODE_ADDRESS}:30053", A)}


def test_address_frontend_takes_precedence_over_a_node_port() -> None:
    frontends = accepted_frontends(plan(A, external_ips=(NODE_ADDRESS,), port=30053))
    frontends.update({"ns/other": [plan(B, cluster_ip="10.96.0.11", node_port=30053)]}, complete=False)
    assert stale(frontends, [(f"{NODE_ADDRESS}:30053", A), (f"{NODE_ADDRESS}:30053", B)]) == {
        (f"{NODE_ADDRESS}:30053", B)
    }
    frontends.update({"ns/dns": ()}, complete=False)
    assert stale(frontends, [(f"{NODE_ADDRESS}:30053", A), (f"{NODE_ADDRESS}:30053", B)]) == {
        (f"{NODE_ADDRESS}:30053", A)
    }


@pytest.mark.parametrize(
    ("context", "address", "expected"),
    [
        (Context(Family.IPV4, "n"), NODE_ADDRESS, True),
        (Context(Family.IPV4, "n"), "198.51.100.1", False),
        (Context(Family.IPV4, "n"), "127.0.0.1", False),
        (Context(Family.IPV4, "n", localhost_node_ports=True), "127.0.0.1", True),
        (Context(Family.IPV4, "n", localhost_node_ports=True), "127.0.0.2", True),
        (Context(Family.IPV6, "n", localhost_node_ports=True), "::1", False),
        (Context(Family.IPV4, "n", node_port_addresses=("192.0.2.2",)), NODE_ADDRESS, False),
        (Context(Family.IPV4, "n", node_port_addresses=("192.0.2.2",)), "192.0.2.2", True),
        (Context(Family.IPV4, "n", node_port_addresses=()), NODE_ADDRESS, False),
    ],
)
def test_node_port_addresses(context: Context, address: str, expected: bool) -> None:
    assert accepts_node_ports(context, address, lambda: {NODE_ADDRESS, "127.0.0.1", "::1"}) is expected


# The endpoints of a frontend.


def endpoints_by_frontend(ports: Sequence[ServicePortPlan]) -> dict[str, frozenset[str]]:
    return {name: frontend.endpoints for name, frontend in udp_frontends(ports).items()}


def test_all_frontends_with_traffic_policy_cluster_have_all_endpoints() -> None:
    port = plan(A, B, external_ips=("203.0.113.1",), vips=("203.0.113.2",), node_port=30053)
    expected = frozenset({A, B})
    assert endpoints_by_frontend([port]) == {
        DNS: expected,
        "203.0.113.1:53": expected,
        "203.0.113.2:53": expected,
        ":30053": expected,
    }


def test_traffic_policy_local_applies_to_internal_or_external_frontends() -> None:
    internal = plan(A, B, local_endpoints=(A,), internal_local=True, node_port=30053)
    assert endpoints_by_frontend([internal]) == {DNS: {A}, ":30053": {A, B}}
    external = plan(A, B, local_endpoints=(A, C), external_local=True, node_port=30053)
    assert endpoints_by_frontend([external]) == {DNS: {A, B}, ":30053": {A, B, C}}


def test_ipv6_frontends() -> None:
    port = plan("[fd00::1]:53", cluster_ip="fd00:96::a", node_port=30053)
    assert set(endpoints_by_frontend([port])) == {"[fd00:96::a]:53", ":30053"}


# Any sequence of states.

SERVICES = {"ns/a": ("10.96.0.1", 30001), "ns/b": ("10.96.0.2", 30001), "ns/c": ("10.96.0.3", 30003)}
service_states = st.dictionaries(
    st.sampled_from(sorted(SERVICES)),
    st.tuples(st.frozensets(st.sampled_from([A, B, C])), st.booleans(), st.sampled_from([53, 5353]), st.booleans()),
)


def plans_for(state: Mapping[str, Any]) -> dict[str, list[ServicePortPlan]]:
    plans = {}
    for key, (endpoints, node_port, port, shares) in state.items():
        address, number = SERVICES[key]
        external_ips = ("203.0.113.1",) if shares else ()
        fields = {"cluster_ip": address, "port": port, "node_port": number * node_port, "external_ips": external_ips}
        plans[key] = [plan(*sorted(endpoints), service=key, **fields)]
    return plans


def expected_flows(plans: Mapping[str, Sequence[ServicePortPlan]]) -> set[Flow]:
    """Return the flows that new connections would create: from every frontend to the endpoints of its owner."""
    endpoints_of: dict[str, frozenset[str]] = {}
    for ports in sorted(plans.values(), key=lambda ports: (not ports[0].cluster_endpoints, ports[0].name)):
        endpoints_of = endpoints_by_frontend(ports) | endpoints_of
    return {
        (NODE_ADDRESS + front if front[0] == ":" else front, to)
        for front, endpoints in endpoints_of.items()
        for to in endpoints
    }


@given(history=st.lists(service_states, min_size=1, max_size=6))
def test_remaining_flows_match_what_new_connections_would_create(history: list[Mapping[str, Any]]) -> None:
    frontends, remaining = UdpFrontends(), set[Flow]()
    before: dict[str, list[ServicePortPlan]] = {}
    for number, state in enumerate(history):
        now = plans_for(state)
        changed = {key: now.get(key, []) for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        frontends.update(changed, complete=number == 0)
        live = expected_flows(now)
        assert not stale(frontends, live)
        remaining = (remaining - stale(frontends, remaining)) | live
        assert remaining == live
        frontends.mark_checked()
        before = now


# The cleaner.


class FakeConntrack:
    """A connection tracking table in memory that fails on demand."""

    def __init__(self, *flows: Flow) -> None:
        self.flows = set(flows)
        self.error: OSError | None = None
        self.calls = 0

    def clean(self, destinations: Collection[str], is_stale: Callable[[str, str], bool]) -> int:
        self.calls += 1
        if self.error:
            raise self.error
        selected = {
            flow for flow in self.flows if not {flow[0], flow[0][flow[0].rindex(":") :]}.isdisjoint(destinations)
        }
        deleted = {flow for flow in selected if is_stale(*flow)}
        self.flows -= deleted
        return len(deleted)


class CleanerFixture:
    """A cleaner of a fake conntrack table, and the cleanups that it reported."""

    def __init__(self, *flows: Flow) -> None:
        self.conntrack = FakeConntrack(*flows)
        self.cleanups: list[ConntrackCleanup] = []
        self.address_reads: list[Family] = []
        ticks = iter(range(1000))
        self._cleaner = ConntrackCleaner(
            {Family.IPV4: self.conntrack},
            self._node_addresses,
            clock=lambda: float(next(ticks)),
            on_cleanup=self.cleanups.append,
        )

    def _node_addresses(self, family: Family) -> Collection[str]:
        self.address_reads.append(family)
        return {NODE_ADDRESS}

    def synced(self, *ports: ServicePortPlan, complete: bool = False, family: Family = Family.IPV4) -> None:
        self._cleaner.clean(succeeded(family, {"ns/dns": ports}, complete=complete))

    def failed(self) -> None:
        self._cleaner.clean(failed(Family.IPV4))


def test_first_sync_deletes_flows_that_became_stale_before() -> None:
    cleaner = CleanerFixture((DNS, A), (DNS, B))
    cleaner.synced(plan(A), complete=True)
    assert cleaner.conntrack.flows == {(DNS, A)}
    assert cleaner.cleanups == [ConntrackCleanup(Family.IPV4, deleted=1, seconds=1.0)]


def test_sync_without_suspect_frontends_does_not_read_conntrack() -> None:
    cleaner = CleanerFixture()
    cleaner.synced(plan(A), complete=True)
    cleaner.synced(plan(A, B))
    cleaner.synced(plan(A, B, protocol="TCP"), family=Family.IPV6)
    assert cleaner.conntrack.calls == 1
    assert len(cleaner.cleanups) == 1


def test_node_addresses_are_read_once_and_only_for_node_ports() -> None:
    cleaner = CleanerFixture((DNS, A), (f"{NODE_ADDRESS}:30053", A), ("198.51.100.1:30053", A))
    cleaner.synced(plan(B), complete=True)
    assert cleaner.address_reads == []
    cleaner.synced(plan(B, node_port=30053))
    assert cleaner.address_reads == [Family.IPV4]
    assert cleaner.conntrack.flows == {("198.51.100.1:30053", A)}


def test_failed_sync_keeps_flows_and_the_next_one_deletes_them() -> None:
    cleaner = CleanerFixture((DNS, A))
    cleaner.synced(plan(A), complete=True)
    cleaner.failed()
    assert cleaner.conntrack.flows == {(DNS, A)}
    cleaner.synced(plan(B), complete=True)
    assert cleaner.conntrack.flows == set()


def test_flows_that_could_not_be_deleted_are_deleted_after_the_next_sync(caplog: pytest.LogCaptureFixture) -> None:
    cleaner = CleanerFixture((DNS, A))
    cleaner.synced(plan(A), complete=True)
    cleaner.conntrack.error = PermissionError(1, "Operation not permitted")
    with caplog.at_level(logging.WARNING):
        cleaner.synced(plan(B))
        cleaner.synced(plan(B))
    assert [record.message for record in caplog.records] == [
        "IPv4: cannot delete stale UDP conntrack entries: Operation not permitted"
    ]
    assert cleaner.cleanups[-1].error == "Operation not permitted"
    cleaner.conntrack.error = None
    cleaner.synced(plan(B))
    assert cleaner.conntrack.flows == set()
    assert cleaner.cleanups[-1] == ConntrackCleanup(Family.IPV4, deleted=1, seconds=1.0)


def test_new_conntrack_error_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    cleaner = CleanerFixture()
    with caplog.at_level(logging.WARNING):
        for error in (OSError("one"), None, OSError("two")):
            cleaner.conntrack.error = error
            cleaner.synced(plan(A), complete=True)
    assert len(caplog.records) == 2


def test_flow_created_without_endpoints_is_stale_once_there_are_some() -> None:
    """Packets of the node itself to a NodePort or an external address are not rejected in the output hook."""
    frontends = accepted_frontends(plan(external_ips=("203.0.113.5",)))
    frontends.update({"ns/dns": (plan(A, external_ips=("203.0.113.5",)),)}, complete=False)
    untranslated = ("203.0.113.5:53", "203.0.113.5:53")
    assert stale(frontends, [untranslated, ("203.0.113.5:53", A)]) == {untranslated}
