"""The plan of a service port in one IP family: frontends, endpoints and traffic decisions, for any backend. Pure.

Rules, conntrack cleanup, health check node ports and metrics are all derived from plans. Only this module evaluates
traffic policies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from ipaddress import ip_address, ip_network

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets, cluster_endpoints, endpoints_by_socket, local_endpoints, serving, usable
from kproxy.model.types import Endpoint, EndpointSlice, Family, Protocol, Service, ServiceKey, ServicePort

MANY_PORTS = 16
"""With at least so many ports, the slices of a Service are first sorted by port."""


class TrafficDecision(Enum):
    """What happens to a new connection to a frontend."""

    FORWARD = "forward"
    REJECT = "reject"
    """The service port has no usable endpoint in the cluster. The client receives an error at once."""
    DROP = "drop"
    """The policy is Local, and all usable endpoints are on other nodes. Load balancers should use those nodes."""


class ServicePortPlan(Struct, frozen=True, gc=False):
    """How one port of one Service is served in one family.

    The internal frontend is `cluster_ip` with `port`. The external frontends are `external_ips` and `vips` (load
    balancer addresses) with `port`, and this node's addresses with `node_port`. A `node_port` of 0 means that there is
    no NodePort. `affinity_seconds` is the timeout of session affinity; 0 means no session affinity.

    `internal_local` is true if the internal traffic policy is Local, `external_local` if the external traffic policy is
    Local. `cluster_endpoints` are the endpoints for traffic with policy Cluster, `local_endpoints` those for traffic
    with policy Local. Each is empty if no frontend uses that policy.

    If `source_ranges` is not empty, only clients in these ranges may use the VIPs. The other frontends are not
    restricted. `vips_are_sources` is true if one of the ranges contains this node's address. In that case the VIPs are
    allowed as source addresses, too: if a VIP is a local address of the node, the node's own packets to the VIP have
    the VIP as their source address. `unrestricted` is true if the port has VIPs and the Service has source ranges, but
    all of these ranges belong to the other IP family. In that case the VIPs of this family are open to all clients, as
    in kube-proxy. `dual_stack` is true if the Service also has a ClusterIP of the other family.

    `serving_endpoints` are all endpoints that still serve traffic. Existing flows to these endpoints may continue, even
    if new flows are sent to other endpoints. The field is only set for UDP. `endpoints_on_node` contains those
    `cluster_endpoints` and `local_endpoints` that are on this node or may be. An endpoint without a `nodeName`, such as
    one that was created by hand or mirrored from an Endpoints object, may be on any node.

    `local_ready` are the addresses of the ready endpoints on this node. The field is only set for a Service with a
    `health_check_node_port`. Terminating endpoints may still serve traffic, but the health check does not count them.
    """

    service: ServiceKey
    port_name: str
    protocol: Protocol
    cluster_ip: str
    port: int
    node_port: int
    external_ips: tuple[str, ...]
    vips: tuple[str, ...]
    source_ranges: tuple[str, ...]
    vips_are_sources: bool
    health_check_node_port: int
    affinity_seconds: int
    internal_local: bool
    external_local: bool
    internal: TrafficDecision
    external: TrafficDecision
    cluster_endpoints: Sockets
    local_endpoints: Sockets
    serving_endpoints: Sockets = ()
    endpoints_on_node: Sockets = ()
    local_ready: tuple[str, ...] = ()
    unrestricted: bool = False
    dual_stack: bool = False

    @property
    def name(self) -> str:
        """`namespace/name:port`, or `namespace/name` for an unnamed port."""
        return service_port_name(self.service, self.port_name)

    @property
    def has_endpoints(self) -> bool:
        """Whether any endpoint in the cluster can serve a connection, regardless of traffic policies."""
        return self.internal is not TrafficDecision.REJECT

    @property
    def externally_accessible(self) -> bool:
        """Whether the port has frontends besides the ClusterIP."""
        return bool(self.node_port or self.vips or self.external_ips)

    @property
    def outlives_sync(self) -> bool:
        """Whether the plan is needed after the sync: for UDP flows, health checks, or the metric of dropped traffic."""
        dropped = self.internal is TrafficDecision.DROP or self.external is TrafficDecision.DROP
        return dropped or self.protocol == "UDP" or bool(self.health_check_node_port)

    @property
    def reachable_endpoints(self) -> Sockets:
        """All endpoints to which this node may send traffic under either traffic policy, in sorted order."""
        if not self.local_endpoints:
            return self.cluster_endpoints
        return tuple(sorted({*self.cluster_endpoints, *self.local_endpoints}))


def service_port_name(service: ServiceKey, port_name: str) -> str:
    """Return `namespace/name:port`, or `namespace/name` for an unnamed port."""
    return f"{service}:{port_name}" if port_name else service


def plan_service(
    service: Service, slices: Iterable[EndpointSlice], context: Context, *, key: ServiceKey = ""
) -> tuple[ServicePortPlan, ...]:
    """Plan the ports of a Service in the context's family. Return no plans if it has no ClusterIP of that family.

    A caller that keeps the `key` of the Service should pass it: the plans then refer to the same string.
    """
    cluster_ip = cluster_ip_of(service, context.family)
    if cluster_ip is None:
        return ()
    ordered = list(slices)
    if len(ordered) > 1:
        ordered.sort(key=lambda each: each.name)
    slices_of = _slices_by_port(ordered, len(service.ports))
    name = key or service.key
    return tuple(
        [_plan_port(service, port, slices_of(port), context, key=name, cluster_ip=cluster_ip) for port in service.ports]
    )


def cluster_ip_of(service: Service, family: Family) -> str | None:
    """Return the Service's ClusterIP of a family, or None if it has none."""
    for address in service.cluster_ips:
        if family_of(address) is family:
            return address
    return None


def count_endpoints(service: Service, slices: Collection[EndpointSlice], family: Family) -> int:
    """Count the endpoints of a Service in one family, including unusable endpoints, without planning the Service.

    An endpoint that serves several ports counts once per port. The result is 0 if the Service has no ClusterIP of the
    family.
    """
    if cluster_ip_of(service, family) is None:
        return 0
    slices_of = _slices_by_port([each for each in slices if each.family is family], len(service.ports))
    return sum(_count_port(slices_of(port), port) for port in service.ports)


def _slices_by_port(slices: list[EndpointSlice], ports: int) -> Callable[[ServicePort], list[EndpointSlice]]:
    """Return a function that returns the slices that may carry a service port.

    With many ports, it returns slices that have only the port of the same name and protocol. Otherwise, the time to
    plan a Service would grow with the square of the number of its ports.
    """
    if ports < MANY_PORTS:
        return lambda _: slices
    found: dict[tuple[str, str], list[EndpointSlice]] = {}
    for each in slices:
        for port in each.ports:
            found.setdefault((port.name, port.protocol), []).append(replace(each, ports=(port,)))
    return lambda port: found.get((port.name, port.protocol), [])


def _count_port(slices: list[EndpointSlice], port: ServicePort) -> int:
    sockets = {
        (endpoint.address, target.port)
        for each in slices
        for target in each.ports
        if target.name == port.name and target.protocol == port.protocol
        for endpoint in each.endpoints
    }
    return len(sockets)


def _plan_port(
    service: Service,
    port: ServicePort,
    slices: list[EndpointSlice],
    context: Context,
    *,
    key: ServiceKey,
    cluster_ip: str,
) -> ServicePortPlan:
    external_ips = _of_family(service.external_ips, context.family)
    vips = _of_family(service.vips, context.family)
    family_ranges = _of_family(service.source_ranges, context.family) if vips else ()
    ranges = _effective_ranges(family_ranges) if family_ranges else ()
    accessible = bool(port.node_port or external_ips or vips)

    known = endpoints_by_socket(slices, context.family, port.name, port.protocol)
    # Traffic from pods and from the node itself to external frontends always uses policy Cluster, even if the external
    # traffic policy is Local.
    uses_cluster = accessible or not service.internal_local
    uses_local = service.internal_local or (accessible and service.external_local)
    local = local_endpoints(known, context.node_name) if uses_local else ()
    cluster = cluster_endpoints(known, context.node_name, context.zone) if uses_cluster else ()
    anywhere = bool(cluster or usable(known))
    return ServicePortPlan(
        service=key,
        port_name=port.name,
        protocol=port.protocol,
        cluster_ip=cluster_ip,
        port=port.port,
        node_port=port.node_port,
        external_ips=external_ips,
        vips=vips,
        source_ranges=ranges,
        vips_are_sources=bool(ranges) and any(_contains(each, context.node_address) for each in ranges),
        health_check_node_port=service.health_check_node_port,
        affinity_seconds=service.affinity_seconds,
        internal_local=service.internal_local,
        external_local=service.external_local,
        internal=_decide(anywhere=anywhere, local_only=service.internal_local, local=local),
        external=_decide(anywhere=anywhere, local_only=service.external_local and accessible, local=local),
        cluster_endpoints=cluster,
        local_endpoints=local,
        serving_endpoints=serving(known) if port.protocol == "UDP" else (),
        endpoints_on_node=_may_be_on(context.node_name, known, (cluster, local)),
        local_ready=_ready_on(context.node_name, known.values()) if service.health_check_node_port else (),
        unrestricted=bool(vips and service.source_ranges and not family_ranges),
        dual_stack=len(service.cluster_ips) > 1,
    )


def _may_be_on(node: str, known: Mapping[str, Endpoint], used: tuple[Sockets, ...]) -> Sockets:
    candidates = [socket for socket, endpoint in known.items() if not endpoint.node or endpoint.node == node]
    return tuple(socket for socket in candidates if any(socket in sockets for sockets in used)) if candidates else ()


def _ready_on(node: str, endpoints: Iterable[Endpoint]) -> tuple[str, ...]:
    return tuple(endpoint.address for endpoint in endpoints if endpoint.ready and node and endpoint.node == node)


def _decide(*, anywhere: bool, local_only: bool, local: Sockets) -> TrafficDecision:
    if not anywhere:
        return TrafficDecision.REJECT
    return TrafficDecision.DROP if local_only and not local else TrafficDecision.FORWARD


def _of_family(addresses: tuple[str, ...], family: Family) -> tuple[str, ...]:
    return tuple([address for address in addresses if family_of(address) is family]) if addresses else ()


def _effective_ranges(ranges: tuple[str, ...]) -> tuple[str, ...]:
    """Return the source ranges, or none if one of them contains every address."""
    return () if any(each.endswith("/0") for each in ranges) else ranges


def _contains(cidr: str, address: str) -> bool:
    return bool(address) and ip_address(address) in ip_network(cidr)
