"""The plan: for one family and one service port, who reaches what and how, free of any backend.

Everything that renders rules, cleans conntrack, serves health ports or explains a decision reads plans;
the rules of traffic policy are decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from ipaddress import ip_address, ip_network

from msgspec import Struct

from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets, cluster_endpoints, endpoints_by_socket, local_endpoints, serving, usable
from kproxy.model.types import Endpoint, EndpointSlice, Family, Protocol, Service, ServiceKey, ServicePort


class TrafficDecision(Enum):
    """What becomes of a new connection to a frontend."""

    FORWARD = "forward"
    REJECT = "reject"
    """The Service has no endpoint anywhere: say so at once."""
    DROP = "drop"
    """There are endpoints, but policy Local leaves none on this node: a load balancer should go elsewhere."""


class ServicePortPlan(Struct, frozen=True, gc=False):
    """How one port of one Service is served in one family.

    Frontends: `cluster_ip`:`port` is internal; `external_ips` and `vips` with `port`, and `node_port` (0: none) on
    this node's addresses, are external. `internal_local` and `external_local` say which policy each kind of
    traffic has; the endpoints of policy Cluster and Local are `cluster_endpoints` and `local_endpoints`, each
    empty when the Service has no use for that policy.

    With `source_ranges`, only these sources may use the VIPs (never applied to the other frontends);
    `vips_are_sources` adds the VIPs themselves, because a node that is allowed may talk to a VIP which it holds as a
    local address. `unrestricted` says that the Service names source ranges, but all of them of the other family: then
    the VIPs of this one are open to everybody, as in kube-proxy. `dual_stack` says that the Service has a ClusterIP of
    the other family, too.

    For UDP, `serving_endpoints` are all that still answer, whether or not new flows go to them: those that they have
    may stay. `endpoints_here` are those of the endpoints in use that are, or may be, on this node: one without
    `nodeName` (made by hand, or mirrored from an Endpoints object) can be on any.

    `local_ready` holds the addresses of the ready endpoints on this node, whatever the policies, and only
    for a Service with a `health_check_node_port`: those that terminate serve on, but no longer count for health.
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
    endpoints_here: Sockets = ()
    local_ready: tuple[str, ...] = ()
    unrestricted: bool = False
    dual_stack: bool = False

    @property
    def name(self) -> str:
        """`namespace/name:port`, or `namespace/name` for an unnamed port."""
        return f"{self.service}:{self.port_name}" if self.port_name else self.service

    @property
    def has_endpoints(self) -> bool:
        """Whether any endpoint in the cluster could serve a connection, this node's policies aside."""
        return self.internal is not TrafficDecision.REJECT

    @property
    def externally_accessible(self) -> bool:
        """Whether there is any frontend besides the ClusterIP."""
        return bool(self.node_port or self.vips or self.external_ips)

    @property
    def outlives_sync(self) -> bool:
        """Whether it matters beyond the rules: for UDP flows, health check node ports, or ports without endpoints here.

        A Service without such a port needs not be remembered for those purposes.
        """
        dropped = TrafficDecision.DROP in (self.internal, self.external)
        return dropped or self.protocol == "UDP" or bool(self.health_check_node_port)

    @property
    def reachable_endpoints(self) -> Sockets:
        """All endpoints that this node may send traffic to, under either policy, in their order."""
        if not self.local_endpoints:
            return self.cluster_endpoints
        return tuple(sorted({*self.cluster_endpoints, *self.local_endpoints}))


def plan_service(service: Service, slices: Iterable[EndpointSlice], context: Context) -> tuple[ServicePortPlan, ...]:
    """Return the plans of a Service's ports in the context's family; none if it has no ClusterIP there."""
    family = context.family
    cluster_ip = next((ip for ip in service.cluster_ips if family_of(ip) is family), None)
    if cluster_ip is None:
        return ()
    ordered = sorted(slices, key=lambda each: each.name)
    return tuple(_plan_port(service, cluster_ip, port, ordered, context) for port in service.ports)


def count_endpoints(service: Service, slices: Collection[EndpointSlice], family: Family) -> int:
    """Count the endpoints of a Service's ports in one family, unusable ones included.

    Costs a fraction of `plan_service`. An endpoint that two slices list counts once, and one that serves several ports
    counts for each of them; a Service without a ClusterIP in the family has none.
    """
    if not any(family_of(ip) is family for ip in service.cluster_ips):
        return 0
    own = [each for each in slices if each.family is family]
    return sum(_count_port(own, port) for port in service.ports)


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
    service: Service, cluster_ip: str, port: ServicePort, slices: list[EndpointSlice], context: Context
) -> ServicePortPlan:
    external_ips = _of_family(service.external_ips, context.family)
    vips = _of_family(service.vips, context.family)
    named = _of_family(service.source_ranges, context.family) if vips else ()
    ranges = _effective_ranges(named)
    accessible = bool(port.node_port or external_ips or vips)

    known = endpoints_by_socket(slices, context.family, port.name, port.protocol)
    # Even under external policy Local, pods and the node itself reach external frontends with policy Cluster.
    uses_cluster = accessible or not service.internal_local
    uses_local = service.internal_local or (accessible and service.external_local)
    local = local_endpoints(known, context.node_name) if uses_local else ()
    cluster = cluster_endpoints(known, context.node_name, context.zone) if uses_cluster else ()
    anywhere = bool(cluster or usable(known))
    return ServicePortPlan(
        service=service.key,
        port_name=port.name,
        protocol=port.protocol,
        cluster_ip=cluster_ip,
        port=port.port,
        node_port=port.node_port,
        external_ips=external_ips,
        vips=vips,
        source_ranges=ranges,
        vips_are_sources=any(_contains(each, context.node_address) for each in ranges),
        health_check_node_port=service.health_check_node_port,
        affinity_seconds=service.affinity_seconds,
        internal_local=service.internal_local,
        external_local=service.external_local,
        internal=_decide(anywhere=anywhere, local_only=service.internal_local, local=local),
        external=_decide(anywhere=anywhere, local_only=service.external_local and accessible, local=local),
        cluster_endpoints=cluster,
        local_endpoints=local,
        serving_endpoints=serving(known) if port.protocol == "UDP" else (),
        endpoints_here=_may_be_on(context.node_name, known, (cluster, local)),
        local_ready=_ready_on(context.node_name, known.values()) if service.health_check_node_port else (),
        unrestricted=bool(vips and service.source_ranges and not named),
        dual_stack=len({family_of(ip) for ip in service.cluster_ips}) > 1,
    )


def _may_be_on(node: str, known: Mapping[str, Endpoint], used: tuple[Sockets, ...]) -> Sockets:
    here = [text for text, endpoint in known.items() if not endpoint.node or endpoint.node == node]
    return tuple(text for text in here if any(text in sockets for sockets in used)) if here else ()


def _ready_on(node: str, endpoints: Iterable[Endpoint]) -> tuple[str, ...]:
    return tuple(endpoint.address for endpoint in endpoints if endpoint.ready and node and endpoint.node == node)


def _decide(*, anywhere: bool, local_only: bool, local: Sockets) -> TrafficDecision:
    if not anywhere:
        return TrafficDecision.REJECT
    return TrafficDecision.DROP if local_only and not local else TrafficDecision.FORWARD


def _of_family(texts: tuple[str, ...], family: Family) -> tuple[str, ...]:
    return tuple([text for text in texts if family_of(text) is family]) if texts else ()


def _effective_ranges(ranges: tuple[str, ...]) -> tuple[str, ...]:
    """Return the ranges that restrict anything: one that holds every address makes the others pointless."""
    return () if any(each.endswith("/0") for each in ranges) else ranges


def _contains(cidr: str, address: str) -> bool:
    return bool(address) and ip_address(address) in ip_network(cidr)
