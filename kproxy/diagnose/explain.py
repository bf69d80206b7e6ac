"""Explain why a Service works on this node or does not: one verdict, and the one reason behind it. Pure.

A problem hides what comes after it, and causes much of it. So the first problem in this order is the reason, and
nothing else is reported as one: the object itself, rules that the kernel refuses, missing endpoints, traffic policies,
rules that are not in the kernel yet or no longer, connections that still use old rules, and single frontends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.client_view import (
    ClientPlace,
    client_reason,
    context_at,
    for_client,
    locate,
    no_local_endpoints,
    no_way_in,
    plan_at,
    source_allowed,
)
from kproxy.diagnose.endpoint_use import explain_endpoints
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_notes import notes, policies_in_words
from kproxy.diagnose.explain_report import (
    ChangedRule,
    ClientExplanation,
    FlowExplanation,
    FrontendExplanation,
    FrontendKind,
    KernelExplanation,
    Outcome,
    PortExplanation,
    Reason,
    ServiceExplanation,
    Verdict,
)
from kproxy.diagnose.port_case import PortCase, cases_of, claimed_frontends
from kproxy.diagnose.port_reasons import (
    balancer_pending,
    conflict_reason,
    node_port_reason,
    only_terminating,
    stale_reason,
)
from kproxy.diagnose.rejection_cause import endpoints_without_pods, matching_pods, rejection_cause
from kproxy.diagnose.rules_problem import RulesProblem, rules_problem
from kproxy.diagnose.service_problem import keeps_last_version, object_problem
from kproxy.model.addresses import family_of, socket_text
from kproxy.model.localhost_node_ports import proxied_address
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family
from kproxy.sync.service_conditions import service_condition

_ORDER: tuple[Verdict, ...] = ("NOT PROGRAMMED", "REJECTED", "DROPPED", "DEGRADED", "WORKS")
"""The verdicts, the worst first."""
_OUTCOMES: dict[TrafficDecision, Outcome] = {
    TrafficDecision.FORWARD: "forwarded",
    TrafficDecision.REJECT: "rejected",
    TrafficDecision.DROP: "dropped",
}


_ABOUT_FRONTENDS = {"PortConflict", "AddressConflict", "NodePortNotOnThisAddress"}
"""The reasons why single frontends do not work."""


class _Conclusion(Struct, frozen=True):
    """A verdict and the reason for it, which is None if everything works."""

    verdict: Verdict
    reason: Reason | None


def explain(facts: Facts, client_address: str = "") -> ServiceExplanation:
    """Explain a Service. With a `client_address` in canonical form, the verdict is about this client."""
    client = locate(facts, client_address) if client_address else None
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    problem = object_problem(facts, raw)
    service = facts.service
    if problem is not None or service is None:
        kept = problem is not None and problem.code == "InvalidObject" and keeps_last_version(facts)
        return _report(facts, _Conclusion("DEGRADED" if kept else "NOT PROGRAMMED", problem), (), (), client)
    cases = list(cases_of(facts, service))
    rules = rules_problem(facts, {family for case in cases for family in case.plans})
    ports = tuple(_explain_port(facts, case, client, rules) for case in cases)
    return _report(facts, _overall(ports), ports, cases, client)


# One port


def _explain_port(
    facts: Facts, case: PortCase, client: ClientPlace | None, rules: RulesProblem | None
) -> PortExplanation:
    conclusion = _conclude(facts, case, client, rules)
    frontends = tuple(_frontends(facts, case, client))
    seen = facts.objects.slices_of(facts.key) if facts.objects else ()
    contexts = {family: facts.context(family) for family in Family}
    at_client = case
    if client is not None and client.family in case.plans:
        at_client = _at_client(facts, case, client)
        contexts[client.family] = context_at(facts, client)
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    raw_ports = (raw.spec.ports or []) if raw else []
    return PortExplanation(
        name=case.port.name,
        port=case.port.port,
        protocol=case.port.protocol,
        target_port=str(raw_ports[case.index].target) if case.index < len(raw_ports) else "",
        verdict=conclusion.verdict,
        reason=conclusion.reason,
        frontends=frontends,
        endpoints=explain_endpoints(case.port, at_client.plans, contexts, facts.slices, seen),
    )


def _at_client(facts: Facts, case: PortCase, client: ClientPlace) -> PortCase:
    """Return a port as the client's node serves it, where its packets meet the rules."""
    plan = plan_at(facts, case.plans[client.family], client)
    return replace(case, plans={**case.plans, client.family: plan})


def _conclude(facts: Facts, case: PortCase, client: ClientPlace | None, rules: RulesProblem | None) -> _Conclusion:
    """Return the verdict about a port and the first reason for it, in the order that this module describes."""
    if rules is not None and rules.first:
        return _Conclusion(rules.verdict, rules.reason)
    refused = _refused(facts, case, client)
    if refused is not None:
        return refused
    if rules is not None:
        return _Conclusion(rules.verdict, rules.reason)
    partial = next((reason for reason in _partial_reasons(facts, case, client) if reason is not None), None)
    if partial is None:
        return _Conclusion("WORKS", None)
    own = case.only(client.family) if client is not None else case
    nothing_left = partial.code in _ABOUT_FRONTENDS and not any(_usable_frontends(facts, own, client))
    return _Conclusion("NOT PROGRAMMED" if nothing_left else "DEGRADED", partial)


def _usable_frontends(facts: Facts, case: PortCase, client: ClientPlace | None) -> Iterator[str]:
    """Yield the frontends at which a client reaches the port; without a client, those at which any client does."""
    closed = node_port_reason(facts, case) is not None
    for family, plan in case.plans.items():
        lost = {each.frontend for each in case.lost_in[family]}
        for number, (frontend, _) in enumerate(claimed_frontends(plan)):
            is_cluster_ip = number == 0
            if frontend in lost or (closed and frontend.startswith("NodePort")):
                continue
            if not (is_cluster_ip and client is not None and client.inside is False):
                yield frontend


def _refused(facts: Facts, case: PortCase, client: ClientPlace | None) -> _Conclusion | None:
    """Return why the plan rejects or drops connections, or None if it forwards them."""
    if client is not None and (outside := no_way_in(facts, case.plans, client)) is not None:
        return _Conclusion(*outside)
    rejected = [family for family, plan in case.plans.items() if _is_rejected(plan)]
    asked = [client.family] if client is not None else list(case.plans)
    if rejected and set(asked) <= set(rejected):
        families = rejected if len(rejected) == len(case.plans) else asked
        return _Conclusion("REJECTED", rejection_cause(facts, case.port, case.index, families))
    if client is not None:
        reason = client_reason(facts, case.plans[client.family], client)
        if reason is not None or client.inside is not None:
            return _Conclusion("DROPPED", reason) if reason is not None else None
        case = case.only(client.family)
    if any(not (_is_rejected(plan) or _is_dropped(plan)) for plan in case.plans.values()):
        return None
    reason = _dropped_reason(facts, case)
    return _Conclusion("DROPPED", reason) if reason is not None else None


def _dropped_reason(facts: Facts, case: PortCase) -> Reason | None:
    """Return why connections in some families are dropped, or None if none are."""
    dropped = next((plan for plan in case.plans.values() if _is_dropped(plan)), None)
    if dropped is None:
        return None
    internal = dropped.internal is TrafficDecision.DROP
    others = any(not _is_dropped(plan) for plan in case.plans.values())
    return no_local_endpoints(facts, dropped, internal=internal, only_family=others)


def _partial_reasons(facts: Facts, case: PortCase, client: ClientPlace | None) -> Iterator[Reason | None]:
    """Yield what is wrong with a part of the port, in the order of its weight."""
    if client is not None:
        case = case.only(client.family)
    rejected = [family for family, plan in case.plans.items() if _is_rejected(plan)]
    if rejected and client is None:
        yield rejection_cause(facts, case.port, case.index, rejected)
    if client is None:
        yield _dropped_reason(facts, case)
    yield conflict_reason(facts, case)
    yield endpoints_without_pods(facts, case.port, list(case.plans))
    yield stale_reason(facts, case)
    yield only_terminating(facts, case if client is None else _at_client(facts, case, client), client)
    if client is None or not client.inside:
        yield balancer_pending(facts, case)
        yield node_port_reason(facts, case)


def _is_rejected(plan: ServicePortPlan) -> bool:
    condition = service_condition((plan,))
    return condition is not None and bool(condition.rejected)


def _is_dropped(plan: ServicePortPlan) -> bool:
    condition = service_condition((plan,))
    return condition is not None and bool(condition.dropped)


# Frontends


def _frontends(facts: Facts, case: PortCase, client: ClientPlace | None) -> Iterator[FrontendExplanation]:
    for family, plan in case.plans.items():
        if client is not None and client.family is not family:
            continue
        lost = {each.frontend: each.owner for each in case.lost_in[family]}
        if client is None:
            yield from _frontends_of(facts, plan, lost)
            continue
        at_client = plan_at(facts, plan, client)
        here, there = _frontends_of(facts, plan, lost), _frontends_of(facts, at_client, lost)
        for own, remote in zip(here, there, strict=True):  # a NodePort is reached at this node
            is_here = own.kind == "NodePort"
            yield for_client(facts, own if is_here else remote, plan if is_here else at_client, client)


def _frontends_of(facts: Facts, plan: ServicePortPlan, lost: Mapping[str, str]) -> Iterator[FrontendExplanation]:
    internal = plan.local_endpoints if plan.internal_local else plan.cluster_endpoints
    external = plan.local_endpoints if plan.external_local else plan.cluster_endpoints

    def frontend(kind: FrontendKind, address: str, *remarks: str, number: int = 0) -> FrontendExplanation:
        name = socket_text(address, number or plan.port)
        owner = lost.get(f"{name}/{plan.protocol}" if address else f"NodePort {number}/{plan.protocol}", "")
        is_internal = kind == "ClusterIP"
        outcome = "owned by another Service" if owner else _OUTCOMES[plan.internal if is_internal else plan.external]
        return FrontendExplanation(
            kind=kind,
            address=name,
            protocol=plan.protocol,
            outcome=outcome,
            endpoints=len(internal if is_internal else external) if outcome == "forwarded" else 0,
            remark=f"by {owner}" if owner else "; ".join(filter(None, remarks)),
        )

    yield frontend("ClusterIP", plan.cluster_ip)
    only_outside = plan.external is TrafficDecision.DROP and plan.cluster_endpoints
    remark = "only if from outside" if only_outside else ""
    for address in plan.external_ips:
        yield frontend("ExternalIP", address, remark)
    ranges = f"only for {', '.join(plan.source_ranges)}" if plan.source_ranges else ""
    for address in plan.vips:
        yield frontend("LoadBalancer", address, ranges, remark)
    if plan.node_port:
        context = facts.context(family_of(plan.cluster_ip))
        accepted = context.node_port_addresses
        where = "all addresses" if accepted is None else ", ".join(accepted) or "no address"
        if loopback := proxied_address(context, plan):
            where = f"{where} and at {loopback}" if accepted != () else loopback
        yield frontend("NodePort", "", f"at {where} of this node", remark, number=plan.node_port)


# The report


def _overall(ports: Sequence[PortExplanation]) -> _Conclusion:
    worst = min(ports, key=lambda each: _ORDER.index(each.verdict))
    same = all(each.verdict == worst.verdict for each in ports)
    return _Conclusion(worst.verdict if same else "DEGRADED", worst.reason)


def _report(
    facts: Facts,
    conclusion: _Conclusion,
    ports: tuple[PortExplanation, ...],
    cases: Sequence[PortCase],
    client: ClientPlace | None,
) -> ServiceExplanation:
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    return ServiceExplanation(
        service=facts.key,
        node=facts.node_name,
        mode=facts.mode,
        verdict=conclusion.verdict,
        reason=conclusion.reason,
        symptom=_symptom(conclusion, ports),
        type=raw.spec.type if raw is not None else "",
        ports=ports,
        policies=tuple(policies_in_words(facts, raw, cases)) if cases else (),
        notes=tuple(notes(facts, raw, cases, conclusion.reason)),
        kernel=_kernel(facts),
        flows=tuple(_flows(facts)),
        client=_client(client, cases) if client is not None else None,
        sources=facts.sources,
        unseen=tuple(_unseen(facts)),
    )


def _unseen(facts: Facts) -> Iterator[str]:
    yield from (f"{each.name}: {each.detail}" for each in facts.sources if not each.used)
    objects = facts.objects
    if objects is None:
        yield "Pods and the Service as its user wrote it: the API server was not read"
        return
    raw = objects.service_object(facts.key)
    kinds: dict[str, object] = {"Nodes": objects.nodes}
    if raw is not None and raw.spec.selector:
        kinds |= {"Pods": objects.pods, "NetworkPolicies": objects.policies}
    if missing := [name for name, found in kinds.items() if found is None]:
        where = "not readable" if facts.live else "not in the files"
        yield f"{', '.join(missing)} ({where})"
    if raw is not None and raw.spec.selector and objects.pods is not None and matching_pods(facts) is None:
        yield f"Pods of namespace {facts.key.partition('/')[0]} (not in the files)"


def _symptom(conclusion: _Conclusion, ports: Sequence[PortExplanation]) -> str:
    if conclusion.verdict == "DROPPED":
        return "Clients see a timeout."
    if conclusion.verdict != "REJECTED":
        return ""
    only_udp = {each.protocol for each in ports} == {"UDP"}
    return f'Clients see "connection refused"{" (ICMP port unreachable), or no reply" if only_udp else ""}.'


def _kernel(facts: Facts) -> KernelExplanation:
    kernel = facts.kernel
    if kernel is None:
        return KernelExplanation(matches=None, summary="not compared")
    differences = tuple(
        ChangedRule(family=each.family.value, object=each.object, problem=each.problem) for each in kernel.differences
    )
    matches = not (kernel.differences or kernel.absent) if kernel.compared else None
    return KernelExplanation(matches=matches, summary=kernel.summary, differences=differences)


def _flows(facts: Facts) -> Iterator[FlowExplanation]:
    for flow in sorted(facts.flows, key=lambda each: (not each.stale, each.protocol != "UDP", each.frontend)):
        yield FlowExplanation(
            frontend=flow.frontend,
            protocol=flow.protocol,
            endpoint=flow.endpoint,
            count=flow.count,
            stale=flow.stale,
        )


def _client(client: ClientPlace, cases: Sequence[PortCase]) -> ClientExplanation:
    plan = next((case.plans[client.family] for case in cases if client.family in case.plans), None)
    restricted = plan is not None and bool(plan.source_ranges)
    elsewhere = f"its packets meet the rules of node {client.other_node}: run kproxy explain there"
    return ClientExplanation(
        address=client.address,
        location=client.location,
        inside=client.inside,
        source_allowed=source_allowed(plan, client) if plan is not None and restricted else None,
        remark=elsewhere if client.other_node else "",
    )
