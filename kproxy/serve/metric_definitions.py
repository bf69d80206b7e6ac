"""Definitions of all metrics: names, types, labels, buckets and help texts.

Metrics named `kubeproxy_*` have the names and labels of the metrics of kube-proxy 1.36, so that dashboards for
kube-proxy work with kproxy. kube-proxy does not have the metrics named `kproxy_*`.

kproxy omits these metrics, which describe the implementation of kube-proxy:

- `go_*`: the Go runtime
- `apiserver_*` and `aggregator_*`: API server libraries that are linked into kube-proxy
- `kubernetes_feature_enabled`, `registered_metrics_total`, `hidden_metrics_total`, `disabled_metrics_total` and
  `cardinality_enforcement_*`: kube-proxy's metrics library
- `rest_client_*`, except `rest_client_requests_total` and `rest_client_request_duration_seconds`
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct

from kproxy import __version__
from kproxy.model.connection_counts import ServicePortName
from kproxy.model.drift import PART_KINDS
from kproxy.model.types import Family, Protocol
from kproxy.serve.metric_values import Counter, Gauge, Histogram

SYNC_BUCKETS = tuple(0.001 * 2**power for power in range(15))
"""Histogram buckets in seconds for the duration of syncs and conntrack cleanups, as in kube-proxy."""
PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
"""Histogram buckets in seconds for the network programming latency, as in kube-proxy."""
FAMILY = ("ip_family",)
TABLES = ("filter", "nat")
POLICIES = ("internal", "external")
INVALID_DROPPED = (
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "Number of packets dropped because their conntrack state is INVALID.",
)
LOCALHOST_ACCEPTED = (
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    "Number of packets accepted to NodePorts on the loopback interface.",
)
REQUEST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
"""Histogram buckets in seconds for the duration of requests to the API server, as in client-go."""


class LocalhostNodePorts(Struct, frozen=True):
    """NodePorts on the loopback address of an IP family in nftables mode.

    `listeners` is the number of open listeners, and `failures` counts failures to open one. Both are None if kproxy
    does not serve these NodePorts. `rejected` is the number of rejected packets of each protocol.
    """

    rejected: Mapping[Protocol, int]
    listeners: int | None = None
    failures: int | None = None


class MetricDefinitions:
    """All metrics of the daemon, except those of its process. `kproxy.serve.metrics_page` renders them.

    Some metrics exist only in iptables mode or only in nftables mode; `mode` determines which ones are defined.

    - `recorded` are the metrics whose values the daemon updates.
    - The other metrics are read at each scrape:
        - `packet_counters` maps the name and help text of each packet counter of the kernel to a function that returns
          the number of packets, or None if the kernel does not have the counter. It is empty in nftables mode.
        - `api_contacts` returns when the API server last sent data about the objects of each kind, in seconds since the
          epoch.
        - `localhost_node_ports` returns the state of NodePorts on loopback addresses.
        - `service_connections` returns the connections to each service port. It is None if they are not exposed.
    """

    def __init__(
        self, mode: str, families: Iterable[Family], counters: Mapping[tuple[str, str], Callable[[], int | None]]
    ) -> None:
        self.recorded: list[Counter | Gauge | Histogram] = []
        self.packet_counters = {} if mode == "nftables" else counters
        self.api_contacts: Callable[[], Mapping[str, float]] = dict
        self.localhost_node_ports: Callable[[], Mapping[Family, LocalhostNodePorts]] = dict
        self.service_connections: Callable[[], Mapping[ServicePortName, int]] | None = None
        self._names = [family.value for family in families]
        self._define_syncs()
        self._define_changes()
        self._define_conntrack()
        if mode == "nftables":
            self._define_nftables()
        else:
            self._define_iptables()
        self._define_http()
        self._define_build()
        self.node_missing = self._gauge("kproxy_node_missing", "Whether this machine's Node is missing (1) or not (0).")

    def _define_syncs(self) -> None:
        self.sync = self._durations("sync_proxy_rules", "Duration of syncs in seconds.")
        self.full_sync = self._durations("sync_full_proxy_rules", "Duration of full syncs (all Services) in seconds.")
        self.partial_sync = self._durations(
            "sync_partial_proxy_rules", "Duration of partial syncs (changed Services) in seconds."
        )
        self.programming = self._histogram(
            "kubeproxy_network_programming_duration_seconds",
            "Time in seconds from an endpoint change in the cluster until this node has programmed it.",
            FAMILY,
            PROGRAMMING_BUCKETS,
        )
        self.last_queued = self._gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "Unix time at which a change last requested a sync.",
            FAMILY,
        )
        self.last_synced = self._gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "Unix time at which a sync last succeeded.", FAMILY
        )
        self.no_local_endpoints = self._gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Number of service ports with traffic policy Local that have endpoints, but none on this node.",
            (*FAMILY, "traffic_policy"),
        )
        self.without_endpoints = self._gauge(
            "kproxy_services_without_endpoints", "Number of Services with a port that has no endpoints.", FAMILY
        )
        self.in_conflict = self._gauge(
            "kproxy_services_in_conflict",
            "Number of Services that lose an address and port to another Service.",
            FAMILY,
        )
        self.quarantined = self._gauge(
            "kproxy_services_quarantined", "Number of Services whose rules the kernel rejected.", FAMILY
        )
        self.invalid_services = self._gauge(
            "kproxy_services_refused",
            "Number of Services whose current object is invalid; the last valid one, if any, stays active.",
        )
        self.invalid_endpoints = self._gauge(
            "kproxy_endpoints_invalid",
            "Number of endpoints and ports of EndpointSlices that are ignored because they cannot be used.",
        )
        self.failures = self._counter("kproxy_sync_failures_total", "Number of failed syncs.", FAMILY)
        self.drift_repairs = self._counter(
            "kproxy_drift_repairs_total",
            "Number of parts of the rules that other processes changed and kproxy restored, by kind of part.",
            (*FAMILY, "kind"),
        )
        self._initialize(self.failures)
        for name in self._names:
            for policy in POLICIES:
                self.no_local_endpoints.set(0, name, policy)
            for kind in PART_KINDS:
                self.drift_repairs.add(0, name, kind)

    def _define_changes(self) -> None:
        prefix = "kubeproxy_sync_proxy_rules"
        self.endpoint_changes = self._counter(
            f"{prefix}_endpoint_changes_total", "Number of EndpointSlice changes received."
        )
        self.service_changes = self._counter(
            f"{prefix}_service_changes_total", "Number of Service changes received, counted once per IP family."
        )
        self.endpoints_pending = self._gauge(
            f"{prefix}_endpoint_changes_pending", "Number of EndpointSlice changes that are not programmed yet."
        )
        self.services_pending = self._gauge(
            f"{prefix}_service_changes_pending", "Number of Service changes that are not programmed yet."
        )

    def _define_conntrack(self) -> None:
        self.conntrack = self._histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Duration of conntrack cleanups in seconds.",
            FAMILY,
            SYNC_BUCKETS,
        )
        self.conntrack_deleted = self._counter(
            "kubeproxy_conntrack_reconciler_deleted_entries_total", "Number of stale conntrack entries deleted.", FAMILY
        )
        self._initialize(self.conntrack_deleted)

    def _define_iptables(self) -> None:
        prefix = "kubeproxy_sync_proxy_rules_iptables"
        labels = (*FAMILY, "table")
        self.rules_written = self._gauge(
            f"{prefix}_last", "Number of iptables rules written by the last successful sync.", labels
        )
        self.rules = self._gauge(f"{prefix}_total", "Number of iptables rules owned by kproxy.", labels)
        self.rejected = self._counter(f"{prefix}_restore_failures_total", "Number of failed iptables syncs.", FAMILY)
        self.partly_rejected = self._counter(
            f"{prefix}_partial_restore_failures_total", "Number of failed partial iptables syncs.", FAMILY
        )
        self._initialize(self.rejected, self.partly_rejected)

    def _define_nftables(self) -> None:
        prefix = "kubeproxy_sync_proxy_rules_nftables"
        self.rejected = self._counter(f"{prefix}_sync_failures_total", "Number of failed nftables syncs.", FAMILY)
        self.cleanup_failures = self._counter(
            f"{prefix}_cleanup_failures_total", "Number of failures to remove unused nftables chains.", FAMILY
        )
        self._initialize(self.rejected, self.cleanup_failures)

    def _define_http(self) -> None:
        self.probes = {
            page: self._counter(
                f"kubeproxy_proxy_{page}_total", f"Number of /{page} responses, by HTTP status code.", ("code",)
            )
            for page in ("healthz", "livez")
        }
        self.requests = self._counter(
            "rest_client_requests_total",
            "Number of requests to the API server, by HTTP status code, host and method.",
            ("code", "host", "method"),
        )
        self.reflector_errors = self._counter(
            "kproxy_reflector_errors_total",
            "Number of failures to receive objects from the API server, by kind of object and reason.",
            ("kind", "reason"),
        )
        self.request_duration = self._histogram(
            "rest_client_request_duration_seconds",
            "Time in seconds until the API server starts to respond, by host and verb.",
            ("host", "verb"),
            REQUEST_BUCKETS,
        )

    def _define_build(self) -> None:
        labels = {
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
        # Not `kubernetes_build_info`: alerts compare the versions in that metric across the components of Kubernetes.
        build = self._gauge("kproxy_build_info", "Build information of kproxy; the value is always 1.", tuple(labels))
        build.set(1, *labels.values())

    def _durations(self, name: str, text: str) -> Histogram:
        return self._histogram(f"kubeproxy_{name}_duration_seconds", text, FAMILY, SYNC_BUCKETS)

    def _histogram(self, name: str, text: str, labels: Sequence[str], bounds: Iterable[float]) -> Histogram:
        histogram = Histogram(name, text, labels, bounds)
        self.recorded.append(histogram)
        return histogram

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        gauge = Gauge(name, text, labels)
        self.recorded.append(gauge)
        return gauge

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        counter = Counter(name, text, labels)
        self.recorded.append(counter)
        return counter

    def _initialize(self, *counters: Counter) -> None:
        """Expose counters as 0 before their first increment. Otherwise, `rate()` would miss the first increment."""
        for counter in counters:
            for name in self._names:
                counter.add(0, name)
