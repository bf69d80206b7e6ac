"""The chains that Services share: what is done with a packet depends on sizes and policy, not on whose it is.

A frontend's verdict names one of them; its own endpoints are found in the maps, by the frontend's own key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, Self, cast

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.nftables import names
from kproxy.nftables.base_table import NODE_PORT, SERVICE, local_traffic_match
from kproxy.nftables.ruleset import DnatMap, FibLocal, Go, KeyField, NftChain, NftRule, SetMark, rule

UNEVENNESS = 1 / 500
"""What part of all connections may run out of draws: these go to one of the first endpoints."""


def size_for(endpoints: int) -> int:
    """Return the smallest size that holds so many endpoints: 1, 2, 3, 4, 6, 8, 12, 16, 24, and so on."""
    power = 1 << max(0, (endpoints - 1).bit_length() - 1)
    return next(size for size in (power, power * 3 // 2, power * 2) if size >= endpoints)


@lru_cache(64)
def draws(size: int) -> tuple[int, ...]:
    """Return what a chain of a size draws below, draw after draw, until an endpoint is found.

    The last but one always finds one, as the chain is for more endpoints than the next smaller size. The very last is
    for a packet that is under way while N changes: it has come by the verdict of before and looks at the map of after.
    """
    smaller = size * 3 // 4 if size & (size - 1) == 0 else size * 2 // 3
    missing = (size - smaller - 1) / size
    found = [size]
    while missing ** len(found) > UNEVENNESS:
        found.append(size)
    if missing:
        found.append(smaller)
    if found[-1] > 1:
        found.append(1)
    return tuple(found)


Frontends = Literal["service", "nodeport"]
Policy = Literal["any", "local", "external", "external-local"]
_NAME = re.compile(r"(service|nodeport)-(any|local|external|external-local)-(\d+)(?:-(\d+))?")
_POOLS = {
    ("service", False): names.SERVICE_ENDPOINTS,
    ("service", True): names.SERVICE_LOCAL_ENDPOINTS,
    ("nodeport", False): names.NODE_PORT_ENDPOINTS,
    ("nodeport", True): names.NODE_PORT_LOCAL_ENDPOINTS,
}


def pool_map(frontends: Frontends, *, local: bool) -> str:
    """Return the map that holds the endpoints of such frontends: all, or those on this node."""
    return _POOLS[frontends, local]


class SharedChain(Struct, frozen=True):
    """What one shared chain is for.

    Policy `any` picks one of all endpoints, of which there are up to `size`; `local` one of those on this node.
    `external` masquerades first. `external-local` is external traffic of policy Local: up to `size` endpoints for pods
    and this node, up to `local_size` (0: none) for everybody else.
    """

    frontends: Frontends
    policy: Policy
    size: int
    local_size: int = 0

    @classmethod
    def named(cls, name: str) -> Self | None:
        """Return what the chain of a name is for, None if Services do not share it."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        frontends, policy = cast("Frontends", found[1]), cast("Policy", found[2])
        return cls(frontends, policy, int(found[3]), int(found[4] or 0))

    @property
    def name(self) -> str:
        """The chain's name."""
        name = f"{self.frontends}-{self.policy}-{self.size}"
        return f"{name}-{self.local_size}" if self.policy == "external-local" else name

    def needs(self) -> Iterator[SharedChain]:
        """Yield the chains that this one goes to."""
        if self.policy in {"external", "external-local"}:
            yield SharedChain(self.frontends, "any", self.size)
        if self.local_size:
            yield SharedChain(self.frontends, "local", self.local_size)

    def chain(self, context: Context) -> NftChain:
        """Return the chain itself."""
        if self.policy in {"any", "local"}:
            local = self.policy == "local"
            comment = f"one of up to {self.size} endpoints{' on this node' if local else ''}"
            return NftChain(self.name, tuple(self._picks(local=local)), comment)
        anywhere = SharedChain(self.frontends, "any", self.size).name
        if self.policy == "external":
            masquerade = rule(SetMark(context.masquerade_mark), comment="masquerade")
            return NftChain(self.name, (masquerade, rule(Go(anywhere))), "external traffic")
        here = SharedChain(self.frontends, "local", self.local_size).name if self.local_size else ""
        return NftChain(self.name, external_local_rules(context, anywhere, here), "external traffic of policy Local")

    def _picks(self, *, local: bool) -> Iterator[NftRule]:
        fields: tuple[KeyField, ...] = SERVICE if self.frontends == "service" else NODE_PORT
        for below in draws(self.size):
            yield rule(DnatMap(fields, below, pool_map(self.frontends, local=local)))


def external_local_rules(context: Context, anywhere: str, here: str) -> tuple[NftRule, ...]:
    """Return the rules of external traffic of policy Local.

    Pods and the node itself reach the frontend as if it were the ClusterIP, by the chain `anywhere`; the node
    is masqueraded, because its source may be the frontend's address itself. All others go to the chain `here`;
    without one (""), they go on, to be dropped.
    """
    rules = []
    inside = local_traffic_match(context, inside=True)
    if inside is not None:
        rules.append(rule(inside, Go(anywhere), comment="pods"))
    own = FibLocal(KeyField.SOURCE)
    rules.append(rule(own, SetMark(context.masquerade_mark), comment="masquerade this node's own traffic"))
    rules.append(rule(own, Go(anywhere), comment="this node's own traffic"))
    if here:
        rules.append(rule(Go(here)))
    return tuple(rules)


def any_chain(frontends: Frontends, endpoints: int) -> str:
    """Return the name of the chain that picks one of so many endpoints."""
    return SharedChain(frontends, "any", size_for(endpoints)).name


def local_chain(frontends: Frontends, endpoints: int) -> str:
    """Return the name of the chain that picks one of so many endpoints on this node."""
    return SharedChain(frontends, "local", size_for(endpoints)).name


def external_chain(frontends: Frontends, endpoints: int) -> str:
    """Return the name of the chain for external traffic that any of so many endpoints may serve."""
    return SharedChain(frontends, "external", size_for(endpoints)).name


def external_local_chain(frontends: Frontends, endpoints: int, local: int) -> str:
    """Return the name of the chain for external traffic of policy Local."""
    return SharedChain(frontends, "external-local", size_for(endpoints), size_for(local) if local else 0).name


def shared_chains(names: Iterable[str]) -> Iterator[SharedChain]:
    """Yield the shared ones among the chains of these names, and all chains that they go to."""
    for name in names:
        shared = SharedChain.named(name)
        if shared is not None:
            yield shared
            yield from shared_chains(each.name for each in shared.needs())
