"""`/metrics`: what kube-proxy's dashboards ask for, kept up to date sync by sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import generate_latest

from kproxy.model.delta import Kind
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.store import StoreChange
from kproxy.model.sync_report import ApplyResult, SyncReport
from kproxy.model.types import EndpointSlice, Family, Service, ServiceKey
from kproxy.serve.http import HttpRequest, HttpResponse
from kproxy.serve.metric_definitions import POLICIES, TABLES, MetricDefinitions

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The text format, which is all that kube-proxy offers besides protobuf."""


class Metrics:
    """An observer of syncs that counts, and the page that shows it.

    All but `page` are called by whoever knows: `queued`, `changed` and `synced` by the reconciler's thread. `wall`
    gives seconds since the epoch; endpoint changes from before this was made are not measured, since nobody here
    could have programmed them then.
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
        self._series = MetricDefinitions(mode, self._families, counters)
        self._iptables = mode != "nftables"
        self._wall = wall
        self._since = wall()
        self._unknown = set(self._families)
        self._gaps = {family: MissingLocalEndpoints() for family in self._families}
        self._services_pending = dict.fromkeys(self._families, 0)
        self._endpoints_pending = dict.fromkeys(self._families, 0)

    def page(self, _: HttpRequest) -> HttpResponse:
        """Answer with all metrics."""
        return HttpResponse(200, (("Content-Type", CONTENT_TYPE),), generate_latest(self._series.registry))

    def on_queue(self, family: Family, now: float) -> None:  # noqa: ARG002 - dashboards want the time of day
        """Note that a change of a family waits to be programmed."""
        self._series.last_queued.labels(family.value).set(self._wall())

    def on_change(self, kind: Kind, changed: StoreChange) -> None:
        """Count what one delta changed: Services once for each family, as kube-proxy does, and EndpointSlices once."""
        if kind is Service:
            self._series.service_changes.inc(len(changed.services) * len(self._families))
            self._wait(self._services_pending, len(changed.services))
        elif kind is EndpointSlice:
            self._series.endpoint_changes.inc(len(changed.services))
            self._wait(self._endpoints_pending, len(changed.services))
        self._show_pending()

    def on_sync(self, report: SyncReport) -> None:
        """Record the duration and the outcome of a sync."""
        result, name, seconds = report.result, report.family.value, report.finished - report.started
        full = report.family in self._unknown or (result is not None and result.complete)
        self._series.sync.labels(name).observe(seconds)
        (self._series.full_sync if full else self._series.partial_sync).labels(name).observe(seconds)
        if result is None:
            self._failed(report.family, full=full)
            return
        self._unknown.discard(report.family)
        self._services_pending[report.family] = self._endpoints_pending[report.family] = 0
        self._show_pending()
        self._show_times(name, result.last_changes)
        self._show_rules(name, result.applied)
        self._series.without_endpoints.labels(name).set(result.counts.without_endpoints)
        self._series.in_conflict.labels(name).set(result.counts.in_conflict)
        gaps = self._gaps[report.family]
        gaps.update(result.plans, complete=result.complete)
        for policy, number in zip(POLICIES, gaps.totals, strict=True):
            self._series.no_local_endpoints.labels(name, policy).set(number)

    def probed(self, page: str, status: int) -> None:
        """Count an answer of `healthz` or `livez`."""
        self._series.probes[page].labels(str(int(status))).inc()

    def node_missing(self, missing: bool) -> None:
        """Show whether this machine's Node does not exist."""
        self._series.node_missing.set(missing)

    def track_invalid_services(self, read: Callable[[], int]) -> None:
        """Show from now on what `read` returns as the number of refused Services: it changes without a sync."""
        self._series.invalid_services.set_function(read)

    def conntrack_reconciled(self, family: Family, seconds: float, deleted: int) -> None:
        """Count one look for stale conntrack entries and how many were deleted."""
        self._series.conntrack.labels(family.value).observe(seconds)
        self._series.conntrack_deleted.labels(family.value).inc(deleted)

    def requested(self, method: str, host: str, code: str, seconds: float) -> None:
        """Count a request to the API server; `code` is the status, or `<error>` where there was no answer.

        `seconds` went by until the answer began or was given up.
        """
        self._series.requests.labels(code, host, method).inc()
        self._series.request_duration.labels(host, method).observe(seconds)

    def _failed(self, family: Family, *, full: bool) -> None:
        """After a failure nothing is known of the kernel any more: the next attempt looks at everything."""
        self._unknown.add(family)
        self._series.failures.labels(family.value).inc()
        self._series.refused.labels(family.value).inc()
        if self._iptables and not full:
            self._series.partly_refused.labels(family.value).inc()

    def _wait(self, pending: dict[Family, int], number: int) -> None:
        for family in pending:
            pending[family] += number

    def _show_pending(self) -> None:
        self._series.services_pending.set(max(self._services_pending.values(), default=0))
        self._series.endpoints_pending.set(max(self._endpoints_pending.values(), default=0))

    def _show_times(self, name: str, last_changes: Sequence[float]) -> None:
        now = self._wall()
        self._series.last_synced.labels(name).set(now)
        for moment in last_changes:
            if moment > self._since:
                self._series.programming.labels(name).observe(max(0.0, now - moment))

    def _show_rules(self, name: str, applied: ApplyResult) -> None:
        if not self._iptables:
            return
        for table in TABLES:
            self._series.rules_written.labels(name, table).set(applied.written_rules.get(table, 0))
            self._series.rules.labels(name, table).set(applied.total_rules.get(table, 0))


class MissingLocalEndpoints:
    """How many ports of Services have endpoints, but none on this node where their policy wants one.

    Only Services with such ports are remembered, so a sync of few Services costs little in a cluster of many.
    """

    def __init__(self) -> None:
        self._ports: dict[ServiceKey, tuple[int, int]] = {}
        self._internal = 0
        self._external = 0

    @property
    def totals(self) -> tuple[int, int]:
        """The numbers for internal and for external traffic."""
        return self._internal, self._external

    def update(self, plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], *, complete: bool) -> None:
        """Take in the plans of all Services, or of those that may have changed."""
        gone = self._ports.keys() - plans.keys() if complete else ()
        for key in gone:
            self._put(key, 0, 0)
        for key, ports in plans.items():
            internal = sum(plan.internal is TrafficDecision.DROP for plan in ports)
            external = sum(plan.external is TrafficDecision.DROP for plan in ports)
            if internal or external or key in self._ports:
                self._put(key, internal, external)

    def _put(self, key: ServiceKey, internal: int, external: int) -> None:
        was_internal, was_external = self._ports.pop(key, (0, 0))
        self._internal += internal - was_internal
        self._external += external - was_external
        if internal or external:
            self._ports[key] = internal, external
