"""The lab: a node, its pods, pods of other nodes and outside clients, each in its own network namespace.

Hosts are attached to the node by point-to-point links with one route per address, as most CNI plugins without a bridge
do. So packets from a pod to itself through a Service pass the node, as on a real node, and return on the same link.

    client ──┐
    pod-a  ──┤ node-1 10.99.0.2 ──── 10.99.0.1 outside ──┬── pods of node-2 (10.244.2.x)
    pod-b  ──┘                                           └── pods of node-3 (10.244.3.x)
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from tests.lab import links
from tests.lab.namespace import Namespace

NODE = "node-1"
NODE_ADDRESSES = ("10.99.0.2", "fd00:99::2")
OUTSIDE_ADDRESSES = ("10.99.0.1", "fd00:99::1")


@dataclass(frozen=True)
class Host:
    """One host of the lab: its name, network namespace and addresses."""

    name: str
    namespace: Namespace
    addresses: tuple[str, ...]

    def address(self, version: int = 4) -> str:
        """Return the first address of IP version 4 or 6."""
        return next(address for address in self.addresses if links.version_of(address) == version)

    @property
    def by_version(self) -> dict[int, str]:
        """The first address of each IP version."""
        return {links.version_of(address): address for address in reversed(self.addresses)}


class Lab:
    """A cluster network around `node`. Close it, or use it in a `with` block.

    Packets to addresses that no host owns are answered with ICMP "unreachable" at once.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        try:
            self.node = self._host(NODE, NODE_ADDRESSES, forwards=True)
            self.outside = self._host("outside", OUTSIDE_ADDRESSES, forwards=True)
            links.connect(self.node.namespace, NODE_ADDRESSES, self.outside.namespace, OUTSIDE_ADDRESSES)
            links.route_default(self.node.namespace, OUTSIDE_ADDRESSES)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_pod(self, name: str, *addresses: str, node: str = NODE) -> Host:
        """Add a pod to this node, or to another node beyond the uplink."""
        if node == NODE:
            return self._behind_node(name, addresses)
        return self._attach(self.outside, name, addresses)

    def add_client(self, name: str, *addresses: str) -> Host:
        """Add a client outside the cluster whose default route is the node."""
        return self._behind_node(name, addresses)

    def close(self) -> None:
        """Remove everything. Processes started in the lab's namespaces are killed."""
        self._stack.close()

    def _behind_node(self, name: str, addresses: tuple[str, ...]) -> Host:
        host = self._attach(self.node, name, addresses)
        links.route(self.outside.namespace, addresses, self.node.by_version)
        return host

    def _attach(self, hub: Host, name: str, addresses: tuple[str, ...]) -> Host:
        host = self._host(name, addresses, forwards=False)
        links.attach(hub.namespace, hub.by_version, host.namespace, addresses)
        return host

    def _host(self, name: str, addresses: tuple[str, ...], *, forwards: bool) -> Host:
        namespace = Namespace(name)
        self._stack.callback(namespace.close)
        links.configure(namespace, forwards=forwards)
        return Host(name, namespace, addresses)
