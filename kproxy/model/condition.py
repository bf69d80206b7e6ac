"""What keeps Services, in one family, from serving everybody that their users expect. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from kproxy.model.plan import Decision, ServicePortPlan


class Condition(Struct, frozen=True, gc=False):
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


class Tally(Struct, frozen=True):
    """How many Services of a family are in a condition, or in none because they are not served.

    `without_endpoints` have a port without any endpoint, `dropped` one without an endpoint on this node under policy
    Local, `in_conflict` lose a frontend to another Service. `refused` are objects that could not be used, `ignored` are
    headless or ExternalName Services, or those of another proxy, as far as files have them: the API server is asked not
    to send them.
    """

    without_endpoints: int = 0
    dropped: int = 0
    in_conflict: int = 0
    refused: int = 0
    ignored: int = 0


def condition_of(plans: Sequence[ServicePortPlan]) -> Condition | None:
    """Return what is wrong with a Service, None if nothing is."""
    for plan in plans:
        if plan.internal is not Decision.FORWARD or plan.external is not Decision.FORWARD or plan.unrestricted:
            break
    else:
        return None
    return Condition(
        rejected=tuple(plan.port_name for plan in plans if not plan.has_endpoints),
        dropped=tuple(plan.port_name for plan in plans if Decision.DROP in (plan.internal, plan.external)),
        unrestricted=any(plan.unrestricted for plan in plans),
        ports=len(plans),
    )
