"""The listening sockets behind the health check ports of Services; all of it runs in the server's thread."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection, Mapping
from functools import partial
from http import HTTPStatus

from msgspec import Struct

from kproxy.model.reminder import Reminder
from kproxy.model.types import ServiceKey
from kproxy.serve.http import NO_SNIFF, Request, Response, plain
from kproxy.serve.listen import Address, listen
from kproxy.serve.server import HttpServer

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

    endpoints: Mapping[Address, int]


class HealthPorts:
    """Keeps a socket open for each address that is wanted, and answers for the Service that wants it.

    An address that cannot be opened does not hold up others. It is tried again, reported once for each reason, and
    logged as long as that lasts, ever more rarely.
    """

    def __init__(self, server: HttpServer, is_healthy: Callable[[], bool], failed: Failed) -> None:
        self._server = server
        self._is_healthy = is_healthy
        self._failed = failed
        self._services: dict[ServiceKey, ServiceHealth] = {}
        self._owners: dict[Address, ServiceKey] = {}
        self._open: dict[Address, socket.socket] = {}
        self._told: dict[tuple[ServiceKey, Address], tuple[str, Reminder]] = {}
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

    def _assign(self) -> dict[tuple[ServiceKey, Address], str]:
        """Give each address to one Service; return why others, which the API server does not allow, go without."""
        self._owners = {}
        problems = {}
        for key, health in sorted(self._services.items()):
            for address in health.endpoints:
                owner = self._owners.setdefault(address, key)
                if owner != key:
                    problems[key, address] = f"Service {owner} has the same port"
        return problems

    def _try_to_open(self, address: Address) -> str:
        try:
            listener = listen(address)
        except OSError as error:
            return error.strerror or str(error)
        self._open[address] = listener
        self._server.add(listener, partial(self._answer, address))
        return ""

    def _tell(self, problems: dict[tuple[ServiceKey, Address], str]) -> None:
        told, self._told = self._told, {}
        for (key, address), reason in problems.items():
            before, reminder = told.pop((key, address), ("", Reminder()))
            if reason != before:
                reminder.reset()
                self._failed(key, address.port, f"cannot listen on {address}: {reason}")
            if reminder.is_due(self._server.now()):
                log.error("Service %s: its health cannot be asked for on %s: %s", key, address, reason)
            self._told[key, address] = reason, reminder
        for key, address in told:
            if self._owners.get(address) == key and address in self._open:
                log.info("Service %s: its health can be asked for on %s now", key, address)

    def _answer(self, address: Address, _: Request) -> Response:
        owner = self._owners.get(address)
        if owner is None:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "no Service has this port any more\n")
        return service_answer(owner, self._services[owner].endpoints[address], healthy=self._is_healthy())


def _addresses(health: ServiceHealth | None) -> Collection[Address]:
    return health.endpoints.keys() if health else frozenset()


def service_answer(key: ServiceKey, endpoints: int, *, healthy: bool) -> Response:
    """Return what a load balancer is told: 200 if this node can serve new connections of the Service, else 503.

    The header carries the number of endpoints, so that load balancers can weigh nodes (as kube-proxy's does).
    """
    namespace, _, name = key.partition("/")
    body = BODY.format(namespace=namespace, name=name, endpoints=endpoints, healthy=str(healthy).lower())
    weight = ("X-Load-Balancing-Endpoint-Weight", str(endpoints))
    status = HTTPStatus.OK if endpoints and healthy else HTTPStatus.SERVICE_UNAVAILABLE
    return Response(status, (("Content-Type", "application/json"), NO_SNIFF, weight), body.encode())
