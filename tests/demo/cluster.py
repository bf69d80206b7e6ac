"""The demo's cluster: a node that runs kproxy, HTTP server pods, a client pod, and the API objects as files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from tests.lab import objects
from tests.lab.client import Answered, Outcome, send_request
from tests.lab.connection_stream import FIRST_SOURCE_PORT
from tests.lab.proxy import Daemon
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab
from tests.lab.waiting import wait_until

SERVICE = "demo/web"
VIP = "10.96.0.80"
PORT, TARGET_PORT = 80, 8080
START_TIMEOUT = 0.5
"""Seconds until a request times out while kproxy starts. TCP would retransmit its SYN only after a full second."""


class DemoCluster:
    """The demo's cluster. Use it as a context manager, which removes everything on exit."""

    def __init__(self, folder: Path) -> None:
        self.objects = folder / "objects"
        self.objects.mkdir()
        self._log = folder / "kproxy.log"
        self._stack = ExitStack()
        self._lab = self._stack.enter_context(Lab())
        self._servers = self._stack.enter_context(Servers())
        self.node = self._lab.node
        self.client = self._lab.add_pod("client", "10.244.1.100")
        self._ports = count(FIRST_SOURCE_PORT)

    def __enter__(self) -> DemoCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def add_pod(self, name: str, address: str) -> Host:
        """Start a pod that replies to HTTP requests with its name."""
        pod = self._lab.add_pod(name, address)
        self._servers.serve(pod, TARGET_PORT)
        return pod

    def stop_pod(self, pod: Host) -> None:
        """Stop a pod's server after it has replied to all accepted requests."""
        self._servers.stop(pod)

    def write_service(self) -> None:
        """Write the files that never change: the Node and the Service."""
        node = objects.node(addresses=[self.node.address()])
        service = objects.service("web", VIP, port=PORT, target_port=TARGET_PORT)
        objects.write(self.objects / "node.yaml", [node])
        objects.write(self.objects / "service.yaml", [service])

    def write_endpoints(self, ready: Sequence[Host], terminating: Sequence[Host] = ()) -> None:
        """Write the EndpointSlice of the Service with its ready and its terminating endpoints."""
        endpoints = [objects.endpoint(pod.address(), NODE) for pod in ready]
        endpoints += [objects.endpoint(pod.address(), NODE, ready=False, terminating=True) for pod in terminating]
        endpoint_slice = objects.endpoint_slice("web", endpoints, port=TARGET_PORT)
        objects.write(self.objects / "endpoints.yaml", [endpoint_slice])

    def start_kproxy(self) -> tuple[Daemon, float]:
        """Start the daemon and wait until the Service is reachable; return the daemon and the elapsed seconds."""
        start = time.monotonic()
        daemon = self._stack.enter_context(Daemon(self._lab, self.objects, self._log))

        def is_reachable() -> bool:
            outcome = send_request(self.client, VIP, PORT, source_port=next(self._ports), timeout=START_TIMEOUT)
            return daemon.is_up() and isinstance(outcome, Answered)

        wait_until(is_reachable, f"a reply from http://{VIP}/")
        return daemon, time.monotonic() - start

    def request(self) -> Outcome:
        """Send one request from the client to the Service."""
        return send_request(self.client, VIP, PORT, source_port=next(self._ports))

    def dump(self) -> str:
        """Return the node's nat table in the format of `iptables-save`."""
        return self.node.namespace.run(["iptables-save", "-t", "nat"]).stdout

    def time_until_programmed(self, change: Callable[[], None], pod: Host, *, present: bool) -> float:
        """Make a change; return the seconds until the rules have the pod as a target (or no longer have it)."""
        target = f"--to-destination {pod.address()}:{TARGET_PORT}"
        start = time.monotonic()
        change()
        wait_until(
            lambda: (target in self.dump()) is present,
            f"rules {'with' if present else 'without'} {pod.name}",
        )
        return time.monotonic() - start
