"""`/metrics`: names, types, labels and buckets match kube-proxy 1.36, and values are correct."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.model.connection_counts import OTHERS, ServicePortName
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, TrafficDecision, plan_service
from kproxy.model.store import StoreChange
from kproxy.model.sync_report import ApplyResult
from kproxy.model.types import EndpointSlice, Family, Node, Service
from kproxy.serve.http import HttpRequest
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED
from kproxy.serve.metrics import Metrics, MissingLocalEndpoints
from kproxy.serve.metrics_page import ip_traffic
from tests.recordings import GOLDEN, store
from tests.reports import PlansByService, failed, succeeded

V4, V6 = Family.IPV4, Family.IPV6
NOW = 1795218460.0
REQUEST = HttpRequest("GET", "/metrics", {}, persistent=True)
PREFIX = "kubeproxy_sync_proxy_rules"
SAMPLE = re.compile(r"([a-z_:A-Z0-9]+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-z_]+)="([^"]*)"')

NEVER_RECORDED = {
    "iptables": {
        "kubeproxy_conntrack_reconciler_deleted_entries_total": ("counter", {"ip_family"}),
        "kubeproxy_conntrack_reconciler_sync_duration_seconds": ("histogram", {"ip_family"}),
        "kubeproxy_network_programming_duration_seconds": ("histogram", {"ip_family"}),
        "kubeproxy_proxy_livez_total": ("counter", {"code"}),
        "kubeproxy_sync_partial_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
        f"{PREFIX}_iptables_restore_failures_total": ("counter", {"ip_family"}),
        f"{PREFIX}_iptables_partial_restore_failures_total": ("counter", {"ip_family"}),
    },
    "nftables": {
        "kubeproxy_conntrack_reconciler_deleted_entries_total": ("counter", {"ip_family"}),
        "kubeproxy_conntrack_reconciler_sync_duration_seconds": ("histogram", {"ip_family"}),
        "kubeproxy_network_programming_duration_seconds": ("histogram", {"ip_family"}),
        "kubeproxy_proxy_healthz_total": ("counter", {"code"}),
        "kubeproxy_proxy_livez_total": ("counter", {"code"}),
        "kubeproxy_sync_partial_proxy_rules_duration_seconds": ("histogram", {"ip_family"}),
        f"{PREFIX}_nftables_sync_failures_total": ("counter", {"ip_family"}),
        f"{PREFIX}_nftables_cleanup_failures_total": ("counter", {"ip_family"}),
    },
}
"""Metrics that kube-proxy 1.36 registers but that have no samples until something happens, so no recording has them."""
RECORDINGS = {"iptables": "metrics.txt", "nftables": "metrics-nftables.txt"}


class Page:
    """A parsed metrics page: types by metric name, and values by name and labels."""

    def __init__(self, text: str) -> None:
        self.types = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE ")}
        self.helps = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP ")}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.labels: dict[str, set[str]] = {name: set() for name in self.types}
        self.buckets: dict[str, list[str]] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                self._sample(line)

    def _sample(self, line: str) -> None:
        match = SAMPLE.fullmatch(line)
        assert match, line
        labels = dict(LABEL.findall(match[2] or ""))
        self.values[match[1], frozenset(labels.items())] = float(match[3])
        base = match[1] if match[1] in self.types else re.sub("_(bucket|sum|count)$", "", match[1])
        assert base in self.types, line
        if "le" in labels:
            bounds = self.buckets.setdefault(base, [])
            if (bound := labels.pop("le")) not in bounds:
                bounds.append(bound)
        self.labels[base] |= labels.keys()

    def value(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, frozenset(labels.items())))


def is_kube_proxy_name(name: str) -> bool:
    return name.startswith(("kubeproxy_", "process_"))


def recorded(mode: str) -> Page:
    return Page((GOLDEN / "clusterip" / RECORDINGS[mode]).read_text())


class FakeProxy:
    """A dual-stack proxy that reports its syncs to `Metrics`, with a wall clock."""

    def __init__(self, mode: str = "iptables", **counters: Any) -> None:
        self.now = NOW
        reads: dict[tuple[str, str], Callable[[], int | None]] = {
            INVALID_DROPPED: lambda: counters.get("dropped", 0),
            LOCALHOST_ACCEPTED: lambda: counters.get("accepted", 0),
        }
        self.metrics = Metrics(mode, (V4, V6), reads, wall=lambda: self.now)

    @property
    def page(self) -> Page:
        return Page(self.metrics.page(REQUEST).body.decode())

    def sync(self, family: Family = V4, plans: PlansByService | None = None, **more: Any) -> None:
        self.metrics.on_sync(succeeded(family, plans, **{"started": 10.0, "finished": 10.5, **more}))

    def fail(self, family: Family = V4) -> None:
        self.metrics.on_sync(failed(family, started=10.0, finished=10.5))

    def value(self, name: str, **labels: str) -> float | None:
        return self.page.value(name, **labels)


@pytest.fixture
def proxy() -> FakeProxy:
    return FakeProxy()


def full_page(mode: str) -> Page:
    """Return a page on which every metric has a sample."""
    proxy = FakeProxy(mode)
    proxy.metrics.on_queue(V4, 0.0)
    proxy.sync(applied=ApplyResult({"nat": 1}, {"nat": 1}), last_changes=(NOW + 1,))
    proxy.sync(complete=False)
    proxy.metrics.conntrack_reconciled(V4, 0.1, 1)
    for page in ("healthz", "livez"):
        proxy.metrics.on_probe(page, 200)
    proxy.metrics.on_request("GET", "10.99.0.1:6443", "200", 0.1)
    proxy.metrics.on_reflector_error("Service", "status")
    proxy.metrics.track_api(lambda: {"Service": 1.0})
    proxy.metrics.track_service_connections(lambda: {ServicePortName("shop", "web", "http"): 1})
    return proxy.page


def test_endpoints_that_are_ignored_are_counted_without_a_sync(proxy: FakeProxy) -> None:
    numbers = [7]
    proxy.metrics.track_invalid_endpoints(lambda: numbers[0])
    assert proxy.value("kproxy_endpoints_invalid") == 7
    numbers[0] = 0
    assert proxy.value("kproxy_endpoints_invalid") == 0


def test_invalid_services_are_counted_without_a_sync(proxy: FakeProxy) -> None:
    invalid: list[str] = []
    proxy.metrics.track_invalid_services(lambda: len(invalid))
    assert proxy.value("kproxy_services_refused") == 0
    invalid.append("ns/web")
    assert proxy.value("kproxy_services_refused") == 1


@pytest.mark.parametrize("mode", RECORDINGS)
def test_names_types_and_labels_match_kube_proxy(mode: str) -> None:
    page, recording = full_page(mode), recorded(mode)
    expected = {
        name: (kind, recording.labels[name]) for name, kind in recording.types.items() if is_kube_proxy_name(name)
    }
    assert {name: (kind, page.labels[name]) for name, kind in page.types.items() if is_kube_proxy_name(name)} == {
        **expected,
        **NEVER_RECORDED[mode],
    }
    assert not NEVER_RECORDED[mode].keys() & expected.keys()


@pytest.mark.parametrize("mode", RECORDINGS)
def test_buckets_match_kube_proxy(mode: str) -> None:
    page, recording = full_page(mode), recorded(mode)
    shared = recording.buckets.keys() & page.buckets.keys()
    assert {name: [float(b) for b in page.buckets[name]] for name in shared} == {
        name: [float(b) for b in recording.buckets[name]] for name in shared
    }
    assert len(shared) == 3
    sync = page.buckets["kubeproxy_sync_proxy_rules_duration_seconds"]
    assert page.buckets["kubeproxy_sync_partial_proxy_rules_duration_seconds"] == sync
    programming = [float(bound) for bound in page.buckets["kubeproxy_network_programming_duration_seconds"][:-1]]
    minutes = [120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]
    assert programming == [0.25, 0.5, *map(float, range(1, 60)), *map(float, range(60, 116, 5)), *minutes]


@pytest.mark.parametrize("mode", RECORDINGS)
def test_all_names_are_prefixed_except_those_of_the_api_client(mode: str) -> None:
    page = full_page(mode)
    assert {name for name in page.types if not is_kube_proxy_name(name) and not name.startswith("kproxy_")} == {
        "rest_client_requests_total",
        "rest_client_request_duration_seconds",
    }
    for name, kind in (
        ("rest_client_requests_total", "counter"),
        ("rest_client_request_duration_seconds", "histogram"),
    ):
        assert page.types[name] == recorded(mode).types[name] == kind
        assert page.labels[name] == recorded(mode).labels[name]
    assert page.helps == page.types.keys()
    assert not any(name.endswith("_created") for name in page.types)


def test_page_is_in_prometheus_text_format(proxy: FakeProxy) -> None:
    response = proxy.metrics.page(REQUEST)
    assert response.headers == (("Content-Type", "text/plain; version=0.0.4; charset=utf-8"),)
    assert response.body.endswith(b"\n")


def test_sync_durations(proxy: FakeProxy) -> None:
    proxy.sync(finished=10.05)
    proxy.sync(complete=False, finished=10.003)
    proxy.sync(V6, finished=11.0)
    durations = "proxy_rules_duration_seconds"
    page = proxy.page
    assert page.value(f"kubeproxy_sync_{durations}_count", ip_family="IPv4") == 2
    assert page.value(f"kubeproxy_sync_{durations}_sum", ip_family="IPv4") == pytest.approx(0.053)
    assert page.value(f"kubeproxy_sync_full_{durations}_sum", ip_family="IPv4") == pytest.approx(0.05)
    assert page.value(f"kubeproxy_sync_partial_{durations}_sum", ip_family="IPv4") == pytest.approx(0.003)
    assert page.value(f"kubeproxy_sync_full_{durations}_bucket", ip_family="IPv4", le="0.032") == 0
    assert page.value(f"kubeproxy_sync_full_{durations}_bucket", ip_family="IPv4", le="0.064") == 1
    assert page.value(f"kubeproxy_sync_full_{durations}_sum", ip_family="IPv6") == 1


def test_full_and_partial_sync_failures_are_counted(proxy: FakeProxy) -> None:
    def failures() -> list[float | None]:
        names = ("restore_failures_total", "partial_restore_failures_total")
        counts = [proxy.value(f"{PREFIX}_iptables_{name}", ip_family="IPv4") for name in names]
        return [*counts, proxy.value("kproxy_sync_failures_total", ip_family="IPv4")]

    assert failures() == [0, 0, 0]
    proxy.fail()  # the first sync is a full one
    assert failures() == [1, 0, 1]
    proxy.fail()  # so is the sync after a failure
    assert failures() == [2, 0, 2]
    proxy.sync()
    proxy.fail()
    assert failures() == [3, 1, 3]
    proxy.fail()
    assert failures() == [4, 1, 4]
    assert proxy.value(f"{PREFIX}_iptables_restore_failures_total", ip_family="IPv6") == 0
    assert proxy.value("kubeproxy_sync_partial_proxy_rules_duration_seconds_count", ip_family="IPv4") == 1


def test_failures_in_nftables_mode() -> None:
    proxy = FakeProxy("nftables")
    proxy.sync()
    proxy.fail()
    assert proxy.value(f"{PREFIX}_nftables_sync_failures_total", ip_family="IPv4") == 1
    assert proxy.value(f"{PREFIX}_nftables_cleanup_failures_total", ip_family="IPv4") == 0


def test_timestamps_of_last_sync_and_last_queued_change(proxy: FakeProxy) -> None:
    proxy.metrics.on_queue(V4, 5.0)
    proxy.now += 2
    proxy.sync()
    proxy.now += 2
    proxy.fail()
    assert proxy.value(f"{PREFIX}_last_queued_timestamp_seconds", ip_family="IPv4") == NOW
    assert proxy.value(f"{PREFIX}_last_timestamp_seconds", ip_family="IPv4") == NOW + 2
    assert proxy.value(f"{PREFIX}_last_timestamp_seconds", ip_family="IPv6") is None


def test_network_programming_duration(proxy: FakeProxy) -> None:
    proxy.now += 100
    proxy.sync(last_changes=(NOW - 1, NOW + 90, NOW + 99.5, NOW + 200))
    name = "kubeproxy_network_programming_duration_seconds"
    page = proxy.page
    # The first change is older than the process. The last one has a timestamp from a clock that is ahead.
    assert page.value(f"{name}_count", ip_family="IPv4") == 3
    assert page.value(f"{name}_sum", ip_family="IPv4") == 10.5
    assert page.value(f"{name}_bucket", ip_family="IPv4", le="0.25") == 1
    assert page.value(f"{name}_bucket", ip_family="IPv4", le="9.0") == 2
    assert page.value(f"{name}_bucket", ip_family="IPv4", le="10.0") == 3


def test_changes_are_pending_until_both_families_are_synced(proxy: FakeProxy) -> None:
    def shown() -> list[float | None]:
        names = ("service_changes_total", "service_changes_pending", "endpoint_changes_total")
        return [proxy.value(f"{PREFIX}_{name}") for name in (*names, "endpoint_changes_pending")]

    assert shown() == [0, 0, 0, 0]
    proxy.metrics.on_change(Service, StoreChange(frozenset({"ns/a", "ns/b"})))
    proxy.metrics.on_change(EndpointSlice, StoreChange(frozenset({"ns/a"})))
    proxy.metrics.on_change(EndpointSlice, StoreChange(frozenset({"ns/b"})))
    proxy.metrics.on_change(Node, StoreChange(node=True))
    assert shown() == [4, 2, 2, 2]  # as in the recording
    proxy.sync(V4)
    assert shown() == [4, 2, 2, 2]
    proxy.fail(V6)
    assert shown() == [4, 2, 2, 2]
    proxy.sync(V6)
    assert shown() == [4, 0, 2, 0]
    page = recorded("iptables")
    assert page.value(f"{PREFIX}_service_changes_total") == 4
    assert page.value(f"{PREFIX}_endpoint_changes_total") == 2


def test_rule_counts_by_table(proxy: FakeProxy) -> None:
    proxy.sync(applied=ApplyResult({"nat": 21, "filter": 4}, {"nat": 21, "filter": 4}))
    proxy.sync(complete=False, applied=ApplyResult({"nat": 3}, {"nat": 24, "filter": 4}))
    proxy.fail()
    page = proxy.page
    values = [
        page.value(f"{PREFIX}_iptables_{name}", ip_family="IPv4", table=table)
        for name in ("last", "total")
        for table in ("nat", "filter")
    ]
    assert values == [3, 0, 24, 4]


@pytest.mark.parametrize(
    ("scenario", "internal", "external"),
    [
        ("clusterip", 0, 0),
        ("internal-local", 0, 0),
        ("internal-local-none-here", 1, 0),
        ("nodeport-external-local-none-here", 0, 1),
        ("no-endpoints", 0, 0),
    ],
)
def test_ports_without_local_endpoints(proxy: FakeProxy, scenario: str, internal: int, external: int) -> None:
    cluster = store(scenario)
    services = [service for key in cluster.service_keys() if (service := cluster.service(key))]
    for family in Family:
        context = Context(family, "node-1")
        proxy.sync(family, {item.key: plan_service(item, cluster.slices(item.key), context) for item in services})
    counts = {
        policy: proxy.value(f"{PREFIX}_no_local_endpoints_total", ip_family="IPv4", traffic_policy=policy)
        for policy in ("internal", "external")
    }
    assert counts == {"internal": internal, "external": external}


KEYS = st.sampled_from(["ns/a", "ns/b", "ns/c"])
DECISIONS = st.sampled_from(list(TrafficDecision))
PORTS = st.lists(st.tuples(DECISIONS, DECISIONS), max_size=3)
UPDATES = st.lists(st.tuples(st.dictionaries(KEYS, PORTS), st.booleans()), max_size=8)


def make_plan(internal: TrafficDecision, external: TrafficDecision) -> ServicePortPlan:
    fields: dict[str, Any] = dict.fromkeys(ServicePortPlan.__struct_fields__, ())
    return ServicePortPlan(**{**fields, "internal": internal, "external": external})


@given(UPDATES)
def test_incremental_counts_match_a_full_count(updates: list[tuple[dict[str, list[Any]], bool]]) -> None:
    missing, current = MissingLocalEndpoints(), dict[str, list[Any]]()
    for services, complete in updates:
        missing.update(
            {key: [make_plan(*port) for port in ports] for key, ports in services.items()}, complete=complete
        )
        current = services if complete else {**current, **services}
        ports = [port for of_service in current.values() for port in of_service]
        dropped = tuple(sum(port[index] is TrafficDecision.DROP for port in ports) for index in (0, 1))
        assert missing.totals == dropped


def test_kernel_counters_are_read_at_every_scrape() -> None:
    counters: dict[str, int | None] = {"dropped": 7, "accepted": None}
    proxy = FakeProxy()
    proxy.metrics = Metrics(
        "iptables",
        (V4,),
        {INVALID_DROPPED: lambda: counters["dropped"], LOCALHOST_ACCEPTED: lambda: counters["accepted"]},
        wall=lambda: NOW,
    )
    assert proxy.value(INVALID_DROPPED[0]) == 7
    assert proxy.value(LOCALHOST_ACCEPTED[0]) is None
    counters["dropped"] = 9
    assert proxy.value(INVALID_DROPPED[0]) == 9


def test_metrics_that_other_components_report(proxy: FakeProxy) -> None:
    proxy.metrics.conntrack_reconciled(V4, 0.25, 3)
    proxy.metrics.conntrack_reconciled(V4, 0.25, 2)
    proxy.metrics.on_request("GET", "10.99.0.1:6443", "200", 0.5)
    proxy.metrics.on_request("GET", "10.99.0.1:6443", "<error>", 0.25)
    proxy.metrics.on_probe("healthz", 200)
    proxy.metrics.on_probe("healthz", 503)
    proxy.metrics.on_probe("livez", 200)
    page = proxy.page
    assert page.value("kubeproxy_conntrack_reconciler_deleted_entries_total", ip_family="IPv4") == 5
    assert page.value("kubeproxy_conntrack_reconciler_sync_duration_seconds_sum", ip_family="IPv4") == 0.5
    request = {"host": "10.99.0.1:6443", "method": "GET"}
    assert page.value("rest_client_requests_total", code="200", **request) == 1
    assert page.value("rest_client_requests_total", code="<error>", **request) == 1
    duration = {"host": "10.99.0.1:6443", "verb": "GET"}
    assert page.value("rest_client_request_duration_seconds_sum", **duration) == 0.75
    assert page.value("kubeproxy_proxy_healthz_total", code="200") == 1
    assert page.value("kubeproxy_proxy_healthz_total", code="503") == 1
    assert page.value("kubeproxy_proxy_livez_total", code="503") is None


def test_process_metrics_and_build_info(proxy: FakeProxy) -> None:
    page = proxy.page
    assert (page.value("process_resident_memory_bytes") or 0) > 1 << 20
    assert (page.value("process_open_fds") or 0) > 2
    assert [value for (name, _), value in page.values.items() if name == "kproxy_build_info"] == [1]
    assert not any(name.startswith("kubernetes_") for name, _ in page.values), (
        "alerts compare kubernetes_build_info with the versions of other components"
    )


def test_node_missing_gauge(proxy: FakeProxy) -> None:
    assert proxy.value("kproxy_node_missing") == 0
    proxy.metrics.set_node_missing(True)
    assert proxy.value("kproxy_node_missing") == 1
    proxy.metrics.set_node_missing(False)
    assert proxy.value("kproxy_node_missing") == 0


def test_connections_of_services_are_exposed_only_if_they_are_read(proxy: FakeProxy) -> None:
    labels = {"namespace": "shop", "service": "web", "port": "http"}
    assert "kproxy_service_connections" not in proxy.metrics.page(REQUEST).body.decode()
    proxy.metrics.track_service_connections(lambda: {ServicePortName("shop", "web", "http"): 7, OTHERS: 9})
    assert proxy.value("kproxy_service_connections_total", **labels) == 7
    assert proxy.value("kproxy_service_connections_total", **dict.fromkeys(labels, "")) == 9


def test_contact_with_the_api_server_and_its_failures(proxy: FakeProxy) -> None:
    ages = {"Service": 5.0, "Node": 100.0}
    proxy.metrics.track_api(lambda: ages)
    proxy.metrics.on_reflector_error("Service", "size")
    assert proxy.value("kproxy_api_last_contact_timestamp_seconds", kind="Service") == NOW - 5.0
    assert proxy.value("kproxy_api_last_contact_timestamp_seconds", kind="Node") == NOW - 100.0
    assert proxy.value("kproxy_reflector_errors_total", kind="Service", reason="size") == 1


def test_ip_traffic_is_parsed_from_netstat() -> None:
    text = "TcpExt: A B\nTcpExt: 1 2\nIpExt: InNoRoutes InOctets OutOctets\nIpExt: 0 1474978 1414198\n"
    assert ip_traffic(text) == {"InNoRoutes": 0, "InOctets": 1474978, "OutOctets": 1414198}
    assert ip_traffic("") == {}
