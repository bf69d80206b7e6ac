"""Small objects that both the test server and a real kube-apiserver accept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Object = dict[str, Any]


def service(name: str, cluster_ip: str, *, namespace: str = "demo", port: int = 80, **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterIP": cluster_ip, "ports": [{"port": port, "protocol": "TCP"}], **spec},
    }


def endpoint_slice(name: str, of: str, addresses: Iterable[str], *, namespace: str = "demo") -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]} for address in addresses],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def node(name: str, zone: str = "zone-a") -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "spec": {},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.10"}]},
    }


def service_cidr(name: str, *cidrs: str) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name},
        "spec": {"cidrs": cidrs},
    }


def labeled(body: Object, **labels: str) -> Object:
    """Return the object with more labels. In names, `__` stands for "/" and `_` for "-"."""
    metadata = body["metadata"]
    more = {name.replace("__", "/").replace("_", "-"): value for name, value in labels.items()}
    return body | {"metadata": metadata | {"labels": metadata.get("labels", {}) | more}}
