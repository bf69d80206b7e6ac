"""API objects of clusters of any size, with all the fields that a real API server sends.

Names and addresses derive from the number of a Service, so separate processes agree on them without communicating.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from msgspec import Struct

from tests.lab.topology import NODE, NODE_ADDRESSES

Object: TypeAlias = dict[str, Any]

NAMESPACE = "bench"
PORT, TARGET_PORT = 80, 8080
SERVICE_CIDR = "10.96.0.0/12"
CLUSTER_CIDR = "10.128.0.0/9,fd00:10:244::/48"
ROLLING = "rolling"
"""Name of the Service for rolling updates. It exists only during a rolling update."""

MAX_SLICE_ENDPOINTS = 100
"""Maximum number of endpoints in an EndpointSlice: the default of the EndpointSlice controller."""

MAX_ENDPOINTS = 72 << 16
"""Maximum number of endpoints of a cluster: more would use the addresses of rolling updates."""

_CONNECTED = 5
_CREATED = "2026-01-01T00:00:00Z"


class Cluster(Struct, frozen=True):
    """`services` Services with `endpoints` endpoints each.

    `server_addresses` are the addresses of a pod that accepts connections; some Services have them as their endpoints.
    """

    services: int
    endpoints: int
    server_addresses: tuple[str, ...] = ()

    @property
    def connected(self) -> tuple[int, ...]:
        """The Services that the client connects to: the first, the last, and some in between.

        The kernel evaluates a chain from its first rule, so the position of a Service affects the time to connect.
        """
        last = self.services - 1
        return (
            tuple(sorted({last * step // (_CONNECTED - 1) for step in range(_CONNECTED)}))
            if self.server_addresses
            else ()
        )

    def objects(self) -> Iterator[Object]:
        """Yield all objects of the initial cluster."""
        yield node()
        yield service_cidr()
        for number in range(self.services):
            yield service(f"service-{number}", cluster_ip(number))
            yield from self.endpoint_slices(number)

    def service(self, number: int) -> Object:
        """Return one Service; `number` may exceed the size of the initial cluster."""
        return service(f"service-{number}", cluster_ip(number))

    @property
    def slices(self) -> int:
        """The number of EndpointSlices of each Service."""
        return -(-self.endpoints // MAX_SLICE_ENDPOINTS)

    def endpoint_slices(self, number: int) -> list[Object]:
        """Return all EndpointSlices of one Service."""
        return [self._slice(number, index, self._addresses(number)) for index in range(self.slices)]

    def endpoint_slice(self, number: int, *, variant: int = 0, annotation: str = "") -> Object:
        """Return the last EndpointSlice of one Service. Each `variant` has a different address for the last endpoint.

        An `annotation` changes the object but no rule.
        """
        addresses = self._addresses(number)
        if variant:
            addresses[-1] = _address(172, 16, variant)
        return self._slice(number, self.slices - 1, addresses, annotation)

    def _slice(self, number: int, index: int, addresses: list[str], annotation: str = "") -> Object:
        begin = index * MAX_SLICE_ENDPOINTS
        end = begin + MAX_SLICE_ENDPOINTS
        return endpoint_slice(f"service-{number}", addresses[begin:end], first=begin, annotation=annotation)

    def _addresses(self, number: int) -> list[str]:
        if number in self.connected:
            return list(self.server_addresses[: self.endpoints])
        return [_address(10, 128, number * self.endpoints + index) for index in range(self.endpoints)]


def cluster_ip(number: int) -> str:
    """Return the cluster IP of a Service."""
    return _address(10, 96, number + 256)


def rolling_service() -> Object:
    """Return the Service for rolling updates."""
    return service(ROLLING, "10.111.0.1")


def rolling_slice(endpoints: int, replaced: int) -> Object:
    """Return its EndpointSlice after the first `replaced` endpoints have been replaced by others."""
    addresses = [_address(10, 200 if index < replaced else 201, index) for index in range(endpoints)]
    return endpoint_slice(ROLLING, addresses)


def node() -> Object:
    """Return the Node that the daemon runs on."""
    addresses = [{"type": "InternalIP", "address": address} for address in NODE_ADDRESSES]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {},
        "status": {"addresses": addresses},
    }


def service_cidr() -> Object:
    """Return the ServiceCIDR that contains all cluster IPs."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [SERVICE_CIDR]},
    }


def service(name: str, address: str) -> Object:
    """Return a ClusterIP Service with one port."""
    fields = ("clusterIP", "clusterIPs", "internalTrafficPolicy", "ipFamilies", "ipFamilyPolicy")
    managed: Object = {
        "f:spec": {f"f:{field}": {} for field in (*fields, "ports", "selector", "sessionAffinity", "type")}
    }
    managed["f:spec"]["f:ports"] = {
        ".": {},
        f'k:{{"port":{PORT},"protocol":"TCP"}}': {
            ".": {},
            "f:name": {},
            "f:port": {},
            "f:protocol": {},
            "f:targetPort": {},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "creationTimestamp": _CREATED,
            "labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "bench"},
            "managedFields": [_manager("kubectl", "v1", managed)],
        },
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET_PORT}],
            "selector": {"app.kubernetes.io/name": name},
            "clusterIP": address,
            "clusterIPs": [address],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(name: str, addresses: list[str], *, first: int = 0, annotation: str = "") -> Object:
    """Return an EndpointSlice of a Service, as the EndpointSlice controller writes it.

    `first` is the number of endpoints in the Service's earlier slices.
    """
    labels = {"endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}
    labels["kubernetes.io/service-name"] = name
    owner = {"apiVersion": "v1", "kind": "Service", "name": name, "uid": _uid(name), "controller": True}
    managed: Object = {
        "f:addressType": {},
        "f:endpoints": {},
        "f:metadata": {
            "f:generateName": {},
            "f:labels": {".": {}, **{f"f:{label}": {} for label in labels}},
            "f:ownerReferences": {".": {}, f'k:{{"uid":"{_uid(name)}"}}': {}},
        },
        "f:ports": {},
    }
    metadata: Object = {
        "name": f"{name}-x7k2p" if not first else f"{name}-{first // MAX_SLICE_ENDPOINTS:05}",
        "generateName": f"{name}-",
        "namespace": NAMESPACE,
        "creationTimestamp": _CREATED,
        "labels": labels,
        "ownerReferences": [owner],
        "managedFields": [_manager("kube-controller-manager", "discovery.k8s.io/v1", managed)],
    }
    if annotation:
        metadata["annotations"] = {"bench/note": annotation}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": [_endpoint(f"{name}-{index}", address) for index, address in enumerate(addresses, first)],
        "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
    }


def _endpoint(pod: str, address: str) -> Object:
    return {
        "addresses": [address],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": _uid(pod)},
        "nodeName": "node-2",
        "zone": "zone-b",
    }


def _manager(name: str, version: str, fields: Object) -> Object:
    return {
        "manager": name,
        "operation": "Update",
        "apiVersion": version,
        "time": _CREATED,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }


def _uid(name: str) -> str:
    digits = name.encode().hex().rjust(32, "0")[-32:]
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _address(first: int, second: int, number: int) -> str:
    """Return an IPv4 address by its number in the range that starts at `first.second.0.0`."""
    return f"{first}.{second + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
