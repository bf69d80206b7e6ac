"""The metrics themselves: names, types, labels and buckets, which dashboards made for kube-proxy 1.36 rely on.

Everything `kubeproxy_*` is kube-proxy's, with its labels; `kproxy_*` is our own. Left out is what kube-proxy exposes
only because of what it is made of: `go_*` (Go's run time), `apiserver_*` and `aggregator_*` (libraries of the API
server linked into it), `kubernetes_feature_enabled`, `registered_metrics_total`, `hidden_metrics_total`,
`disabled_metrics_total` and `cardinality_enforcement_*` (its metrics library), and the inner life of its API client,
`rest_client_*` but for `rest_client_requests_total` and `rest_client_request_duration_seconds`.
"""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kproxy import __version__
from kproxy.model.types import Family

NETSTAT = Path("/proc/self/net/netstat")
UNLIMITED = 2**64 - 1
"""How Go's collector shows a limit that is none."""


class ProcessLimitsCollector(Collector):
    """The address space limit of this process, and the traffic of its network namespace (as Go's collector)."""

    def collect(self) -> Iterator[Metric]:
        """Return what holds now; what the kernel does not tell is left out."""
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        yield GaugeMetricFamily(
            "process_virtual_memory_max_bytes",
            "How much address space this process may use.",
            value=UNLIMITED if limit == resource.RLIM_INFINITY else limit,
        )
        try:
            traffic = ip_traffic(NETSTAT.read_text())
        except OSError:
            return
        for name, field, verb in (("receive", "InOctets", "came in"), ("transmit", "OutOctets", "went out")):
            if field in traffic:
                yield CounterMetricFamily(
                    f"process_network_{name}_bytes_total",
                    f"Bytes of IP packets that {verb} in this process's network namespace.",
                    value=traffic[field],
                )


def ip_traffic(netstat: str) -> dict[str, int]:
    """Return the fields of group IpExt of `/proc/net/netstat`, where a line of names precedes a line of numbers."""
    rows = [line.split()[1:] for line in netstat.splitlines() if line.startswith("IpExt:")]
    return dict(zip(rows[0], map(int, rows[1]), strict=False)) if len(rows) == 2 else {}


class PacketCounterCollector(Collector):
    """Counters that the kernel keeps, read when they are asked for.

    `counters` are name, help and a way to read each, which returns None where there is no such counter.
    """

    def __init__(self, counters: Mapping[tuple[str, str], Callable[[], int | None]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        """Return what the kernel has counted."""
        for (name, text), read in self._counters.items():
            packets = read()
            if packets is not None:
                yield CounterMetricFamily(name, text, value=packets)


SYNC_BUCKETS = tuple(0.001 * 2**power for power in range(15))
PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
FAMILY = ("ip_family",)
TABLES = ("filter", "nat")
POLICIES = ("internal", "external")
INVALID_DROPPED = (
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "Packets dropped because conntrack calls them INVALID.",
)
LOCALHOST_ACCEPTED = (
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    "Packets to NodePorts of the loopback interface that were let in.",
)


REQUEST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
"""Seconds until an answer begins, as client-go counts them."""


class MetricDefinitions:
    """All metrics of one daemon, in a registry of their own.

    `mode` decides which backend's metrics there are. `counters` reads the kernel's counters by name of metric.
    """

    def __init__(
        self, mode: str, families: Iterable[Family], counters: Mapping[tuple[str, str], Callable[[], int | None]]
    ) -> None:
        registry = CollectorRegistry()
        self.registry = WithoutCreatedSamples(registry)
        self._registry = registry
        self._names = [family.value for family in families]
        self._of_syncs()
        self._of_changes()
        self._of_conntrack()
        if mode == "nftables":
            self._of_nftables()
        else:
            self._of_iptables()
            registry.register(PacketCounterCollector(counters))
        self._of_http()
        self._of_build()
        self.node_missing = self._gauge("kproxy_node_missing", "Whether this machine's Node does not exist (0 or 1).")
        ProcessCollector(registry=registry)
        registry.register(ProcessLimitsCollector())

    def _of_syncs(self) -> None:
        self.sync = self._durations("sync_proxy_rules", "How long syncs took.")
        self.full_sync = self._durations("sync_full_proxy_rules", "How long syncs of all Services took.")
        self.partial_sync = self._durations("sync_partial_proxy_rules", "How long syncs of some Services took.")
        self.programming = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "How long it took from a change of endpoints in the cluster until this node's kernel had it.",
            FAMILY,
            buckets=PROGRAMMING_BUCKETS,
            registry=self._registry,
        )
        self.last_queued = self._gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "When a change last asked for a sync.", FAMILY
        )
        self.last_synced = self._gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "When a sync last succeeded.", FAMILY
        )
        self.no_local_endpoints = self._gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Ports of Services with traffic policy Local that have endpoints, but none on this node.",
            (*FAMILY, "traffic_policy"),
        )
        self.without_endpoints = self._gauge(
            "kproxy_services_without_endpoints", "Services with a port that has no endpoint anywhere.", FAMILY
        )
        self.in_conflict = self._gauge(
            "kproxy_services_in_conflict", "Services that lose an address and port to another Service.", FAMILY
        )
        self.invalid_services = self._gauge(
            "kproxy_services_refused",
            "Services whose present object cannot be used: an earlier one may be in its place.",
        )
        self.failures = self._counter("kproxy_sync_failures_total", "Syncs that failed.", FAMILY)
        self._start(self.failures)
        for name in self._names:
            for policy in POLICIES:
                self.no_local_endpoints.labels(name, policy)

    def _of_changes(self) -> None:
        prefix = "kubeproxy_sync_proxy_rules"
        self.endpoint_changes = self._counter(f"{prefix}_endpoint_changes_total", "Changes of EndpointSlices seen.")
        self.service_changes = self._counter(
            f"{prefix}_service_changes_total", "Changes of Services seen, once for each IP family."
        )
        self.endpoints_pending = self._gauge(
            f"{prefix}_endpoint_changes_pending", "Changes of EndpointSlices that are not in the kernel yet."
        )
        self.services_pending = self._gauge(
            f"{prefix}_service_changes_pending", "Changes of Services that are not in the kernel yet."
        )

    def _of_conntrack(self) -> None:
        self.conntrack = Histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "How long it took to look for conntrack entries that are no longer right.",
            FAMILY,
            buckets=SYNC_BUCKETS,
            registry=self._registry,
        )
        self.conntrack_deleted = self._counter(
            "kubeproxy_conntrack_reconciler_deleted_entries_total", "Conntrack entries deleted as stale.", FAMILY
        )
        self._start(self.conntrack_deleted)

    def _of_iptables(self) -> None:
        prefix = "kubeproxy_sync_proxy_rules_iptables"
        labels = (*FAMILY, "table")
        self.rules_written = self._gauge(f"{prefix}_last", "Rules that the last successful sync wrote.", labels)
        self.rules = self._gauge(f"{prefix}_total", "Rules of ours in the kernel.", labels)
        self.refused = self._counter(f"{prefix}_restore_failures_total", "Syncs that the kernel refused.", FAMILY)
        self.partly_refused = self._counter(
            f"{prefix}_partial_restore_failures_total", "Syncs of some Services that the kernel refused.", FAMILY
        )
        self._start(self.refused, self.partly_refused)

    def _of_nftables(self) -> None:
        prefix = "kubeproxy_sync_proxy_rules_nftables"
        self.refused = self._counter(f"{prefix}_sync_failures_total", "Syncs that the kernel refused.", FAMILY)
        self.cleanup_failures = self._counter(
            f"{prefix}_cleanup_failures_total", "Failures to remove chains that are no longer used.", FAMILY
        )
        self._start(self.refused, self.cleanup_failures)

    def _of_http(self) -> None:
        self.probes = {
            page: self._counter(f"kubeproxy_proxy_{page}_total", f"Answers of /{page}, by status.", ("code",))
            for page in ("healthz", "livez")
        }
        self.requests = self._counter(
            "rest_client_requests_total", "Requests to the API server, by status.", ("code", "host", "method")
        )
        self.request_duration = Histogram(
            "rest_client_request_duration_seconds",
            "How long it took until the API server began to answer.",
            ("host", "verb"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )

    def _of_build(self) -> None:
        facts = {
            "build_date": "",
            "compiler": platform.python_implementation(),
            "git_commit": "",
            "git_tree_state": "",
            "git_version": f"v{__version__}",
            "go_version": "",
            "major": "",
            "minor": "",
            "platform": f"linux/{platform.machine()}",
        }
        # Not `kubernetes_build_info`: alerts compare the versions there with Kubernetes'.
        build = self._gauge("kproxy_build_info", "What this is a build of; always 1.", tuple(facts))
        build.labels(**facts).set(1)

    def _durations(self, name: str, text: str) -> Histogram:
        full = f"kubeproxy_{name}_duration_seconds"
        return Histogram(full, text, FAMILY, buckets=SYNC_BUCKETS, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _start(self, *counters: Counter) -> None:
        """Show counters of failures from the start, so that the first failure is seen as a rate."""
        for counter in counters:
            for name in self._names:
                counter.labels(name)


class WithoutCreatedSamples(Collector):
    """A registry without the series `..._created`, which kube-proxy does not have."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Return all metrics."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if sample.name != f"{metric.name}_created"]
            yield metric
