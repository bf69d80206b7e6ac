"""NodePorts on the loopback addresses in nftables mode: what listens, and to which endpoint a connection goes. Pure.

The kernel cannot forward packets between a loopback address and a pod without `route_localnet`. kproxy therefore
accepts these connections itself and opens a connection to an endpoint for each of them (KEP-6032).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family

LISTEN_ADDRESSES = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
"""The addresses on which kproxy accepts connections to NodePorts, whatever loopback range is configured."""
LOOPBACK_NETWORKS = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}
DRAIN_SECONDS = 1.0
"""How long existing connections may continue after the daemon has received the signal to stop."""
MAX_DIALS = 3
"""Maximum number of endpoints that are tried for one connection."""


class LocalhostListener(Struct, frozen=True):
    """What kproxy does with connections to one NodePort on the loopback address of an IP family.

    `affinity_seconds` is the timeout of session affinity; 0 means none.
    """

    port: int
    endpoints: Sockets
    affinity_seconds: int = 0


def forwards_locally(plan: ServicePortPlan) -> bool:
    """Return whether connections to the NodePort on the loopback address are forwarded.

    With external traffic policy Local, only endpoints on this node count, as in kube-proxy.
    """
    return bool(plan.node_port and plan.protocol == "TCP" and plan.external is TrafficDecision.FORWARD)


def proxied_address(context: Context, plan: ServicePortPlan) -> str:
    """Return the loopback address on which kproxy serves the NodePort of a plan, or "" if it does not serve it."""
    served = context.localhost_traffic in {"proxy", "proxy-hold"} and forwards_locally(plan)
    return LISTEN_ADDRESSES[context.family] if served else ""


def localhost_listeners(plans: Iterable[ServicePortPlan]) -> tuple[LocalhostListener, ...]:
    """Return the listeners that the ports of one Service need."""
    return tuple(
        LocalhostListener(
            plan.node_port,
            plan.local_endpoints if plan.external_local else plan.cluster_endpoints,
            plan.affinity_seconds,
        )
        for plan in plans
        if forwards_locally(plan)
    )


class EndpointChoice:
    """Chooses the endpoints for the connections to one listener.

    All connections to a loopback address have the same source address. Session affinity therefore binds all of them to
    one endpoint, until no connection has been opened for the length of the timeout. `draw` picks a random item.
    """

    def __init__(self, listener: LocalhostListener, draw: Callable[[Sequence[str]], str]) -> None:
        self._listener = listener
        self._draw = draw
        self._pinned = ""
        self._used = 0.0

    def update(self, listener: LocalhostListener) -> None:
        """Use other endpoints or another timeout from now on.

        The bound endpoint is forgotten if it is no longer an endpoint, or if the timeout has changed.
        """
        if listener.affinity_seconds != self._listener.affinity_seconds or self._pinned not in listener.endpoints:
            self._pinned = ""
        self._listener = listener

    def choose(self, tried: Collection[str], now: float) -> str:
        """Return an endpoint for a connection, or "" if no further one should be tried.

        `tried` are the endpoints that this connection could not reach. `now` is a monotonic time in seconds.
        """
        if len(tried) >= MAX_DIALS:
            return ""
        timeout, chosen = self._listener.affinity_seconds, self._pinned
        if not chosen or chosen in tried or now - self._used > timeout:
            endpoints = self._listener.endpoints
            untried = [each for each in endpoints if each not in tried] if tried else endpoints
            chosen = self._draw(untried) if untried else ""
        if timeout and chosen:
            self._pinned, self._used = chosen, now
        return chosen
