"""Which rules are left out because another service port holds the frontend that they are about. Pure.

The rule is that of `kproxy.model.claims`. A frontend has rules in several chains, of which packets meet those of table
nat first: left to their order, the rules of a Service that can serve would take over the ClusterIP of one that cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import TypeAlias

from msgspec import Struct

from kproxy.iptables.render import Claim, DispatchRule
from kproxy.model.claims import Conflict
from kproxy.model.endpoints import socket_text
from kproxy.model.types import Family, ServiceKey

Place: TypeAlias = int | tuple[int, str]
"""What Services may claim at once: an address as a number, or a NodePort with its protocol."""

DispatchRules: TypeAlias = Mapping[ServiceKey, Iterable[tuple[str, DispatchRule]]]
"""The dispatch rules of some Services, each with the service port (`namespace/name:port`) that it belongs to."""


class Settlement(Struct, frozen=True):
    """How claims to the same frontends are settled: rules that are left out, and who loses to whom."""

    left_out: frozenset[DispatchRule] = frozenset()
    conflicts: tuple[Conflict, ...] = ()


def place_of(rule: DispatchRule) -> Place:
    """Return what a rule is about."""
    return (rule.place, rule.protocol) if rule.protocol else rule.place


def settle(family: Family, places: Iterable[Place], rules: DispatchRules) -> Settlement:
    """Return how the claims to some places are settled, given all rules of the Services that have any there."""
    left_out: set[DispatchRule] = set()
    conflicts: list[Conflict] = []
    claimed: dict[tuple[Place, str, int], dict[str, list[DispatchRule]]] = {}
    contested = frozenset(places)
    for owner, rule in (each for owned in rules.values() for each in owned):
        if rule.claim is not None and (place := place_of(rule)) in contested:
            frontend = (place, rule.claim.protocol, rule.claim.port)
            claimed.setdefault(frontend, {}).setdefault(owner, []).append(rule)
    for (place, _, _), owners in claimed.items():
        holder = min(owners, key=lambda owner: (_claim(owners[owner]).rank, owner))
        for loser in (each for each in owners if _service_of(each) != _service_of(holder)):
            left_out.update(owners[loser])
            conflicts.append(Conflict(_frontend(family, place, _claim(owners[loser])), holder, loser))
    return Settlement(frozenset(left_out), tuple(sorted(conflicts)))


def _service_of(owner: str) -> ServiceKey:
    return owner.partition(":")[0]


def _claim(rules: list[DispatchRule]) -> Claim:
    claim = min((rule.claim for rule in rules if rule.claim is not None), key=lambda each: each.rank)
    assert claim is not None
    return claim


def _frontend(family: Family, place: Place, claim: Claim) -> str:
    protocol = claim.protocol.upper()
    if isinstance(place, tuple):
        return f"NodePort {claim.port}/{protocol}"
    packed = place.to_bytes(16 if family is Family.IPV6 else 4, "big")
    return f"{socket_text(str(ip_address(packed)), claim.port)}/{protocol}"


class Claims:
    """Which Services have rules about which place, as far as the kernel has accepted them."""

    def __init__(self) -> None:
        self._holders: dict[Place, ServiceKey | tuple[ServiceKey, ...]] = {}
        self._contested: set[Place] = set()

    def put(self, key: ServiceKey, old: Iterable[DispatchRule], new: Iterable[DispatchRule]) -> None:
        """Replace a Service's rules."""
        before, after = _places(old), _places(new)
        if before == after:
            return
        for place in before - after:
            self._set(place, tuple(each for each in self.of(place) if each != key))
        for place in after - before:
            self._set(place, (*self.of(place), key))

    def of(self, place: Place) -> tuple[ServiceKey, ...]:
        """Return the Services that have rules about a place."""
        found = self._holders.get(place, ())
        return found if isinstance(found, tuple) else (found,)

    def contested(self, changed: Mapping[ServiceKey, Iterable[DispatchRule]]) -> dict[Place, set[ServiceKey]]:
        """Return the places that several Services claim, with these, once `changed` has replaced their rules."""
        touched: dict[Place, set[ServiceKey]] = {}
        for key, rules in changed.items():
            for place in _places(rules):
                touched.setdefault(place, set()).add(key)
        for place, keys in touched.items():
            if place in self._holders:
                keys.update(each for each in self.of(place) if each not in changed)
        found = {place: keys for place, keys in touched.items() if len(keys) > 1}
        for place in self._contested - touched.keys():
            keys = {each for each in self.of(place) if each not in changed}
            if len(keys) > 1:
                found[place] = keys
        return found

    def _set(self, place: Place, keys: tuple[ServiceKey, ...]) -> None:
        if not keys:
            del self._holders[place]
        else:
            self._holders[place] = keys[0] if len(keys) == 1 else keys
        (self._contested.add if len(keys) > 1 else self._contested.discard)(place)


def _places(rules: Iterable[DispatchRule]) -> set[Place]:
    return {place_of(rule) for rule in rules if rule.claim is not None}
