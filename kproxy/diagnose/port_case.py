"""One port of a Service with its plans, and the frontends that other Services claim, too. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.explain_facts import Facts, TrackedFlow
from kproxy.model.addresses import socket_text
from kproxy.model.endpoints import endpoints_by_socket
from kproxy.model.frontend_conflicts import ClaimRank, FrontendConflict, external_rank
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import Endpoint, Family, Service, ServicePort


class PortCase(Struct, frozen=True):
    """One port of the Service with its plans, and what it lost to other Services."""

    index: int
    port: ServicePort
    plans: dict[Family, ServicePortPlan]
    lost_in: dict[Family, tuple[FrontendConflict, ...]]
    won: tuple[FrontendConflict, ...]

    @property
    def lost(self) -> tuple[FrontendConflict, ...]:
        """The frontends that belong to other Services, in all families."""
        return tuple(each for family in self.plans for each in self.lost_in[family])

    def only(self, family: Family) -> PortCase:
        """Return the same port in one of its families."""
        return replace(self, plans={family: self.plans[family]})


def cases_of(facts: Facts, service: Service) -> Iterator[PortCase]:
    """Yield the ports of a Service, in the order of `spec.ports`."""
    plans = facts.plans()
    others = {family: list(facts.other_plans(family)) for family in plans}
    for index, port in enumerate(service.ports):
        own = {family: each[index] for family, each in plans.items()}
        conflicts = {
            family: (*_conflicts(plan, others[family]), *_kernel_conflicts(facts, plan)) for family, plan in own.items()
        }
        lost = {
            family: tuple(each for each in found if each.owner != own[family].name)
            for family, found in conflicts.items()
        }
        won = tuple(each for family, found in conflicts.items() for each in found if each not in lost[family])
        yield PortCase(index, port, own, lost, won)


def claimed_frontends(plan: ServicePortPlan) -> Iterator[tuple[str, tuple[ClaimRank, str]]]:
    """Yield the frontends of a port, as `FrontendConflict` names them, and its claim to each. The lowest claim wins."""
    rank = external_rank(plan)
    yield f"{socket_text(plan.cluster_ip, plan.port)}/{plan.protocol}", (ClaimRank.CLUSTER_IP, plan.name)
    for address in (*plan.external_ips, *plan.vips):
        yield f"{socket_text(address, plan.port)}/{plan.protocol}", (rank, plan.name)
    if plan.node_port:
        yield f"NodePort {plan.node_port}/{plan.protocol}", (rank, plan.name)


def _conflicts(plan: ServicePortPlan, others: Iterable[ServicePortPlan]) -> Iterator[FrontendConflict]:
    """Yield the frontends that this port and ports of other Services claim, as `FrontendConflict` describes them."""
    theirs = [claim for other in others for claim in claimed_frontends(other)]
    for frontend, claim in dict(claimed_frontends(plan)).items():
        rivals = [each for name, each in theirs if name == frontend]
        if rivals:
            best = min(rivals)
            owner, loser = (best[1], plan.name) if best < claim else (plan.name, best[1])
            yield FrontendConflict(frontend, owner, loser)


def _kernel_conflicts(facts: Facts, plan: ServicePortPlan) -> Iterator[FrontendConflict]:
    """Yield the frontends that belong to others in the kernel, if the other Services could not be seen."""
    if facts.kernel is None or (facts.objects is not None and facts.objects.sees_all_services):
        return
    for frontend in dict(claimed_frontends(plan)):
        if owner := facts.kernel.owners.get(frontend):
            yield FrontendConflict(frontend, owner, plan.name)


def known_endpoints(facts: Facts, case: PortCase, family: Family) -> dict[str, Endpoint]:
    """Return all endpoints of a port in one family, by `ip:port`."""
    ordered = sorted(facts.slices, key=lambda each: each.name)
    return endpoints_by_socket(ordered, family, case.port.name, case.port.protocol)


def own_flows(facts: Facts, case: PortCase, *, stale: bool) -> Iterator[TrackedFlow]:
    """Yield the tracked connections to the frontends of a port."""
    for flow in facts.flows:
        plan = case.plans.get(flow.family)
        if plan is not None and flow.protocol == plan.protocol and flow.stale is stale:
            frontends = {name.partition("/")[0].replace("NodePort ", ":") for name, _ in claimed_frontends(plan)}
            if flow.frontend in frontends:
                yield flow
