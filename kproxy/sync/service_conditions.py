"""Conditions of Services, such as ports without endpoints, and the transitions to report. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.store import Store
from kproxy.model.sync_report import ConditionReason, ConditionTransition, ServiceCounts
from kproxy.model.types import Family, ServiceKey


class ServiceCondition(Struct, frozen=True, gc=False):
    """Why some connections to a Service fail, or why unwanted clients can reach it.

    `rejected` are the names of the ports that have no usable endpoints. If a traffic policy of the Service is Local,
    `dropped` are the names of the ports that have usable endpoints, but none on this node. The name of an unnamed port
    is "". `unrestricted` means that the load balancer addresses of this family are open to all sources, because all
    `loadBalancerSourceRanges` belong to the other family. `ports` is the total number of ports.
    """

    rejected: tuple[str, ...]
    dropped: tuple[str, ...]
    unrestricted: bool
    ports: int


def service_condition(plans: Sequence[ServicePortPlan]) -> ServiceCondition | None:
    """Return the condition of a Service with these plans, or None if nothing is wrong with it."""
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
    """The current conditions of one family's Services. Services without a condition take no memory."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._conditions: dict[ServiceKey, ServiceCondition] = {}
        self._rejected = self._dropped = 0
        self._reported: set[ServiceKey] = set()
        """The Services whose lack of endpoints has been reported, but whose recovery has not been reported yet."""
        self._conflicts: frozenset[FrontendConflict] = frozenset()
        self._losers: frozenset[ServiceKey] = frozenset()
        self._has_synced = False

    def problems(self) -> dict[ServiceKey, str]:
        """Return the Services whose connections fail, with the reasons. Any thread may call this."""
        return {key: text for key, each in dict(self._conditions).items() if (text := _problem(each))}

    def reported(self, covered: Collection[ServiceKey] | None) -> Collection[ServiceKey]:
        """Return the Services in `covered` that have a reported problem. If `covered` is None, check all Services."""
        if covered is None:
            return self._reported | self._losers
        return [key for key in covered if key in self._reported or key in self._losers]

    def counts(self, store: Store) -> ServiceCounts:
        """Return the number of Services in each condition."""
        return ServiceCounts(
            without_endpoints=self._rejected,
            dropped=self._dropped,
            in_conflict=len(self._losers),
            invalid=store.invalid_services,
            ignored=store.ignored_services,
        )

    def update(
        self,
        conditions: Mapping[ServiceKey, ServiceCondition],
        covered: Collection[ServiceKey] | None,
        appeared: Collection[ServiceKey],
        conflicts: Collection[FrontendConflict],
        deleted: Collection[ServiceKey] = (),
    ) -> tuple[ConditionTransition, ...]:
        """Record the conditions after a successful sync. Return the transitions to report.

        `covered` are the Services that the sync covered; None means all Services. `conditions` contains the condition
        of each covered Service that has one. `conflicts` are all current conflicts.

        Missing endpoints are not reported for Services that `appeared` since the last sync, nor for any Service at the
        first sync, because these Services may still be waiting for their first endpoint. `deleted` are Services that no
        longer exist or no longer have a ClusterIP of this family. If they had a problem, its end is not reported.
        """
        transitions = list(self._update_conflicts(frozenset(conflicts), deleted))
        recovered = [
            key
            for key in (self._conditions if covered is None else covered)
            if key in self._conditions and key not in conditions
        ]
        for key in recovered:
            self._set(key, None)
            if key in self._reported:
                self._reported.discard(key)
                if key not in deleted:
                    transitions.append(self._transition(key, "EndpointsAvailable", "has endpoints again"))
        for key, condition in conditions.items():
            is_new = key in appeared or not self._has_synced
            transitions += self._compare(key, self._conditions.get(key), condition, is_new=is_new)
            self._set(key, condition)
        self._has_synced = True
        return tuple(transitions)

    def _set(self, key: ServiceKey, condition: ServiceCondition | None) -> None:
        before = self._conditions.pop(key, None)
        if condition is not None:
            self._conditions[key] = condition
        self._rejected += bool(condition and condition.rejected) - bool(before and before.rejected)
        self._dropped += bool(condition and condition.dropped) - bool(before and before.dropped)

    def _compare(
        self, key: ServiceKey, before: ServiceCondition | None, now: ServiceCondition, *, is_new: bool
    ) -> Iterator[ConditionTransition]:
        newly_rejected = set(now.rejected) - set(before.rejected if before else ())
        if newly_rejected and not is_new:
            self._reported.add(key)
            names = ", ".join(name for name in now.rejected if name)
            all_ports = len(now.rejected) == now.ports or not names
            ports = "" if all_ports else f" at port{'s' if len(now.rejected) > 1 else ''} {names}"
            yield self._transition(key, "NoEndpoints", f"has no endpoints{ports}: new connections are rejected")
        if not now.rejected and key in self._reported:
            self._reported.discard(key)
            yield self._transition(key, "EndpointsAvailable", "has endpoints again")
        if now.unrestricted and not (before and before.unrestricted):
            name = self._family.value
            yield self._transition(
                key,
                "SourceRangesIgnored",
                f"has no {name} range in loadBalancerSourceRanges: its {name} load balancer addresses are open to "
                f"all sources; add {name} ranges",
            )

    def _update_conflicts(
        self, now: frozenset[FrontendConflict], deleted: Collection[ServiceKey]
    ) -> Iterator[ConditionTransition]:
        if now == self._conflicts:
            return
        before, self._conflicts = self._conflicts, now
        self._losers = frozenset(_service_of(conflict.loser) for conflict in now)
        for each in sorted(now - before):
            text = f"{each.loser} and {each.owner} both claim {each.frontend}: traffic goes to {each.owner} only"
            yield ConditionTransition(_service_of(each.loser), "FrontendConflict", f"{self._family.value}: {text}")
        for each in sorted(conflict for conflict in before - now if _service_of(conflict.loser) not in deleted):
            text = f"{each.loser} no longer loses {each.frontend} to {each.owner}"
            yield ConditionTransition(_service_of(each.loser), "ConflictResolved", f"{self._family.value}: {text}")

    def _transition(self, key: ServiceKey, reason: ConditionReason, text: str) -> ConditionTransition:
        return ConditionTransition(key, reason, f"{self._family.value}: Service {key} {text}")


def _problem(condition: ServiceCondition) -> str:
    """Return why connections to a Service fail, or ""."""
    texts = []
    for names, text in (
        (condition.rejected, "has no endpoints"),
        (condition.dropped, "has no endpoints on this node, and a traffic policy is Local"),
    ):
        if names:
            named = ", ".join(name for name in names if name)
            texts.append(f"{text} (port {named})" if named and len(names) < condition.ports else text)
    return "; ".join(texts)


def _service_of(port_name: str) -> ServiceKey:
    return port_name.partition(":")[0]
