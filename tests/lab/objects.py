"""Minimal Kubernetes objects in API form, and YAML files of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tests.lab.links import version_of
from tests.lab.topology import NODE, NODE_ADDRESSES

Object: TypeAlias = dict[str, Any]


def service(
    name: str,
    *cluster_ips: str,
    port: int = 80,
    target_port: int = 8080,
    protocol: str = "TCP",
    namespace: str = "demo",
    **spec: Any,
) -> Object:
    """Return a Service with one port. `spec` are further fields of its spec, by their API names."""
    versions = [f"IPv{version_of(address)}" for address in cluster_ips]
    own: Object = {
        "type": "ClusterIP",
        "clusterIP": cluster_ips[0],
        "clusterIPs": list(cluster_ips),
        "ipFamilies": versions,
        "ports": [{"name": "main", "protocol": protocol, "port": port, "targetPort": target_port}],
        "selector": {"app": name},
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": own | spec,
    }


def endpoint(
    address: str, node_name: str = NODE, *, ready: bool = True, serving: bool = True, terminating: bool = False
) -> Object:
    """Return one endpoint of an EndpointSlice."""
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    return {"addresses": [address], "conditions": conditions, "nodeName": node_name}


def endpoint_slice(
    service_name: str,
    endpoints: Sequence[Object],
    *,
    family: str = "IPv4",
    port: int = 8080,
    protocol: str = "TCP",
    namespace: str = "demo",
) -> Object:
    """Return the EndpointSlice of a Service for one IP family."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-{family.lower()}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": "main", "protocol": protocol, "port": port}],
    }


def node(name: str = NODE, addresses: Sequence[str] = NODE_ADDRESSES) -> Object:
    """Return a Node with these internal IPs."""
    own = [{"type": "InternalIP", "address": address} for address in addresses]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
        "status": {"addresses": own},
    }


def write(path: Path, objects: Sequence[Object]) -> None:
    """Replace a YAML file atomically."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(yaml.safe_dump_all(objects, sort_keys=False))
    os.replace(temporary, path)
