"""Write model objects as manifests: the fields that affect rules, as the API server would send them. Pure."""

from __future__ import annotations

from typing import Any

from kproxy.kube.codec.conversion import DELETION_TAINT, SERVICE_NAME_LABEL, ZONE_LABEL
from kproxy.model.types import Endpoint, EndpointSlice, Node, Service


def service_manifest(service: Service) -> dict[str, Any]:
    """Return a Service that kproxy decodes to the same model object.

    Its type is the simplest one that has the same effect.
    """
    spec: dict[str, Any] = {
        "type": _service_type(service),
        "clusterIP": service.cluster_ips[0],
        "clusterIPs": list(service.cluster_ips),
        "ports": [
            {
                "name": port.name,
                "port": port.port,
                "protocol": port.protocol,
                **({"nodePort": port.node_port} if port.node_port else {}),
            }
            for port in service.ports
        ],
        "internalTrafficPolicy": "Local" if service.internal_local else "Cluster",
    }
    if service.affinity_seconds:
        spec["sessionAffinity"] = "ClientIP"
        spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": service.affinity_seconds}}
    if service.external_ips:
        spec["externalIPs"] = list(service.external_ips)
    if service.external_local:
        spec["externalTrafficPolicy"] = "Local"
    if service.source_ranges:
        spec["loadBalancerSourceRanges"] = list(service.source_ranges)
    if service.health_check_node_port:
        spec["healthCheckNodePort"] = service.health_check_node_port
    found = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(service.namespace, service.name),
        "spec": spec,
    }
    if service.vips:
        found["status"] = {"loadBalancer": {"ingress": [{"ip": address} for address in service.vips]}}
    return found


def _service_type(service: Service) -> str:
    if service.vips or service.health_check_node_port:
        return "LoadBalancer"
    if service.external_local or any(port.node_port for port in service.ports):
        return "NodePort"
    return "ClusterIP"


def slice_manifest(endpoint_slice: EndpointSlice) -> dict[str, Any]:
    """Return an EndpointSlice that kproxy decodes to the same model object, except for `last_change` and `invalid`."""
    metadata = _metadata(endpoint_slice.namespace, endpoint_slice.name)
    metadata["labels"] = {SERVICE_NAME_LABEL: endpoint_slice.service.partition("/")[2]}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": endpoint_slice.family.value,
        "ports": [{"name": port.name, "port": port.port, "protocol": port.protocol} for port in endpoint_slice.ports],
        "endpoints": [_endpoint(endpoint) for endpoint in endpoint_slice.endpoints],
    }


def _endpoint(endpoint: Endpoint) -> dict[str, Any]:
    hints = {}
    if endpoint.for_zones:
        hints["forZones"] = [{"name": zone} for zone in endpoint.for_zones]
    if endpoint.for_nodes:
        hints["forNodes"] = [{"name": node} for node in endpoint.for_nodes]
    return {
        "addresses": [endpoint.address],
        "conditions": {
            "ready": endpoint.ready,
            "serving": endpoint.serving,
            "terminating": endpoint.terminating,
        },
        **({"nodeName": endpoint.node} if endpoint.node else {}),
        **({"hints": hints} if hints else {}),
    }


def node_manifest(node: Node) -> dict[str, Any]:
    """Return a Node that kproxy decodes to the same model object."""
    spec: dict[str, Any] = {}
    if node.pod_cidrs:
        spec["podCIDR"] = node.pod_cidrs[0]
        spec["podCIDRs"] = list(node.pod_cidrs)
    if node.being_deleted:
        spec["taints"] = [{"key": DELETION_TAINT, "effect": "NoSchedule"}]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            **({"uid": node.uid} if node.uid else {}),
            "labels": {ZONE_LABEL: node.zone} if node.zone else {},
        },
        "spec": spec,
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in node.addresses]},
    }


def _metadata(namespace: str, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": namespace}
