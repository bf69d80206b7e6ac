"""What one client gets from a Service: where it is, whether it is allowed, and which rules apply to it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.cluster_objects import SeenService
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import FrontendExplanation, Reason, Verdict
from kproxy.model.addresses import family_of
from kproxy.model.plan import ServicePortPlan, TrafficDecision, plan_service
from kproxy.model.types import Family


class ClientPlace(Struct, frozen=True):
    """Where a client is. `inside` is None if it is unknown whether the client is in the cluster.

    `on_this_node` is true for this node itself and its pods. `other_node` is the node on which the client's packets
    enter the rules, if that is another node.
    """

    address: str
    location: str
    inside: bool | None
    on_this_node: bool = False
    other_node: str = ""

    @property
    def family(self) -> Family:
        """The family of its address."""
        return family_of(self.address)


def locate(facts: Facts, address: str) -> ClientPlace:
    """Return where a client is, from the addresses of Nodes, Pods and endpoints and from the pod networks."""
    known = _node_at(facts, address) or _pod_at(facts, address) or _pod_network_of(facts, address)
    if known is not None:
        return known
    sees_cluster = any(each.addresses for each in facts.nodes) or facts.node is not None
    has_cidr = bool(facts.context(family_of(address)).local_traffic.cidr)
    if sees_cluster or has_cidr:
        return ClientPlace(address, "outside the cluster", inside=False)
    return ClientPlace(address, "not known to be in the cluster: no Nodes were seen", inside=None)


def _node_at(facts: Facts, address: str) -> ClientPlace | None:
    if facts.node is not None and address in facts.node.addresses:
        return ClientPlace(address, f"this node ({facts.node.name})", inside=True, on_this_node=True)
    other = next((each for each in facts.nodes if address in each.addresses), None)
    return ClientPlace(address, f"node {other.name}", inside=True, other_node=other.name) if other else None


def _pod_at(facts: Facts, address: str) -> ClientPlace | None:
    for pod in (facts.objects.pods or ()) if facts.objects else ():
        if address in pod.addresses and not pod.finished:
            name = f"{pod.metadata.namespace}/{pod.metadata.name}"
            return _pod(address, f"pod {name}", pod.spec.node_name, facts.node_name)
    for each in facts.slices:
        for endpoint in each.endpoints:
            if endpoint.address == address:
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


def client_reason(
    facts: Facts, plans: Mapping[Family, ServicePortPlan], client: ClientPlace
) -> tuple[Verdict, Reason | None]:
    """Return the verdict for a client about a port that has endpoints in the cluster, and the reason."""
    plan = plans.get(client.family)
    if plan is None:
        missing = client.family.value
        reason = Reason(
            code="FamilyMissing",
            message=f"the client has an {missing} address, but the Service has no {missing} ClusterIP",
            fix="set spec.ipFamilyPolicy to PreferDualStack, or let the client use the other family",
        )
        return "NOT PROGRAMMED", reason
    if not client.inside:
        return _outside(facts, plan, client)
    if client.other_node:
        plan = _plan_at(facts, plan, client)
    if plan.internal is TrafficDecision.DROP:
        return "DROPPED", no_local_endpoints(facts, plan, internal=True, node_name=client.other_node)
    return "WORKS", None


def _plan_at(facts: Facts, plan: ServicePortPlan, client: ClientPlace) -> ServicePortPlan:
    """Return the plan of the same port on the client's node, where its packets meet the rules."""
    zone = next((each.zone for each in facts.nodes if each.name == client.other_node), "")
    context = replace(facts.context(client.family), node_name=client.other_node, zone=zone)
    assert facts.service is not None
    there = plan_service(facts.service, facts.slices, context)
    return next(each for each in there if (each.name, each.port) == (plan.name, plan.port))


def _outside(facts: Facts, plan: ServicePortPlan, client: ClientPlace) -> tuple[Verdict, Reason | None]:
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    if not plan.externally_accessible and raw is not None and raw.spec.type == "LoadBalancer":
        return "WORKS" if raw.ingress else "DROPPED", load_balancer_pending(raw, has_node_port=bool(plan.node_port))
    if not plan.externally_accessible:
        reason = Reason(
            code="ReachedOnlyFromInside",
            message=f"{client.address} is {client.location}, and the Service has only a ClusterIP",
            details=("networks outside the cluster have no route to ClusterIPs",),
            fix="set spec.type to NodePort or LoadBalancer, or use an Ingress or kubectl port-forward",
        )
        return "DROPPED", reason
    if plan.vips and not source_allowed(plan, client):
        rest = plan.node_port or plan.external_ips
        reason = Reason(
            code="SourceNotAllowed",
            message=f"{client.address} is in none of spec.loadBalancerSourceRanges: {', '.join(plan.source_ranges)}",
            details=("the ranges do not restrict NodePorts and external IPs",) if rest else (),
            fix=f"add {client.address}/{128 if ':' in client.address else 32} or its network to the ranges",
        )
        return "DROPPED", reason
    if plan.external is TrafficDecision.DROP:
        return "DROPPED", no_local_endpoints(facts, plan, internal=False)
    return "WORKS", None


def load_balancer_pending(raw: SeenService, *, has_node_port: bool) -> Reason | None:
    """Return the reason of a Service of type LoadBalancer that has no load balancer address, or None if it has one."""
    if raw.spec.type != "LoadBalancer" or raw.ingress:
        return None
    reached = "; clients can use the NodePort of any node" if has_node_port else ""
    return Reason(
        code="LoadBalancerPending",
        message=f"the load balancer has no address yet (status.loadBalancer is empty){reached}",
        fix="see the events of the Service; a cluster without a cloud provider needs a controller such as MetalLB",
    )


def no_local_endpoints(facts: Facts, plan: ServicePortPlan, *, internal: bool, node_name: str = "") -> Reason:
    """Return the reason of a port whose policy is Local and whose endpoints are all on other nodes.

    `node_name` is the node on which connections meet the rules, by default this one.
    """
    node_name = node_name or facts.node_name
    field = "internalTrafficPolicy" if internal else "externalTrafficPolicy"
    elsewhere = sorted({each.node for every in facts.slices for each in every.endpoints if each.ready and each.node})
    details: list[str] = []
    fix = f"run a pod of the Service on {node_name}, or set spec.{field} to Cluster"
    if elsewhere:
        shown = ", ".join(elsewhere[:4]) + (" and others" if len(elsewhere) > 4 else "")
        details.append(f"ready endpoints are on: {shown}")
    else:
        details.append("its EndpointSlices do not say on which nodes the endpoints are (no nodeName)")
        fix = f"set nodeName in the EndpointSlices, or set spec.{field} to Cluster"
    names = [each.name for each in facts.nodes]
    if names and node_name not in names:
        details.append(f"no Node is named {node_name}; Nodes: {', '.join(names[:4])}")
        fix = "set --hostname-override to the name of this node's Node object"
    elif not internal:
        details.append("clients inside the cluster still reach it through any node")
        if plan.vips or plan.health_check_node_port:
            fix += "; a load balancer with health checks does not send clients here"
    message = f"{field} is Local, and no usable endpoint is on {node_name}"
    return Reason(code="NoLocalEndpoints", message=message, details=tuple(details), fix=fix)


def for_client(frontend: FrontendExplanation, plan: ServicePortPlan, client: ClientPlace) -> FrontendExplanation:
    """Return what happens to connections of one client to a frontend of its family."""
    if frontend.outcome in {"rejected", "not programmed", "owned by another Service"}:
        return frontend
    if frontend.kind == "ClusterIP":
        remark = "not routed to nodes from outside"
        return replace(frontend, outcome="dropped", endpoints=0, remark=remark) if not client.inside else frontend
    if frontend.kind == "LoadBalancer" and not source_allowed(plan, client):
        return replace(frontend, outcome="dropped", endpoints=0, remark="loadBalancerSourceRanges")
    if client.inside and plan.external_local and plan.cluster_endpoints:
        count = len(plan.cluster_endpoints)
        return replace(frontend, outcome="forwarded", endpoints=count, remark="as from any pod or node: to all nodes")
    return frontend
