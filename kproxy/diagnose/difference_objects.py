"""The report of `kproxy diff --against`: what other objects would change on this node. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from msgspec import Struct

from kproxy.diagnose.report import Report, ReportPart
from kproxy.model.addresses import socket_text
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import ServiceKey

FrontendKind: TypeAlias = Literal["ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"]
Plans: TypeAlias = Mapping[ServiceKey, Sequence[ServicePortPlan]]
"""The plans of the Services of one family."""
_OUTCOMES = {
    TrafficDecision.FORWARD: "forwarded",
    TrafficDecision.REJECT: "rejected, because there is no endpoint",
    TrafficDecision.DROP: "dropped, because a Local policy finds no endpoint on this node",
}


class FrontendChange(ReportPart, frozen=True, kw_only=True):
    """A frontend of a Service that is new, that disappears, or that treats connections differently.

    `address` is "" for a NodePort. `effects` says what is different, if `change` is `changed`.
    """

    change: Literal["added", "removed", "changed"]
    kind: FrontendKind
    address: str
    port: int
    protocol: str
    effects: tuple[str, ...] = ()


class LostEndpoint(ReportPart, frozen=True, kw_only=True):
    """An endpoint that a Service loses on this node.

    `connections` is the number of its current connections through frontends of the Service, as far as this node tracks
    them, or None if this is unknown. TCP connections to a pod that still runs continue; UDP flows move to others.
    """

    endpoint: str
    protocol: str
    connections: int | None = None


class ServiceDifference(ReportPart, frozen=True, kw_only=True):
    """What changes for one Service in one IP family. Endpoints are `IP:port`; `endpoints` is their new number."""

    family: str
    service: ServiceKey
    change: Literal["added", "removed", "changed"]
    frontends: tuple[FrontendChange, ...] = ()
    endpoints: int = 0
    endpoints_added: tuple[str, ...] = ()
    endpoints_removed: tuple[LostEndpoint, ...] = ()


class WrittenRules(ReportPart, frozen=True, kw_only=True):
    """How many rules, and elements of sets and maps, are new, disappear, and are written in one IP family.

    More can be written than are new: in iptables mode, a chain in which a rule changes is written again.
    """

    family: str
    added: int
    removed: int
    written: int


class ObjectsDifference(Report, frozen=True, kw_only=True):
    """What other objects would change on this node. `before` and `after` tell where the objects come from."""

    mode: str
    node: str
    before: str
    after: str
    identical: bool
    services: tuple[ServiceDifference, ...]
    rules: tuple[WrittenRules, ...]
    notes: tuple[str, ...] = ()


FlowCounts: TypeAlias = Mapping[tuple[str, str, str], int]
"""The number of tracked connections by protocol, original destination and endpoint, each "ip:port"."""


class Frontend(Struct, frozen=True):
    """What identifies a frontend."""

    kind: FrontendKind
    address: str
    port: int
    protocol: str


class Treatment(Struct, frozen=True):
    """How the connections to a frontend are treated."""

    outcome: str
    policy: str
    affinity_seconds: int
    source_ranges: tuple[str, ...]


def service_differences(
    family: str, before: Plans, after: Plans, flows: FlowCounts | None = None
) -> tuple[ServiceDifference, ...]:
    """Compare the Services of one family. `flows` counts the connections in this family, or is None if unknown."""
    keys = sorted(before.keys() | after.keys())
    found = (_service(family, key, before.get(key, ()), after.get(key, ()), flows) for key in keys)
    return tuple(each for each in found if each is not None)


def frontends(plans: Sequence[ServicePortPlan]) -> dict[Frontend, Treatment]:
    """Return the frontends of a Service with their treatment."""
    return {frontend: treatment for plan in plans for frontend, treatment in _port_frontends(plan)}


def _port_frontends(plan: ServicePortPlan) -> Iterator[tuple[Frontend, Treatment]]:
    affinity = plan.affinity_seconds
    internal = Treatment(_OUTCOMES[plan.internal], _policy(local=plan.internal_local), affinity, ())
    yield Frontend("ClusterIP", plan.cluster_ip, plan.port, plan.protocol), internal
    external = Treatment(_OUTCOMES[plan.external], _policy(local=plan.external_local), affinity, ())
    for address in plan.external_ips:
        yield Frontend("ExternalIP", address, plan.port, plan.protocol), external
    for address in plan.vips:
        treatment = Treatment(external.outcome, external.policy, affinity, plan.source_ranges)
        yield Frontend("LoadBalancer", address, plan.port, plan.protocol), treatment
    if plan.node_port:
        yield Frontend("NodePort", "", plan.node_port, plan.protocol), external


def _policy(*, local: bool) -> str:
    return "Local" if local else "Cluster"


def _service(
    family: str,
    key: ServiceKey,
    before: Sequence[ServicePortPlan],
    after: Sequence[ServicePortPlan],
    flows: FlowCounts | None,
) -> ServiceDifference | None:
    old_frontends, new_frontends = frontends(before), frontends(after)
    old, new = _endpoints(before), _endpoints(after)
    changes = tuple(_frontend_changes(old_frontends, new_frontends))
    added = tuple(f"{endpoint}/{protocol}" for protocol, endpoint in sorted(new - old))
    removed = tuple(
        LostEndpoint(
            endpoint=endpoint,
            protocol=protocol,
            connections=None if flows is None else _connections(flows, old_frontends, protocol, endpoint),
        )
        for protocol, endpoint in sorted(old - new)
    )
    if not (changes or added or removed):
        return None
    return ServiceDifference(
        family=family,
        service=key,
        change="changed" if before and after else "added" if after else "removed",
        frontends=changes,
        endpoints=len(new),
        endpoints_added=added,
        endpoints_removed=removed,
    )


def _endpoints(plans: Sequence[ServicePortPlan]) -> set[tuple[str, str]]:
    return {(plan.protocol, endpoint) for plan in plans for endpoint in plan.reachable_endpoints}


def _frontend_changes(
    before: Mapping[Frontend, Treatment], after: Mapping[Frontend, Treatment]
) -> Iterator[FrontendChange]:
    for each in dict.fromkeys((*before, *after)):
        old, new = before.get(each), after.get(each)
        if old == new:
            continue
        yield FrontendChange(
            change="added" if old is None else "removed" if new is None else "changed",
            kind=each.kind,
            address=each.address,
            port=each.port,
            protocol=each.protocol,
            effects=tuple(_effects(old, new)) if old is not None and new is not None else (),
        )


def _effects(old: Treatment, new: Treatment) -> Iterator[str]:
    if old.outcome != new.outcome:
        yield f"connections are {new.outcome}; before: {old.outcome.partition(',')[0]}"
    if old.policy != new.policy:
        yield f"traffic policy {new.policy} instead of {old.policy}"
    if old.affinity_seconds != new.affinity_seconds:
        yield f"session affinity: {_seconds(new.affinity_seconds)} instead of {_seconds(old.affinity_seconds)}"
    if old.source_ranges != new.source_ranges:
        yield f"clients: {_ranges(new.source_ranges)} instead of {_ranges(old.source_ranges)}"


def _seconds(number: int) -> str:
    return f"{number} s" if number else "none"


def _ranges(ranges: tuple[str, ...]) -> str:
    return ", ".join(ranges) or "all"


def _connections(flows: FlowCounts, fronts: Mapping[Frontend, Treatment], protocol: str, endpoint: str) -> int:
    """Count the connections to an endpoint through the frontends of a Service."""
    sockets = {socket_text(each.address, each.port) for each in fronts if each.address and each.protocol == protocol}
    ports = {str(each.port) for each in fronts if not each.address and each.protocol == protocol}
    return sum(
        count
        for (flow_protocol, destination, source), count in flows.items()
        if flow_protocol == protocol
        and source == endpoint
        and (destination in sockets or destination.rpartition(":")[2] in ports)
    )


def frontend_text(change: FrontendChange) -> str:
    """Return a frontend for people: `ClusterIP 10.96.0.10:80/TCP`, `NodePort 30080/TCP`."""
    where = socket_text(change.address, change.port) if change.address else str(change.port)
    return f"{change.kind} {where}/{change.protocol}"
