"""The health check node ports of Services with external traffic policy Local.

`ServiceHealthTracker` runs in the reconciler's thread and derives the health of Services from sync reports.
`HealthCheckNodePorts` runs in the server's thread, opens the ports and responds to requests.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.log_throttle import LogThrottle
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family, ServiceKey
from kproxy.serve.http import NO_SNIFF, HttpRequest, HttpResponse, plain
from kproxy.serve.server import HttpServer, ListenAddress, listen

log = logging.getLogger(__name__)
RETRY_SECONDS = 5.0
"""Seconds between two attempts to open a port."""
BODY = """\
{{
	"service": {{
		"namespace": "{namespace}",
		"name": "{name}"
	}},
	"localEndpoints": {endpoints},
	"serviceProxyHealthy": {healthy}
}}"""
WILDCARDS = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104 - health check ports use the addresses of NodePorts
PortFailure: TypeAlias = Callable[[ServiceKey, int, str], None]
"""Called in the server's thread with the Service, the health check node port that cannot be opened, and the reason."""


class ServiceHealth(Struct, frozen=True):
    """The listen addresses of a Service's health check node port, each with the count of ready endpoints on this node.

    Each count includes only endpoints of one IP family: see `service_health`.
    """

    endpoints: Mapping[ListenAddress, int]


HealthUpdate: TypeAlias = Callable[[Mapping[ServiceKey, ServiceHealth | None]], None]
"""Called with the Services whose health changed. None means that a Service no longer has a health check node port."""


class FamilyServiceHealth(Struct, frozen=True):
    """The health of a Service in one IP family.

    `port` is the health check node port. `hosts` are the addresses that accept NodePort traffic; None means all
    addresses. `endpoints` is the number of ready endpoints on this node.
    """

    port: int
    hosts: tuple[str, ...] | None
    endpoints: int
    dual_stack: bool


class ServiceHealthTracker:
    """Derives the health of Services from sync reports, and passes changes to `update`.

    `update` must neither block nor raise.
    """

    def __init__(self, families: Iterable[Family], update: HealthUpdate) -> None:
        self._update = update
        self._known: dict[Family, dict[ServiceKey, FamilyServiceHealth]] = {family: {} for family in families}

    def on_sync(self, report: SyncReport) -> None:
        """Update the health of the Services in the report of a successful sync. Ignore failed syncs."""
        result = report.result
        if result is None:
            return
        known = self._known[report.family]
        current = {key: family_health(plans, result.context) for key, plans in result.plans.items()}
        if result.complete:
            current.update(dict.fromkeys(known.keys() - current.keys()))
        changed = [key for key, health in current.items() if health != known.get(key)]
        for key in changed:
            health = current[key]
            if health is None:
                del known[key]
            else:
                known[key] = health
        if changed:
            self._update({key: self._merged(key) for key in changed})

    def _merged(self, key: ServiceKey) -> ServiceHealth | None:
        families = {family: services[key] for family, services in self._known.items() if key in services}
        return service_health(families) if families else None


def family_health(plans: Sequence[ServicePortPlan], context: Context) -> FamilyServiceHealth | None:
    """Return the health of a Service in one IP family, or None if the Service has no health check node port."""
    if not plans or not plans[0].health_check_node_port:
        return None
    ready = {address for plan in plans for address in plan.local_ready}
    return FamilyServiceHealth(
        plans[0].health_check_node_port, context.node_port_addresses, len(ready), plans[0].dual_stack
    )


def service_health(families: Mapping[Family, FamilyServiceHealth]) -> ServiceHealth:
    """Return the listen addresses of a Service's health check node port, each with its endpoint count.

    For a dual-stack Service, the count for a listen address includes only endpoints of the address's IP family.
    Otherwise, a load balancer could send IPv4 connections to a node that has only IPv6 endpoints. This also applies
    while only one of the two families has been synced.

    The port of a single-stack Service listens on all addresses of both IP families if all addresses accept NodePort
    traffic.
    """
    if len(families) == 1:
        (health,) = families.values()
        if health.hosts is None and not health.dual_stack:
            return ServiceHealth({ListenAddress("", health.port): health.endpoints})
    return ServiceHealth(
        {
            ListenAddress(host, health.port, one_family=True): health.endpoints
            for family, health in families.items()
            for host in (health.hosts if health.hosts is not None else (WILDCARDS[family],))
        }
    )


class HealthCheckNodePorts:
    """Listens on the health check node ports of Services and responds with their health.

    If one listen address cannot be opened, the others still work. kproxy retries every `RETRY_SECONDS`, reports each
    new reason to `on_failure`, and logs the failure at growing intervals.
    """

    def __init__(self, server: HttpServer, is_healthy: Callable[[], bool], on_failure: PortFailure) -> None:
        self._server = server
        self._is_healthy = is_healthy
        self._on_failure = on_failure
        self._services: dict[ServiceKey, ServiceHealth] = {}
        self._owners: dict[ListenAddress, ServiceKey] = {}
        self._open: dict[ListenAddress, socket.socket] = {}
        self._reported: dict[tuple[ServiceKey, ListenAddress], tuple[str, LogThrottle]] = {}
        self._retrying = False

    def update(self, changes: Mapping[ServiceKey, ServiceHealth | None]) -> None:
        """Apply changes to the health of Services. None means that a Service no longer has a health check node port."""
        ports_changed = any(
            _addresses(health) != _addresses(self._services.get(key)) for key, health in changes.items()
        )
        for key, health in changes.items():
            if health is None:
                self._services.pop(key, None)
            else:
                self._services[key] = health
        if ports_changed:
            self._reconcile()

    def _reconcile(self) -> None:
        problems = self._assign()
        for address in self._open.keys() - self._owners.keys():
            self._server.remove(self._open.pop(address))
        for address, owner in self._owners.items():
            if address not in self._open and (reason := self._try_to_open(address)):
                problems[owner, address] = reason
        self._report(problems)
        if self._owners.keys() - self._open.keys() and not self._retrying:
            self._retrying = True
            self._server.call_later(RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        self._reconcile()

    def _assign(self) -> dict[tuple[ServiceKey, ListenAddress], str]:
        """Assign each listen address to one Service. Return a problem for every other Service with the same address.

        These problems are rare: the API server does not allow two Services with the same health check node port.
        """
        self._owners = {}
        problems = {}
        for key, health in sorted(self._services.items()):
            for address in health.endpoints:
                owner = self._owners.setdefault(address, key)
                if owner != key:
                    problems[key, address] = f"Service {owner} has the same port"
        return problems

    def _try_to_open(self, address: ListenAddress) -> str:
        try:
            listener = listen(address)
        except OSError as error:
            return error.strerror or str(error)
        self._open[address] = listener
        self._server.add(listener, partial(self._respond, address))
        return ""

    def _report(self, problems: dict[tuple[ServiceKey, ListenAddress], str]) -> None:
        reported, self._reported = self._reported, {}
        for (key, address), reason in problems.items():
            before, reminder = reported.pop((key, address), ("", LogThrottle()))
            if reason != before:
                reminder.reset()
                self._on_failure(key, address.port, f"cannot listen on {address}: {reason}")
            if reminder.is_due(self._server.now()):
                log.error("Service %s: health check node port: cannot listen on %s: %s", key, address, reason)
            self._reported[key, address] = reason, reminder
        for key, address in reported:
            if self._owners.get(address) == key and address in self._open:
                log.info("Service %s: health check node port: listening on %s", key, address)

    def _respond(self, address: ListenAddress, _: HttpRequest) -> HttpResponse:
        owner = self._owners.get(address)
        if owner is None:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "no Service has this health check node port\n")
        return service_response(owner, self._services[owner].endpoints[address], healthy=self._is_healthy())


def _addresses(health: ServiceHealth | None) -> Collection[ListenAddress]:
    return health.endpoints.keys() if health else frozenset()


def service_response(key: ServiceKey, endpoints: int, *, healthy: bool) -> HttpResponse:
    """Return the response to a load balancer.

    The status is 200 if this node has endpoints of the Service and the proxy is healthy, and 503 otherwise. As in
    kube-proxy, a header contains the number of endpoints, so that load balancers can use it as the weight of the node.
    """
    namespace, _, name = key.partition("/")
    body = BODY.format(namespace=namespace, name=name, endpoints=endpoints, healthy=str(healthy).lower())
    weight = ("X-Load-Balancing-Endpoint-Weight", str(endpoints))
    status = HTTPStatus.OK if endpoints and healthy else HTTPStatus.SERVICE_UNAVAILABLE
    return HttpResponse(status, (("Content-Type", "application/json"), NO_SNIFF, weight), body.encode())
