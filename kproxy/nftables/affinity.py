"""The chains and sets of a service port with session affinity: the only ones that hold endpoints one by one.

Each endpoint has a set of the clients that it served last, which expire after the Service's timeout. Sets live as long
as their endpoint is one: a client that is in none of them is given any.
"""

from __future__ import annotations

from collections.abc import Iterator

from kproxy.model.context import Context
from kproxy.model.endpoints import split_socket_text
from kproxy.model.plan import Decision, ServicePortPlan
from kproxy.model.topology import Sockets
from kproxy.nftables import names
from kproxy.nftables.objects import (
    Chain,
    Chance,
    Field,
    Go,
    IsIn,
    IsProtocol,
    Mark,
    Remember,
    Rule,
    SendTo,
    Set,
    rule,
)
from kproxy.nftables.shared import external_local_rules


def affinity_sets(plan: ServicePortPlan) -> Iterator[Set]:
    """Yield the set of each endpoint."""
    for endpoint in plan.reachable_endpoints:
        yield Set(f"affinity-{_suffix(plan, endpoint)}", (Field.SOURCE,), timeout=plan.affinity_seconds)


def affinity_chains(plan: ServicePortPlan, context: Context) -> Iterator[Chain]:
    """Yield the chains of a service port, those first that others go to."""
    for endpoint in plan.reachable_endpoints:
        yield _endpoint(plan, endpoint)
    name = names.service_port_name(plan)
    cluster, local, external = f"service-{name}", f"local-{name}", f"external-{name}"
    if plan.cluster_endpoints:
        yield Chain(cluster, tuple(_policy(plan, plan.cluster_endpoints)), names.comment(plan.name))
    if plan.local_endpoints:
        yield Chain(local, tuple(_policy(plan, plan.local_endpoints)), names.comment(f"{plan.name}, policy Local"))
    if not plan.externally_accessible:
        return
    if plan.external_local:
        rules = external_local_rules(context, cluster, local if plan.external is Decision.FORWARD else "")
    else:
        rules = (rule(Mark(context.masquerade_mark), comment="masquerade"), rule(Go(cluster)))
    yield Chain(external, rules, names.comment(f"{plan.name}, external traffic"))


def _endpoint(plan: ServicePortPlan, endpoint: str) -> Chain:
    address, port = split_socket_text(endpoint)
    suffix = _suffix(plan, endpoint)
    rules = (
        rule(Remember(f"affinity-{suffix}")),
        rule(IsProtocol(plan.protocol), SendTo(address, port)),
    )
    return Chain(f"endpoint-{suffix}", rules, names.comment(plan.name))


def _policy(plan: ServicePortPlan, endpoints: Sockets) -> Iterator[Rule]:
    """Yield the rules that send a client where it was before, or else to an endpoint by chance."""
    suffixes = [_suffix(plan, endpoint) for endpoint in endpoints]
    for suffix in suffixes:
        yield rule(IsIn((Field.SOURCE,), f"affinity-{suffix}"), Go(f"endpoint-{suffix}"))
    for remaining, suffix in zip(range(len(suffixes), 0, -1), suffixes, strict=True):
        chance = (Chance(remaining),) if remaining > 1 else ()
        yield rule(*chance, Go(f"endpoint-{suffix}"))


def _suffix(plan: ServicePortPlan, endpoint: str) -> str:
    address, port = split_socket_text(endpoint)
    return names.endpoint_name(plan, address, port)
