"""`/metrics`: the names, types, labels and buckets that kube-proxy 1.36 had, with values that are true."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, TrafficDecision, plan_service
from kproxy.model.store import StoreChange
from kproxy.model.sync_report import ApplyResult
from kproxy.model.types import EndpointSlice, Family, Node, Service
from kproxy.serve.http import HttpRequest
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED, ip_traffic
from kproxy.serve.metrics import Metrics, MissingLocalEndpoints
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
"""What kube-proxy 1.36 registers, but only shows once it has something to say."""
RECORDINGS = {"iptables": "metrics.txt", "nftables": "metrics-nftables.txt"}


class Page:
    """A page of metrics: `types` by name, and the values by name and labels."""

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


def ours(name: str) -> bool:
    return name.startswith(("kubeproxy_", "process_"))


def recorded(mode: str) -> Page:
    return Page((GOLDEN / "clusterip" / RECORDINGS[mode]).read_text())


class Scene:
    """Metrics, and the clock on the wall."""

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
def scene() -> Scene:
    return Scene()


def everything(mode: str) -> Page:
    """A page on which each metric has been given a value."""
    scene = Scene(mode)
    scene.metrics.on_queue(V4, 0.0)
    scene.sync(applied=ApplyResult({"nat": 1}, {"nat": 1}), last_changes=(NOW + 1,))
    scene.sync(complete=False)
    scene.metrics.conntrack_reconciled(V4, 0.1, 1)
    for page in ("healthz", "livez"):
        scene.metrics.on_probe(page, 200)
    scene.metrics.on_request("GET", "10.99.0.1:6443", "200", 0.1)
    return scene.page


def test_refused_services_are_counted_without_a_sync(scene: Scene) -> None:
    refused: list[str] = []
    scene.metrics.track_invalid_services(lambda: len(refused))
    assert scene.value("kproxy_services_refused") == 0
    refused.append("ns/web")
    assert scene.value("kproxy_services_refused") == 1


@pytest.mark.parametrize("mode", RECORDINGS)
def test_names_types_and_labels_are_kube_proxys(mode: str) -> None:
    page, theirs = everything(mode), recorded(mode)
    wanted = {name: (kind, theirs.labels[name]) for name, kind in theirs.types.items() if ours(name)}
    assert {name: (kind, page.labels[name]) for name, kind in page.types.items() if ours(name)} == {
        **wanted,
        **NEVER_RECORDED[mode],
    }
    assert not NEVER_RECORDED[mode].keys() & wanted.keys()


@pytest.mark.parametrize("mode", RECORDINGS)
def test_buckets_are_kube_proxys(mode: str) -> None:
    page, theirs = everything(mode), recorded(mode)
    shared = theirs.buckets.keys() & page.buckets.keys()
    assert {name: [float(b) for b in page.buckets[name]] for name in shared} == {
        name: [float(b) for b in theirs.buckets[name]] for name in shared
    }
    assert len(shared) == 3
    sync = page.buckets["kubeproxy_sync_proxy_rules_duration_seconds"]
    assert page.buckets["kubeproxy_sync_partial_proxy_rules_duration_seconds"] == sync
    programming = [float(bound) for bound in page.buckets["kubeproxy_network_programming_duration_seconds"][:-1]]
    minutes = [120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]
    assert programming == [0.25, 0.5, *map(float, range(1, 60)), *map(float, range(60, 116, 5)), *minutes]


@pytest.mark.parametrize("mode", RECORDINGS)
def test_only_these_kinds_of_names(mode: str) -> None:
    page = everything(mode)
    assert {name for name in page.types if not ours(name) and not name.startswith("kproxy_")} == {
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


def test_the_page_is_in_the_text_format(scene: Scene) -> None:
    response = scene.metrics.page(REQUEST)
    assert response.headers == (("Content-Type", "text/plain; version=0.0.4; charset=utf-8"),)
    assert response.body.endswith(b"\n")


def test_syncs_are_timed(scene: Scene) -> None:
    scene.sync(finished=10.05)
    scene.sync(complete=False, finished=10.003)
    scene.sync(V6, finished=11.0)
    durations = "proxy_rules_duration_seconds"
    page = scene.page
    assert page.value(f"kubeproxy_sync_{durations}_count", ip_family="IPv4") == 2
    assert page.value(f"kubeproxy_sync_{durations}_sum", ip_family="IPv4") == pytest.approx(0.053)
    assert page.value(f"kubeproxy_sync_full_{durations}_sum", ip_family="IPv4") == pytest.approx(0.05)
    assert page.value(f"kubeproxy_sync_partial_{durations}_sum", ip_family="IPv4") == pytest.approx(0.003)
    assert page.value(f"kubeproxy_sync_full_{durations}_bucket", ip_family="IPv4", le="0.032") == 0
    assert page.value(f"kubeproxy_sync_full_{durations}_bucket", ip_family="IPv4", le="0.064") == 1
    assert page.value(f"kubeproxy_sync_full_{durations}_sum", ip_family="IPv6") == 1


def test_failures_are_counted_whole_and_partial(scene: Scene) -> None:
    def failures() -> list[float | None]:
        names = ("restore_failures_total", "partial_restore_failures_total")
        found = [scene.value(f"{PREFIX}_iptables_{name}", ip_family="IPv4") for name in names]
        return [*found, scene.value("kproxy_sync_failures_total", ip_family="IPv4")]

    assert failures() == [0, 0, 0]
    scene.fail()  # the first attempt looks at everything
    assert failures() == [1, 0, 1]
    scene.fail()  # and so does the one after a failure
    assert failures() == [2, 0, 2]
    scene.sync()
    scene.fail()
    assert failures() == [3, 1, 3]
    scene.fail()
    assert failures() == [4, 1, 4]
    assert scene.value(f"{PREFIX}_iptables_restore_failures_total", ip_family="IPv6") == 0
    assert scene.value("kubeproxy_sync_partial_proxy_rules_duration_seconds_count", ip_family="IPv4") == 1


def test_failures_in_nftables_mode() -> None:
    scene = Scene("nftables")
    scene.sync()
    scene.fail()
    assert scene.value(f"{PREFIX}_nftables_sync_failures_total", ip_family="IPv4") == 1
    assert scene.value(f"{PREFIX}_nftables_cleanup_failures_total", ip_family="IPv4") == 0


def test_times_of_day(scene: Scene) -> None:
    scene.metrics.on_queue(V4, 5.0)
    scene.now += 2
    scene.sync()
    scene.now += 2
    scene.fail()
    assert scene.value(f"{PREFIX}_last_queued_timestamp_seconds", ip_family="IPv4") == NOW
    assert scene.value(f"{PREFIX}_last_timestamp_seconds", ip_family="IPv4") == NOW + 2
    assert scene.value(f"{PREFIX}_last_timestamp_seconds", ip_family="IPv6") is None


def test_how_long_changes_took(scene: Scene) -> None:
    scene.now += 100
    scene.sync(last_changes=(NOW - 1, NOW + 90, NOW + 99.5, NOW + 200))
    name = "kubeproxy_network_programming_duration_seconds"
    page = scene.page
    # The first is from before the start, the last from a clock that is ahead.
    assert page.value(f"{name}_count", ip_family="IPv4") == 3
    assert page.value(f"{name}_sum", ip_family="IPv4") == 10.5
    assert page.value(f"{name}_bucket", ip_family="IPv4", le="0.25") == 1
    assert page.value(f"{name}_bucket", ip_family="IPv4", le="9.0") == 2
    assert page.value(f"{name}_bucket", ip_family="IPv4", le="10.0") == 3


def test_changes_are_counted_and_wait_for_both_families(scene: Scene) -> None:
    def shown() -> list[float | None]:
        names = ("service_changes_total", "service_changes_pending", "endpoint_changes_total")
        return [scene.value(f"{PREFIX}_{name}") for name in (*names, "endpoint_changes_pending")]

    assert shown() == [0, 0, 0, 0]
    scene.metrics.on_change(Service, StoreChange(frozenset({"ns/a", "ns/b"})))
    scene.metrics.on_change(EndpointSlice, StoreChange(frozenset({"ns/a"})))
    scene.metrics.on_change(EndpointSlice, StoreChange(frozenset({"ns/b"})))
    scene.metrics.on_change(Node, StoreChange(node=True))
    assert shown() == [4, 2, 2, 2]  # as in the recording of this cluster
    scene.sync(V4)
    assert shown() == [4, 2, 2, 2]
    scene.fail(V6)
    assert shown() == [4, 2, 2, 2]
    scene.sync(V6)
    assert shown() == [4, 0, 2, 0]
    page = recorded("iptables")
    assert page.value(f"{PREFIX}_service_changes_total") == 4
    assert page.value(f"{PREFIX}_endpoint_changes_total") == 2


def test_rules_by_table(scene: Scene) -> None:
    scene.sync(applied=ApplyResult({"nat": 21, "filter": 4}, {"nat": 21, "filter": 4}))
    scene.sync(complete=False, applied=ApplyResult({"nat": 3}, {"nat": 24, "filter": 4}))
    scene.fail()
    page = scene.page
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
def test_ports_without_local_endpoints(scene: Scene, scenario: str, internal: int, external: int) -> None:
    cluster = store(scenario)
    services = [service for key in cluster.service_keys() if (service := cluster.service(key))]
    for family in Family:
        context = Context(family, "node-1")
        scene.sync(family, {each.key: plan_service(each, cluster.slices(each.key), context) for each in services})
    found = {
        policy: scene.value(f"{PREFIX}_no_local_endpoints_total", ip_family="IPv4", traffic_policy=policy)
        for policy in ("internal", "external")
    }
    assert found == {"internal": internal, "external": external}


KEYS = st.sampled_from(["ns/a", "ns/b", "ns/c"])
DECISIONS = st.sampled_from(list(TrafficDecision))
PORTS = st.lists(st.tuples(DECISIONS, DECISIONS), max_size=3)
UPDATES = st.lists(st.tuples(st.dictionaries(KEYS, PORTS), st.booleans()), max_size=8)


def a_plan(internal: TrafficDecision, external: TrafficDecision) -> ServicePortPlan:
    nothing: dict[str, Any] = dict.fromkeys(ServicePortPlan.__struct_fields__, ())
    return ServicePortPlan(**{**nothing, "internal": internal, "external": external})


@given(UPDATES)
def test_counting_bit_by_bit_is_counting_all(updates: list[tuple[dict[str, list[Any]], bool]]) -> None:
    gaps, known = MissingLocalEndpoints(), dict[str, list[Any]]()
    for services, complete in updates:
        gaps.update({key: [a_plan(*port) for port in ports] for key, ports in services.items()}, complete=complete)
        known = services if complete else {**known, **services}
        ports = [port for each in known.values() for port in each]
        dropped = tuple(sum(port[place] is TrafficDecision.DROP for port in ports) for place in (0, 1))
        assert gaps.totals == dropped


def test_kernel_counters_are_read_when_asked() -> None:
    counters: dict[str, int | None] = {"dropped": 7, "accepted": None}
    scene = Scene()
    scene.metrics = Metrics(
        "iptables",
        (V4,),
        {INVALID_DROPPED: lambda: counters["dropped"], LOCALHOST_ACCEPTED: lambda: counters["accepted"]},
        wall=lambda: NOW,
    )
    assert scene.value(INVALID_DROPPED[0]) == 7
    assert scene.value(LOCALHOST_ACCEPTED[0]) is None
    counters["dropped"] = 9
    assert scene.value(INVALID_DROPPED[0]) == 9


def test_what_others_report(scene: Scene) -> None:
    scene.metrics.conntrack_reconciled(V4, 0.25, 3)
    scene.metrics.conntrack_reconciled(V4, 0.25, 2)
    scene.metrics.on_request("GET", "10.99.0.1:6443", "200", 0.5)
    scene.metrics.on_request("GET", "10.99.0.1:6443", "<error>", 0.25)
    scene.metrics.on_probe("healthz", 200)
    scene.metrics.on_probe("healthz", 503)
    scene.metrics.on_probe("livez", 200)
    page = scene.page
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


def test_the_process_and_the_build(scene: Scene) -> None:
    page = scene.page
    assert (page.value("process_resident_memory_bytes") or 0) > 1 << 20
    assert (page.value("process_open_fds") or 0) > 2
    assert [value for (name, _), value in page.values.items() if name == "kproxy_build_info"] == [1]
    assert not any(name.startswith("kubernetes_") for name, _ in page.values), (
        "alerts compare it with Kubernetes' version"
    )


def test_whether_the_node_is_missing(scene: Scene) -> None:
    assert scene.value("kproxy_node_missing") == 0
    scene.metrics.set_node_missing(True)
    assert scene.value("kproxy_node_missing") == 1
    scene.metrics.set_node_missing(False)
    assert scene.value("kproxy_node_missing") == 0


def test_traffic_of_the_namespace() -> None:
    text = "TcpExt: A B\nTcpExt: 1 2\nIpExt: InNoRoutes InOctets OutOctets\nIpExt: 0 1474978 1414198\n"
    assert ip_traffic(text) == {"InNoRoutes": 0, "InOctets": 1474978, "OutOctets": 1414198}
    assert ip_traffic("") == {}
