"""The resources that the server knows: their paths, kinds and the empty objects of their bookmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Resource:
    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    selectable: tuple[str, ...] = ()
    empty: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"

    @property
    def path(self) -> str:
        return f"{self.root}/{self.plural}"

    def object_path(self, namespace: str, name: str = "") -> str:
        collection = f"{self.root}/namespaces/{namespace}/{self.plural}" if self.namespaced else self.path
        return f"{collection}/{name}" if name else collection


_NODE_STATUS = {
    "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
    "nodeInfo": dict.fromkeys(("machineID", "systemUUID", "bootID", "kernelVersion", "osImage"), ""),
}

SERVICES = Resource(
    "",
    "v1",
    "services",
    "Service",
    selectable=("spec.clusterIP", "spec.type"),
    empty={"spec": {}, "status": {"loadBalancer": {}}},
)
ENDPOINT_SLICES = Resource(
    "discovery.k8s.io",
    "v1",
    "endpointslices",
    "EndpointSlice",
    empty={"addressType": "", "endpoints": None, "ports": None},
)
NODES = Resource(
    "",
    "v1",
    "nodes",
    "Node",
    namespaced=False,
    selectable=("spec.unschedulable",),
    empty={"spec": {}, "status": _NODE_STATUS},
)
SERVICE_CIDRS = Resource(
    "networking.k8s.io",
    "v1",
    "servicecidrs",
    "ServiceCIDR",
    namespaced=False,
    empty={"spec": {}, "status": {}},
)
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")

RESOURCES = (
    SERVICES,
    ENDPOINT_SLICES,
    NODES,
    Resource("", "v1", "namespaces", "Namespace", namespaced=False),
    Resource("", "v1", "pods", "Pod", selectable=("spec.nodeName", "status.phase")),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
    Resource("", "v1", "events", "Event"),
    Resource("", "v1", "configmaps", "ConfigMap"),
    EVENTS,
    SERVICE_CIDRS,
)


def resource_of(api_version: str, kind: str) -> Resource:
    return next(item for item in RESOURCES if item.api_version == api_version and item.kind == kind)


def find_path(path: str) -> tuple[Resource, str, str] | None:
    """Split a path into resource, namespace and name, each "" if absent."""
    for item in RESOURCES:
        if not path.startswith(item.root + "/"):
            continue
        parts = path[len(item.root) + 1 :].split("/")
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2:
            namespace, parts = parts[1], parts[2:]
        if parts[0] == item.plural and len(parts) <= 2:
            return item, namespace, parts[1] if len(parts) == 2 else ""
    return None
