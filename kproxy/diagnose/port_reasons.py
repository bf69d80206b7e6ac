"""Why a port with endpoints works only in part: contested frontends, stale flows, load balancers, hints. Pure."""

from __future__ import annotations

from kproxy.diagnose.client_view import ClientPlace, load_balancer_pending
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import Reason
from kproxy.diagnose.pods import plural
from kproxy.diagnose.port_case import PortCase, known_endpoints, own_flows
from kproxy.model.addresses import family_of, split_socket_text
from kproxy.model.endpoints import Sockets
from kproxy.model.localhost_node_ports import proxied_address
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import Family


def conflict_reason(facts: Facts, case: PortCase) -> Reason | None:
    """Return the reason if another Service owns one of the frontends."""
    if not case.lost:
        return None
    conflict = case.lost[0]
    owner = conflict.owner.partition(":")[0]
    more = tuple(f"{each.frontend} goes to {each.owner}, too" for each in case.lost[1:4])
    message = f"{conflict.frontend} belongs to {conflict.owner}, which also claims it: its clients reach that Service"
    if conflict.frontend.startswith("NodePort"):
        fix = f"choose another nodePort in {facts.key} or in {owner}"
        return Reason(code="PortConflict", message=message, details=more, fix=fix)
    fix = f"remove the address from {facts.key} or from {owner}, or use different ports"
    return Reason(code="AddressConflict", message=message, details=more, fix=fix)


def stale_reason(facts: Facts, case: PortCase) -> Reason | None:
    """Return the reason if UDP flows go to an address that is no endpoint.

    TCP connections end by themselves when their endpoint is gone, and leave entries for some minutes.
    """
    stale = [flow for flow in own_flows(facts, case, stale=True) if flow.protocol == "UDP"]
    if not stale:
        return None
    first, *others = stale
    family = "ipv6" if first.family is Family.IPV6 else "ipv4"
    address, _, port = first.frontend.rpartition(":")
    destination = f" --orig-dst {address.strip('[]')}" if address else ""
    source = split_socket_text(first.endpoint)[0]
    flows = f"{plural(first.count, 'tracked UDP flow')} to {first.frontend}"
    if first.endpoint.endswith(first.frontend):
        message = f"{flows} {'was' if first.count == 1 else 'were'} never sent to an endpoint, and will not be"
    else:
        verb = "goes" if first.count == 1 else "go"
        message = f"{flows} still {verb} to {first.endpoint}, which is no longer an endpoint"
    details = ["new flows reach the current endpoints; a client that keeps its source port does not"]
    details += [
        f"the same for {plural(each.count, 'flow')} to {each.frontend} at {each.endpoint}" for each in others[:3]
    ]
    command = f"conntrack -D -f {family} -p udp{destination} --dport {port} --reply-src {source}"
    return Reason(code="StaleConntrack", message=message, details=tuple(details), fix=f"delete the entries: {command}")


def only_terminating(facts: Facts, case: PortCase, client: ClientPlace | None) -> Reason | None:
    """Return the reason if all endpoints in use are terminating. `client` is the client that uses them, None if any."""
    for family, plan in case.plans.items():
        known = known_endpoints(facts, case, family)
        used = [known[socket] for socket in _used_by(plan, client) if socket in known]
        if used and all(endpoint.terminating and not endpoint.ready for endpoint in used):
            count = len(used)
            node = (client.other_node if client is not None else "") or facts.node_name
            where = f" on {node}" if any(endpoint.ready for endpoint in known.values()) else ""
            subject = f"its only endpoint{where} is" if count == 1 else f"all {count} endpoints{where} are"
            return Reason(
                code="OnlyTerminating",
                message=f"{subject} terminating: connections work only until the pods have ended",
                fix="start pods that stay: check the replicas of the Deployment and whether new pods become ready",
            )
    return None


def _used_by(plan: ServicePortPlan, client: ClientPlace | None) -> Sockets:
    if client is None or client.inside is None:
        return plan.reachable_endpoints
    is_local = plan.internal_local if client.inside else plan.external_local
    return plan.local_endpoints if is_local else plan.cluster_endpoints


def balancer_pending(facts: Facts, case: PortCase) -> Reason | None:
    """Return the reason if a Service of type LoadBalancer has no load balancer address."""
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    return load_balancer_pending(raw, has_node_port=bool(case.port.node_port)) if raw is not None else None


def node_port_reason(facts: Facts, case: PortCase) -> Reason | None:
    """Return the reason if no address of this node accepts connections to the NodePort."""
    if not case.port.node_port:
        return None
    closed = [family for family in case.plans if facts.context(family).node_port_addresses == ()]
    node = facts.node
    families = {family_of(address) for address in node.addresses} if node is not None else set()
    closed = [family for family in closed if family in families]
    open_families = [family for family in case.plans if family in families and family not in closed]
    if not closed or open_families or any(proxied_address(facts.context(each), case.plans[each]) for each in closed):
        return None
    addresses = ", ".join(node.addresses) if node is not None else ""
    return Reason(
        code="NodePortNotOnThisAddress",
        message=f"no address of {facts.node_name} accepts connections to NodePorts",
        details=(f"nodePortAddresses selects none of its addresses: {addresses}",),
        fix="correct nodePortAddresses (--nodeport-addresses) in the configuration of kproxy",
    )


def hints_elsewhere(facts: Facts, case: PortCase) -> str:
    """Return a remark if all endpoints have hints, but none of them is for this node or its zone; or "".

    Connections then go to endpoints everywhere. Without the Node, its zone is unknown.
    """
    for family in case.plans if facts.node is not None else ():
        context = facts.context(family)
        if not case.plans[family].cluster_endpoints:
            continue  # traffic with policy Local does not use hints
        ready = [each for each in known_endpoints(facts, case, family).values() if each.ready]
        if not ready or not all(each.for_zones or each.for_nodes for each in ready):
            continue
        near = any(context.node_name in each.for_nodes or context.zone in each.for_zones for each in ready)
        if near or (not all(each.for_zones for each in ready) and not all(each.for_nodes for each in ready)):
            continue
        zones = sorted({zone for each in ready for zone in each.for_zones})
        nodes = sorted({name for each in ready for name in each.for_nodes})
        word = ("zone" if zones else "node") + ("" if len(zones or nodes) == 1 else "s")
        named = f"{word} {', '.join(zones or nodes)}"
        if zones and not context.zone:
            own = f"{facts.node_name} has no zone (label topology.kubernetes.io/zone)"
        else:
            own = f"{facts.node_name} is in zone {context.zone}" if zones else f"this is {facts.node_name}"
        return f"the topology hints name only {named}, and {own}: connections go to endpoints everywhere"
    return ""
