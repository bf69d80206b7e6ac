"""Decide which service port owns a frontend that several Services claim. Pure.

The API server keeps ClusterIPs and NodePorts unique, but not external IPs and load balancer addresses: two Services can
have the same external IP, and the external IP of one Service can be the ClusterIP of another (CVE-2020-8554). In both
proxy modes, one service port owns the frontend, and the other service ports receive none of its traffic:

1. A ClusterIP belongs to its Service, even while that Service has no endpoints.
2. For any other frontend, a service port that forwards traffic on this node ranks first. A service port that drops
   traffic ranks second, and one that rejects traffic ranks last.
3. Among service ports of equal rank, the first one by name (`namespace/name:port`) owns the frontend.
"""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct

from kproxy.model.plan import ServicePortPlan, TrafficDecision


class ClaimRank(IntEnum):
    """The rank of a claim to a frontend. The claim with the lowest rank owns the frontend."""

    CLUSTER_IP = 0
    FORWARDS = 1
    DROPS = 2
    REJECTS = 3


class FrontendConflict(Struct, frozen=True, order=True):
    """Two service ports that claim the same frontend: `owner` receives all of its traffic, `loser` receives none.

    `frontend` is `IP:port/PROTOCOL` or `NodePort number/PROTOCOL`; service ports are `namespace/name:port`.
    """

    frontend: str
    owner: str
    loser: str


_RANKS = {
    TrafficDecision.FORWARD: ClaimRank.FORWARDS,
    TrafficDecision.DROP: ClaimRank.DROPS,
    TrafficDecision.REJECT: ClaimRank.REJECTS,
}


def external_rank(plan: ServicePortPlan) -> ClaimRank:
    """Return the rank of a service port's claim to its external IPs, load balancer addresses and NodePort."""
    return _RANKS[plan.external]
