"""The lab: a node, its pods, pods of other nodes and outside clients, each in a namespace of its own.

Hosts hang from the node by point-to-point links with one route per address, the way most CNI plugins do it
without a bridge. So packets from a pod to itself pass the node, as on a real one, and go back where they
came from.

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
    """One machine of the lab: its name, its namespace and its own addresses."""

    name: str
    namespace: Namespace
    addresses: tuple[str, ...]

    def address(self, version: int = 4) -> str:
        """Return its first address of IP version 4 or 6."""
        return next(address for address in self.addresses if links.version_of(address) == version)

    @property
    def by_version(self) -> dict[int, str]:
        """Its first address of each IP version."""
        return {links.version_of(address): address for address in reversed(self.addresses)}


class Lab:
    """A cluster's network around `node`. Close it, or use it in a `with`.

    What no machine of the lab owns is answered "unreachable", at once.
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
        """Add a pod to this node, or to another one, which is reached over the uplink."""
        if node == NODE:
            return self._behind_node(name, addresses)
        return self._hang(self.outside, name, addresses)

    def add_client(self, name: str, *addresses: str) -> Host:
        """Add a machine outside the cluster that sends everything to the node."""
        return self._behind_node(name, addresses)

    def close(self) -> None:
        """Remove everything; processes started in the lab's namespaces are killed."""
        self._stack.close()

    def _behind_node(self, name: str, addresses: tuple[str, ...]) -> Host:
        host = self._hang(self.node, name, addresses)
        links.route(self.outside.namespace, addresses, self.node.by_version)
        return host

    def _hang(self, hub: Host, name: str, addresses: tuple[str, ...]) -> Host:
        host = self._host(name, addresses, forwards=False)
        links.hang(hub.namespace, hub.by_version, host.namespace, addresses)
        return host

    def _host(self, name: str, addresses: tuple[str, ...], *, forwards: bool) -> Host:
        namespace = Namespace(name)
        self._stack.callback(namespace.close)
        links.prepare(namespace, forwards=forwards)
        return Host(name, namespace, addresses)
