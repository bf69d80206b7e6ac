"""What Kubernetes objects say about addresses: Pods, Nodes, Services and endpoints. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct, field

Json: TypeAlias = Any


class ClusterAddresses(Struct):
    """Addresses of a cluster by what they belong to.

    `pods` maps `namespace/name` to addresses, `nodes` node names to addresses. `pod_names` are the addresses of Pods
    with a network of their own, `endpoint_nodes` those of endpoints with their nodes, `cluster_ips` those of Services.
    """

    pods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pod_names: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    endpoint_nodes: dict[str, str] = field(default_factory=dict)
    cluster_ips: dict[str, str] = field(default_factory=dict)

    def foreign_to(self, node: str) -> set[str]:
        """Return the addresses that are certainly not addresses of a node: those of other nodes, Pods and Services."""
        own = set(self.nodes.get(node, ()))
        every_node = {address for addresses in self.nodes.values() for address in addresses}
        found = every_node | set(self.pod_names) | set(self.cluster_ips)
        found |= {address for address in self.endpoint_nodes if address not in every_node and self.nodes}
        return found - own

    def node_of(self, address: str) -> str:
        """Return the name of the node on which an address is, or ""."""
        if address in self.endpoint_nodes:
            return self.endpoint_nodes[address]
        return next((name for name, addresses in self.nodes.items() if address in addresses), "")


def read_cluster_objects(contents: Iterable[bytes | Json]) -> ClusterAddresses:
    """Return the addresses in documents: single objects, or lists. Objects of other kinds are ignored."""
    found = ClusterAddresses()
    for content in contents:
        data = msgspec.json.decode(content) if isinstance(content, bytes) else content
        for item in _items(data, ""):
            reader = _READERS.get(item.get("kind", ""))
            if reader is not None:
                reader(found, item)
    return found


def _items(data: Json, kind: str) -> Iterator[Json]:
    if not isinstance(data, dict):
        return
    own = data.get("kind") or kind
    if own.endswith("List") and isinstance(data.get("items"), list):
        for item in data["items"]:
            yield from _items(item, own.removesuffix("List"))
        return
    yield {**data, "kind": own}


def _name(item: Json) -> str:
    metadata = item.get("metadata") or {}
    return f"{metadata.get('namespace') or 'default'}/{metadata.get('name', '')}"


def _read_pod(found: ClusterAddresses, item: Json) -> None:
    spec, status = item.get("spec") or {}, item.get("status") or {}
    addresses = [each.get("ip", "") for each in status.get("podIPs") or ()] or [status.get("podIP") or ""]
    kept = tuple(_canonical(address) for address in addresses if _canonical(address))
    found.pods[_name(item)] = kept
    if not spec.get("hostNetwork"):
        found.pod_names.update(dict.fromkeys(kept, _name(item)))
        found.endpoint_nodes.update(dict.fromkeys(kept, spec.get("nodeName") or ""))


def _read_node(found: ClusterAddresses, item: Json) -> None:
    status = item.get("status") or {}
    addresses = [_canonical(each.get("address", "")) for each in status.get("addresses") or ()]
    found.nodes[(item.get("metadata") or {}).get("name", "")] = tuple(address for address in addresses if address)


def _read_service(found: ClusterAddresses, item: Json) -> None:
    spec = item.get("spec") or {}
    for address in spec.get("clusterIPs") or [spec.get("clusterIP") or ""]:
        if _canonical(address):
            found.cluster_ips[_canonical(address)] = _name(item)


def _read_slice(found: ClusterAddresses, item: Json) -> None:
    for endpoint in item.get("endpoints") or ():
        for address in endpoint.get("addresses") or ():
            if _canonical(address):
                found.endpoint_nodes[_canonical(address)] = endpoint.get("nodeName") or ""


_READERS = {"Pod": _read_pod, "Node": _read_node, "Service": _read_service, "EndpointSlice": _read_slice}


def _canonical(address: str) -> str:
    try:
        return str(ip_address(address))
    except ValueError:
        return ""
