"""The API's shapes, with only the fields that decide rules; everything else is skipped while parsing."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from kproxy.model.types import Protocol


class Wire(Struct, rename="camel", gc=False):
    """An object as the API sends it: camelCase keys in JSON, everything optional, unknown keys passed over."""


class MetadataWire(Wire):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class ServicePortWire(Wire):
    port: int = 0
    name: str = ""
    protocol: Protocol = "TCP"
    node_port: int = 0


class ClientIPWire(Wire):
    timeout_seconds: int | None = None


class AffinityConfigWire(Wire):
    client_ip: ClientIPWire | None = msgspec.field(default=None, name="clientIP")


class ServiceSpecWire(Wire):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ports: list[ServicePortWire] | None = None
    session_affinity: str = "None"
    session_affinity_config: AffinityConfigWire | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int = 0


class IngressWire(Wire):
    ip: str = ""
    ip_mode: str | None = None


class LoadBalancerWire(Wire):
    ingress: list[IngressWire] | None = None


class ServiceStatusWire(Wire):
    load_balancer: LoadBalancerWire | None = None


class ServiceWire(Wire):
    metadata: MetadataWire
    spec: ServiceSpecWire | None = None
    status: ServiceStatusWire | None = None


class ConditionsWire(Wire):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class NamedWire(Wire):
    name: str = ""


class HintsWire(Wire):
    for_zones: list[NamedWire] | None = None
    for_nodes: list[NamedWire] | None = None


class EndpointWire(Wire):
    addresses: list[str] | None = None
    conditions: ConditionsWire | None = None
    node_name: str | None = None
    hints: HintsWire | None = None


class EndpointPortWire(Wire):
    name: str | None = None
    port: int | None = None
    protocol: Protocol | None = None


class EndpointSliceWire(Wire):
    metadata: MetadataWire
    address_type: str = ""
    endpoints: list[EndpointWire] | None = None
    ports: list[EndpointPortWire] | None = None


class TaintWire(Wire):
    key: str = ""


class NodeSpecWire(Wire):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[TaintWire] | None = None


class NodeAddressWire(Wire):
    type: str = ""
    address: str = ""


class NodeStatusWire(Wire):
    addresses: list[NodeAddressWire] | None = None


class NodeWire(Wire):
    metadata: MetadataWire
    spec: NodeSpecWire | None = None
    status: NodeStatusWire | None = None


class ServiceCIDRSpecWire(Wire):
    cidrs: list[str] | None = None


class ServiceCIDRWire(Wire):
    metadata: MetadataWire
    spec: ServiceCIDRSpecWire | None = None


class StatusDetailsWire(Wire):
    retry_after_seconds: float = 0.0


class StatusWire(Wire):
    code: int = 0
    reason: str = ""
    message: str = ""
    details: StatusDetailsWire | None = None
