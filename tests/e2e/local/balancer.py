"""What stands before the cluster: it hands packets for external addresses of Services to a node, and changes nothing.

A load balancer that is told `ipMode: Proxy` would be an endpoint of its own. There is none of that kind here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tests.e2e.cluster import Object
from tests.e2e.local.network import Network
from tests.e2e.local.slices import SERVICE_NAME


class Balancer:
    """Routes for one test's addresses."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._nodes: dict[str, str] = {}

    def learn(self, services: Iterable[Object], slices: Sequence[Object]) -> None:
        """Send each Service's addresses to a node that takes them."""
        wanted = hops(services, slices, list(self._network.nodes))
        for address in self._nodes.keys() - wanted.keys():
            self._network.drop(address)
        for address, node in wanted.items():
            if self._nodes.get(address) != node:
                self._network.send(address, node)
        self._nodes = wanted

    def clear(self) -> None:
        """Take all routes back."""
        self.learn([], [])


def hops(services: Iterable[Object], slices: Sequence[Object], nodes: Sequence[str]) -> dict[str, str]:
    """Return the node for each external address: the last, or for policy Local the last with a ready endpoint."""
    found: dict[str, str] = {}
    for service in services:
        ready = _nodes_of(service, slices)
        local = service["spec"].get("externalTrafficPolicy") == "Local"
        usable = [node for node in nodes if node in ready or not local] or nodes
        found |= dict.fromkeys(_addresses(service), usable[-1])
    return found


def _addresses(service: Object) -> list[str]:
    ingress: Sequence[Mapping[str, str]] = service["status"]["loadBalancer"].get("ingress", ())
    balanced = [each["ip"] for each in ingress if each.get("ipMode", "VIP") == "VIP"]
    return [*balanced, *service["spec"].get("externalIPs", ())]


def _nodes_of(service: Object, slices: Sequence[Object]) -> set[str]:
    """Return the nodes with an endpoint that health checks count."""
    own = [each for each in slices if each["metadata"]["labels"].get(SERVICE_NAME) == service["metadata"]["name"]]
    endpoints = [endpoint for each in own for endpoint in each["endpoints"]]
    return {endpoint.get("nodeName", "") for endpoint in endpoints if endpoint["conditions"].get("ready", True)}
