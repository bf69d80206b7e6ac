"""Resolve conflicts over frontends: find the dispatch rules of service ports that do not own their frontend. Pure.

`kproxy.model.frontend_conflicts` defines which service port owns a frontend. The dispatch rules that other Services
have for this frontend are omitted. If they were written, the order of tables would decide: rules that forward traffic
are in table nat, rules that reject or drop it are in table filter, and packets traverse table nat first. For example, a
Service with endpoints would receive the traffic to the ClusterIP of a Service without endpoints.
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
"""A frontend, packed into one integer to save memory, because every Service has at least one frontend. The integer is
negative for a NodePort.
"""
DispatchRules: TypeAlias = Mapping[ServiceKey, Iterable[tuple[str, DispatchRule]]]
"""The dispatch rules of some Services. Each rule is paired with the name of its service port, `namespace/name:port`."""
_PROTOCOLS = ("tcp", "udp", "sctp")
_PORT_BITS = 16
_PROTOCOL_BITS = 2


class ConflictResolution(Struct, frozen=True):
    """The dispatch rules to omit because a port of another Service owns their frontend, and the conflicts."""

    omitted_rules: frozenset[DispatchRule] = frozenset()
    conflicts: tuple[FrontendConflict, ...] = ()


def frontend_of(rule: DispatchRule) -> Frontend | None:
    """Return the frontend that a dispatch rule matches, or None if the rule does not match a frontend."""
    match = rule.frontend
    if match is None:
        return None
    packed = _PROTOCOLS.index(match.protocol) << _PORT_BITS | match.port
    return ~packed if rule.protocol else rule.destination << (_PORT_BITS + _PROTOCOL_BITS) | packed


def resolve_conflicts(family: Family, frontends: Iterable[Frontend], rules: DispatchRules) -> ConflictResolution:
    """Resolve the conflicts over `frontends`.

    `rules` are all dispatch rules of the Services that use any of these frontends.
    """
    omitted_rules: set[DispatchRule] = set()
    conflicts: list[FrontendConflict] = []
    users: dict[Frontend, dict[str, list[DispatchRule]]] = {frontend: {} for frontend in frontends}
    for service_port, rule in (pair for pairs in rules.values() for pair in pairs):
        frontend = frontend_of(rule)
        if frontend in users:
            users[frontend].setdefault(service_port, []).append(rule)
    for frontend, rules_by_port in users.items():
        owner = min(rules_by_port, key=lambda service_port: (_rank(rules_by_port[service_port]), service_port))
        for loser in (port for port in rules_by_port if _service_of(port) != _service_of(owner)):
            omitted_rules.update(rules_by_port[loser])
            conflicts.append(FrontendConflict(_format_frontend(family, frontend), owner, loser))
    return ConflictResolution(frozenset(omitted_rules), tuple(sorted(conflicts)))


def _service_of(service_port: str) -> ServiceKey:
    return service_port.partition(":")[0]


def _rank(rules: Iterable[DispatchRule]) -> ClaimRank:
    return min(rule.frontend.rank for rule in rules if rule.frontend is not None)


def _format_frontend(family: Family, frontend: Frontend) -> str:
    packed = ~frontend if frontend < 0 else frontend
    port = packed & (1 << _PORT_BITS) - 1
    protocol = _PROTOCOLS[packed >> _PORT_BITS & (1 << _PROTOCOL_BITS) - 1].upper()
    if frontend < 0:
        return f"NodePort {port}/{protocol}"
    address = (packed >> (_PORT_BITS + _PROTOCOL_BITS)).to_bytes(16 if family is Family.IPV6 else 4, "big")
    return f"{socket_text(str(ip_address(address)), port)}/{protocol}"


class FrontendIndex:
    """For each frontend, the Services that use it according to the rules that the kernel has accepted."""

    def __init__(self) -> None:
        self._services: dict[Frontend, ServiceKey | tuple[ServiceKey, ...]] = {}
        self._shared: set[Frontend] = set()

    def update(self, key: ServiceKey, old: Iterable[DispatchRule], new: Iterable[DispatchRule]) -> None:
        """Update the index after the dispatch rules of a Service changed from `old` to `new`."""
        old_frontends, new_frontends = _frontends(old), _frontends(new)
        for frontend in old_frontends - new_frontends:
            self._set(frontend, tuple(other for other in self.services_of(frontend) if other != key))
        for frontend in new_frontends - old_frontends:
            self._set(frontend, (*self.services_of(frontend), key))

    def services_of(self, frontend: Frontend) -> tuple[ServiceKey, ...]:
        """Return the Services that use a frontend."""
        services = self._services.get(frontend, ())
        return services if isinstance(services, tuple) else (services,)

    def shared_frontends(self, changed: Mapping[ServiceKey, Iterable[DispatchRule]]) -> dict[Frontend, set[ServiceKey]]:
        """Return each frontend that several Services use, with these Services.

        `changed` are the new dispatch rules of some Services. They take precedence over the rules that the index has
        for these Services. The index itself does not change.
        """
        touched: dict[Frontend, set[ServiceKey]] = {}
        for key, rules in changed.items():
            for frontend in _frontends(rules):
                touched.setdefault(frontend, set()).add(key)
        for frontend, keys in touched.items():
            if frontend in self._services:
                keys.update(key for key in self.services_of(frontend) if key not in changed)
        shared = {frontend: keys for frontend, keys in touched.items() if len(keys) > 1}
        for frontend in self._shared - touched.keys():
            keys = {key for key in self.services_of(frontend) if key not in changed}
            if len(keys) > 1:
                shared[frontend] = keys
        return shared

    def _set(self, frontend: Frontend, keys: tuple[ServiceKey, ...]) -> None:
        if not keys:
            del self._services[frontend]
        else:
            self._services[frontend] = keys[0] if len(keys) == 1 else keys
        (self._shared.add if len(keys) > 1 else self._shared.discard)(frontend)


def _frontends(rules: Iterable[DispatchRule]) -> set[Frontend]:
    return {frontend for rule in rules if (frontend := frontend_of(rule)) is not None}
