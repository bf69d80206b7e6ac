"""The serving side of a daemon, put together: one thread, two fixed ports, and those of Services."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from kproxy import __version__
from kproxy.model.logging import LogThrottle
from kproxy.model.sync_report import ChangeListener, QueueListener, SyncListener
from kproxy.model.types import Family, Node
from kproxy.serve.health import NANO, Health, HealthPages
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, json, plain, routes
from kproxy.serve.metrics import Metrics
from kproxy.serve.server import HttpServer, listen, parse_address
from kproxy.serve.service_health import Failed, HealthCheckNodePorts, ServiceHealthTracker
from kproxy.serve.zpages import flagz, statusz

log = logging.getLogger(__name__)
RETRY_SECONDS = 5.0
"""How long a fixed port that could not be opened is left alone (as kube-proxy does)."""


class ListenError(Exception):
    """A port cannot be opened that must be; the message says which and why on one line."""


class StatusServer:
    """Health, metrics and the Services' health check ports, from `start` until `stop`.

    `mode` and `configuration` (the data of a configuration file) are shown; `health_timeout` is how many seconds
    changes may wait until this counts as unhealthy. The addresses are `IP:port`, "" for none; with `hard_fail`
    they must be there at once. `node` returns this Node as far as it is known, `counters` reads the kernel's counters
    (see `kproxy.serve.metric_definitions`), and `port_failed` is told of Services' ports that cannot be served. `clock`
    is the reconciler's, `wall` gives nanoseconds since the epoch. `reason` returns what is wrong with this Node,
    `flags` the value of each flag of the command line.
    """

    def __init__(
        self,
        families: Iterable[Family],
        *,
        mode: str,
        configuration: Mapping[str, object],
        healthz_address: str,
        metrics_address: str,
        hard_fail: bool,
        health_timeout: float,
        node: Callable[[], Node | None],
        counters: Mapping[tuple[str, str], Callable[[], int | None]],
        port_failed: Failed,
        clock: Callable[[], float],
        wall: Callable[[], int],
        reason: Callable[[], str] = lambda: "",
        flags: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        families = tuple(families)
        self._mode = mode
        self._configuration = configuration
        self._flags = flags
        self._clock, self._wall = clock, partial(_seconds, wall)
        self._hard_fail = hard_fail
        self._server = HttpServer(clock=clock, wall=self._wall)
        self.health = Health(families, health_timeout, wall=wall)
        self.metrics = Metrics(mode, families, counters, wall=self._wall)
        ports = HealthCheckNodePorts(self._server, lambda: self.health.is_healthy(clock()), port_failed)
        services = ServiceHealthTracker(families, lambda changes: self._server.call(partial(ports.update, changes)))
        self.on_queue: tuple[QueueListener, ...] = (self.health.on_queue, self.metrics.on_queue)
        self.on_change: tuple[ChangeListener, ...] = (self.metrics.on_change,)
        self.on_sync: tuple[SyncListener, ...] = (self.health.on_sync, services.on_sync, self.metrics.on_sync)
        pages = HealthPages(self.health, node, clock=clock, wall=wall, probed=self.metrics.probed, reason=reason)
        self._fixed = {"healthz": (healthz_address, pages.handler), "metrics": (metrics_address, self._metrics_pages())}

    def start(self) -> None:
        """Begin to serve. Raises `ListenError` if a port cannot be opened that must be."""
        for name, (address, handler) in self._fixed.items():
            if address:
                self._open(name, address, handler, None if self._hard_fail else LogThrottle())
        self._server.start()

    def stop(self, timeout: float) -> None:
        """Close all ports; wait at most `timeout` seconds for a request that is being answered."""
        self._server.stop(timeout)

    def _open(
        self, name: str, address: str, handler: Handler, reminder: LogThrottle | None, *, again: bool = False
    ) -> None:
        """Open a fixed port. Without a `reminder` it must be there; else it is tried `again` until it is."""
        try:
            listener = listen(parse_address(address))
        except OSError as error:
            message = f"{name}BindAddress {address}: cannot listen: {error.strerror}"
            if reminder is None:
                raise ListenError(message) from None
            if reminder.is_due(self._server.now()):
                log.error("%s, trying again every %.0f s", message, RETRY_SECONDS)
            self._server.call_later(RETRY_SECONDS, partial(self._open, name, address, handler, reminder, again=True))
        else:
            self._server.add(listener, handler)
            if again:
                log.info("%sBindAddress %s: listening now", name, address)

    def _metrics_pages(self) -> Handler:
        pages: dict[str, Handler] = {
            "/metrics": self.metrics.page,
            "/healthz": lambda _: plain(200, "ok"),
            "/proxyMode": lambda _: plain(200, self._mode),
            "/configz": self._configz,
            "/flagz": flagz(self._flags),
        }
        began = self._clock()
        pages["/statusz"] = statusz(
            started=self._wall(),
            up=lambda: self._clock() - began,
            binary_version=__version__,
            python_version=f"{platform.python_version()} ({platform.python_implementation()})",
            paths=(*pages, "/statusz"),
        )
        return routes(pages)

    def _configz(self, _: HttpRequest) -> HttpResponse:
        return json(200, {"kubeproxy.config.k8s.io": self._configuration})


def _seconds(nanoseconds: Callable[[], int]) -> float:
    return nanoseconds() / NANO
