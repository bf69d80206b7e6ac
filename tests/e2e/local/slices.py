"""The EndpointSlices of a Service, as the EndpointSlice controller creates them.

The rules are from the API reference of EndpointSlice and Service, and from KEP-1672 (terminating endpoints), KEP-2433,
KEP-4444 and KEP-3015 (hints). A Service has one slice per family: no test has more than 100 pods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tests.e2e.cluster import HTTP_PORT, UDP_PORT, IpFamily, Object

CONTAINER_PORTS = {("http", "TCP"): HTTP_PORT, ("udp", "UDP"): UDP_PORT}
"""The container ports of every pod, by name and protocol, for a named `targetPort`."""

MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
CONTROLLER = "endpointslice-controller.k8s.io"
SERVICE_NAME = "kubernetes.io/service-name"
HEADLESS = "service.kubernetes.io/headless"


class PodState(msgspec.Struct, frozen=True):
    """A pod as the controller sees it. A pod that is both terminating and ready still serves."""

    name: str
    node: str
    labels: Mapping[str, str]
    addresses: Mapping[IpFamily, str]
    ready: bool = True
    terminating: bool = False


def slices_of(service: Object, pods: Sequence[PodState], zones: Mapping[str, str]) -> list[Object]:
    """Return a Service's slices, none if it has no selector. `zones` are the zones of the nodes."""
    spec = service["spec"]
    if not spec.get("selector") or spec["type"] == "ExternalName":
        return []
    selected = [pod for pod in pods if spec["selector"].items() <= pod.labels.items()]
    return [_slice(service, selected, zones, family) for family in spec["ipFamilies"]]


def _slice(service: Object, pods: Sequence[PodState], zones: Mapping[str, str], family: IpFamily) -> Object:
    metadata, spec = service["metadata"], service["spec"]
    labels = {SERVICE_NAME: metadata["name"], MANAGED_BY: CONTROLLER}
    if spec["clusterIP"] == "None":
        labels[HEADLESS] = ""
    owner = {"apiVersion": "v1", "kind": "Service", "name": metadata["name"], "uid": metadata["uid"]}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{metadata['name']}-{family.lower()}",
            "namespace": metadata["namespace"],
            "labels": labels,
            "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
        },
        "addressType": family,
        "endpoints": [_endpoint(spec, pod, zones[pod.node], family) for pod in pods if family in pod.addresses],
        "ports": _ports(spec),
    }


def _endpoint(spec: Object, pod: PodState, zone: str, family: IpFamily) -> Object:
    ready = spec.get("publishNotReadyAddresses", False) or (pod.ready and not pod.terminating)
    found: Object = {
        "addresses": [pod.addresses[family]],
        "conditions": {"ready": ready, "serving": pod.ready, "terminating": pod.terminating},
        "targetRef": {"kind": "Pod", "name": pod.name},
        "nodeName": pod.node,
        "zone": zone,
    }
    hints = _hints(spec.get("trafficDistribution", ""), pod.node, zone) if ready else {}
    return found | ({"hints": hints} if hints else {})


def _hints(distribution: str, node: str, zone: str) -> dict[str, Any]:
    """Return the hints of an endpoint. PreferClose is the older name of PreferSameZone."""
    hints: dict[str, Any] = {}
    if distribution in {"PreferClose", "PreferSameZone", "PreferSameNode"}:
        hints["forZones"] = [{"name": zone}]
    if distribution == "PreferSameNode":
        hints["forNodes"] = [{"name": node}]
    return hints


def _ports(spec: Object) -> list[Object]:
    """Return the ports of a slice. Named target ports that no pod has are omitted."""
    found = []
    for port in spec.get("ports", ()):
        target = port["targetPort"]
        number = CONTAINER_PORTS.get((target, port["protocol"])) if isinstance(target, str) else target
        if number is not None:
            found.append({"name": port.get("name", ""), "protocol": port["protocol"], "port": number})
    return found
