"""From plans to what a Service needs in the table: elements of the shared maps and, seldom, chains of its own. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from msgspec import Struct

from kproxy.model.addresses import split_socket_text
from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets
from kproxy.model.frontend_conflicts import ClaimRank, external_rank
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.nftables import names
from kproxy.nftables import shared_chains as shared
from kproxy.nftables.elements import DROP, hairpin_key, node_port_key, pack_address, pack_pool, service_key
from kproxy.nftables.ruleset import (
    Dnat,
    Drop,
    Go,
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
from kproxy.nftables.shared_chains import external_local_rules


def affinity_sets(plan: ServicePortPlan) -> Iterator[NftSet]:
    """Yield the set of each endpoint."""
    for endpoint in plan.reachable_endpoints:
        yield NftSet(f"affinity-{_suffix(plan, endpoint)}", (KeyField.SOURCE,), timeout=plan.affinity_seconds)


def affinity_chains(plan: ServicePortPlan, context: Context) -> Iterator[NftChain]:
    """Yield the chains of a service port, those first that others go to."""
    for endpoint in plan.reachable_endpoints:
        yield _endpoint(plan, endpoint)
    name = names.service_port_name(plan)
    cluster, local, external = f"service-{name}", f"local-{name}", f"external-{name}"
    if plan.cluster_endpoints:
        yield NftChain(cluster, tuple(_policy(plan, plan.cluster_endpoints)), names.comment(plan.name))
    if plan.local_endpoints:
        yield NftChain(local, tuple(_policy(plan, plan.local_endpoints)), names.comment(f"{plan.name}, policy Local"))
    if not plan.externally_accessible:
        return
    if plan.external_local:
        rules = external_local_rules(context, cluster, local if plan.external is TrafficDecision.FORWARD else "")
    else:
        rules = (rule(SetMark(context.masquerade_mark), comment="masquerade"), rule(Go(cluster)))
    yield NftChain(external, rules, names.comment(f"{plan.name}, external traffic"))


def _endpoint(plan: ServicePortPlan, endpoint: str) -> NftChain:
    address, port = split_socket_text(endpoint)
    suffix = _suffix(plan, endpoint)
    rules = (
        rule(UpdateSet(f"affinity-{suffix}")),
        rule(MatchL4Proto(plan.protocol), Dnat(address, port)),
    )
    return NftChain(f"endpoint-{suffix}", rules, names.comment(plan.name))


def _policy(plan: ServicePortPlan, endpoints: Sockets) -> Iterator[NftRule]:
    """Yield the rules that send a client where it was before, or else to an endpoint by chance."""
    suffixes = [_suffix(plan, endpoint) for endpoint in endpoints]
    for suffix in suffixes:
        yield rule(Lookup((KeyField.SOURCE,), f"affinity-{suffix}"), Go(f"endpoint-{suffix}"))
    for remaining, suffix in zip(range(len(suffixes), 0, -1), suffixes, strict=True):
        chance = (Numgen(remaining),) if remaining > 1 else ()
        yield rule(*chance, Go(f"endpoint-{suffix}"))


def _suffix(plan: ServicePortPlan, endpoint: str) -> str:
    address, port = split_socket_text(endpoint)
    return names.endpoint_name(plan, address, port)


Verdicts = tuple[tuple[str, str], ...]
"""Maps of verdicts, each with the verdict that it has for a frontend: a chain's name or `DROP`."""


class RenderedFrontend(Struct, frozen=True, gc=False):
    """What a Service has under one key: that of an address and port, or that of a NodePort.

    `pools` are maps of endpoints, each with the endpoints' values one after the other. `owner` names the service port,
    and `rank` decides who gets the key should several Services claim it (`kproxy.model.frontend_conflicts`).
    """

    key: bytes
    verdicts: Verdicts
    pools: tuple[tuple[str, bytes], ...]
    owner: str
    rank: int = ClaimRank.FORWARDS


class RenderedService(Struct, frozen=True, gc=False):
    """All that one Service needs in the table. `cluster_ip` and `hairpins` are keys of the sets of these names."""

    cluster_ip: bytes
    frontends: tuple[RenderedFrontend, ...]
    hairpins: tuple[bytes, ...] = ()
    chains: tuple[NftChain, ...] = ()
    sets: tuple[NftSet, ...] = ()


def render_service(plans: Sequence[ServicePortPlan], context: Context) -> RenderedService | None:
    """Return what a Service needs; None if it has nothing in this family."""
    if not plans:
        return None
    frontends: list[RenderedFrontend] = []
    hairpins: list[bytes] = []
    chains: list[NftChain] = []
    sets: list[NftSet] = []
    for plan in plans:
        frontends += _frontends(plan)
        hairpins += [hairpin_key(endpoint, plan.protocol) for endpoint in plan.endpoints_on_node]
        if plan.source_ranges:
            chains.append(_firewall(plan))
        if plan.affinity_seconds and plan.has_endpoints:
            chains += affinity_chains(plan, context)
            sets += affinity_sets(plan)
    return RenderedService(
        pack_address(plans[0].cluster_ip), tuple(frontends), tuple(hairpins), tuple(chains), tuple(sets)
    )


def _frontends(plan: ServicePortPlan) -> Iterator[RenderedFrontend]:
    any_pool = pack_pool(plan.cluster_endpoints)
    local_pool = pack_pool(plan.local_endpoints)
    yield _internal(plan, any_pool, local_pool)
    for address in dict.fromkeys((*plan.external_ips, *plan.vips)):
        key = service_key(address, plan.protocol, plan.port)
        restricted = bool(plan.source_ranges) and address in plan.vips
        yield _external(plan, "service", key, any_pool, local_pool, restricted=restricted)
    if plan.node_port:
        key = node_port_key(plan.protocol, plan.node_port)
        yield _external(plan, "nodeport", key, any_pool, local_pool, restricted=False)


def _internal(plan: ServicePortPlan, any_pool: bytes, local_pool: bytes) -> RenderedFrontend:
    key = service_key(plan.cluster_ip, plan.protocol, plan.port)
    if plan.internal is not TrafficDecision.FORWARD:
        return RenderedFrontend(key, _refusal("service", plan.internal), (), plan.name, ClaimRank.CLUSTER_IP)
    if plan.affinity_seconds:
        own = f"{'local' if plan.internal_local else 'service'}-{names.service_port_name(plan)}"
        return RenderedFrontend(key, ((names.SERVICE_IPS, own),), (), plan.name, ClaimRank.CLUSTER_IP)
    if plan.internal_local:
        chain = shared.local_chain("service", len(plan.local_endpoints))
        pools = ((names.SERVICE_LOCAL_ENDPOINTS, local_pool),)
    else:
        chain = shared.any_chain("service", len(plan.cluster_endpoints))
        pools = ((names.SERVICE_ENDPOINTS, any_pool),)
    return RenderedFrontend(key, _goes_to(names.SERVICE_IPS, chain), pools, plan.name, ClaimRank.CLUSTER_IP)


def _external(
    plan: ServicePortPlan,
    kind: shared.Frontends,
    key: bytes,
    any_pool: bytes,
    local_pool: bytes,
    *,
    restricted: bool,
) -> RenderedFrontend:
    firewall = ((names.FIREWALL_IPS, f"firewall-{names.service_port_name(plan)}"),) if restricted else ()
    refusal = () if plan.external is TrafficDecision.FORWARD else _refusal(kind, plan.external)
    rank = external_rank(plan)
    if not plan.has_endpoints:
        return RenderedFrontend(key, firewall + refusal, (), plan.name, rank)
    verdicts = names.SERVICE_IPS if kind == "service" else names.SERVICE_NODE_PORTS
    if plan.affinity_seconds:
        own = f"external-{names.service_port_name(plan)}"
        return RenderedFrontend(key, (*firewall, *refusal, (verdicts, own)), (), plan.name, rank)
    pools = [(shared.pool_map(kind, local=False), any_pool)]
    anywhere, here = len(plan.cluster_endpoints), len(plan.local_endpoints)
    if plan.external_local:
        chain = shared.external_local_chain(kind, anywhere, here)
        if here:
            pools.append((shared.pool_map(kind, local=True), local_pool))
    else:
        chain = shared.external_chain(kind, anywhere)
    return RenderedFrontend(key, firewall + refusal + _goes_to(verdicts, chain), tuple(pools), plan.name, rank)


@lru_cache(1 << 10)
def _goes_to(verdicts: str, chain: str) -> Verdicts:
    """Return the same value for the same verdict, of which there are few: it is kept once for thousands of Services."""
    return ((verdicts, chain),)


def _refusal(kind: shared.Frontends, decision: TrafficDecision) -> Verdicts:
    verdicts = names.NO_ENDPOINT_SERVICES if kind == "service" else names.NO_ENDPOINT_NODE_PORTS
    return ((verdicts, DROP if decision is TrafficDecision.DROP else names.REJECT),)


def _firewall(plan: ServicePortPlan) -> NftChain:
    """Return the chain that lets allowed sources through to where the destination is translated."""
    sources = [*plan.source_ranges, *(plan.vips if plan.vips_are_sources else ())]
    rules: list[NftRule] = [rule(MatchSaddr(source), Return()) for source in sources]
    return NftChain(f"firewall-{names.service_port_name(plan)}", (*rules, rule(Drop())), names.comment(plan.name))
