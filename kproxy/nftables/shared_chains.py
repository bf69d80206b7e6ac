"""Chains that all frontends with the same traffic policy and a similar number of endpoints share. Pure.

The verdict of a frontend is a goto to a shared chain. The rules of the chain use the frontend's key to find the
frontend's endpoints in a map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, Self, TypeAlias, cast

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.nftables import names
from kproxy.nftables.base_table import NODE_PORT_KEY, SERVICE_KEY, local_traffic_match
from kproxy.nftables.ruleset import DnatMap, FibLocal, Goto, KeyField, NftChain, NftRule, SetMark, rule

MAX_IMBALANCE = 1 / 500
"""Maximum share of connections for which the first rules of a chain find no endpoint.

The modulus of these rules is the chain's capacity. A later rule with a smaller modulus sends the remaining connections
to one of the first endpoints of the frontend. A low maximum therefore limits how much more traffic these endpoints
receive than the others.
"""
FrontendKind: TypeAlias = Literal["service", "nodeport"]
Policy: TypeAlias = Literal["any", "local", "external", "external-local"]
_NAME = re.compile(r"(service|nodeport)-(any|local|external|external-local)-(\d+)(?:-(\d+))?")
_ENDPOINT_MAPS = {
    ("service", False): names.SERVICE_ENDPOINTS,
    ("service", True): names.SERVICE_LOCAL_ENDPOINTS,
    ("nodeport", False): names.NODE_PORT_ENDPOINTS,
    ("nodeport", True): names.NODE_PORT_LOCAL_ENDPOINTS,
}


@lru_cache(1 << 10)
def chain_capacity(endpoints: int) -> int:
    """Return the smallest capacity of a chain that is sufficient for this number of endpoints.

    The capacities are the powers of two and the numbers halfway between them: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on.
    """
    power = 1 << max(0, (endpoints - 1).bit_length() - 1)
    return next(capacity for capacity in (power, power * 3 // 2, power * 2) if capacity >= endpoints)


@lru_cache(64)
def numgen_moduli(capacity: int) -> tuple[int, ...]:
    """Return the N of `numgen random mod N` in each rule of a chain of this capacity, in the order of the rules.

    A packet reaches a rule only if none of the random numbers of the preceding rules was the index of an endpoint.

    A frontend that uses the chain has more endpoints than the next smaller capacity. In the second-to-last rule, N is
    therefore never greater than the number of endpoints, so this rule always finds an endpoint.

    In the last rule, N is 1. It is for packets that are in flight while the number of endpoints decreases. The verdict
    of such a packet may be from before the change, while the map already has fewer endpoints. A chain of capacity 1 has
    only this rule.
    """
    smaller = capacity * 3 // 4 if capacity & (capacity - 1) == 0 else capacity * 2 // 3
    miss_probability = (capacity - smaller - 1) / capacity
    moduli = [capacity]
    while miss_probability ** len(moduli) > MAX_IMBALANCE:
        moduli.append(capacity)
    if miss_probability:
        moduli.append(smaller)
    if moduli[-1] > 1:
        moduli.append(1)
    return tuple(moduli)


def endpoint_map(kind: FrontendKind, *, local: bool) -> str:
    """Return the name of the map that has the endpoints of this kind of frontend.

    With `local`, return the map that has only the endpoints on this node.
    """
    return _ENDPOINT_MAPS[kind, local]


class SharedChain(Struct, frozen=True):
    """The identity of a shared chain: the kind of its frontends, its policy and its capacity.

    What the chain does depends on the policy:

    - `any` selects one of up to `capacity` endpoints.
    - `local` selects one of up to `capacity` endpoints, all of them on this node.
    - `external` masquerades the traffic and continues in the chain with policy `any`.
    - `external-local` handles external traffic with `externalTrafficPolicy: Local`. For traffic from local pods and
      from the node itself, it selects one of up to `capacity` endpoints. For all other traffic, it selects one of up to
      `local_capacity` endpoints on this node. If `local_capacity` is 0, there are no endpoints on this node.
    """

    kind: FrontendKind
    policy: Policy
    capacity: int
    local_capacity: int = 0

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Parse the name of a chain. Return None if it is not the name of a shared chain."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        kind, policy = cast("FrontendKind", found[1]), cast("Policy", found[2])
        return cls(kind, policy, int(found[3]), int(found[4] or 0))

    @property
    def name(self) -> str:
        """The chain's name."""
        name = f"{self.kind}-{self.policy}-{self.capacity}"
        return f"{name}-{self.local_capacity}" if self.policy == "external-local" else name

    def targets(self) -> Iterator[SharedChain]:
        """Yield the shared chains to which this chain has a goto."""
        if self.policy in {"external", "external-local"}:
            yield SharedChain(self.kind, "any", self.capacity)
        if self.local_capacity:
            yield SharedChain(self.kind, "local", self.local_capacity)

    def render(self, context: Context) -> NftChain:
        """Return the chain with its rules."""
        if self.policy in {"any", "local"}:
            local = self.policy == "local"
            comment = f"one of up to {self.capacity} endpoints{' on this node' if local else ''}"
            return NftChain(self.name, tuple(self._select_endpoint(local=local)), comment)
        any_chain = SharedChain(self.kind, "any", self.capacity).name
        if self.policy == "external":
            masquerade = rule(SetMark(context.masquerade_mark), comment="masquerade")
            return NftChain(self.name, (masquerade, rule(Goto(any_chain))), "external traffic")
        local_chain = SharedChain(self.kind, "local", self.local_capacity).name if self.local_capacity else ""
        rules = external_local_rules(context, any_chain, local_chain)
        return NftChain(self.name, rules, "external traffic of policy Local")

    def _select_endpoint(self, *, local: bool) -> Iterator[NftRule]:
        fields: tuple[KeyField, ...] = SERVICE_KEY if self.kind == "service" else NODE_PORT_KEY
        for modulus in numgen_moduli(self.capacity):
            yield rule(DnatMap(fields, modulus, endpoint_map(self.kind, local=local)))


def external_local_rules(context: Context, any_chain: str, local_chain: str) -> tuple[NftRule, ...]:
    """Return the rules for external traffic with `externalTrafficPolicy: Local`.

    Traffic from local pods (see `local_traffic_match`) and from the node itself is sent to `any_chain`. It can reach
    any endpoint, as if its destination were the ClusterIP. The node's own traffic is masqueraded, because its source
    can be the frontend's address.

    All other traffic is sent to `local_chain`. If `local_chain` is "", no rule matches this traffic, and the base
    chains that check for frontends without endpoints drop it later.
    """
    rules = []
    from_pods = local_traffic_match(context, negate=False)
    if from_pods is not None:
        rules.append(rule(from_pods, Goto(any_chain), comment="pods"))
    from_node = FibLocal(KeyField.SOURCE)
    rules.append(rule(from_node, SetMark(context.masquerade_mark), comment="masquerade this node's own traffic"))
    rules.append(rule(from_node, Goto(any_chain), comment="this node's own traffic"))
    if local_chain:
        rules.append(rule(Goto(local_chain)))
    return tuple(rules)


@lru_cache(1 << 8)
def any_chain_name(kind: FrontendKind, endpoints: int) -> str:
    """Return the name of the chain that selects an endpoint for frontends with this many endpoints."""
    return SharedChain(kind, "any", chain_capacity(endpoints)).name


@lru_cache(1 << 8)
def local_chain_name(kind: FrontendKind, endpoints: int) -> str:
    """Return the name of the chain that selects a local endpoint for frontends with this many local endpoints."""
    return SharedChain(kind, "local", chain_capacity(endpoints)).name


@lru_cache(1 << 8)
def external_chain_name(kind: FrontendKind, endpoints: int) -> str:
    """Return the name of the chain for external traffic with `externalTrafficPolicy: Cluster`."""
    return SharedChain(kind, "external", chain_capacity(endpoints)).name


def external_local_chain_name(kind: FrontendKind, endpoints: int, local_endpoints: int) -> str:
    """Return the name of the chain for external traffic with `externalTrafficPolicy: Local`."""
    local_capacity = chain_capacity(local_endpoints) if local_endpoints else 0
    return SharedChain(kind, "external-local", chain_capacity(endpoints), local_capacity).name


def required_shared_chains(chain_names: Iterable[str]) -> Iterator[SharedChain]:
    """Yield each shared chain among the named chains, followed by the shared chains that can be reached from it.

    A chain may be yielded several times.
    """
    for name in chain_names:
        shared = SharedChain.parse(name)
        if shared is not None:
            yield shared
            yield from required_shared_chains(each.name for each in shared.targets())
