"""The listeners that update the metrics, and the handler of `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kproxy.model.connection_counts import ServicePortName
from kproxy.model.delta import Kind
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.store import StoreChange
from kproxy.model.sync_report import ApplyResult, RepairReport, SyncReport
from kproxy.model.types import EndpointSlice, Family, Service, ServiceKey
from kproxy.serve.http import HttpRequest, HttpResponse
from kproxy.serve.metric_definitions import POLICIES, TABLES, LocalhostNodePorts, MetricDefinitions

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The Prometheus text format. Unlike kube-proxy, kproxy does not offer protobuf."""


class Metrics:
    """Updates all metrics and serves them.

    The reconciler's thread calls `on_queue`, `on_change` and `on_sync`. Any thread may call the other methods. `wall`
    returns seconds since the epoch. `mode` and `counters` are described in `MetricDefinitions`.

    The programming latency is recorded only for endpoint changes that happened after this process started. kproxy could
    not have programmed earlier changes in time.
    """

    def __init__(
        self,
        mode: str,
        families: Iterable[Family],
        counters: Mapping[tuple[str, str], Callable[[], int | None]],
        *,
        wall: Callable[[], float],
    ) -> None:
        self._families = tuple(families)
        self._metrics = MetricDefinitions(mode, self._families, counters)
        self._iptables = mode != "nftables"
        self._wall = wall
        self._since = wall()
        self._unsynced = set(self._families)
        self._missing_local = {family: MissingLocalEndpoints() for family in self._families}
        self._services_pending = dict.fromkeys(self._families, 0)
        self._endpoints_pending = dict.fromkeys(self._families, 0)

    def page(self, _: HttpRequest) -> HttpResponse:
        """Respond with all metrics."""
        from kproxy.serve.metrics_page import render  # noqa: PLC0415 - takes 2 MB of memory; many nodes are not scraped

        return HttpResponse(200, (("Content-Type", CONTENT_TYPE),), render(self._metrics))

    def on_queue(self, family: Family, now: float) -> None:  # noqa: ARG002 - the metric is a wall clock time
        """Record that an IP family has a change that is waiting for a sync."""
        self._metrics.last_queued.set(self._wall(), family.value)

    def on_change(self, kind: Kind, changed: StoreChange) -> None:
        """Count the Services that a change to Services or EndpointSlices affects.

        As in kube-proxy, a Service is counted once per IP family if Services changed, but only once if EndpointSlices
        changed.
        """
        if kind is Service:
            self._metrics.service_changes.add(len(changed.services) * len(self._families))
            self._add_pending(self._services_pending, len(changed.services))
        elif kind is EndpointSlice:
            self._metrics.endpoint_changes.add(len(changed.services))
            self._add_pending(self._endpoints_pending, len(changed.services))
        self._set_pending()

    def on_sync(self, report: SyncReport) -> None:
        """Record the duration and the outcome of a sync."""
        result, name, seconds = report.result, report.family.value, report.finished - report.started
        full = report.family in self._unsynced or (result is not None and result.complete)
        self._metrics.sync.observe(seconds, name)
        (self._metrics.full_sync if full else self._metrics.partial_sync).observe(seconds, name)
        if result is None:
            self._failed(report.family, full=full)
            return
        self._unsynced.discard(report.family)
        self._services_pending[report.family] = self._endpoints_pending[report.family] = 0
        self._set_pending()
        self._set_times(name, result.last_changes)
        self._set_rules(name, result.applied)
        self._metrics.without_endpoints.set(result.counts.without_endpoints, name)
        self._metrics.in_conflict.set(result.counts.in_conflict, name)
        self._metrics.quarantined.set(result.counts.quarantined, name)
        missing = self._missing_local[report.family]
        missing.update(result.plans, complete=result.complete)
        for policy, number in zip(POLICIES, missing.totals, strict=True):
            self._metrics.no_local_endpoints.set(number, name, policy)

    def on_repair(self, report: RepairReport) -> None:
        """Count the parts of the rules that were restored. A full sync counts as the repair of a table."""
        name = report.family.value
        for part in report.result.repaired:
            self._metrics.drift_repairs.add(1, name, part.kind)
        if report.result.needs_full_sync:
            self._metrics.drift_repairs.add(1, name, "table")

    def on_probe(self, page: str, status: int) -> None:
        """Count a response of `page` ("healthz" or "livez") under its HTTP status."""
        self._metrics.probes[page].add(1, str(int(status)))

    def set_node_missing(self, missing: bool) -> None:
        """Set whether this machine's Node is missing."""
        self._metrics.node_missing.set(missing)

    def track_invalid_services(self, read: Callable[[], int]) -> None:
        """Call `read` at each scrape to get the number of invalid Services.

        `on_sync` cannot update this number, because it can change without a sync.
        """
        self._metrics.invalid_services.read = read

    def track_invalid_endpoints(self, read: Callable[[], int]) -> None:
        """Call `read` at each scrape to get the number of endpoints and ports that are ignored."""
        self._metrics.invalid_endpoints.read = read

    def track_api(self, ages: Callable[[], Mapping[str, float]]) -> None:
        """Call `ages` at each scrape to get the seconds since the API server last sent data, by kind."""

        def times() -> dict[str, float]:
            now = self._wall()
            return {kind: now - age for kind, age in ages().items()}

        self._metrics.api_contacts = times

    def track_service_connections(self, read: Callable[[], Mapping[ServicePortName, int]]) -> None:
        """Call `read` at each scrape to get the connections to each service port."""
        self._metrics.service_connections = read

    def track_localhost_node_ports(self, read: Callable[[], Mapping[Family, LocalhostNodePorts]]) -> None:
        """Call `read` at each scrape to get the state of NodePorts on loopback addresses."""
        self._metrics.localhost_node_ports = read

    def on_reflector_error(self, kind: str, reason: str) -> None:
        """Count a failure to receive objects of a kind from the API server."""
        self._metrics.reflector_errors.add(1, kind, reason)

    def conntrack_reconciled(self, family: Family, seconds: float, deleted: int) -> None:
        """Record the duration of a conntrack cleanup and the number of deleted entries."""
        self._metrics.conntrack.observe(seconds, family.value)
        self._metrics.conntrack_deleted.add(deleted, family.value)

    def on_request(self, method: str, host: str, code: str, seconds: float) -> None:
        """Count a request to the API server.

        `code` is the HTTP status, or `<error>` if the server did not respond. `seconds` is the time from the request
        until the response or the failure.
        """
        self._metrics.requests.add(1, code, host, method)
        self._metrics.request_duration.observe(seconds, host, method)

    def _failed(self, family: Family, *, full: bool) -> None:
        """Count a failed sync.

        A failure leaves the state of the kernel unknown. The next sync of the IP family is therefore a full sync.
        """
        self._unsynced.add(family)
        self._metrics.failures.add(1, family.value)
        self._metrics.rejected.add(1, family.value)
        if self._iptables and not full:
            self._metrics.partly_rejected.add(1, family.value)

    def _add_pending(self, pending: dict[Family, int], number: int) -> None:
        for family in pending:
            pending[family] += number

    def _set_pending(self) -> None:
        self._metrics.services_pending.set(max(self._services_pending.values(), default=0))
        self._metrics.endpoints_pending.set(max(self._endpoints_pending.values(), default=0))

    def _set_times(self, name: str, last_changes: Sequence[float]) -> None:
        now = self._wall()
        self._metrics.last_synced.set(now, name)
        for moment in last_changes:
            if moment > self._since:
                self._metrics.programming.observe(max(0.0, now - moment), name)

    def _set_rules(self, name: str, applied: ApplyResult) -> None:
        if not self._iptables:
            return
        for table in TABLES:
            self._metrics.rules_written.set(applied.written_rules.get(table, 0), name, table)
            self._metrics.rules.set(applied.total_rules.get(table, 0), name, table)


class MissingLocalEndpoints:
    """Counts service ports with traffic policy Local that have endpoints, but none on this node.

    Stores only the Services that have at least one counted port.
    """

    def __init__(self) -> None:
        self._ports: dict[ServiceKey, tuple[int, int]] = {}
        self._internal = 0
        self._external = 0

    @property
    def totals(self) -> tuple[int, int]:
        """The number of ports whose internal traffic is dropped, and the number whose external traffic is dropped."""
        return self._internal, self._external

    def update(self, plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], *, complete: bool) -> None:
        """Update the counts.

        `plans` and `complete` are described in `SyncResult`. If `complete` is true, a Service that is absent from
        `plans` has no counted port.
        """
        deleted = self._ports.keys() - plans.keys() if complete else ()
        for key in deleted:
            self._set(key, 0, 0)
        for key, ports in plans.items():
            internal = sum(plan.internal is TrafficDecision.DROP for plan in ports)
            external = sum(plan.external is TrafficDecision.DROP for plan in ports)
            if internal or external or key in self._ports:
                self._set(key, internal, external)

    def _set(self, key: ServiceKey, internal: int, external: int) -> None:
        was_internal, was_external = self._ports.pop(key, (0, 0))
        self._internal += internal - was_internal
        self._external += external - was_external
        if internal or external:
            self._ports[key] = internal, external
