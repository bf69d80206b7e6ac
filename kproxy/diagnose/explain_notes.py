"""The traffic policies of a Service in words, and remarks that are not the reason of its problem. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kproxy.diagnose.cluster_objects import Pod, SeenService
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import ExplainNote, NoteCode, Reason
from kproxy.diagnose.pods import names_of, plural, policies_for, selector_text
from kproxy.diagnose.port_case import PortCase, known_endpoints
from kproxy.diagnose.port_reasons import hints_elsewhere
from kproxy.diagnose.rejection_cause import managed_endpoints, matching_pods, pods_without_port
from kproxy.model.addresses import family_of

_ABOUT_PODS = {
    "SelectorMatchesNothing",
    "TargetPortUnresolved",
    "PodsNotReady",
    "NoReadyEndpoints",
    "OnlyTerminating",
    "NoEndpoints",
}
"""Reasons of which remarks about Pods and endpoints would only be consequences."""


def policies_in_words(facts: Facts, raw: SeenService | None, cases: Sequence[PortCase]) -> Iterator[str]:
    """Yield one sentence for each policy of a Service that is not the default."""
    service = facts.service
    assert service is not None
    plan = next(iter(cases[0].plans.values()), None)
    if plan is None:
        return
    if service.internal_local:
        yield "internalTrafficPolicy Local: pods and programs on this node reach only endpoints on this node"
    if service.external_local:
        yield "externalTrafficPolicy Local: from outside, only endpoints on this node are used"
    elif plan.externally_accessible:
        yield "externalTrafficPolicy Cluster: endpoints on all nodes are used; they see a node's address"
    if service.affinity_seconds:
        yield f"sessionAffinity ClientIP: a client stays with its endpoint until idle for {service.affinity_seconds} s"
    if service.source_ranges and service.vips:
        yield f"loadBalancerSourceRanges: only {', '.join(service.source_ranges)} may use the load balancer addresses"
    if service.health_check_node_port:
        count = len(plan.local_ready)
        state = f"healthy, {plural(count, 'ready endpoint')}" if count else "unhealthy, no ready endpoint here"
        yield f"healthCheckNodePort {service.health_check_node_port}: load balancers see this node as {state}"
    if raw is not None and raw.spec.publish_not_ready_addresses:
        yield "publishNotReadyAddresses: endpoints are used before they are ready"


def notes(
    facts: Facts, raw: SeenService | None, cases: Sequence[PortCase], reason: Reason | None
) -> Iterator[ExplainNote]:
    """Yield remarks about a Service that follow neither from each other nor from `reason`, its problem."""
    if raw is not None and raw.metadata.deletion_timestamp is not None:
        yield _note("ServiceBeingDeleted", "the Service is being deleted")
    code = reason.code if reason is not None else ""
    unknown = facts.nodes and all(each.name != facts.node_name for each in facts.nodes)
    if unknown and code != "NoLocalEndpoints":  # whose details say it
        names = ", ".join(each.name for each in facts.nodes[:4])
        yield _note("NodeUnknown", f"no Node is named {facts.node_name}; Nodes: {names} (--hostname-override)")
    if not cases:
        return
    if code not in _ABOUT_PODS:
        yield from _target_ports(facts, raw, cases)
        yield from _endpoints(facts, code)
        yield from _out_of_date(facts, raw, code)
        yield from _hints(facts, cases)
    yield from _balancer(facts, raw, cases)
    for node in facts.nodes:
        for address in set(node.addresses) & set(facts.service.cluster_ips if facts.service else ()):
            text = f"ClusterIP {address} is also an address of node {node.name}: the service network must be separate"
            yield _note("ClusterIPOfNode", text)
    for won in (won for case in cases for won in case.won):
        text = f"{won.frontend} is also claimed by {won.loser}, which gets none of its traffic"
        yield _note("OwnsContestedFrontend", text)
    if code != "NodePortNotOnThisAddress":
        yield from _partial_node_ports(facts, cases)
    policies = (facts.objects.policies or ()) if facts.objects else ()
    names = ", ".join(each.metadata.name for each in policies_for(policies, _namespace(facts), _pods(facts)))
    if names:
        text = f"NetworkPolicies restrict connections to its pods: {names}; kproxy does not see their effect"
        yield _note("NetworkPolicyPresent", text)


def _namespace(facts: Facts) -> str:
    return facts.key.partition("/")[0]


def _pods(facts: Facts) -> Sequence[Pod]:
    return matching_pods(facts) or ()


def _target_ports(facts: Facts, raw: SeenService | None, cases: Sequence[PortCase]) -> Iterator[ExplainNote]:
    raw_ports = (raw.spec.ports or []) if raw is not None else []
    ports = [raw_ports[case.index] for case in cases if case.index < len(raw_ports)]
    found = {pods_without_port(_pods(facts), port): port for port in ports}
    for text, port in found.items():
        if text:
            yield _note("PodsWithoutPort" if isinstance(port.target, str) else "TargetPortNotDeclared", text)


def _endpoints(facts: Facts, code: str) -> Iterator[ExplainNote]:
    every = [endpoint for each in facts.slices for endpoint in each.endpoints]
    unready = {endpoint.address for endpoint in every if not endpoint.ready and not endpoint.terminating}
    total = {endpoint.address for endpoint in every}
    if unready and unready != total:
        pods = [pod for pod in _pods(facts) if not unready.isdisjoint(pod.addresses)]
        text = f"{len(unready)} of {plural(len(total), 'endpoint')} {'is' if len(unready) == 1 else 'are'} not ready"
        yield _note("SomeEndpointsNotReady", text + (f": {names_of(pods)}" if pods else ""))
    for each in facts.objects.slices_of(facts.key) if facts.objects else ():
        if each.invalid and code != "InvalidObject":
            yield _note("InvalidEndpoints", f"EndpointSlice {each.name} cannot be used: {each.problem}")
    invalid = sum(each.invalid for each in facts.slices)
    if invalid and code != "InvalidObject":
        text = f"{plural(invalid, 'endpoint or port')} in its EndpointSlices cannot be used"
        yield _note("InvalidEndpoints", text)


def _out_of_date(facts: Facts, raw: SeenService | None, code: str) -> Iterator[ExplainNote]:
    pods = matching_pods(facts)
    if code == "EndpointSlicesOutOfDate" or pods is None or raw is None:
        return
    text = ""
    endpoints = managed_endpoints(facts)
    if not pods and endpoints:
        text = f"no pod has the labels of spec.selector: {selector_text(raw.spec.selector or {})}"
    elif not raw.spec.publish_not_ready_addresses:
        ready = {each.address for each in endpoints if each.ready and not each.terminating}
        unready = [pod for pod in pods if pod.unready and not ready.isdisjoint(pod.addresses)]
        if unready:
            text = f"{names_of(unready)} {'is' if len(unready) == 1 else 'are'} not ready"
    if text:
        yield _note("EndpointSlicesOutOfDate", f"the EndpointSlices list ready endpoints, but {text}")


def _hints(facts: Facts, cases: Sequence[PortCase]) -> Iterator[ExplainNote]:
    for case in cases:
        for family in case.plans:
            ready = [each for each in known_endpoints(facts, case, family).values() if each.ready]
            hinted = [each for each in ready if each.for_zones or each.for_nodes]
            if hinted and len(hinted) < len(ready):
                text = f"topology hints are ignored: {len(ready) - len(hinted)} of {len(ready)} endpoints have none"
                yield _note("HintsNotUsed", text)
                return
        if text := hints_elsewhere(facts, case):
            yield _note("HintsExcludeThisNode", text)
            return


def _balancer(facts: Facts, raw: SeenService | None, cases: Sequence[PortCase]) -> Iterator[ExplainNote]:
    service = facts.service
    assert service is not None
    if any(plan.unrestricted for case in cases for plan in case.plans.values()):
        text = "loadBalancerSourceRanges has no range of the family of a load balancer address: it is open to all"
        yield _note("SourceRangesIgnored", text)
    if service.source_ranges and not service.vips and raw is not None and raw.ingress:
        text = "the load balancer itself, not this node, enforces loadBalancerSourceRanges: NodePorts are open to all"
        yield _note("SourceRangesWithoutLoadBalancer", text)
    elif service.source_ranges and not service.vips:
        yield _note(
            "SourceRangesWithoutLoadBalancer",
            "loadBalancerSourceRanges restricts only load balancer addresses, and the Service has none here",
        )
    if raw is not None and raw.ingress and not service.vips:
        names = ", ".join(each.hostname or each.ip for each in raw.ingress)
        yield _note("LoadBalancerBypassesNode", f"traffic from inside to {names} goes to the load balancer itself")


def _partial_node_ports(facts: Facts, cases: Sequence[PortCase]) -> Iterator[ExplainNote]:
    node = facts.node
    if node is None:
        return
    ports = [case.port.node_port for case in cases if case.port.node_port]
    for family in dict.fromkeys(family for case in cases for family in case.plans):
        accepted = facts.context(family).node_port_addresses
        own = [address for address in node.addresses if family_of(address) is family]
        closed = [address for address in own if accepted is not None and address not in accepted]
        if ports and closed:
            text = f"NodePorts are not reachable at {', '.join(closed)} of this node (nodePortAddresses)"
            yield _note("NodePortNotOnThisAddress", text)


def _note(code: NoteCode, message: str) -> ExplainNote:
    return ExplainNote(code=code, message=message)
