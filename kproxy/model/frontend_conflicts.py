"""Decide which service port owns a frontend that several Services claim. Pure.

The API server keeps ClusterIPs and NodePorts unique, but not external IPs and load balancer addresses: two Services can
have the same one, or one can name the ClusterIP of another (CVE-2020-8554). In both modes one service port owns the
frontend, and the others receive none of its traffic:

1. A ClusterIP belongs to its Service, even while that Service has no endpoints.
2. Otherwise, a service port that can forward traffic on this node comes before one that must drop or reject it.
3. Of several such ports, the first by name (`namespace/name:port`) owns the frontend.
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
    """Two service ports that claim one frontend: `owner` receives its traffic, `loser` receives none of it.

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
