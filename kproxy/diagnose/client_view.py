"""What one client gets from a Service: where it is, whether it is allowed, and which rules apply to it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.cluster_objects import SeenService
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import FrontendExplanation, Reason, Verdict
from kproxy.model.addresses import canonical_address, family_of
from kproxy.model.context import Context
from kproxy.model.endpoints import endpoints_by_socket, usable
from kproxy.model.plan import ServicePortPlan, TrafficDecision, plan_service
from kproxy.model.types import Family


class ClientPlace(Struct, frozen=True):
    """Where a client is. `inside` is None if it is unknown whether the client is in the cluster.

    `on_this_node` is true for this node itself and its pods. `other_node` is the node on which the client's packets
    enter the rules, if that is another node. `is_node` is true for a node itself, false for its pods.
    """

    address: str
    location: str
    inside: bool | None
    on_this_node: bool = False
    other_node: str = ""
    is_node: bool = False

    @property
    def family(self) -> Family:
        """The family of its address."""
        return family_of(self.address)


def locate(facts: Facts, address: str) -> ClientPlace:
    """Return where a client is, from the addresses of Nodes, Pods and endpoints and from the pod networks."""
    if ip_address(address).is_loopback:
        return ClientPlace(address, f"this node ({facts.node_name})", inside=True, on_this_node=True, is_node=True)
    known = _node_at(facts, address) or _pod_at(facts, address) or _pod_network_of(facts, address)
    if known is not None:
        return known
    for service in facts.objects.services if facts.objects else ():
        if address in service.cluster_ips:
            return ClientPlace(address, f"the ClusterIP of {service.key}, which is no client's address", inside=None)
    what = "an endpoint of this Service " if _is_endpoint(facts, address) else ""
    if _knows_pod_networks(facts, family_of(address)):
        return ClientPlace(address, f"{what}outside the cluster", inside=False)
    unseen = "the pod networks are unknown (Nodes without podCIDRs)" if facts.nodes else "no Nodes were seen"
    return ClientPlace(address, f"{what}not known to be in the cluster: {unseen}", inside=None)


def _knows_pod_networks(facts: Facts, family: Family) -> bool:
    """Return whether an address in no known pod network, and of no known Pod, is outside the cluster."""
    if facts.nodes and all(any(family_of(each) is family for each in node.pod_cidrs) for node in facts.nodes):
        return True
    cidr = facts.context(family).local_traffic.cidr
    if cidr and (facts.node is None or cidr not in facts.node.pod_cidrs):
        return True  # the network of all pods, not of those on one node
    pods = (facts.objects.pods or ()) if facts.objects and not facts.live else ()
    return bool(facts.nodes) and len({pod.metadata.namespace for pod in pods}) > 1  # those of all namespaces


def _is_endpoint(facts: Facts, address: str) -> bool:
    return any(endpoint.address == address for each in facts.slices for endpoint in each.endpoints)


def _node_at(facts: Facts, address: str) -> ClientPlace | None:
    if facts.node is not None and address in facts.node.addresses:
        where = f"this node ({facts.node.name})"
        return ClientPlace(address, where, inside=True, on_this_node=True, is_node=True)
    other = next((each for each in facts.nodes if address in each.addresses), None)
    if other is None:
        return None
    return ClientPlace(address, f"node {other.name}", inside=True, other_node=other.name, is_node=True)


def _pod_at(facts: Facts, address: str) -> ClientPlace | None:
    for pod in (facts.objects.pods or ()) if facts.objects else ():
        if address in pod.addresses and not pod.finished:
            name = f"{pod.metadata.namespace}/{pod.metadata.name}"
            return _pod(address, f"pod {name}", pod.spec.node_name, facts.node_name)
    for each in facts.slices:
        for endpoint in each.endpoints:
            if endpoint.address == address and endpoint.node:  # without a node, it may be outside the cluster
                return _pod(address, "an endpoint of this Service", endpoint.node, facts.node_name)
    return None


def _pod_network_of(facts: Facts, address: str) -> ClientPlace | None:
    if facts.node is not None and _in(address, facts.node.pod_cidrs):
        return ClientPlace(address, "a pod on this node", inside=True, on_this_node=True)
    for other in facts.nodes:
        if _in(address, other.pod_cidrs):
            return ClientPlace(address, f"a pod on node {other.name}", inside=True, other_node=other.name)
    cidr = facts.context(family_of(address)).local_traffic.cidr
    return ClientPlace(address, "a pod of the cluster", inside=True) if cidr and _in(address, (cidr,)) else None


def _pod(address: str, what: str, node: str, this_node: str) -> ClientPlace:
    if node == this_node:
        return ClientPlace(address, f"{what}, on this node", inside=True, on_this_node=True)
    where = f", on node {node}" if node else ""
    return ClientPlace(address, f"{what}{where}", inside=True, other_node=node)


def _in(address: str, cidrs: tuple[str, ...]) -> bool:
    return any(family_of(cidr) is family_of(address) and ip_address(address) in ip_network(cidr) for cidr in cidrs)


def source_allowed(plan: ServicePortPlan, client: ClientPlace) -> bool:
    """Return whether `loadBalancerSourceRanges` allows a client to use the load balancer addresses."""
    if not plan.source_ranges or _in(client.address, plan.source_ranges):
        return True
    return plan.vips_are_sources and client.address in plan.vips


def no_way_in(
    facts: Facts, plans: Mapping[Family, ServicePortPlan], client: ClientPlace
) -> tuple[Verdict, Reason] | None:
    """Return the verdict and the reason if a client reaches no frontend of a port, whatever its endpoints are."""
    plan = plans.get(client.family)
    if plan is None:
        missing = client.family.value
        reason = Reason(
            code="FamilyMissing",
            message=f"the client has an {missing} address, but the Service has no {missing} ClusterIP",
            fix="set spec.ipFamilyPolicy to PreferDualStack, or let the client use the other family",
        )
        return "NOT PROGRAMMED", reason
    if client.inside is not False:
        return None
    if not plan.externally_accessible:
        return _no_external_frontend(facts, plan, client)
    # In nftables mode, source ranges are checked first, even if the Service has no endpoints.
    if facts.mode == "nftables" and not plan.has_endpoints:
        refused = source_reason(plan, client)
        return ("DROPPED", refused) if refused is not None else None
    return None


def client_reason(facts: Facts, plan: ServicePortPlan, client: ClientPlace) -> Reason | None:
    """Return why connections of a client are dropped, or None. The port has endpoints and a frontend for the client."""
    refused = source_reason(plan, client)
    if refused is not None and not client.inside:
        return refused
    if client.inside is None:
        return None
    if client.inside is False:
        dropped = plan.externally_accessible and plan.external is TrafficDecision.DROP
        return no_local_endpoints(facts, plan, internal=False) if dropped else None
    plan = plan_at(facts, plan, client)
    if plan.internal is TrafficDecision.DROP:
        return no_local_endpoints(facts, plan, internal=True, node_name=client.other_node)
    return None


def context_at(facts: Facts, client: ClientPlace) -> Context:
    """Return the context of the client's node, as far as it matters for the selection of endpoints."""
    context = facts.context(client.family)
    if not client.other_node:
        return context
    zone = next((each.zone for each in facts.nodes if each.name == client.other_node), "")
    return replace(context, node_name=client.other_node, zone=zone)


def plan_at(facts: Facts, plan: ServicePortPlan, client: ClientPlace) -> ServicePortPlan:
    """Return the plan of the same port on the client's node, where its packets meet the rules."""
    if not client.other_node:
        return plan
    assert facts.service is not None
    there = plan_service(facts.service, facts.slices, context_at(facts, client))
    return next(each for each in there if (each.name, each.port) == (plan.name, plan.port))


def _no_external_frontend(facts: Facts, plan: ServicePortPlan, client: ClientPlace) -> tuple[Verdict, Reason] | None:
    """Return why a client outside does not reach a port that has only a ClusterIP in its family on this node."""
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    if raw is not None and raw.spec.type == "LoadBalancer":
        if (pending := load_balancer_pending(raw, has_node_port=bool(plan.node_port))) is not None:
            return "DROPPED", pending
        addresses = [address for each in raw.ingress if (address := canonical_address(each.ip))]
        if len(addresses) < len(raw.ingress) or any(family_of(each) is client.family for each in addresses):
            return None  # a host name may have addresses of both families
        missing = client.family.value
        reason = Reason(
            code="FamilyMissing",
            message=f"the client has an {missing} address, but the load balancer has only {', '.join(addresses)}",
            fix=f"let the load balancer have an {missing} address, or let the client use the other family",
        )
        return "NOT PROGRAMMED", reason
    reason = Reason(
        code="ReachedOnlyFromInside",
        message=f"{client.address} is {client.location}, and the Service has only a ClusterIP",
        details=("networks outside the cluster have no route to ClusterIPs",),
        fix="set spec.type to NodePort or LoadBalancer, or use an Ingress or kubectl port-forward",
    )
    return "DROPPED", reason


def source_reason(plan: ServicePortPlan, client: ClientPlace) -> Reason | None:
    """Return the reason if the load balancer addresses of a port do not accept a client."""
    if not plan.vips or source_allowed(plan, client):
        return None
    rest = plan.node_port or plan.external_ips
    return Reason(
        code="SourceNotAllowed",
        message=f"{client.address} is in none of spec.loadBalancerSourceRanges: {', '.join(plan.source_ranges)}",
        details=("the ranges do not restrict NodePorts and external IPs",) if rest else (),
        fix=f"add {client.address}/{128 if ':' in client.address else 32} or its network to the ranges",
    )


def load_balancer_pending(raw: SeenService, *, has_node_port: bool) -> Reason | None:
    """Return the reason of a Service of type LoadBalancer that has no load balancer address, or None if it has one."""
    if raw.spec.type != "LoadBalancer" or raw.ingress:
        return None
    which = "a node with endpoints" if raw.spec.external_traffic_policy == "Local" else "any node"
    reached = f"; clients can use the NodePort of {which}" if has_node_port else ""
    return Reason(
        code="LoadBalancerPending",
        message=f"the load balancer has no address yet (status.loadBalancer is empty){reached}",
        fix="see the events of the Service; a cluster without a cloud provider needs a controller such as MetalLB",
    )


def no_local_endpoints(
    facts: Facts, plan: ServicePortPlan, *, internal: bool, node_name: str = "", only_family: bool = False
) -> Reason:
    """Return the reason of a port whose policy is Local and whose endpoints are all on other nodes.

    `node_name` is the node on which connections meet the rules, by default this one. `only_family` is true if
    connections in the other family work.
    """
    node_name = node_name or facts.node_name
    field = "internalTrafficPolicy" if internal else "externalTrafficPolicy"
    both = plan.internal_local and plan.external_local and plan.externally_accessible
    fields = "spec.internalTrafficPolicy and spec.externalTrafficPolicy" if both else f"spec.{field}"
    family = family_of(plan.cluster_ip)
    ordered = sorted(facts.slices, key=lambda each: each.name)
    known = endpoints_by_socket(ordered, family, plan.port_name, plan.protocol)
    elsewhere = sorted({node for socket in usable(known) if (node := known[socket].node)})
    details: list[str] = []
    fix = f"run a pod of the Service on {node_name}, or set {fields} to Cluster"
    if elsewhere:
        shown = ", ".join(elsewhere[:4]) + (" and others" if len(elsewhere) > 4 else "")
        details.append(f"usable endpoints are on: {shown}")
    else:
        details.append("its EndpointSlices do not say on which nodes the endpoints are (no nodeName)")
        fix = f"set nodeName in the EndpointSlices, or set {fields} to Cluster"
    names = [each.name for each in facts.nodes]
    if names and node_name not in names:
        details.append(f"no Node is named {node_name}; Nodes: {', '.join(names[:4])}")
        fix = "set --hostname-override to the name of this node's Node object"
    elif not internal:
        if not plan.internal_local:
            details.append("clients inside the cluster still reach it through any node")
        if plan.vips or plan.health_check_node_port:
            fix += "; a load balancer with health checks does not send clients here"
    subject = "internalTrafficPolicy and externalTrafficPolicy are" if both else f"{field} is"
    of_family = f"{family.value} " if only_family else ""
    message = f"{subject} Local, and no usable {of_family}endpoint is on {node_name}"
    return Reason(code="NoLocalEndpoints", message=message, details=tuple(details), fix=fix)


def for_client(
    facts: Facts, frontend: FrontendExplanation, plan: ServicePortPlan, client: ClientPlace
) -> FrontendExplanation:
    """Return what happens to connections of one client to a frontend of its family."""
    if frontend.kind == "ClusterIP" and client.inside is False:
        return replace(frontend, outcome="dropped", endpoints=0, remark="not routed to nodes from outside")
    if frontend.outcome in {"not programmed", "owned by another Service"}:
        return frontend
    checked_first = frontend.outcome != "rejected" or facts.mode == "nftables"
    if frontend.kind == "LoadBalancer" and checked_first and not source_allowed(plan, client):
        return replace(frontend, outcome="dropped", endpoints=0, remark="loadBalancerSourceRanges")
    if frontend.kind == "ClusterIP" or frontend.outcome == "rejected" or not client.inside:
        return frontend
    return _from_inside(facts, frontend, plan, client) if plan.external_local else frontend


def _from_inside(
    facts: Facts, frontend: FrontendExplanation, plan: ServicePortPlan, client: ClientPlace
) -> FrontendExplanation:
    """Return what happens to connections of a client inside to a frontend for which policy Local may not count."""
    if not _is_recognized(facts, client, at_client=frontend.kind != "NodePort"):
        why = "a node" if client.is_node else "a pod that kproxy does not recognize (detectLocalMode)"
        return replace(frontend, remark=f"as from outside, for {why}")
    count = len(plan.cluster_endpoints)
    return replace(frontend, outcome="forwarded", endpoints=count, remark="as from any pod or node: to all nodes")


def _is_recognized(facts: Facts, client: ClientPlace, *, at_client: bool) -> bool:
    """Return whether the rules recognize a client inside the cluster as local, so that policy Local does not apply.

    `at_client` is true if they are the rules of the client's node, false if they are those of this node.
    """
    if client.is_node:
        return at_client or client.on_this_node
    traffic = facts.context(client.family).local_traffic
    if not traffic.cidr:
        return traffic.detectable and (client.on_this_node or (at_client and bool(client.other_node)))
    if _in(client.address, (traffic.cidr,)):
        return True
    node = next((each for each in facts.nodes if at_client and each.name == client.other_node), None)
    return node is not None and _in(client.address, node.pod_cidrs)
