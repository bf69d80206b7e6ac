"""The outcomes that a packet may have at any moment, given the states of the objects that kproxy has seen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, plan_service
from kproxy.model.store import Store
from kproxy.model.types import Family, ServiceKey
from tests.simulation.outcomes import DROP, NONE, REJECT, Frontend, frontends, planned_outcomes

Plans = tuple[ServicePortPlan, ...]


class Version:
    """The plans of one version of a Service, its frontends, and the outcomes that were computed before."""

    __slots__ = ("_outcomes", "claims", "endpoints", "plans")

    def __init__(self, plans: Plans) -> None:
        self.plans = plans
        self.claims = frontends(plans)
        self.endpoints: dict[tuple[str, str], frozenset[str]] = {
            (plan.port_name, plan.protocol): frozenset((*plan.cluster_endpoints, *plan.local_endpoints))
            for plan in plans
        }
        self._outcomes: dict[tuple[Frontend, str], set[str]] = {}

    def outcomes(self, frontend: Frontend, source: str, *, local_pod: bool) -> set[str]:
        """Return the outcomes of a packet to a frontend that this version claims."""
        found = self._outcomes.get((frontend, source))
        if found is None:
            found = set()
            for plan in self.claims[frontend]:
                found |= planned_outcomes(plan, frontend, source, local_pod=local_pod)
            self._outcomes[frontend, source] = found
        return found


class Mark(NamedTuple):
    """The index of the current version of each Service, and of the current context."""

    services: dict[ServiceKey, int]
    context: int


class Expectations:
    """The plans that each Service of one family may have in the kernel.

    These are the plans that the last finished sync may have programmed, and all later ones. A Service that the kernel
    rejected keeps its older plans. They outlive kproxy's process, as the rules do.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self._versions: dict[ServiceKey, list[Version]] = {}
        self._contexts: list[Context] = []
        self._lost: set[ServiceKey] = set()

    def record(self, store: Store, context: Context, keys: Collection[ServiceKey] | None) -> None:
        """Record the current plans of the given Services, or of all Services if `keys` is None."""
        if not self._contexts or self._contexts[-1] != context:
            self._contexts.append(context)
            keys = None
        every = dict.fromkeys((*self._versions, *store.service_keys())) if keys is None else keys
        for key in every:
            service = store.service(key)
            slices = store.slices(key) if service else ()
            versions = self._versions.setdefault(key, [Version(())])
            # A sync or repair may still use an older context, but reads the current objects.
            for each in self._contexts:
                plans = plan_service(service, slices, each) if service else ()
                if versions[-1].plans != plans:
                    versions.append(Version(plans))

    def mark(self) -> Mark:
        """Return the current version of each Service and of the context, at the start of a sync."""
        return Mark({key: len(versions) - 1 for key, versions in self._versions.items()}, len(self._contexts) - 1)

    def finish(self, mark: Mark, rejected: Collection[ServiceKey]) -> None:
        """Record that a sync, which began at `mark`, programmed all Services except the `rejected` ones."""
        self._lost &= set(rejected)
        for key, index in mark.services.items():
            if key not in rejected and index > 0:
                del self._versions[key][:index]
        del self._contexts[: max(0, mark.context)]

    def lose(self, key: ServiceKey) -> None:
        """Record that nothing is known about the rules of a Service, until the kernel accepts it again."""
        self._lost.add(key)

    def known_frontends(self) -> list[Frontend]:
        """Return all frontends that any Service may have, except those of which nothing is known."""
        found = {each: None for versions in self._versions.values() for one in versions for each in one.claims}
        for key in self._lost:
            for version in self._versions.get(key, ()):
                for each in version.claims:
                    found.pop(each, None)
        return list(found)

    def allowed(self, frontend: Frontend, source: str, *, local_pod: bool, mixed: bool) -> set[str]:
        """Return the outcomes that a packet may have.

        With `mixed`, a frontend of one version of a Service may lead to the endpoints of another version.
        """
        found: set[str] = set()
        unclaimed = True
        for versions in self._versions.values():
            claiming = [each for each in versions if frontend in each.claims]
            unclaimed = unclaimed and len(claiming) < len(versions)
            for version in claiming:
                found |= version.outcomes(frontend, source, local_pod=local_pod)
                if mixed and len(versions) > 1:
                    ports = [(plan.port_name, plan.protocol) for plan in version.claims[frontend]]
                    found.update(*(each.endpoints.get(port, ()) for each in versions for port in ports))
        if unclaimed:
            # nftables mode rejects packets to other ports of a ClusterIP, and drops those to unassigned ClusterIPs.
            found |= {NONE, REJECT, DROP}
        return found

    def describe(self, frontend: Frontend) -> Iterator[str]:
        """Describe the plans of a frontend."""
        for key, versions in self._versions.items():
            for version in versions:
                yield from (f"{key}: {plan}" for plan in version.claims.get(frontend, ()))
