"""Render plans into map elements and, for the Services that need them, per-Service chains and sets. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.addresses import split_socket_text
from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets
from kproxy.model.frontend_conflicts import ClaimRank, external_rank
from kproxy.model.localhost_node_ports import forwards_locally
from kproxy.model.plan import ServicePortPlan, TrafficDecision, service_port_name
from kproxy.model.types import ServiceKey
from kproxy.nftables import names
from kproxy.nftables import shared_chains as shared
from kproxy.nftables.comments import comment_of
from kproxy.nftables.elements import DROP, hairpin_key, node_port_key, pack_address, pack_endpoints, service_key
from kproxy.nftables.ruleset import (
    Dnat,
    Drop,
    Goto,
    KeyField,
    Lookup,
    MatchL4Proto,
    MatchSaddr,
    NftChain,
    NftRule,
    NftSet,
    Numgen,
    Return,
    SetMark,
    UpdateSet,
    rule,
)

Verdicts: TypeAlias = tuple[tuple[str, str], ...]
"""A frontend's verdicts, as pairs of a verdict map's name and a verdict.

A verdict is `DROP` or a goto, which is represented by the name of its target chain.
"""


class RenderedFrontend(Struct, frozen=True, gc=False):
    """The map elements for one frontend of a Service.

    `endpoints` contains pairs: the name of an endpoint map, and the concatenated values of this frontend's elements in
    that map. `port_name` is "" for an unnamed port. If several Services claim the frontend, `rank` decides which of
    them owns it (see `kproxy.model.frontend_conflicts`).
    """

    key: bytes
    verdicts: Verdicts
    endpoints: tuple[tuple[str, bytes], ...]
    service: ServiceKey
    port_name: str
    rank: int = ClaimRank.FORWARDS

    @property
    def service_port(self) -> str:
        """`namespace/name:port`, or `namespace/name` for an unnamed port."""
        return service_port_name(self.service, self.port_name)


class RenderedService(Struct, frozen=True, gc=False):
    """Everything that one Service needs in the table.

    `cluster_ip` is the key of an element in the set `cluster-ips`. `hairpins` are the keys of elements in the set
    `hairpin-connections`. Only Services with session affinity or source ranges have `chains`. Only Services with
    session affinity have `sets`.
    """

    cluster_ip: bytes
    frontends: tuple[RenderedFrontend, ...]
    hairpins: tuple[bytes, ...] = ()
    chains: tuple[NftChain, ...] = ()
    sets: tuple[NftSet, ...] = ()


def render_service(plans: Sequence[ServicePortPlan], context: Context) -> RenderedService | None:
    """Render all ports of one Service. Return None if the Service has no ports in this family."""
    if not plans:
        return None
    frontends: list[RenderedFrontend] = []
    hairpins: list[bytes] = []
    chains: list[NftChain] = []
    sets: list[NftSet] = []
    for plan in plans:
        frontends += _frontends(plan, context)
        if plan.endpoints_on_node:
            hairpins += [hairpin_key(endpoint, plan.protocol) for endpoint in plan.endpoints_on_node]
        if plan.source_ranges:
            chains.append(_firewall_chain(plan))
        if plan.affinity_seconds and plan.has_endpoints:
            chains += _affinity_chains(plan, context)
            sets += _affinity_sets(plan)
    return RenderedService(
        pack_address(plans[0].cluster_ip), tuple(frontends), tuple(hairpins), tuple(chains), tuple(sets)
    )


# Frontends


def _frontends(plan: ServicePortPlan, context: Context) -> Iterator[RenderedFrontend]:
    all_endpoints = pack_endpoints(plan.cluster_endpoints)
    local_endpoints = pack_endpoints(plan.local_endpoints)
    yield _internal_frontend(plan, all_endpoints, local_endpoints)
    for address in dict.fromkeys((*plan.external_ips, *plan.vips)) if plan.external_ips or plan.vips else ():
        key = service_key(address, plan.protocol, plan.port)
        restricted = bool(plan.source_ranges) and address in plan.vips
        yield _external_frontend(plan, "service", key, all_endpoints, local_endpoints, restricted=restricted)
    if plan.node_port:
        key = node_port_key(plan.protocol, plan.node_port)
        frontend = _external_frontend(plan, "nodeport", key, all_endpoints, local_endpoints, restricted=False)
        yield _with_localhost_verdict(frontend, plan, context)


def _internal_frontend(plan: ServicePortPlan, all_endpoints: bytes, local_endpoints: bytes) -> RenderedFrontend:
    key = service_key(plan.cluster_ip, plan.protocol, plan.port)
    if plan.internal is not TrafficDecision.FORWARD:
        verdicts = _no_endpoint_verdicts("service", plan.internal)
        return RenderedFrontend(key, verdicts, (), plan.service, plan.port_name, ClaimRank.CLUSTER_IP)
    if plan.affinity_seconds:
        chain = f"{'local' if plan.internal_local else 'service'}-{names.service_port_suffix(plan)}"
        return RenderedFrontend(
            key, ((names.SERVICE_IPS, chain),), (), plan.service, plan.port_name, ClaimRank.CLUSTER_IP
        )
    if plan.internal_local:
        chain = shared.local_chain_name("service", len(plan.local_endpoints))
        endpoints = ((names.SERVICE_LOCAL_ENDPOINTS, local_endpoints),)
    else:
        chain = shared.any_chain_name("service", len(plan.cluster_endpoints))
        endpoints = ((names.SERVICE_ENDPOINTS, all_endpoints),)
    verdicts = _shared_chain_verdicts(names.SERVICE_IPS, chain)
    return RenderedFrontend(key, verdicts, endpoints, plan.service, plan.port_name, ClaimRank.CLUSTER_IP)


def _external_frontend(
    plan: ServicePortPlan,
    kind: shared.FrontendKind,
    key: bytes,
    all_endpoints: bytes,
    local_endpoints: bytes,
    *,
    restricted: bool,
) -> RenderedFrontend:
    firewall = ((names.FIREWALL_IPS, f"firewall-{names.service_port_suffix(plan)}"),) if restricted else ()
    forwards = plan.external is TrafficDecision.FORWARD
    no_endpoint = () if forwards else _no_endpoint_verdicts(kind, plan.external)
    rank = external_rank(plan)
    if not plan.has_endpoints:
        return RenderedFrontend(key, firewall + no_endpoint, (), plan.service, plan.port_name, rank)
    verdict_map = names.SERVICE_IPS if kind == "service" else names.SERVICE_NODE_PORTS
    if plan.affinity_seconds:
        chain = f"external-{names.service_port_suffix(plan)}"
        return RenderedFrontend(
            key, (*firewall, *no_endpoint, (verdict_map, chain)), (), plan.service, plan.port_name, rank
        )
    endpoints = [(shared.endpoint_map(kind, local=False), all_endpoints)]
    cluster_count, local_count = len(plan.cluster_endpoints), len(plan.local_endpoints)
    if plan.external_local:
        chain = shared.external_local_chain_name(kind, cluster_count, local_count)
        if local_count:
            endpoints.append((shared.endpoint_map(kind, local=True), local_endpoints))
    else:
        chain = shared.external_chain_name(kind, cluster_count)
    verdicts = firewall + no_endpoint + _shared_chain_verdicts(verdict_map, chain)
    return RenderedFrontend(key, verdicts, tuple(endpoints), plan.service, plan.port_name, rank)


def _with_localhost_verdict(frontend: RenderedFrontend, plan: ServicePortPlan, context: Context) -> RenderedFrontend:
    """Add what happens to packets to a NodePort on loopback addresses."""
    traffic = context.localhost_traffic
    if not traffic:
        return frontend
    if plan.protocol != "TCP" or traffic == "reject":
        chain = names.LOCALHOST_REJECT
    elif forwards_locally(plan):
        chain = names.LOCALHOST_PROXY
    else:
        return frontend
    return replace(
        frontend, verdicts=_joined(frontend.verdicts, _shared_chain_verdicts(names.LOCALHOST_NODE_PORTS, chain))
    )


@lru_cache(1 << 10)
def _joined(some: Verdicts, more: Verdicts) -> Verdicts:
    """Return all verdicts. The tuple is cached, for the reason that `_shared_chain_verdicts` gives."""
    return some + more


@lru_cache(1 << 10)
def _shared_chain_verdicts(verdict_map: str, chain: str) -> Verdicts:
    """Return a goto to a shared chain, as the only element of a tuple.

    The tuple is cached to save memory, because thousands of Services have no other verdict.
    """
    return ((verdict_map, chain),)


def _no_endpoint_verdicts(kind: shared.FrontendKind, decision: TrafficDecision) -> Verdicts:
    verdict_map = names.NO_ENDPOINT_SERVICES if kind == "service" else names.NO_ENDPOINT_NODE_PORTS
    return ((verdict_map, DROP if decision is TrafficDecision.DROP else names.REJECT),)


# Per-Service chains and sets


def _firewall_chain(plan: ServicePortPlan) -> NftChain:
    """Return the chain that drops packets from sources that `loadBalancerSourceRanges` does not allow."""
    sources = [*plan.source_ranges, *(plan.vips if plan.vips_are_sources else ())]
    rules: list[NftRule] = [rule(MatchSaddr(source), Return()) for source in sources]
    return NftChain(f"firewall-{names.service_port_suffix(plan)}", (*rules, rule(Drop())), comment_of(plan.name))


def _affinity_sets(plan: ServicePortPlan) -> Iterator[NftSet]:
    """Yield one set for each endpoint. It contains the endpoint's recent clients."""
    for endpoint in plan.reachable_endpoints:
        yield NftSet(f"affinity-{_endpoint_suffix(plan, endpoint)}", (KeyField.SOURCE,), timeout=plan.affinity_seconds)


def _affinity_chains(plan: ServicePortPlan, context: Context) -> Iterator[NftChain]:
    """Yield the chains of a service port with session affinity. Each comes after the chains that its rules refer to."""
    for endpoint in plan.reachable_endpoints:
        yield _endpoint_chain(plan, endpoint)
    suffix = names.service_port_suffix(plan)
    cluster, local, external = f"service-{suffix}", f"local-{suffix}", f"external-{suffix}"
    if plan.cluster_endpoints:
        yield NftChain(cluster, tuple(_affinity_rules(plan, plan.cluster_endpoints)), comment_of(plan.name))
    if plan.local_endpoints:
        comment = comment_of(f"{plan.name}, policy Local")
        yield NftChain(local, tuple(_affinity_rules(plan, plan.local_endpoints)), comment)
    if not plan.externally_accessible:
        return
    if plan.external_local:
        local_chain = local if plan.external is TrafficDecision.FORWARD else ""
        rules = shared.external_local_rules(context, cluster, local_chain)
    else:
        rules = (rule(SetMark(context.masquerade_mark), comment="masquerade"), rule(Goto(cluster)))
    yield NftChain(external, rules, comment_of(f"{plan.name}, external traffic"))


def _endpoint_chain(plan: ServicePortPlan, endpoint: str) -> NftChain:
    address, port = split_socket_text(endpoint)
    suffix = _endpoint_suffix(plan, endpoint)
    rules = (
        rule(UpdateSet(f"affinity-{suffix}")),
        rule(MatchL4Proto(plan.protocol), Dnat(address, port)),
    )
    return NftChain(f"endpoint-{suffix}", rules, comment_of(plan.name))


def _affinity_rules(plan: ServicePortPlan, endpoints: Sockets) -> Iterator[NftRule]:
    """Yield the rules that send a recent client to its previous endpoint, and any other client to a random endpoint."""
    suffixes = [_endpoint_suffix(plan, endpoint) for endpoint in endpoints]
    for suffix in suffixes:
        yield rule(Lookup((KeyField.SOURCE,), f"affinity-{suffix}"), Goto(f"endpoint-{suffix}"))
    for remaining, suffix in zip(range(len(suffixes), 0, -1), suffixes, strict=True):
        match_random = (Numgen(remaining),) if remaining > 1 else ()
        yield rule(*match_random, Goto(f"endpoint-{suffix}"))


def _endpoint_suffix(plan: ServicePortPlan, endpoint: str) -> str:
    address, port = split_socket_text(endpoint)
    return names.endpoint_suffix(plan, address, port)
