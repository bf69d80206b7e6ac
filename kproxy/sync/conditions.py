"""The conditions of one family's Services once the kernel has accepted them, and what is worth telling. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.store import Store
from kproxy.model.sync_report import ConditionReason, ConditionTransition, ServiceCounts
from kproxy.model.types import Family, ServiceKey


class ServiceCondition(Struct, frozen=True, gc=False):
    """Why some connections to a Service fail, or reach it that should not.

    `rejected` are the names of its ports that have no endpoint anywhere, `dropped` of those that have endpoints, but
    none on this node where a traffic policy Local wants one; an unnamed port is "". `ports` counts all ports.
    `unrestricted` says that its load balancer addresses of this family are open to all sources although
    `loadBalancerSourceRanges` names some: these are all of the other family.
    """

    rejected: tuple[str, ...]
    dropped: tuple[str, ...]
    unrestricted: bool
    ports: int


def service_condition(plans: Sequence[ServicePortPlan]) -> ServiceCondition | None:
    """Return what is wrong with a Service, None if nothing is."""
    for plan in plans:
        if (
            plan.internal is not TrafficDecision.FORWARD
            or plan.external is not TrafficDecision.FORWARD
            or plan.unrestricted
        ):
            break
    else:
        return None
    return ServiceCondition(
        rejected=tuple(plan.port_name for plan in plans if not plan.has_endpoints),
        dropped=tuple(plan.port_name for plan in plans if TrafficDecision.DROP in (plan.internal, plan.external)),
        unrestricted=any(plan.unrestricted for plan in plans),
        ports=len(plans),
    )


class ConditionTracker:
    """Which Services are in a condition. Only these are remembered."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: dict[ServiceKey, ServiceCondition] = {}
        self._rejected = self._dropped = 0
        self._lost: set[ServiceKey] = set()
        self._conflicts: frozenset[FrontendConflict] = frozenset()
        self._losers: frozenset[ServiceKey] = frozenset()
        self._begun = False

    def troubled(self, examined: Collection[ServiceKey] | None) -> Collection[ServiceKey]:
        """Return the Services, of the `examined` ones or all, of which it would be told if their trouble ended."""
        if examined is None:
            return self._lost | self._losers
        return [key for key in examined if key in self._lost or key in self._losers]

    def counts(self, store: Store) -> ServiceCounts:
        """Return how many Services are in which condition."""
        return ServiceCounts(
            without_endpoints=self._rejected,
            dropped=self._dropped,
            in_conflict=len(self._losers),
            invalid=store.invalid_services,
            ignored=store.ignored_services,
        )

    def accept(
        self,
        found: Mapping[ServiceKey, ServiceCondition],
        examined: Collection[ServiceKey] | None,
        appeared: Collection[ServiceKey],
        conflicts: Collection[FrontendConflict],
        left: Collection[ServiceKey] = (),
    ) -> tuple[ConditionTransition, ...]:
        """Take in what a sync found once the kernel has accepted it, and return what is worth telling.

        `found` has the Services in a condition among the `examined` ones, None for all there are. Those that `appeared`
        since the last sync, or are there at the first one, may well be waiting for their first endpoint: that is no
        news. `conflicts` are all that there are now. Those of the `troubled` Services that `left` are deleted or served
        in the other family only: that their trouble is over is no news either.
        """
        notices = list(self._of_conflicts(frozenset(conflicts), left))
        gone = [
            key for key in (self._known if examined is None else examined) if key in self._known and key not in found
        ]
        for key in gone:
            self._put(key, None)
            if key in self._lost:
                self._lost.discard(key)
                if key not in left:
                    notices.append(self._notice(key, "EndpointsAvailable", "has endpoints again"))
        for key, condition in found.items():
            new = key in appeared or not self._begun
            notices += self._of_service(key, self._known.get(key), condition, new=new)
            self._put(key, condition)
        self._begun = True
        return tuple(notices)

    def _put(self, key: ServiceKey, condition: ServiceCondition | None) -> None:
        before = self._known.pop(key, None)
        if condition is not None:
            self._known[key] = condition
        self._rejected += bool(condition and condition.rejected) - bool(before and before.rejected)
        self._dropped += bool(condition and condition.dropped) - bool(before and before.dropped)

    def _of_service(
        self, key: ServiceKey, before: ServiceCondition | None, now: ServiceCondition, *, new: bool
    ) -> Iterator[ConditionTransition]:
        lost = set(now.rejected) - set(before.rejected if before else ())
        if lost and not new:
            self._lost.add(key)
            names = ", ".join(name for name in now.rejected if name)
            whole = len(now.rejected) == now.ports or not names
            which = "" if whole else f" at port{'s' if len(now.rejected) > 1 else ''} {names}"
            yield self._notice(key, "NoEndpoints", f"has no endpoints{which}: new connections are rejected")
        if not now.rejected and key in self._lost:
            self._lost.discard(key)
            yield self._notice(key, "EndpointsAvailable", "has endpoints again")
        if now.unrestricted and not (before and before.unrestricted):
            name = self._family.value
            yield self._notice(
                key,
                "SourceRangesIgnored",
                f"names no {name} range in loadBalancerSourceRanges: its {name} load balancer addresses are open to "
                f"all sources; add {name} ranges",
            )

    def _of_conflicts(
        self, now: frozenset[FrontendConflict], left: Collection[ServiceKey]
    ) -> Iterator[ConditionTransition]:
        if now == self._conflicts:
            return
        before, self._conflicts = self._conflicts, now
        self._losers = frozenset(_service_of(conflict.loser) for conflict in now)
        for each in sorted(now - before):
            text = f"{each.loser} and {each.owner} both claim {each.frontend}: traffic goes to {each.owner} only"
            yield ConditionTransition(_service_of(each.loser), "FrontendConflict", f"{self._family.value}: {text}")
        for each in sorted(conflict for conflict in before - now if _service_of(conflict.loser) not in left):
            text = f"{each.loser} no longer loses {each.frontend} to {each.owner}"
            yield ConditionTransition(_service_of(each.loser), "ConflictResolved", f"{self._family.value}: {text}")

    def _notice(self, key: ServiceKey, kind: ConditionReason, text: str) -> ConditionTransition:
        return ConditionTransition(key, kind, f"{self._family.value}: Service {key} {text}")


def _service_of(port_name: str) -> ServiceKey:
    return port_name.partition(":")[0]
