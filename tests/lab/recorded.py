"""A recorded cluster in the lab: servers on its endpoints, and the frontends that lead to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.lab.connection_stream import Target
from tests.lab.links import version_of
from tests.lab.node_pods import NodePods
from tests.lab.objects import Object
from tests.lab.servers import Servers
from tests.lab.topology import NODE, OUTSIDE_ADDRESSES, Host, Lab
from tests.recordings import items

SUBNETS = {"10.244.1.": NODE, "10.244.2.": "node-2", "10.244.3.": "node-3"}
"""The nodes of the recorded pods, by IPv4 prefix."""


@dataclass(frozen=True)
class _Endpoint:
    """A ready endpoint of one service port."""

    address: str
    port: int
    node: str


class RecordedCluster:
    """The TCP service ports of a recording that have ready endpoints, served in a lab."""

    def __init__(self, lab: Lab, servers: Servers, scenario: str) -> None:
        self._slices = items(scenario, "endpointslices")
        self._lab = lab
        self._inside = lab.add_pod("client", "10.244.1.250")
        self._visitor = lab.add_client("visitor", "198.51.100.10")
        ports = [
            (name_of(service), service, port) for service in items(scenario, "services") for port in tcp_ports(service)
        ]
        found = {(name, port["name"]): list(self._ready(service, port)) for name, service, port in ports}
        self._serve(servers, found)
        self.targets = [
            target
            for name, service, port in ports
            for target in self._targets(name, service, port, found[name, port["name"]])
        ]

    def _ready(self, service: Object, port: Object) -> Iterator[_Endpoint]:
        for each in self._slices:
            if each["addressType"] != "IPv4" or name_of(each, each["metadata"]["labels"]) != name_of(service):
                continue
            number = next((own["port"] for own in each["ports"] if own["name"] == port["name"]), None)
            for endpoint in each["endpoints"] or ():
                if number and endpoint["conditions"]["ready"]:
                    yield _Endpoint(endpoint["addresses"][0], number, endpoint.get("nodeName", ""))

    def _serve(self, servers: Servers, found: dict[tuple[str, str], list[_Endpoint]]) -> None:
        """Run a server named `<service>/<address>` on every endpoint."""
        addresses = {endpoint.address for endpoints in found.values() for endpoint in endpoints}
        pods = {
            subnet: NodePods(self._lab, node, sorted(each for each in addresses if each.startswith(subnet)))
            for subnet, node in SUBNETS.items()
        }
        for (name, _), endpoints in found.items():
            for address, port in {(endpoint.address, endpoint.port) for endpoint in endpoints}:
                pod_name = f"{name}/{address}"
                if address == OUTSIDE_ADDRESSES[0]:
                    pod = Host(pod_name, self._lab.outside.namespace, (address,))
                else:
                    pod = pods[address.rpartition(".")[0] + "."].pod(pod_name, address)
                servers.serve(pod, port)

    def _targets(self, name: str, service: Object, port: Object, ready: Sequence[_Endpoint]) -> Iterator[Target]:
        """Yield the frontends of a port that lead to a ready endpoint under its traffic policies."""
        spec = service["spec"]
        local = [endpoint for endpoint in ready if endpoint.node == NODE]
        inside = local if spec.get("internalTrafficPolicy") == "Local" else ready
        outside = local if spec.get("externalTrafficPolicy") == "Local" else ready
        if inside:
            for address in _ipv4(spec["clusterIPs"]):
                yield Target(name, self._inside, address, port["port"])
        if outside:
            for address in (*_ipv4(spec.get("externalIPs", ())), *_load_balancers(service)):
                yield Target(name, self._visitor, address, port["port"])
            if "nodePort" in port:
                yield Target(name, self._visitor, self._lab.node.address(), port["nodePort"])


def name_of(found: Object, labels: dict[str, str] | None = None) -> str:
    """Return `<namespace>/<name>` of a Service, or of the Service that the labels of an EndpointSlice name."""
    metadata = found["metadata"]
    own = labels.get("kubernetes.io/service-name", "") if labels is not None else metadata["name"]
    return f"{metadata['namespace']}/{own}"


def tcp_ports(service: Object) -> list[dict[str, Any]]:
    """Return the TCP ports of a Service."""
    return [port for port in service["spec"].get("ports", ()) if port["protocol"] == "TCP"]


def _ipv4(addresses: Sequence[str]) -> list[str]:
    return [address for address in addresses if version_of(address) == 4]


def _load_balancers(service: Object) -> list[str]:
    """Return the load balancer IPs that any client may use: ipMode VIP, no source ranges."""
    if service["spec"].get("loadBalancerSourceRanges"):
        return []
    entries = service["status"]["loadBalancer"].get("ingress", ())
    return _ipv4([each["ip"] for each in entries if each.get("ipMode", "VIP") == "VIP"])
