"""The objects of the tests, as manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.e2e.cluster import HTTP_PORT, UDP_PORT, IpFamily, Object

PORT = 80
"""The port of every Service with one port. No pod listens on it."""

TARGETS = {"TCP": HTTP_PORT, "UDP": UDP_PORT}
UNSERVED_CLASS = "example.com/unserved"
"""A load balancer class that no controller serves, so that the tests can set the address themselves."""


def service(name: str, family: IpFamily, protocol: str = "TCP", **spec: Any) -> Object:
    """Return a single-stack Service with one port for the pods labeled `app: <name>`.

    `spec` are further fields of its spec, by their API names. Fields that are None are omitted.
    """
    own: Object = {
        "ipFamilyPolicy": "SingleStack",
        "ipFamilies": [family],
        "selector": {"app": name},
        "ports": [{"name": "main", "protocol": protocol, "port": PORT, "targetPort": TARGETS[protocol]}],
    }
    chosen = {field: value for field, value in (own | spec).items() if value is not None}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": chosen}


def endpoint_slice(service_name: str, family: IpFamily, endpoints: Sequence[Object]) -> Object:
    """Return an EndpointSlice that no controller manages, for a Service without a selector."""
    labels = {"kubernetes.io/service-name": service_name, "endpointslice.kubernetes.io/managed-by": "kproxy-e2e"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service_name}-by-hand", "labels": labels},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": "main", "protocol": "TCP", "port": HTTP_PORT}],
    }


def endpoint(address: str, node: str, **more: Any) -> Object:
    """Return a ready endpoint. `more` are further fields, by their API names."""
    return {"addresses": [address], "nodeName": node, "conditions": {"ready": True}} | more


def labels(name: str) -> Mapping[str, str]:
    """Return the labels that `service(name, ...)` selects."""
    return {"app": name}


def url(address: str, port: int, path: str = "/", scheme: str = "http") -> str:
    """Return a URL at an address of either family."""
    host = f"[{address}]" if ":" in address else address
    return f"{scheme}://{host}:{port}{path}"
