"""A Service with every kind of frontend, its pods and its clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab import objects, proxy
from tests.lab.client import Failed, Outcome, Refused, TimedOut, send_request
from tests.lab.modes import mode_flag
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab

CLUSTER_IPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
EXTERNAL_IPS = {4: "203.0.113.7", 6: "2001:db8:7::7"}
LOAD_BALANCER_IPS = {4: "203.0.113.8", 6: "2001:db8:7::8"}
FAMILIES = {4: "IPv4", 6: "IPv6"}
NODE_PORT = 30080
DROP_TIMEOUT = 0.5
"""Seconds without an answer after which a packet counts as dropped. Answers take a hundredth of it."""

TRIES = 40
"""Enough connections to reach both of two endpoints: the chance of missing one is below 1 in 10^12."""


class WebService:
    """A dual-stack Service in a lab with every kind of frontend, its pods and its clients."""

    def __init__(self, lab: Lab, servers: Servers, folder: Path, protocol: str, mode: str = "nftables") -> None:
        self._lab = lab
        self._mode = mode
        self._servers = servers
        self.folder = folder
        self.protocol = protocol
        self.client = lab.add_pod("client", "10.244.1.99", "fd00:10:244:1::99")
        self.outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
        self.node = lab.node

    def pod(self, number: int, node: str = NODE) -> Host:
        """Add a pod that serves the Service's target port."""
        subnet = 1 if node == NODE else 2
        found = self._lab.add_pod(
            f"pod-{number}", f"10.244.{subnet}.{number}", f"fd00:10:244:{subnet}::{number}", node=node
        )
        self._servers.serve(found, 8080, self.protocol)
        return found

    def service(
        self, name: str, *cluster_ips: str, load_balancer_ips: Sequence[str] = (), **spec: Any
    ) -> objects.Object:
        """Return a Service. `load_balancer_ips` are its ingress IPs."""
        found = objects.service(name, *cluster_ips, protocol=self.protocol, **spec)
        if found["spec"]["type"] != "ClusterIP":
            found["spec"]["ports"][0]["nodePort"] = NODE_PORT
        found["status"] = {"loadBalancer": {"ingress": [{"ip": address} for address in load_balancer_ips]}}
        return found

    def slices(self, name: str, pods: Sequence[Host]) -> list[objects.Object]:
        """Return a Service's EndpointSlices of both families."""
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
        """Program these objects and the Node, and nothing else."""
        self.write(found)
        proxy.apply(self._lab, self.folder, mode_flag(self._mode), *flags)

    def write(self, found: Sequence[objects.Object]) -> None:
        """Write these objects and the Node, and nothing else."""
        objects.write(self.folder / "web.yaml", [objects.node(), *found])

    def apply_service(self, pods: Sequence[Host], **spec: Any) -> None:
        """Program the Service with a ClusterIP, a NodePort, an external IP and a load balancer IP."""
        full = {
            "type": "LoadBalancer",
            "externalIPs": [*EXTERNAL_IPS.values()],
            "load_balancer_ips": [*LOAD_BALANCER_IPS.values()],
        }
        self.apply([self.service("web", *CLUSTER_IPS.values(), **(full | spec)), *self.slices("web", pods)])

    def send_request(self, origin: Host, address: str, port: int = 80, *, source: str = "") -> Outcome:
        """Send a request."""
        return send_request(origin, address, port, self.protocol, source=source)

    def drops(self, origin: Host, address: str, port: int = 80) -> bool:
        """Return whether a request is dropped. A local UDP sender gets EPERM when a rule drops its packet in OUTPUT."""
        outcome = send_request(origin, address, port, self.protocol, timeout=DROP_TIMEOUT)
        return outcome in {TimedOut(), Failed("[Errno 1] Operation not permitted")}

    def refuses(self, origin: Host, address: str, port: int = 80) -> bool:
        """Return whether a request is rejected. The node's own UDP sender gets EPERM."""
        outcome = self.send_request(origin, address, port)
        rejected = Failed("[Errno 1] Operation not permitted") if origin is self.node else Refused()
        return outcome in {Refused(), rejected}

    def outcomes(self, origin: Host, address: str, port: int = 80) -> set[Outcome]:
        """Return the distinct outcomes of many requests."""
        return {self.send_request(origin, address, port) for _ in range(TRIES)}

    def external(self, version: int) -> list[tuple[str, int]]:
        """Return all frontends except the ClusterIP."""
        return [(EXTERNAL_IPS[version], 80), (LOAD_BALANCER_IPS[version], 80), (self.node.address(version), NODE_PORT)]

    def frontends(self, version: int) -> list[tuple[str, int]]:
        """Return all frontends."""
        return [(CLUSTER_IPS[version], 80), *self.external(version)]


def _node_of(pod: Host) -> str:
    return NODE if pod.address().startswith("10.244.1.") else "node-2"
