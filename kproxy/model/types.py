"""The cluster as kproxy keeps it: the fields of Services, EndpointSlices, Nodes and ServiceCIDRs that decide rules.

Everything here is immutable and compares by value, so "did this change anything?" is `old != new`.
Addresses and CIDRs are in canonical text form; names that repeat (nodes, zones) are interned by the decoder. What the
store keeps packed is `array_like`: without the names of the fields.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

from msgspec import Struct

Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
ServiceKey: TypeAlias = str
"""A Service's `namespace/name`, the way every Kubernetes tool prints it."""


class Family(Enum):
    """An IP family, by the name that the Kubernetes API and the metrics label `ip_family` use."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"


class ServicePort(Struct, frozen=True, gc=False, array_like=True):
    """One entry of `spec.ports`; `node_port` is 0 where none is allocated."""

    name: str
    port: int
    protocol: Protocol
    node_port: int = 0


class Service(Struct, frozen=True, gc=False, array_like=True):
    """A Service that kproxy serves. Headless and ExternalName Services never become one of these.

    `affinity_seconds` is the ClientIP timeout, 0 without session affinity. `vips` are the load balancer
    addresses of ipMode VIP (KEP-1860): those of ipMode Proxy are not ours to answer for.
    `external_local` and `health_check_node_port` are already freed of values that the Service's type makes
    meaningless.
    """

    namespace: str
    name: str
    cluster_ips: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    affinity_seconds: int = 0
    internal_local: bool = False
    external_local: bool = False
    external_ips: tuple[str, ...] = ()
    vips: tuple[str, ...] = ()
    source_ranges: tuple[str, ...] = ()
    health_check_node_port: int = 0

    @property
    def key(self) -> ServiceKey:
        """The Service's `namespace/name`."""
        return f"{self.namespace}/{self.name}"


class Endpoint(Struct, frozen=True, gc=False, array_like=True):
    """One endpoint of a slice; hints are empty where the slice gives none."""

    address: str
    node: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    for_zones: tuple[str, ...] = ()
    for_nodes: tuple[str, ...] = ()


class EndpointPort(Struct, frozen=True, gc=False, array_like=True):
    """A named port that all endpoints of a slice share."""

    name: str
    port: int
    protocol: Protocol


class EndpointSlice(Struct, frozen=True, gc=False, array_like=True):
    """An EndpointSlice of one family; `service` is the key of the Service that it belongs to.

    `last_change` is the annotation `endpoints.kubernetes.io/last-change-trigger-time` as seconds since the
    epoch, 0.0 where there is none: when the change that this slice carries began.
    """

    namespace: str
    name: str
    service: ServiceKey
    family: Family
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    last_change: float = 0.0


class Node(Struct, frozen=True, gc=False):
    """A Node. `addresses` holds its own IPs, InternalIPs first, each group in the order of the object.

    `being_deleted` is true once the Node has a deletion timestamp or carries the taint
    `ToBeDeletedByClusterAutoscaler`: load balancers should then stop sending traffic here (KEP-3836).
    """

    name: str
    uid: str = ""
    addresses: tuple[str, ...] = ()
    zone: str = ""
    pod_cidrs: tuple[str, ...] = ()
    being_deleted: bool = False


class ServiceCIDR(Struct, frozen=True, gc=False):
    """A ServiceCIDR (KEP-1880): ranges that ClusterIPs are allocated from, one per family at the most."""

    name: str
    cidrs: tuple[str, ...] = ()
