"""The network of the emulated cluster: nodes and an outside client, connected by a router, the fabric.

Pods are attached to their node. Packets to unassigned addresses are answered with ICMP "unreachable" at once.

    pod-1 ──┐                                            ┌── pod-3
    pod-2 ──┤ node-1 10.99.1.1 ──── fabric ──── node-2 ──┴── pod-4
                                      │
                                   outside
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from ipaddress import ip_network
from itertools import count

from tests.e2e.cluster import IpFamily, Node
from tests.lab import links
from tests.lab.namespace import Namespace
from tests.lab.topology import Host

NODES = (
    Node("node-1", {"IPv4": "10.99.1.1", "IPv6": "fd00:99:1::1"}, "zone-a"),
    Node("node-2", {"IPv4": "10.99.2.1", "IPv6": "fd00:99:2::1"}, "zone-b"),
)
POD_CIDRS = {
    "node-1": ("10.244.0.0/18", "fd00:10:244:1::/64"),
    "node-2": ("10.244.64.0/18", "fd00:10:244:2::/64"),
}
FABRIC = ("10.99.0.1", "fd00:99::1")
OUTSIDE = ("198.51.100.10", "2001:db8:51::10")
VERSIONS: Mapping[IpFamily, int] = {"IPv4": 4, "IPv6": 6}


class Network:
    """Nodes, fabric and outside client exist until `close`; pods come and go. Pod addresses are never reused."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._numbers = count(1)
        self._pods: dict[str, Host] = {}
        try:
            self._fabric = self._host("fabric", FABRIC, forwards=True)
            for address in FABRIC:
                _ip(self._fabric, "address add", _host_prefix(address), "dev lo nodad")
            for default in ("0.0.0.0/0", "::/0"):
                _ip(self._fabric, "route add unreachable", default)
            self.nodes = {node.name: self._node(node) for node in NODES}
            self.outside = self._host("outside", OUTSIDE, forwards=False)
            links.attach(self._fabric.namespace, self._fabric.by_version, self.outside.namespace, OUTSIDE)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove nodes, fabric and outside client. Processes on the nodes are killed."""
        self._stack.close()

    def add_pod(self, name: str, node: str) -> Host:
        """Add a pod with an address of each family to a node."""
        number = next(self._numbers)
        addresses = tuple(str(ip_network(cidr)[number]) for cidr in POD_CIDRS[node])
        namespace = Namespace(f"pod-{number}")  # becomes an interface name, which must be short
        links.configure(namespace, forwards=False)
        hub = self._pods[addresses[0]] = self.nodes[node]
        links.attach(hub.namespace, hub.by_version, namespace, addresses)
        return Host(name, namespace, addresses)

    def remove_pod(self, pod: Host) -> None:
        """Remove a pod and its routes. Pods with hostNetwork are left alone."""
        if node := self._pods.pop(pod.addresses[0], None):
            for address in pod.addresses:
                _ip(node, "route delete", _host_prefix(address), "dev", pod.namespace.name)
            pod.namespace.close()  # the kernel frees it later

    def route_to_node(self, address: str, node: str) -> None:
        """Route an external address to a node, as a load balancer does."""
        _ip(self._fabric, "route replace", _host_prefix(address), *self._towards(address, node))

    def remove_route(self, address: str) -> None:
        """Remove the route of an external address."""
        _ip(self._fabric, "route delete", _host_prefix(address))

    def _node(self, node: Node) -> Host:
        addresses = tuple(node.addresses.values())
        host = self._host(node.name, addresses, forwards=True)
        links.attach(self._fabric.namespace, self._fabric.by_version, host.namespace, addresses)
        # With its first pod, the node gets the gateway address of `links.attach` itself, so the fabric cannot use it.
        _ip(self._fabric, "address add", _host_prefix(FABRIC[0]), "dev", node.name)
        _ip(self._fabric, "address delete", _host_prefix(links.GATEWAYS[4]), "dev", node.name)
        _ip(host, "route replace default via", FABRIC[0], "dev eth0 onlink")
        for cidr in POD_CIDRS[node.name]:
            _ip(host, "route add unreachable", cidr)
            version = links.version_of(cidr)
            _ip(self._fabric, "route add", cidr, "via", host.address(version), "dev", node.name, "onlink")
        return host

    def _towards(self, address: str, node: str) -> Iterable[str]:
        return "via", self.nodes[node].address(links.version_of(address)), "dev", node, "onlink"

    def _host(self, name: str, addresses: tuple[str, ...], *, forwards: bool) -> Host:
        namespace = Namespace(name)
        self._stack.callback(namespace.close)
        links.configure(namespace, forwards=forwards)
        return Host(name, namespace, addresses)


def _ip(host: Host, *words: str) -> None:
    """Run `ip` with the family of the address or CIDR among its arguments."""
    family = "-6" if any(":" in word for word in words) else "-4"
    host.namespace.run(["ip", family, *" ".join(words).split()])


def _host_prefix(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"
