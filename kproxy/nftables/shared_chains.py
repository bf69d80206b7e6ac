"""Shared chains, one for all frontends with the same traffic policy and a similar number of endpoints. Pure.

A frontend's verdict goes to one of them. The chain finds the frontend's endpoints in a map, by the frontend's key.
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
"""Maximum share of connections for which no random number below the capacity is the index of an endpoint.

They are sent to one of the first endpoints, so this limits how much more traffic these endpoints get.
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


def chain_capacity(endpoints: int) -> int:
    """Return the smallest sufficient capacity for a number of endpoints: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    power = 1 << max(0, (endpoints - 1).bit_length() - 1)
    return next(capacity for capacity in (power, power * 3 // 2, power * 2) if capacity >= endpoints)


@lru_cache(64)
def numgen_moduli(capacity: int) -> tuple[int, ...]:
    """Return the modulus of each `numgen random mod N` in a chain of this capacity, in the order of the rules.

    A packet reaches a rule if none of the random numbers before it was the index of an endpoint. The second-to-last
    rule always finds an endpoint, because the frontend has more endpoints than the next smaller capacity. The last rule
    (N = 1) is for packets in flight while the number of endpoints changes: they can have the previous verdict, but the
    map is already the current one.
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
    """Return the name of the map with the endpoints of a kind of frontend: all, or with `local` those on this node."""
    return _ENDPOINT_MAPS[kind, local]


class SharedChain(Struct, frozen=True):
    """The identity of a shared chain: kind of frontend, policy and capacity.

    Policy `any` selects one of up to `capacity` endpoints, `local` one of up to `capacity` endpoints on this node.
    `external` masquerades and continues with `any`. `external-local` handles external traffic with
    `externalTrafficPolicy: Local`: pods and this node get one of up to `capacity` endpoints, all other clients one of
    up to `local_capacity` endpoints on this node (0: there are none).
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
        """Yield the shared chains that this one goes to."""
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

    Pods and the node itself reach any endpoint through `any_chain`, as if the frontend were the ClusterIP. The node's
    own traffic is masqueraded, because its source can be the frontend's address. Other traffic goes to `local_chain`;
    if that is "", no rule matches and the packet is dropped later.
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


def any_chain_name(kind: FrontendKind, endpoints: int) -> str:
    """Return the name of the chain that selects one of this many endpoints."""
    return SharedChain(kind, "any", chain_capacity(endpoints)).name


def local_chain_name(kind: FrontendKind, endpoints: int) -> str:
    """Return the name of the chain that selects one of this many endpoints on this node."""
    return SharedChain(kind, "local", chain_capacity(endpoints)).name


def external_chain_name(kind: FrontendKind, endpoints: int) -> str:
    """Return the name of the chain for external traffic with `externalTrafficPolicy: Cluster`."""
    return SharedChain(kind, "external", chain_capacity(endpoints)).name


def external_local_chain_name(kind: FrontendKind, endpoints: int, local_endpoints: int) -> str:
    """Return the name of the chain for external traffic with `externalTrafficPolicy: Local`."""
    local_capacity = chain_capacity(local_endpoints) if local_endpoints else 0
    return SharedChain(kind, "external-local", chain_capacity(endpoints), local_capacity).name


def required_shared_chains(chain_names: Iterable[str]) -> Iterator[SharedChain]:
    """Yield the shared chains among the named chains, and all chains that they go to, some possibly repeatedly."""
    for name in chain_names:
        shared = SharedChain.parse(name)
        if shared is not None:
            yield shared
            yield from required_shared_chains(each.name for each in shared.targets())
