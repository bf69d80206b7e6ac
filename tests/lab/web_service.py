"""A Service with every kind of frontend, the pods behind it, and all who might ask, in nftables mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab import objects, proxy
from tests.lab.client import Failed, Outcome, Refused, TimedOut, ask
from tests.lab.modes import flag
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab

VIPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
EXTERNAL = {4: "203.0.113.7", 6: "2001:db8:7::7"}
BALANCED = {4: "203.0.113.8", 6: "2001:db8:7::8"}
FAMILIES = {4: "IPv4", 6: "IPv6"}
NODE_PORT = 30080
SILENCE = 0.5
"""Seconds without an answer that count as dropped; answers take a hundredth of it."""

TRIES = 40
"""Connections after which one of two endpoints that got none cannot be chance (less than 1 in 10^12)."""


class Web:
    """A dual-stack Service of a lab, with every kind of frontend, pods behind it, and all who might ask."""

    def __init__(self, lab: Lab, servers: Servers, folder: Path, protocol: str) -> None:
        self._lab = lab
        self._servers = servers
        self.folder = folder
        self.protocol = protocol
        self.client = lab.add_pod("client", "10.244.1.99", "fd00:10:244:1::99")
        self.outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
        self.node = lab.node

    def pod(self, number: int, node: str = NODE) -> Host:
        """Add a pod that answers."""
        subnet = 1 if node == NODE else 2
        found = self._lab.add_pod(
            f"pod-{number}", f"10.244.{subnet}.{number}", f"fd00:10:244:{subnet}::{number}", node=node
        )
        self._servers.serve(found, 8080, self.protocol)
        return found

    def service(self, name: str, *cluster_ips: str, balanced: Sequence[str] = (), **spec: Any) -> objects.Object:
        """Return a Service; `balanced` are addresses of its load balancer."""
        found = objects.service(name, *cluster_ips, protocol=self.protocol, **spec)
        if found["spec"]["type"] != "ClusterIP":
            found["spec"]["ports"][0]["nodePort"] = NODE_PORT
        found["status"] = {"loadBalancer": {"ingress": [{"ip": address} for address in balanced]}}
        return found

    def slices(self, name: str, pods: Sequence[Host]) -> list[objects.Object]:
        """Return a Service's slices of both families."""
        return [
            objects.endpoint_slice(
                name,
                [objects.endpoint(pod.address(version), _node_of(pod)) for pod in pods],
                family=family,
                protocol=self.protocol,
            )
            for version, family in FAMILIES.items()
        ]

    def apply(self, found: Sequence[objects.Object], *flags: str) -> None:
        """Program these objects and the node, and nothing else."""
        self.write(found)
        proxy.apply(self._lab, self.folder, flag("nftables"), *flags)

    def write(self, found: Sequence[objects.Object]) -> None:
        """Write these objects and the node, and nothing else."""
        objects.write(self.folder / "web.yaml", [objects.node(), *found])

    def apply_web(self, pods: Sequence[Host], **spec: Any) -> None:
        """Program the Service with a ClusterIP, a NodePort, an external IP and a load balancer's."""
        full = {"type": "LoadBalancer", "externalIPs": [*EXTERNAL.values()], "balanced": [*BALANCED.values()]}
        self.apply([self.service("web", *VIPS.values(), **(full | spec)), *self.slices("web", pods)])

    def ask(self, origin: Host, address: str, port: int = 80, *, source: str = "") -> Outcome:
        """Send a request."""
        return ask(origin, address, port, self.protocol, source=source)

    def drops(self, origin: Host, address: str, port: int = 80) -> bool:
        """Return whether nothing answers. A datagram's own sender is told when a rule stops it on the way out."""
        outcome = ask(origin, address, port, self.protocol, patience=SILENCE)
        return outcome in {TimedOut(), Failed("[Errno 1] Operation not permitted")}

    def refuses(self, origin: Host, address: str, port: int = 80) -> bool:
        """Return whether the answer is a refusal; the node's own datagrams are refused to their sender."""
        outcome = self.ask(origin, address, port)
        own = Failed("[Errno 1] Operation not permitted") if origin is self.node else Refused()
        return outcome in {Refused(), own}

    def reached(self, origin: Host, address: str, port: int = 80) -> set[Outcome]:
        """Return all answers to many requests."""
        return {self.ask(origin, address, port) for _ in range(TRIES)}

    def external(self, version: int) -> list[tuple[str, int]]:
        """Return the frontends that are not the ClusterIP."""
        return [(EXTERNAL[version], 80), (BALANCED[version], 80), (self.node.address(version), NODE_PORT)]

    def frontends(self, version: int) -> list[tuple[str, int]]:
        """Return all frontends."""
        return [(VIPS[version], 80), *self.external(version)]


def _node_of(pod: Host) -> str:
    return NODE if pod.address().startswith("10.244.1.") else "node-2"
