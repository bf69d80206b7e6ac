"""Kubernetes API objects, reduced to the fields that kproxy uses. Pure."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class ApiStruct(Struct, rename="camel", gc=False):
    """An API object or a part of one.

    The API's names for the fields are in camelCase; the Kubernetes API reference describes their meaning. Most fields
    are optional. Unknown fields are ignored.
    """


class ApiMetadata(ApiStruct):
    """ObjectMeta (meta/v1)."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class ApiServicePort(ApiStruct):
    """ServicePort (core/v1)."""

    port: int | None = None
    name: str = ""
    protocol: str = "TCP"
    node_port: int = 0


class ApiClientIP(ApiStruct):
    """ClientIPConfig (core/v1): the timeout of session affinity."""

    timeout_seconds: int | None = None


class ApiAffinityConfig(ApiStruct):
    """SessionAffinityConfig (core/v1)."""

    client_ip: ApiClientIP | None = msgspec.field(default=None, name="clientIP")


class ApiServiceSpec(ApiStruct):
    """ServiceSpec (core/v1)."""

    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ports: list[ApiServicePort] | None = None
    session_affinity: str = "None"
    session_affinity_config: ApiAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int = 0


class ApiIngress(ApiStruct):
    """LoadBalancerIngress (core/v1): one address of a load balancer. `ip` is "" if it has only a hostname."""

    ip: str = ""
    ip_mode: str | None = None


class ApiLoadBalancer(ApiStruct):
    """LoadBalancerStatus (core/v1)."""

    ingress: list[ApiIngress] | None = None


class ApiServiceStatus(ApiStruct):
    """ServiceStatus (core/v1)."""

    load_balancer: ApiLoadBalancer | None = None


class ApiService(ApiStruct):
    """Service (core/v1)."""

    metadata: ApiMetadata
    spec: ApiServiceSpec | None = None
    status: ApiServiceStatus | None = None


class ApiConditions(ApiStruct):
    """EndpointConditions (discovery.k8s.io/v1). None means unknown."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ApiNamed(ApiStruct):
    """ForZone or ForNode (discovery.k8s.io/v1): the zone or node of a hint."""

    name: str = ""


class ApiHints(ApiStruct):
    """EndpointHints (discovery.k8s.io/v1)."""

    for_zones: list[ApiNamed] | None = None
    for_nodes: list[ApiNamed] | None = None


class ApiEndpoint(ApiStruct):
    """Endpoint (discovery.k8s.io/v1)."""

    addresses: list[str] | None = None
    conditions: ApiConditions | None = None
    node_name: str | None = None
    hints: ApiHints | None = None


class ApiEndpointPort(ApiStruct):
    """EndpointPort (discovery.k8s.io/v1)."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class ApiEndpointSlice(ApiStruct):
    """EndpointSlice (discovery.k8s.io/v1)."""

    metadata: ApiMetadata
    address_type: str = ""
    endpoints: list[ApiEndpoint] | None = None
    ports: list[ApiEndpointPort] | None = None


class ApiTaint(ApiStruct):
    """Taint (core/v1)."""

    key: str = ""


class ApiNodeSpec(ApiStruct):
    """NodeSpec (core/v1)."""

    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[ApiTaint] | None = None


class ApiNodeAddress(ApiStruct):
    """NodeAddress (core/v1)."""

    type: str = ""
    address: str = ""


class ApiNodeStatus(ApiStruct):
    """NodeStatus (core/v1)."""

    addresses: list[ApiNodeAddress] | None = None


class ApiNode(ApiStruct):
    """Node (core/v1)."""

    metadata: ApiMetadata
    spec: ApiNodeSpec | None = None
    status: ApiNodeStatus | None = None


class ApiServiceCIDRSpec(ApiStruct):
    """ServiceCIDRSpec (networking.k8s.io/v1)."""

    cidrs: list[str] | None = None


class ApiServiceCIDR(ApiStruct):
    """ServiceCIDR (networking.k8s.io/v1)."""

    metadata: ApiMetadata
    spec: ApiServiceCIDRSpec | None = None


class ApiStatusDetails(ApiStruct):
    """StatusDetails (meta/v1)."""

    retry_after_seconds: float = 0.0


class ApiStatus(ApiStruct):
    """Status (meta/v1): an error that the API server reports."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: ApiStatusDetails | None = None
