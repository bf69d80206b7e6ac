"""The demo's cluster: a node with kproxy on it, pods that answer over HTTP, a client, and the files that tell."""

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
FIRST_TRIES = 0.5
"""Seconds for a request before the rules are there: TCP would wait a whole one before it asks again."""


class Scene:
    """Everything on the stage. Close it, or use it in a `with`: nothing of it stays."""

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

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def add_pod(self, name: str, address: str) -> Host:
        """Start a pod that answers with its name."""
        pod = self._lab.add_pod(name, address)
        self._servers.serve(pod, TARGET_PORT)
        return pod

    def stop_pod(self, pod: Host) -> None:
        """End a pod, once it has answered what it accepted."""
        self._servers.stop(pod)

    def write_service(self) -> None:
        """Write the files that never change: the Node and the Service."""
        node = objects.node(addresses=[self.node.address()])
        service = objects.service("web", VIP, port=PORT, target_port=TARGET_PORT)
        objects.write(self.objects / "node.yaml", [node])
        objects.write(self.objects / "service.yaml", [service])

    def write_endpoints(self, ready: Sequence[Host], leaving: Sequence[Host] = ()) -> None:
        """Write who is behind the Service, and who is about to leave."""
        endpoints = [objects.endpoint(pod.address(), NODE) for pod in ready]
        endpoints += [objects.endpoint(pod.address(), NODE, ready=False, terminating=True) for pod in leaving]
        found = objects.endpoint_slice("web", endpoints, port=TARGET_PORT)
        objects.write(self.objects / "endpoints.yaml", [found])

    def start_kproxy(self) -> tuple[Daemon, float]:
        """Start the daemon; return it once the Service answers, with the seconds until then."""
        begun = time.monotonic()
        daemon = self._stack.enter_context(Daemon(self._lab, self.objects, self._log))

        def answers() -> bool:
            first = send_request(self.client, VIP, PORT, source_port=next(self._ports), timeout=FIRST_TRIES)
            return daemon.is_up() and isinstance(first, Answered)

        wait_until(answers, f"http://{VIP}/ answers")
        return daemon, time.monotonic() - begun

    def request(self) -> Outcome:
        """Send one request from the client to the Service."""
        return send_request(self.client, VIP, PORT, source_port=next(self._ports))

    def dump(self) -> str:
        """Return the node's NAT rules, as `iptables-save` prints them."""
        return self.node.namespace.run(["iptables-save", "-t", "nat"]).stdout

    def follow(self, change: Callable[[], None], pod: Host, present: bool) -> float:
        """Make a change, and return the seconds until the rules name the pod (or no longer do)."""
        target = f"--to-destination {pod.address()}:{TARGET_PORT}"
        begun = time.monotonic()
        change()
        wait_until(
            lambda: (target in self.dump()) is present,
            f"the rules {'name' if present else 'no longer name'} {pod.name}",
        )
        return time.monotonic() - begun
