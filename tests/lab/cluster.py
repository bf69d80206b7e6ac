"""Twenty dual-stack Services of type NodePort, their pods, and the YAML files that describe them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.lab import objects
from tests.lab.connection_stream import Target
from tests.lab.modes import rules_of
from tests.lab.node_pods import NodePods
from tests.lab.servers import Servers
from tests.lab.topology import NODE, Host, Lab

SERVICES = 20
NODES = (NODE, "node-2", "node-3")
NODE_PORT = 30080
PORT = 8080
FAMILIES = {4: "IPv4", 6: "IPv6"}


class LabCluster:
    """The Services, numbered from 0. The pods of a Service are spread over the nodes in turn."""

    def __init__(self, lab: Lab, servers: Servers, folder: Path, *, pods: int, mode: str = "iptables") -> None:
        """Add the addresses of `pods` pods for each Service; none of them runs yet. `mode` is kproxy's proxy mode."""
        self._servers = servers
        self._folder = folder
        folder.mkdir()
        self._node = lab.node
        self._rules = rules_of(mode, lab.node.namespace)
        self._inside = lab.add_pod("client", "10.244.1.250", "fd00:10:244:1::250")
        self._outside = lab.add_client("visitor", "198.51.100.10", "2001:db8:51::10")
        self._nodes_pods = [
            NodePods(lab, node, [a for s in range(SERVICES) for n in range(i, pods, 3) for a in _addresses(s, n)])
            for i, node in enumerate(NODES)
        ]
        objects.write(folder / "node.yaml", [objects.node()])

    def pod(self, service: int, number: int) -> Host:
        """Return a pod, running or not."""
        node_pods = self._nodes_pods[number % len(NODES)]
        return node_pods.pod(f"{name(service)}/{number}", *_addresses(service, number))

    def start(self, service: int, number: int) -> None:
        """Make a pod answer."""
        self._servers.serve(self.pod(service, number), PORT)

    def stop(self, service: int, number: int) -> None:
        """Stop a pod once it has answered every request that it accepted."""
        self._servers.stop(self.pod(service, number))

    def write(self, service: int, ready: Iterable[int], terminating: Sequence[int] = ()) -> None:
        """Write a Service and its endpoints: pods that are ready, and pods that are terminating but still serving."""
        found = [_service(service)]
        conditions = [(number, True) for number in ready] + [(number, False) for number in terminating]
        for version, family in FAMILIES.items():
            endpoints = [
                objects.endpoint(
                    self.pod(service, number).address(version),
                    NODES[number % len(NODES)],
                    ready=is_ready,
                    terminating=not is_ready,
                )
                for number, is_ready in conditions
            ]
            found.append(objects.endpoint_slice(_short(service), endpoints, family=family, port=PORT))
        objects.write(self._folder / f"{_short(service)}.yaml", found)

    def targets(self) -> list[Target]:
        """Return the ClusterIPs of every Service, with a pod as client, and its NodePort, with an outside client."""
        found = []
        for service in range(SERVICES):
            found += [Target(name(service), self._inside, vip, 80) for vip in _vips(service)]
            found += [
                Target(name(service), self._outside, address, NODE_PORT + service) for address in self._node.addresses
            ]
        return found

    def rules(self) -> str:
        """Return the node's rules of both families, without counters and the like."""
        return self._rules.text()

    def destinations(self) -> set[str]:
        """Return each `ip:port` that the node's rules DNAT to."""
        return self._rules.destinations()

    def sockets(self, pods: Iterable[tuple[int, int]]) -> set[str]:
        """Return the `ip:port` of each address of these pods, given as `(service, number)`."""
        return {_socket(address) for pod in pods for address in _addresses(*pod)}


def name(service: int) -> str:
    """Return `<namespace>/<name>` of a Service."""
    return f"demo/{_short(service)}"


def _short(service: int) -> str:
    return f"web-{service:02}"


def _vips(service: int) -> tuple[str, str]:
    return f"10.96.1.{service + 1}", f"fd00:10:96:1::{service + 1:x}"


def _addresses(service: int, number: int) -> tuple[str, str]:
    subnet = number % len(NODES) + 1
    host = service * 12 + number // len(NODES) + 1
    return f"10.244.{subnet}.{host}", f"fd00:10:244:{subnet}::{host:x}"


def _service(service: int) -> dict[str, Any]:
    found = objects.service(_short(service), *_vips(service), target_port=PORT, type="NodePort")
    found["spec"]["ports"][0]["nodePort"] = NODE_PORT + service
    return found


def _socket(address: str) -> str:
    return f"[{address}]:{PORT}" if ":" in address else f"{address}:{PORT}"
