"""The listening sockets behind the health check ports of Services; all of it runs in the server's thread."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.logging import LogThrottle
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family, ServiceKey
from kproxy.serve.http import NO_SNIFF, HttpRequest, HttpResponse, plain
from kproxy.serve.server import HttpServer, ListenAddress, listen

log = logging.getLogger(__name__)
RETRY_SECONDS = 5.0
"""How long a port that could not be opened is left alone."""
BODY = """\
{{
	"service": {{
		"namespace": "{namespace}",
		"name": "{name}"
	}},
	"localEndpoints": {endpoints},
	"serviceProxyHealthy": {healthy}
}}"""
Failed = Callable[[ServiceKey, int, str], None]
"""Told, in the server's thread, which Service's health check port cannot be served, and why."""


class ServiceHealth(Struct, frozen=True):
    """A Service's ready endpoints on this node, counted for each address that its health check port listens on.

    The addresses of one IP family count the endpoints of that family: the load balancer's other family may find
    endpoints here when this one finds none.
    """

    endpoints: Mapping[ListenAddress, int]


class HealthCheckNodePorts:
    """Keeps a socket open for each address that is wanted, and answers for the Service that wants it.

    An address that cannot be opened does not hold up others. It is tried again, reported once for each reason, and
    logged as long as that lasts, ever more rarely.
    """

    def __init__(self, server: HttpServer, is_healthy: Callable[[], bool], failed: Failed) -> None:
        self._server = server
        self._is_healthy = is_healthy
        self._failed = failed
        self._services: dict[ServiceKey, ServiceHealth] = {}
        self._owners: dict[ListenAddress, ServiceKey] = {}
        self._open: dict[ListenAddress, socket.socket] = {}
        self._told: dict[tuple[ServiceKey, ListenAddress], tuple[str, LogThrottle]] = {}
        self._retrying = False

    def update(self, changes: Mapping[ServiceKey, ServiceHealth | None]) -> None:
        """Take over what changed; None for a Service that has no health check port any more."""
        moved = any(_addresses(health) != _addresses(self._services.get(key)) for key, health in changes.items())
        for key, health in changes.items():
            if health is None:
                self._services.pop(key, None)
            else:
                self._services[key] = health
        if moved:
            self._reconcile()

    def _reconcile(self) -> None:
        problems = self._assign()
        for address in self._open.keys() - self._owners.keys():
            self._server.remove(self._open.pop(address))
        for address, owner in self._owners.items():
            if address not in self._open and (reason := self._try_to_open(address)):
                problems[owner, address] = reason
        self._tell(problems)
        if self._owners.keys() - self._open.keys() and not self._retrying:
            self._retrying = True
            self._server.call_later(RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        self._reconcile()

    def _assign(self) -> dict[tuple[ServiceKey, ListenAddress], str]:
        """Give each address to one Service; return why others, which the API server does not allow, go without."""
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
        self._server.add(listener, partial(self._answer, address))
        return ""

    def _tell(self, problems: dict[tuple[ServiceKey, ListenAddress], str]) -> None:
        told, self._told = self._told, {}
        for (key, address), reason in problems.items():
            before, reminder = told.pop((key, address), ("", LogThrottle()))
            if reason != before:
                reminder.reset()
                self._failed(key, address.port, f"cannot listen on {address}: {reason}")
            if reminder.is_due(self._server.now()):
                log.error("Service %s: its health cannot be asked for on %s: %s", key, address, reason)
            self._told[key, address] = reason, reminder
        for key, address in told:
            if self._owners.get(address) == key and address in self._open:
                log.info("Service %s: its health can be asked for on %s now", key, address)

    def _answer(self, address: ListenAddress, _: HttpRequest) -> HttpResponse:
        owner = self._owners.get(address)
        if owner is None:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "no Service has this port any more\n")
        return service_answer(owner, self._services[owner].endpoints[address], healthy=self._is_healthy())


def _addresses(health: ServiceHealth | None) -> Collection[ListenAddress]:
    return health.endpoints.keys() if health else frozenset()


def service_answer(key: ServiceKey, endpoints: int, *, healthy: bool) -> HttpResponse:
    """Return what a load balancer is told: 200 if this node can serve new connections of the Service, else 503.

    The header carries the number of endpoints, so that load balancers can weigh nodes (as kube-proxy's does).
    """
    namespace, _, name = key.partition("/")
    body = BODY.format(namespace=namespace, name=name, endpoints=endpoints, healthy=str(healthy).lower())
    weight = ("X-Load-Balancing-Endpoint-Weight", str(endpoints))
    status = HTTPStatus.OK if endpoints and healthy else HTTPStatus.SERVICE_UNAVAILABLE
    return HttpResponse(status, (("Content-Type", "application/json"), NO_SNIFF, weight), body.encode())


WILDCARDS = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104 - health check ports answer where NodePorts do
Update: TypeAlias = Callable[[Mapping[ServiceKey, ServiceHealth | None]], None]


class FamilyServiceHealth(Struct, frozen=True):
    """What one family says of a Service. `hosts` are the addresses that NodePorts answer on, None for all."""

    port: int
    hosts: tuple[str, ...] | None
    endpoints: int
    dual_stack: bool


class ServiceHealthTracker:
    """Follows the syncs and passes on what changed to `update`, which must neither block nor raise."""

    def __init__(self, families: Iterable[Family], update: Update) -> None:
        self._update = update
        self._known: dict[Family, dict[ServiceKey, FamilyServiceHealth]] = {family: {} for family in families}

    def on_sync(self, report: SyncReport) -> None:
        """Update the health of the Services that a successful sync covered."""
        result = report.result
        if result is None:
            return
        known = self._known[report.family]
        found = {key: family_health(plans, result.context) for key, plans in result.plans.items()}
        if result.complete:
            found.update(dict.fromkeys(known.keys() - found.keys()))
        touched = [key for key, health in found.items() if health != known.get(key)]
        for key in touched:
            health = found[key]
            if health is None:
                del known[key]
            else:
                known[key] = health
        if touched:
            self._update({key: self._merged(key) for key in touched})

    def _merged(self, key: ServiceKey) -> ServiceHealth | None:
        families = {family: services[key] for family, services in self._known.items() if key in services}
        return service_health(families) if families else None


def family_health(plans: Sequence[ServicePortPlan], context: Context) -> FamilyServiceHealth | None:
    """Return what a family's plans of one Service say, None if it has no health check port."""
    if not plans or not plans[0].health_check_node_port:
        return None
    ready = {address for plan in plans for address in plan.local_ready}
    return FamilyServiceHealth(
        plans[0].health_check_node_port, context.node_port_addresses, len(ready), plans[0].dual_stack
    )


def service_health(families: Mapping[Family, FamilyServiceHealth]) -> ServiceHealth:
    """Return where a Service's health is asked for, and what each family answers there.

    Each family of a dual-stack Service answers for its own endpoints: a load balancer of one family must not send
    connections to a node that could serve only the other, even while nothing is known of the other yet. A Service of
    one family whose NodePorts answer on all addresses is asked about on those of both.
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
