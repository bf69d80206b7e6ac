"""Say for each endpoint of a service port why this node sends connections to it, or why it does not. Pure.

`kproxy.model.plan` selects the endpoints; this module only explains the selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from kproxy.diagnose.cluster_objects import SeenSlice
from kproxy.diagnose.explain_report import EndpointExplanation, EndpointState
from kproxy.documents.document import field_path_text
from kproxy.model.addresses import socket_text
from kproxy.model.context import Context
from kproxy.model.endpoints import endpoints_by_socket
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import Endpoint, EndpointSlice, Family, ServicePort


class _UsedSockets(Struct, frozen=True):
    """The endpoints of a plan for each traffic policy."""

    cluster: frozenset[str]
    local: frozenset[str]


def explain_endpoints(
    port: ServicePort,
    plans: Mapping[Family, ServicePortPlan],
    contexts: Mapping[Family, Context],
    slices: Sequence[EndpointSlice],
    seen: Sequence[SeenSlice],
) -> tuple[EndpointExplanation, ...]:
    """Return the endpoints of all slices of the Service, in the order of the slices' names.

    `slices` are those that kproxy uses, and `seen` are all slices as they are in the cluster, if they could be seen.
    """
    found: list[EndpointExplanation] = []
    for family in Family:
        plan, own = plans.get(family), [each for each in slices if each.family is family]
        if plan is None:
            found += _of_other_family(own, family)
        else:
            found += _of_family(port, plan, contexts[family], own)
    found += _unusable(seen)
    return tuple(found)


def _of_other_family(slices: Iterable[EndpointSlice], family: Family) -> Iterator[EndpointExplanation]:
    for each in slices:
        for endpoint in each.endpoints:
            message = f"the Service has no {family.value} ClusterIP"
            yield _explanation(endpoint.address, endpoint, each.name, "OtherFamily", message)


def _of_family(
    port: ServicePort, plan: ServicePortPlan, context: Context, slices: Sequence[EndpointSlice]
) -> Iterator[EndpointExplanation]:
    ordered = sorted(slices, key=lambda each: each.name)
    chosen = endpoints_by_socket(ordered, context.family, port.name, port.protocol)
    yielded: set[str] = set()
    used = _UsedSockets(frozenset(plan.cluster_endpoints), frozenset(plan.local_endpoints))
    for each in ordered:
        targets = [target for target in each.ports if target.name == port.name and target.protocol == port.protocol]
        if not targets:
            message = _missing_port(port, each)
            for endpoint in each.endpoints:
                yield _explanation(endpoint.address, endpoint, each.name, "PortNotInSlice", message)
        for target in targets:
            for endpoint in each.endpoints:
                socket = socket_text(endpoint.address, target.port)
                if socket in yielded or chosen.get(socket) is not endpoint:
                    message = "listed more than once; another entry counts"
                    yield _explanation(socket, endpoint, each.name, "Duplicate", message)
                    continue
                yielded.add(socket)
                some_ready = any(other.ready for other in chosen.values())
                state, message = _state(socket, endpoint, used, plan, context, some_ready=some_ready)
                yield _explanation(socket, endpoint, each.name, state, message)


def _explanation(
    address: str, endpoint: Endpoint, slice_name: str, state: EndpointState, message: str
) -> EndpointExplanation:
    used = state in {"Ready", "ServingWhileTerminating"}
    return EndpointExplanation(
        address=address, node=endpoint.node, slice=slice_name, used=used, state=state, message=message
    )


def _missing_port(port: ServicePort, each: EndpointSlice) -> str:
    wanted = f'"{port.name}"' if port.name else "unnamed"
    names = ", ".join(f"{target.name or 'unnamed'}/{target.protocol}" for target in each.ports) or "none"
    return f"its slice has no {port.protocol} port {wanted}; it has {names}"


def _state(
    socket: str,
    endpoint: Endpoint,
    used: _UsedSockets,
    plan: ServicePortPlan,
    context: Context,
    *,
    some_ready: bool,
) -> tuple[EndpointState, str]:
    in_cluster, in_local = socket in used.cluster, socket in used.local
    if in_cluster or in_local:
        state: EndpointState = "Ready" if endpoint.ready else "ServingWhileTerminating"
        candidates = f"endpoint on {context.node_name}" if some_ready else "endpoint"
        text = "used" if endpoint.ready else f"used although it is terminating: no {candidates} is ready"
        if in_cluster and not in_local and (but := _exceptions(plan)):
            text += f", except for {but}"
        return state, text
    if not endpoint.ready:
        if not endpoint.terminating:
            return "NotReady", "not ready"
        serving = "still serving, but others are ready" if endpoint.serving else "no longer serving"
        return "Terminating", f"terminating, {serving}"
    return _not_near(endpoint, plan, context)


def _exceptions(plan: ServicePortPlan) -> str:
    """Return the traffic that uses only endpoints on this node, while other traffic uses all; "" if there is none."""
    external = plan.external_local and plan.externally_accessible
    if plan.internal_local:
        return (
            "traffic from outside and to the ClusterIP (policies Local)"
            if external
            else ("traffic to the ClusterIP (internalTrafficPolicy: Local)")
        )
    return "traffic from outside (externalTrafficPolicy: Local)" if external else ""


def _not_near(endpoint: Endpoint, plan: ServicePortPlan, context: Context) -> tuple[EndpointState, str]:
    """Return why a ready endpoint is not used: the policy is Local, or hints prefer others."""
    if not plan.cluster_endpoints and (plan.internal_local or plan.external_local):
        return "OnOtherNode", _where(endpoint) + ", and the traffic policy is Local"
    if endpoint.for_nodes and context.node_name not in endpoint.for_nodes:
        return "ForOtherNode", f"its hints name {', '.join(endpoint.for_nodes)}, not this node"
    if endpoint.for_zones:
        return "InOtherZone", f"its hints name zone {', '.join(endpoint.for_zones)}, this node is in {_zone(context)}"
    return "OnOtherNode", _where(endpoint)


def _where(endpoint: Endpoint) -> str:
    return f"on {endpoint.node}" if endpoint.node else "its slice does not say on which node it is"


def _zone(context: Context) -> str:
    return context.zone or "no zone"


def _unusable(seen: Iterable[SeenSlice]) -> Iterator[EndpointExplanation]:
    for each in seen:
        if each.decoded is None:
            for address in each.addresses:
                message = f"kproxy ignores its slice: {each.problem}"
                yield _explanation(address, Endpoint(address), each.name, "SliceIgnored", message)
            continue
        for field in each.ignored:
            if field.field[0] == "endpoints" and isinstance(field.field[1], int):
                address = each.addresses[field.field[1]]
                message = f"{field_path_text(field.field[2:])} {field.problem}"
                yield _explanation(address, Endpoint(address), each.name, "InvalidAddress", message)
