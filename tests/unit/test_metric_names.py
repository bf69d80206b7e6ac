"""The names, types, labels and help texts of all metrics. They are a contract: dashboards and alerts use them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kproxy.model.connection_counts import ServicePortName
from kproxy.model.store import StoreChange
from kproxy.model.sync_report import ApplyResult
from kproxy.model.types import EndpointSlice, Family
from kproxy.serve.http import HttpRequest
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED, LocalhostNodePorts
from kproxy.serve.metric_values import Counter, Gauge, Histogram
from kproxy.serve.metrics import Metrics
from tests.reports import failed, succeeded

NOW = 1795218460.0
COMMON = """
kubeproxy_sync_proxy_rules_duration_seconds | histogram | ip_family
    Duration of syncs in seconds.
kubeproxy_sync_full_proxy_rules_duration_seconds | histogram | ip_family
    Duration of full syncs (all Services) in seconds.
kubeproxy_sync_partial_proxy_rules_duration_seconds | histogram | ip_family
    Duration of partial syncs (changed Services) in seconds.
kubeproxy_network_programming_duration_seconds | histogram | ip_family
    Time in seconds from an endpoint change in the cluster until this node has programmed it.
kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds | gauge | ip_family
    Unix time at which a change last requested a sync.
kubeproxy_sync_proxy_rules_last_timestamp_seconds | gauge | ip_family
    Unix time at which a sync last succeeded.
kubeproxy_sync_proxy_rules_no_local_endpoints_total | gauge | ip_family traffic_policy
    Number of service ports with traffic policy Local that have endpoints, but none on this node.
kproxy_services_without_endpoints | gauge | ip_family
    Number of Services with a port that has no endpoints.
kproxy_services_in_conflict | gauge | ip_family
    Number of Services that lose an address and port to another Service.
kproxy_services_quarantined | gauge | ip_family
    Number of Services whose rules the kernel rejected.
kproxy_services_refused | gauge
    Number of Services whose current object is invalid; the last valid one, if any, stays active.
kproxy_endpoints_invalid | gauge
    Number of endpoints and ports of EndpointSlices that are ignored because they cannot be used.
kproxy_sync_failures_total | counter | ip_family
    Number of failed syncs.
kproxy_drift_repairs_total | counter | ip_family kind
    Number of parts of the rules that other processes changed and kproxy restored, by kind of part.
kubeproxy_sync_proxy_rules_endpoint_changes_total | counter
    Number of EndpointSlice changes received.
kubeproxy_sync_proxy_rules_service_changes_total | counter
    Number of Service changes received, counted once per IP family.
kubeproxy_sync_proxy_rules_endpoint_changes_pending | gauge
    Number of EndpointSlice changes that are not programmed yet.
kubeproxy_sync_proxy_rules_service_changes_pending | gauge
    Number of Service changes that are not programmed yet.
kubeproxy_conntrack_reconciler_sync_duration_seconds | histogram | ip_family
    Duration of conntrack cleanups in seconds.
kubeproxy_conntrack_reconciler_deleted_entries_total | counter | ip_family
    Number of stale conntrack entries deleted.
kubeproxy_proxy_healthz_total | counter | code
    Number of /healthz responses, by HTTP status code.
kubeproxy_proxy_livez_total | counter | code
    Number of /livez responses, by HTTP status code.
rest_client_requests_total | counter | code host method
    Number of requests to the API server, by HTTP status code, host and method.
kproxy_reflector_errors_total | counter | kind reason
    Number of failures to receive objects from the API server, by kind of object and reason.
rest_client_request_duration_seconds | histogram | host verb
    Time in seconds until the API server starts to respond, by host and verb.
kproxy_build_info | gauge | build_date compiler git_commit git_tree_state git_version go_version major minor platform
    Build information of kproxy; the value is always 1.
kproxy_node_missing | gauge
    Whether this machine's Node is missing (1) or not (0).
kproxy_api_last_contact_timestamp_seconds | gauge | kind
    Unix time at which the API server last sent an object, a list or a bookmark of a kind.
kubeproxy_nftables_localhost_nodeport_listeners | gauge | ip_family
    Number of NodePorts that kproxy serves on the loopback address.
kubeproxy_nftables_localhost_nodeport_listener_creation_failures_total | counter | ip_family
    Number of failures to listen on a NodePort of the loopback address.
kubeproxy_nftables_localhost_nodeport_rejected_packets_total | counter | ip_family protocol
    Number of packets rejected because they were for a NodePort on a loopback address.
kproxy_service_connections_total | counter | namespace port service
    Number of connections to a port of a Service on this node. Without labels: to all other ports.
process_virtual_memory_bytes | gauge
    Virtual memory size in bytes.
process_resident_memory_bytes | gauge
    Resident memory size in bytes.
process_start_time_seconds | gauge
    Start time of the process since unix epoch in seconds.
process_cpu_seconds_total | counter
    Total user and system CPU time spent in seconds.
process_open_fds | gauge
    Number of open file descriptors.
process_max_fds | gauge
    Maximum number of open file descriptors.
process_virtual_memory_max_bytes | gauge
    Limit of the virtual memory size of this process in bytes.
process_network_receive_bytes_total | counter
    Number of IP bytes received in the network namespace of this process.
process_network_transmit_bytes_total | counter
    Number of IP bytes sent in the network namespace of this process.
"""
IPTABLES = """
kubeproxy_sync_proxy_rules_iptables_last | gauge | ip_family table
    Number of iptables rules written by the last successful sync.
kubeproxy_sync_proxy_rules_iptables_total | gauge | ip_family table
    Number of iptables rules owned by kproxy.
kubeproxy_sync_proxy_rules_iptables_restore_failures_total | counter | ip_family
    Number of failed iptables syncs.
kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total | counter | ip_family
    Number of failed partial iptables syncs.
kubeproxy_iptables_ct_state_invalid_dropped_packets_total | counter
    Number of packets dropped because their conntrack state is INVALID.
kubeproxy_iptables_localhost_nodeports_accepted_packets_total | counter
    Number of packets accepted to NodePorts on the loopback interface.
"""
NFTABLES = """
kubeproxy_sync_proxy_rules_nftables_sync_failures_total | counter | ip_family
    Number of failed nftables syncs.
kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total | counter | ip_family
    Number of failures to remove unused nftables chains.
"""
"""Two lines per metric: name, type and labels; help text."""


def metrics(mode: str) -> Metrics:
    counters = {INVALID_DROPPED: lambda: 1, LOCALHOST_ACCEPTED: lambda: 1}
    return Metrics(mode, tuple(Family), counters, wall=lambda: NOW)


def text(source: Metrics) -> str:
    return source.page(HttpRequest("GET", "/metrics", {}, persistent=True)).body.decode()


def update_all(source: Metrics) -> None:
    """Make every metric appear with its labels."""
    source.on_queue(Family.IPV4, 0.0)
    source.on_change(EndpointSlice, StoreChange(frozenset({"ns/a"})))
    source.on_sync(succeeded(Family.IPV4, applied=ApplyResult({"nat": 1}, {"nat": 1}), last_changes=(NOW + 1,)))
    source.on_sync(succeeded(Family.IPV4, complete=False))
    source.on_sync(failed(Family.IPV4))
    source.conntrack_reconciled(Family.IPV4, 0.1, 1)
    for page in ("healthz", "livez"):
        source.on_probe(page, 200)
    source.on_request("GET", "10.99.0.1:6443", "200", 0.1)
    source.on_reflector_error("Service", "status")
    source.track_api(lambda: {"Service": 1.0})
    source.track_service_connections(lambda: {ServicePortName("shop", "web", "http"): 1})
    source.track_localhost_node_ports(lambda: {Family.IPV4: LocalhostNodePorts({"TCP": 1}, 2, 3)})


def table(page: str) -> dict[str, tuple[str, str, str]]:
    """Return the type, the labels and the help text of each metric on a page, by its name."""
    rows = {}
    for family in text_string_to_metric_families(page):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        rows[name] = (family.type, " ".join(sorted(labels)), family.documentation)
    return rows


@pytest.mark.parametrize(("mode", "own"), [("iptables", IPTABLES), ("nftables", NFTABLES)])
def test_names_types_labels_and_help_texts_do_not_change(mode: str, own: str) -> None:
    lines = [line for line in (COMMON + own).split("\n") if line]
    expected = {}
    for row, documentation in zip(lines[::2], lines[1::2], strict=True):
        name, kind, labels = [*row.split(" | "), ""][:3]
        expected[name] = (kind, labels, documentation.strip())
    source = metrics(mode)
    update_all(source)
    assert table(text(source)) == expected


def test_prometheus_client_is_not_imported_before_the_first_scrape_which_has_all_updates() -> None:
    program = """
import sys
from tests.unit.test_metric_names import metrics, text, update_all
for name in [name for name in sys.modules if name.startswith("prometheus_client")]:
    del sys.modules[name]
source = metrics("iptables")
for _ in range(3):
    update_all(source)
assert not [name for name in sys.modules if name.startswith("prometheus_client")]
page = text(source)
assert "prometheus_client" in sys.modules
assert 'kubeproxy_proxy_healthz_total{code="200"} 3.0' in page, page
assert 'kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"} 3.0' in page, page
assert 'rest_client_request_duration_seconds_sum{host="10.99.0.1:6443",verb="GET"} 0.30' in page, page
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_updates_of_different_threads_are_all_counted() -> None:
    counter = Counter("a_total", "", ("label",))
    histogram = Histogram("b", "", ("label",), (1.0, 2.0))

    def update() -> None:
        for _ in range(5_000):
            counter.add(1, "x")
            histogram.observe(1.5, "x")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(4):
                threads.submit(update)
    finally:
        sys.setswitchinterval(before)
    assert counter.values() == {("x",): 20_000}
    series = histogram.values()["x",]
    assert (series.counts, series.total) == ([0, 20_000, 0], 30_000.0)


def test_bounds_of_buckets_are_inclusive() -> None:
    histogram = Histogram("b", "", (), (1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.values()[()].counts == [2, 2, 1]


def test_gauge_without_labels_is_read_if_it_has_a_reader() -> None:
    gauge = Gauge("g", "")
    assert gauge.values() == {(): 0.0}
    gauge.set(3)
    assert gauge.values() == {(): 3}
    gauge.read = lambda: 5
    assert gauge.values() == {(): 5}
