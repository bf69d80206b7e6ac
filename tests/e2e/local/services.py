"""Complete Services as the API server does: defaults, ClusterIPs and NodePorts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from ipaddress import ip_network
from itertools import count

from tests.e2e.cluster import IpFamily, Object

FAMILIES: tuple[IpFamily, ...] = ("IPv4", "IPv6")
SERVICE_CIDRS: dict[IpFamily, str] = {"IPv4": "10.96.0.0/16", "IPv6": "fd00:10:96::/112"}
FIRST_NODE_PORT = 30000
AFFINITY_SECONDS = 10800
NOTHING: Object = {"spec": {}, "status": {"loadBalancer": {}}}


class Allocator:
    """Completes Services. Allocated addresses and ports are never reused."""

    def __init__(self) -> None:
        self._addresses = count(10)
        self._ports = count(FIRST_NODE_PORT)

    def complete(self, service: Object, current: Object = NOTHING) -> Object:
        """Return a Service as the API server would store it, in place of the current one."""
        found = copy.deepcopy(service)
        spec, before = found["spec"], current["spec"]
        spec.setdefault("type", "ClusterIP")
        spec.setdefault("sessionAffinity", "None")
        found["status"] = current["status"] if spec["type"] == "LoadBalancer" else {"loadBalancer": {}}
        if spec["type"] == "ExternalName":
            return found
        _set_defaults(spec)
        self._allocate_addresses(spec, before)
        self._allocate_ports(spec, before)
        return found

    def _allocate_addresses(self, spec: Object, before: Object) -> None:
        families = _families(spec)
        spec["ipFamilies"] = families
        if spec.get("clusterIP") == "None":
            spec["clusterIPs"] = ["None"]
            return
        known = dict(zip(before.get("ipFamilies", ()), before.get("clusterIPs", ()), strict=False))
        given = spec.get("clusterIPs") or [spec.get("clusterIP", "")]
        known |= {family: address for family, address in zip(families, given, strict=False) if address}
        spec["clusterIPs"] = [known.get(family) or self._address(family) for family in families]
        spec["clusterIP"] = spec["clusterIPs"][0]

    def _allocate_ports(self, spec: Object, before: Object) -> None:
        if spec["type"] not in {"NodePort", "LoadBalancer"}:
            return
        spec.setdefault("externalTrafficPolicy", "Cluster")
        if spec["type"] == "LoadBalancer":
            spec.setdefault("allocateLoadBalancerNodePorts", True)
            if spec["externalTrafficPolicy"] == "Local" and "healthCheckNodePort" not in spec:
                spec["healthCheckNodePort"] = before.get("healthCheckNodePort") or next(self._ports)
        if spec.get("allocateLoadBalancerNodePorts", True):
            known = {_identity(port): port.get("nodePort") for port in before.get("ports", ())}
            for port in spec["ports"]:
                port["nodePort"] = port.get("nodePort") or known.get(_identity(port)) or next(self._ports)

    def _address(self, family: IpFamily) -> str:
        return str(ip_network(SERVICE_CIDRS[family])[next(self._addresses)])


def _set_defaults(spec: Object) -> None:
    spec.setdefault("internalTrafficPolicy", "Cluster")
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    if spec["sessionAffinity"] == "ClientIP":
        config = spec.setdefault("sessionAffinityConfig", {}).setdefault("clientIP", {})
        config.setdefault("timeoutSeconds", AFFINITY_SECONDS)
    for port in spec.get("ports", ()):
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port["port"])
    if spec.get("externalIPs"):
        spec.setdefault("externalTrafficPolicy", "Cluster")


def _families(spec: Object) -> Sequence[IpFamily]:
    """Return the IP families. The cluster is dual-stack; given families come first."""
    given = list(spec.get("ipFamilies") or FAMILIES[:1])
    if spec["ipFamilyPolicy"] == "SingleStack":
        return given[:1]
    return given + [family for family in FAMILIES if family not in given]


def _identity(port: Object) -> tuple[str, int]:
    return port["protocol"], port["port"]
