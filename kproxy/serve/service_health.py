"""Which Services have a health check port, where it listens and what it tells: follows the syncs.

What counts are ready endpoints on this node, each address once however many ports it serves. An endpoint that
terminates still gets traffic when there is no other, but load balancers shall send new connections elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.delta import Kind
from kproxy.model.plan import ServicePortPlan
from kproxy.model.store import Changed
from kproxy.model.types import Family, ServiceKey
from kproxy.serve.health_ports import ServiceHealth
from kproxy.serve.listen import Address
from kproxy.serve.observed import Sync

WILDCARDS = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104 - health check ports answer where NodePorts do

Update: TypeAlias = Callable[[Mapping[ServiceKey, ServiceHealth | None]], None]


class FamilyHealth(Struct, frozen=True):
    """What one family says of a Service. `hosts` are the addresses that NodePorts answer on, None for all."""

    port: int
    hosts: tuple[str, ...] | None
    endpoints: int
    dual_stack: bool


class ServiceHealthObserver:
    """Follows the syncs and passes on what changed to `update`, which must neither block nor raise."""

    def __init__(self, families: Iterable[Family], update: Update) -> None:
        self._update = update
        self._known: dict[Family, dict[ServiceKey, FamilyHealth]] = {family: {} for family in families}

    def queued(self, family: Family, now: float) -> None:
        """Do nothing: what is not in the kernel yet cannot be told."""

    def changed(self, kind: Kind, changed: Changed) -> None:
        """Do nothing: what is not in the kernel yet cannot be told."""

    def synced(self, sync: Sync) -> None:
        """Take in what is in the kernel now."""
        if sync.context is None:  # it failed
            return
        known = self._known[sync.family]
        found = {key: family_health(plans, sync.context) for key, plans in sync.plans.items()}
        if sync.complete:
            found.update(dict.fromkeys(known.keys() - found.keys()))
        touched = [key for key, health in found.items() if health != known.get(key)]
        for key in touched:
            health = found[key]
            if health is None:
                del known[key]
            else:
                known[key] = health
        if touched:
            self._update({key: self._merged(key) for key in touched})

    def _merged(self, key: ServiceKey) -> ServiceHealth | None:
        families = {family: services[key] for family, services in self._known.items() if key in services}
        return service_health(families) if families else None


def family_health(plans: Sequence[ServicePortPlan], context: Context) -> FamilyHealth | None:
    """Return what a family's plans of one Service say, None if it has no health check port."""
    if not plans or not plans[0].health_check_node_port:
        return None
    ready = {address for plan in plans for address in plan.local_ready}
    return FamilyHealth(plans[0].health_check_node_port, context.node_port_addresses, len(ready), plans[0].dual_stack)


def service_health(families: Mapping[Family, FamilyHealth]) -> ServiceHealth:
    """Return where a Service's health is asked for, and what each family answers there.

    Each family of a dual-stack Service answers for its own endpoints: a load balancer of one family must not send
    connections to a node that could serve only the other, even while nothing is known of the other yet. A Service of
    one family whose NodePorts answer on all addresses is asked about on those of both.
    """
    if len(families) == 1:
        (health,) = families.values()
        if health.hosts is None and not health.dual_stack:
            return ServiceHealth({Address("", health.port): health.endpoints})
    return ServiceHealth(
        {
            Address(host, health.port, one_family=True): health.endpoints
            for family, health in families.items()
            for host in (health.hosts if health.hosts is not None else (WILDCARDS[family],))
        }
    )
