"""Which rules are left out because another service port holds the frontend that they are about. Pure.

The rule is that of `kproxy.model.frontend_conflicts`. A frontend has rules in several chains, of which packets meet
those of table nat first: left to their order, the rules of a Service that can serve would take over the ClusterIP of
one that cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import TypeAlias

from msgspec import Struct

from kproxy.iptables.render import DispatchRule
from kproxy.model.addresses import socket_text
from kproxy.model.frontend_conflicts import ClaimRank, FrontendConflict
from kproxy.model.types import Family, ServiceKey

Frontend: TypeAlias = int
"""An address, or one of the node's ports, with protocol and port, as one number: there is one for every Service."""
DispatchRules: TypeAlias = Mapping[ServiceKey, Iterable[tuple[str, DispatchRule]]]
"""The dispatch rules of some Services, each with the service port (`namespace/name:port`) that it belongs to."""
_PROTOCOLS = ("tcp", "udp", "sctp")
_PORT_BITS = 16
_PROTOCOL_BITS = 2


class ConflictResolution(Struct, frozen=True):
    """How claims to the same frontends are settled: rules that are left out, and who loses to whom."""

    left_out: frozenset[DispatchRule] = frozenset()
    conflicts: tuple[FrontendConflict, ...] = ()


def frontend_of(rule: DispatchRule) -> Frontend | None:
    """Return the frontend that a rule is about, None if it is about none. NodePorts are below 0."""
    claim = rule.claim
    if claim is None:
        return None
    number = _PROTOCOLS.index(claim.protocol) << _PORT_BITS | claim.port
    return ~number if rule.protocol else rule.place << (_PORT_BITS + _PROTOCOL_BITS) | number


def settle(family: Family, frontends: Iterable[Frontend], rules: DispatchRules) -> ConflictResolution:
    """Return how the claims to some frontends are settled, given all rules of the Services that claim any of them."""
    left_out: set[DispatchRule] = set()
    conflicts: list[FrontendConflict] = []
    claimed: dict[Frontend, dict[str, list[DispatchRule]]] = {frontend: {} for frontend in frontends}
    for owner, rule in (each for owned in rules.values() for each in owned):
        frontend = frontend_of(rule)
        if frontend in claimed:
            claimed[frontend].setdefault(owner, []).append(rule)
    for frontend, owners in claimed.items():
        holder = min(owners, key=lambda owner: (_rank(owners[owner]), owner))
        for loser in (each for each in owners if _service_of(each) != _service_of(holder)):
            left_out.update(owners[loser])
            conflicts.append(FrontendConflict(_text(family, frontend), holder, loser))
    return ConflictResolution(frozenset(left_out), tuple(sorted(conflicts)))


def _service_of(owner: str) -> ServiceKey:
    return owner.partition(":")[0]


def _rank(rules: Iterable[DispatchRule]) -> ClaimRank:
    return min(rule.claim.rank for rule in rules if rule.claim is not None)


def _text(family: Family, frontend: Frontend) -> str:
    number = ~frontend if frontend < 0 else frontend
    port = number & (1 << _PORT_BITS) - 1
    protocol = _PROTOCOLS[number >> _PORT_BITS & (1 << _PROTOCOL_BITS) - 1].upper()
    if frontend < 0:
        return f"NodePort {port}/{protocol}"
    packed = (number >> (_PORT_BITS + _PROTOCOL_BITS)).to_bytes(16 if family is Family.IPV6 else 4, "big")
    return f"{socket_text(str(ip_address(packed)), port)}/{protocol}"


class FrontendClaims:
    """Which Services claim which frontend, as far as the kernel has accepted their rules."""

    def __init__(self) -> None:
        self._claimants: dict[Frontend, ServiceKey | tuple[ServiceKey, ...]] = {}
        self._contested: set[Frontend] = set()

    def put(self, key: ServiceKey, old: Iterable[DispatchRule], new: Iterable[DispatchRule]) -> None:
        """Replace a Service's rules."""
        before, after = _frontends(old), _frontends(new)
        for frontend in before - after:
            self._set(frontend, tuple(each for each in self.of(frontend) if each != key))
        for frontend in after - before:
            self._set(frontend, (*self.of(frontend), key))

    def of(self, frontend: Frontend) -> tuple[ServiceKey, ...]:
        """Return the Services that claim a frontend."""
        found = self._claimants.get(frontend, ())
        return found if isinstance(found, tuple) else (found,)

    def contested(self, changed: Mapping[ServiceKey, Iterable[DispatchRule]]) -> dict[Frontend, set[ServiceKey]]:
        """Return the frontends that several Services claim, with these, once `changed` has replaced their rules."""
        touched: dict[Frontend, set[ServiceKey]] = {}
        for key, rules in changed.items():
            for frontend in _frontends(rules):
                touched.setdefault(frontend, set()).add(key)
        for frontend, keys in touched.items():
            if frontend in self._claimants:
                keys.update(each for each in self.of(frontend) if each not in changed)
        found = {frontend: keys for frontend, keys in touched.items() if len(keys) > 1}
        for frontend in self._contested - touched.keys():
            keys = {each for each in self.of(frontend) if each not in changed}
            if len(keys) > 1:
                found[frontend] = keys
        return found

    def _set(self, frontend: Frontend, keys: tuple[ServiceKey, ...]) -> None:
        if not keys:
            del self._claimants[frontend]
        else:
            self._claimants[frontend] = keys[0] if len(keys) == 1 else keys
        (self._contested.add if len(keys) > 1 else self._contested.discard)(frontend)


def _frontends(rules: Iterable[DispatchRule]) -> set[Frontend]:
    return {frontend for rule in rules if (frontend := frontend_of(rule)) is not None}
