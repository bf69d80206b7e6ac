"""Where the API server serves each kind, and which of its objects are asked for."""

from __future__ import annotations

from msgspec import Struct

from kproxy.kube.objects import HEADLESS_LABEL, PROXY_NAME_LABEL
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

_OURS = f"!{PROXY_NAME_LABEL}"
_OURS_WITH_IP = f"{_OURS},!{HEADLESS_LABEL}"
_SERVED = "spec.clusterIP!=None,spec.type!=ExternalName"


class Resource(Struct, frozen=True):
    """A resource of the API: its path, its name as RBAC has it, and the selectors of what is wanted of it.

    `without` tells the user what it means to go without it, "" if kproxy cannot.
    """

    path: str
    name: str
    selectors: dict[str, str] = {}
    without: str = ""


def resource_of(kind: Kind, node_name: str) -> Resource:
    """Return the resource of a kind. Of the Nodes only that of `node_name` is selected."""
    if kind is Service:
        return Resource("/api/v1/services", "services", {"labelSelector": _OURS, "fieldSelector": _SERVED})
    if kind is EndpointSlice:
        path = "/apis/discovery.k8s.io/v1/endpointslices"
        return Resource(path, "endpointslices.discovery.k8s.io", {"labelSelector": _OURS_WITH_IP})
    if kind is ServiceCIDR:
        # New in Kubernetes 1.33, and a ClusterRole from before does not grant it: no reason to program nothing.
        path = "/apis/networking.k8s.io/v1/servicecidrs"
        without = "packets to unallocated service addresses are not dropped"
        return Resource(path, "servicecidrs.networking.k8s.io", without=without)
    return Resource("/api/v1/nodes", "nodes", {"fieldSelector": f"metadata.name={node_name}"})
