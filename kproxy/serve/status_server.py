"""The HTTP server of the daemon: the health and metrics ports, and the health check node ports of Services."""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from kproxy import __version__
from kproxy.model.log_throttle import LogThrottle
from kproxy.model.sync_report import ChangeListener, QueueListener, RepairListener, SyncListener
from kproxy.model.types import Family, Node
from kproxy.serve.control import Control, control_handler, listen_for_control
from kproxy.serve.health import NANO, Health, HealthPages
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, json, plain, routes
from kproxy.serve.metrics import Metrics
from kproxy.serve.server import HttpServer, listen, parse_address
from kproxy.serve.service_health import HealthCheckNodePorts, PortFailure, ServiceHealthTracker
from kproxy.serve.zpages import flagz, statusz

log = logging.getLogger(__name__)
RETRY_SECONDS = 5.0
"""Seconds between two attempts to open the health or metrics port, as in kube-proxy."""


class ListenError(Exception):
    """A required port cannot be opened. The message names the port and the reason on one line."""


class StatusServer:
    """Serves health, metrics and the health check node ports of Services, from `start` until `stop`.

    The reconciler must call the listeners in `on_queue`, `on_change` and `on_sync`.

    - The metrics port also serves `mode`, `configuration` (the content of a configuration file) and the result of
      `flags` (the value of each command-line flag by name).
    - `healthz_address` and `metrics_address` are `IP:port`, or "" to disable the port. If either port cannot be opened,
      `start` raises `ListenError` when `hard_fail` is true; otherwise, the server keeps retrying.
    - The proxy is unhealthy if a change has been waiting for more than `health_timeout` seconds.
    - `node` returns this Node, or None if it is unknown. `reason` returns a description of the problem with this Node,
      or "" if there is none. `sources` returns fields about the sources of the objects (see `HealthPages`).
    - `counters` reads the kernel's packet counters (see `PacketCounterCollector`).
    - `control` answers the requests on the control socket. None means that there is no control socket.
    - `on_port_failed` is called if a health check node port cannot be opened.
    - `clock` is the reconciler's monotonic clock, in seconds. `wall` returns the nanoseconds since the epoch.
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
        on_port_failed: PortFailure,
        clock: Callable[[], float],
        wall: Callable[[], int],
        reason: Callable[[], str] = lambda: "",
        sources: Callable[[], Mapping[str, object]] = dict,
        flags: Callable[[], Mapping[str, str]] = dict,
        control: Control | None = None,
    ) -> None:
        families = tuple(families)
        self._control = control
        self._mode = mode
        self._configuration = configuration
        self._flags = flags
        self._clock, self._wall = clock, partial(_seconds, wall)
        self._hard_fail = hard_fail
        self._server = HttpServer(clock=clock, wall=self._wall)
        self.health = Health(families, health_timeout, wall=wall)
        self.metrics = Metrics(mode, families, counters, wall=self._wall)
        ports = HealthCheckNodePorts(self._server, lambda: self.health.is_healthy(clock()), on_port_failed)
        services = ServiceHealthTracker(families, lambda changes: self._server.call(partial(ports.update, changes)))
        self.on_queue: tuple[QueueListener, ...] = (self.health.on_queue, self.metrics.on_queue)
        self.on_change: tuple[ChangeListener, ...] = (self.metrics.on_change,)
        self.on_sync: tuple[SyncListener, ...] = (self.health.on_sync, services.on_sync, self.metrics.on_sync)
        self.on_repair: tuple[RepairListener, ...] = (self.metrics.on_repair,)
        pages = HealthPages(
            self.health, node, clock=clock, wall=wall, on_probe=self.metrics.on_probe, reason=reason, sources=sources
        )
        self._fixed = {"healthz": (healthz_address, pages.handler), "metrics": (metrics_address, self._metrics_pages())}

    def on_progress(self, family: Family) -> None:
        """Record that the running sync of a family has made progress. Any thread may call this."""
        self.health.on_progress(family, self._clock())

    def healthy(self) -> dict[Family, bool]:
        """Return whether each family is healthy. Any thread may call this."""
        return {family: each.healthy for family, each in self.health.families(self._clock()).items()}

    def start(self) -> None:
        """Open the ports and start serving. Raises `ListenError` if a required port cannot be opened."""
        for name, (address, handler) in self._fixed.items():
            if address:
                self._open(name, address, handler, None if self._hard_fail else LogThrottle())
        if self._control is not None:
            self._open_control(control_handler(self._control, self.metrics.page), LogThrottle())
        self._server.start()

    def _open_control(self, choose: Callable[[socket.socket], Handler], reminder: LogThrottle) -> None:
        """Open the control socket. While a daemon that is about to stop still has it, retry."""
        try:
            listener = listen_for_control()
        except OSError as error:
            if reminder.is_due(self._server.now()):
                log.info("control socket: cannot listen: %s, retrying every %.0f s", error.strerror, RETRY_SECONDS)
            self._server.call_later(RETRY_SECONDS, partial(self._open_control, choose, reminder))
        else:
            self._server.add_chosen(listener, choose)

    def stop(self, timeout: float) -> None:
        """Close all ports. If a request is being served, wait at most `timeout` seconds for it to complete."""
        self._server.stop(timeout)

    def _open(
        self, name: str, address: str, handler: Handler, reminder: LogThrottle | None, *, again: bool = False
    ) -> None:
        """Open a port and serve it. `again` is true for retries.

        If `reminder` is None, the port is required: raise `ListenError` if it cannot be opened. Otherwise, log the
        failure when `reminder` is due, and retry after `RETRY_SECONDS`.
        """
        try:
            listener = listen(parse_address(address))
        except OSError as error:
            message = f"{name}BindAddress {address}: cannot listen: {error.strerror}"
            if reminder is None:
                raise ListenError(message) from None
            if reminder.is_due(self._server.now()):
                log.error("%s, retrying every %.0f s", message, RETRY_SECONDS)
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
        started = self._clock()
        pages["/statusz"] = statusz(
            started=self._wall(),
            up=lambda: self._clock() - started,
            binary_version=__version__,
            python_version=f"{platform.python_version()} ({platform.python_implementation()})",
            paths=(*pages, "/statusz"),
        )
        return routes(pages)

    def _configz(self, _: HttpRequest) -> HttpResponse:
        return json(200, {"kubeproxy.config.k8s.io": self._configuration})


def _seconds(nanoseconds: Callable[[], int]) -> float:
    return nanoseconds() / NANO
