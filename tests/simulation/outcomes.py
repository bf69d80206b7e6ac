"""What may happen to the packets of a frontend, according to the plans. Pure."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family

DROP, REJECT, NONE = "drop", "reject", "none"
"""Outcomes of a packet. NONE means that no rule handles it. Every other outcome is the endpoint that gets it."""
LOCAL_PODS = {Family.IPV4: "10.244.0.0/16", Family.IPV6: "fd00:1::/64"}
"""The addresses of the pods on this node, which rules detect by this range."""
SOURCES = {
    Family.IPV4: ("198.51.100.7", "192.0.2.77", "10.244.0.200"),
    Family.IPV6: ("2001:db8:100::7", "2001:db8:77::7", "fd00:1::200"),
}
"""A client inside of the source ranges, another one outside of them, and a pod on this node."""


class Frontend(NamedTuple):
    """A destination of packets. `address` is "" for a NodePort."""

    address: str
    protocol: str
    port: int

    def __str__(self) -> str:
        return f"{self.address or 'NodePort'}:{self.port}/{self.protocol}"


@lru_cache(1 << 12)
def parsed_network(text: str) -> IPv4Network | IPv6Network:
    """Return a parsed CIDR."""
    return ip_network(text)


@lru_cache(1 << 12)
def parsed_address(text: str) -> IPv4Address | IPv6Address:
    """Return a parsed address."""
    return ip_address(text)


@lru_cache(1 << 14)
def contains(network: str, address: str) -> bool:
    """Return whether a network contains an address."""
    return parsed_address(address) in parsed_network(network)


def frontends(plans: tuple[ServicePortPlan, ...]) -> dict[Frontend, tuple[ServicePortPlan, ...]]:
    """Return the frontends of a Service with the plans that claim each of them."""
    found: dict[Frontend, tuple[ServicePortPlan, ...]] = {}
    for plan in plans:
        addresses = dict.fromkeys((plan.cluster_ip, *plan.external_ips, *plan.vips))
        claimed = [Frontend(address, plan.protocol, plan.port) for address in addresses]
        if plan.node_port:
            claimed.append(Frontend("", plan.protocol, plan.node_port))
        for frontend in claimed:
            found[frontend] = (*found.get(frontend, ()), plan)
    return found


def planned_outcomes(plan: ServicePortPlan, frontend: Frontend, source: str, *, local_pod: bool) -> set[str]:
    """Return the possible outcomes of a packet to a frontend that a plan claims."""
    outcomes: set[str] = set()
    if frontend.address == plan.cluster_ip:
        outcomes |= _internal(plan)
    if not frontend.address or frontend.address in (*plan.external_ips, *plan.vips):
        restricted = frontend.address in plan.vips and bool(plan.source_ranges)
        refused = restricted and not any(contains(each, source) for each in plan.source_ranges)
        if refused:
            outcomes |= {DROP} if plan.has_endpoints else {DROP, REJECT}
        # iptables mode does not restrict an address that is also an external IP.
        if not refused or frontend.address in plan.external_ips:
            outcomes |= _external(plan, local_pod=local_pod)
    return outcomes


def _internal(plan: ServicePortPlan) -> set[str]:
    if plan.internal is not TrafficDecision.FORWARD:
        return {DROP if plan.internal is TrafficDecision.DROP else REJECT}
    return set(plan.local_endpoints if plan.internal_local else plan.cluster_endpoints)


def _external(plan: ServicePortPlan, *, local_pod: bool) -> set[str]:
    if not plan.has_endpoints:
        return {REJECT if plan.external is TrafficDecision.REJECT else DROP}
    if not plan.external_local or local_pod:
        return set(plan.cluster_endpoints)
    return {DROP} if plan.external is TrafficDecision.DROP else set(plan.local_endpoints)
