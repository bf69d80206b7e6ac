"""Who gets the traffic of an address and port that several Services claim.

The API server keeps ClusterIPs and NodePorts unique, but not external IPs and load balancer addresses: two Services may
have the same one, or one may name another's ClusterIP (CVE-2020-8554). In both modes, one service port holds the whole
frontend and the others get nothing there:

1. A ClusterIP belongs to its Service, even while that has no endpoints.
2. Of the others, one that can forward traffic on this node comes before one that must drop or reject it.
3. Among equals, the first by name (`namespace/name:port`) holds it.
"""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from kproxy.model.plan import ServicePortPlan, TrafficDecision


class ClaimRank(IntEnum):
    """How good a claim is; the lowest holds the frontend."""

    CLUSTER_IP = 0
    FORWARDS = 1
    DROPS = 2
    REJECTS = 3


class FrontendConflict(Struct, frozen=True, order=True):
    """Two service ports that claim one frontend: `holder` gets its traffic, `loser` none of it.

    `frontend` is `IP:port/PROTOCOL`, or `NodePort number/PROTOCOL`; service ports are `namespace/name:port`.
    """

    frontend: str
    holder: str
    loser: str


_RANKS = {
    TrafficDecision.FORWARD: ClaimRank.FORWARDS,
    TrafficDecision.DROP: ClaimRank.DROPS,
    TrafficDecision.REJECT: ClaimRank.REJECTS,
}


def external_rank(plan: ServicePortPlan) -> ClaimRank:
    """Return the rank of a plan's claim to its external IPs, load balancer addresses and NodePort."""
    return _RANKS[plan.external]
