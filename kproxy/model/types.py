"""Services, EndpointSlices, Nodes and ServiceCIDRs, reduced to the fields that the rules depend on. Pure.

All values are immutable and compare by value. Addresses and CIDRs are in canonical form. The decoder interns strings
that occur in many objects, such as node and zone names. The types that the store packs are `array_like`, so that field
names are not stored with each object.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

from msgspec import Struct

Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
ServiceKey: TypeAlias = str
"""A Service's `namespace/name`."""


class Family(Enum):
    """An IP family. The values are those of the Kubernetes API and of the metrics label `ip_family`."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"


class ServicePort(Struct, frozen=True, gc=False, array_like=True):
    """One entry of `spec.ports`. `node_port` is 0 if none is allocated."""

    name: str
    port: int
    protocol: Protocol
    node_port: int = 0


class Service(Struct, frozen=True, gc=False, array_like=True):
    """A Service that kproxy serves. It is never headless and never has type ExternalName.

    `affinity_seconds` is the timeout of ClientIP session affinity; 0 means no session affinity. `internal_local` is
    true if the internal traffic policy is Local, `external_local` if the external traffic policy is Local. `vips` are
    the load balancer addresses with ipMode VIP (KEP-1860); kproxy does not handle traffic to load balancer addresses
    with ipMode Proxy. `external_local` and `health_check_node_port` have their default values if they do not apply to
    the Service.
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
    """One endpoint of a slice. `for_zones` and `for_nodes` are its topology hints, empty if it has none."""

    address: str
    node: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    for_zones: tuple[str, ...] = ()
    for_nodes: tuple[str, ...] = ()


class EndpointPort(Struct, frozen=True, gc=False, array_like=True):
    """A port of a slice, which all endpoints of the slice share."""

    name: str
    port: int
    protocol: Protocol


class EndpointSlice(Struct, frozen=True, gc=False, array_like=True):
    """An EndpointSlice of one family. `service` is the key of the Service that it belongs to.

    `last_change` is the time at which the slice's last change was triggered, in seconds since the epoch. It is read
    from the annotation `endpoints.kubernetes.io/last-change-trigger-time`; 0.0 means unknown. `invalid` is the number
    of endpoints and ports of the object that are missing here because they cannot be used.
    """

    namespace: str
    name: str
    service: ServiceKey
    family: Family
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()
    last_change: float = 0.0
    invalid: int = 0


class Node(Struct, frozen=True, gc=False):
    """A Node. `addresses` are its InternalIPs, followed by its ExternalIPs, both in the order of the Node's status.

    `being_deleted` is true if the Node has a deletion timestamp or the taint `ToBeDeletedByClusterAutoscaler`, or if it
    has been deleted. In all of these cases, load balancers should not send new connections to the Node (KEP-3836).
    """

    name: str
    uid: str = ""
    addresses: tuple[str, ...] = ()
    zone: str = ""
    pod_cidrs: tuple[str, ...] = ()
    being_deleted: bool = False


class ServiceCIDR(Struct, frozen=True, gc=False):
    """A ServiceCIDR (KEP-1880): ranges from which ClusterIPs are allocated, at most one range per IP family."""

    name: str
    cidrs: tuple[str, ...] = ()
