"""An external load balancer that routes packets for external addresses of Services to a node, unchanged.

It supports `ipMode: VIP` only. With `ipMode: Proxy`, a load balancer terminates connections itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tests.e2e.cluster import Object
from tests.e2e.local.network import Network
from tests.e2e.local.slices import SERVICE_NAME


class LoadBalancer:
    """The routes for the addresses of one test."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._nodes: dict[str, str] = {}

    def update(self, services: Iterable[Object], slices: Sequence[Object]) -> None:
        """Route each Service's addresses to a node that accepts them."""
        desired = next_hops(services, slices, list(self._network.nodes))
        for address in self._nodes.keys() - desired.keys():
            self._network.remove_route(address)
        for address, node in desired.items():
            if self._nodes.get(address) != node:
                self._network.route_to_node(address, node)
        self._nodes = desired

    def clear(self) -> None:
        """Remove all routes."""
        self.update([], [])


def next_hops(services: Iterable[Object], slices: Sequence[Object], nodes: Sequence[str]) -> dict[str, str]:
    """Return the node for each external address: the last one, with policy Local the last one with a ready endpoint."""
    found: dict[str, str] = {}
    for service in services:
        ready = _nodes_of(service, slices)
        local = service["spec"].get("externalTrafficPolicy") == "Local"
        usable = [node for node in nodes if node in ready or not local] or nodes
        found |= dict.fromkeys(_addresses(service), usable[-1])
    return found


def _addresses(service: Object) -> list[str]:
    ingress: Sequence[Mapping[str, str]] = service["status"]["loadBalancer"].get("ingress", ())
    ingress_ips = [each["ip"] for each in ingress if each.get("ipMode", "VIP") == "VIP"]
    return [*ingress_ips, *service["spec"].get("externalIPs", ())]


def _nodes_of(service: Object, slices: Sequence[Object]) -> set[str]:
    """Return the nodes with a ready endpoint, as health checks count them."""
    own = [each for each in slices if each["metadata"]["labels"].get(SERVICE_NAME) == service["metadata"]["name"]]
    endpoints = [endpoint for each in own for endpoint in each["endpoints"]]
    return {endpoint.get("nodeName", "") for endpoint in endpoints if endpoint["conditions"].get("ready", True)}
