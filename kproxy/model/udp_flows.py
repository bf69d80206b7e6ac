"""Which UDP flows the kernel should forget: those that go where no new flow to the same frontend would go.

Rules decide about the first packet of a flow only; connection tracking repeats that decision for as long as packets
come. A UDP client that keeps sending from one port thus never learns that its endpoint is gone. Flows and frontends
are named by `ip:port` texts; a NodePort is the frontend `:port`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.context import Context
from kproxy.model.frontend_conflicts import ClaimRank, external_rank
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family, ServiceKey

Endpoints = frozenset[str]


class UdpFrontend(NamedTuple):
    """One UDP frontend: the endpoints that its flows may keep, which clients its rules translate, and whose it is.

    Of several Services with the same frontend, the one with the least `claim` holds it
    (`kproxy.model.frontend_conflicts`).

    `translates` compares equal as long as the same clients are sent to an endpoint at all. The packets of all others
    are meant to be rejected or dropped, but rules that come before ours may accept them: they then leave the node
    untranslated, and so does everything that follows on the same flow.
    """

    endpoints: Endpoints
    translates: tuple[object, ...]
    claim: tuple[int, str]


class UdpFrontends:
    """The UDP frontends of one family that the kernel has accepted, and which of them may have stale flows.

    A frontend is under suspicion when it is new, is gone, has lost an endpoint, passes to another Service, or
    translates the packets of other clients than before (its decision, or who is allowed to use it, changed). It stays
    so until `cleaned`. Nothing is kept about other protocols.
    """

    def __init__(self) -> None:
        self._services: dict[ServiceKey, dict[str, UdpFrontend]] = {}
        self._owners: dict[str, set[ServiceKey]] = {}
        self._holders: dict[str, ServiceKey] = {}
        self._suspects: set[str] = set()

    @property
    def suspects(self) -> Collection[str]:
        """The frontends whose flows are to be looked at."""
        return self._suspects

    def accept(self, plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], *, complete: bool) -> None:
        """Take in the plans that the kernel has accepted: of all Services if `complete`, else of some.

        A complete set puts all frontends under suspicion: whatever came before (an earlier process, a failed sync)
        may have left flows that nothing here knows of.
        """
        if complete:
            for key in self._services.keys() - plans.keys():
                self._replace(key, {})
        for key, ports in plans.items():
            self._replace(key, udp_frontends(ports))
        if complete:
            self._suspects.update(self._owners)

    def cleaned(self) -> None:
        """Note that no suspect has stale flows any more."""
        self._suspects.clear()

    def is_stale(self, destination: str, source: str, accepts_node_ports: Callable[[str], bool]) -> bool:
        """Return whether flows to `destination` that `source` answers are stale; those of others than suspects are not.

        At a frontend that exists, whatever is not one of its endpoints is stale: an endpoint that is gone, or the
        frontend itself, when a client sent to it before it was one. At a frontend that is gone, what is not
        translated is left alone: it belongs to whoever has the address or port now. `accepts_node_ports` says
        whether NodePorts answer on an address; others' flows to the same port number are none of ours.
        """
        address, port = split_socket_text(destination)
        node_port = socket_text("", port)
        frontends = [destination]
        if (node_port in self._suspects or node_port in self._owners) and accepts_node_ports(address):
            frontends.append(node_port)
        if self._suspects.isdisjoint(frontends):
            return False
        # The rules for addresses come before those for NodePorts.
        living = next((frontend for frontend in frontends if frontend in self._owners), None)
        if living is None:
            return source != destination
        return source not in self._services[self._holders[living]][living].endpoints

    def _replace(self, key: ServiceKey, new: dict[str, UdpFrontend]) -> None:
        old = self._services.pop(key, {})
        if new:
            self._services[key] = new
        for frontend in old.keys() - new.keys():
            self._suspects.add(frontend)
            self._leave(frontend, key)
        for frontend, state in new.items():
            before = old.get(frontend)
            if (
                before is None
                or before.translates != state.translates
                or not before.endpoints <= state.endpoints
                # Without endpoints, the node's own packets to NodePorts and external addresses leave untranslated.
                or not before.endpoints
            ):
                self._suspects.add(frontend)
            self._owners.setdefault(frontend, set()).add(key)
            self._settle(frontend, key, worse=before is not None and before.claim < state.claim)

    def _leave(self, frontend: str, key: ServiceKey) -> None:
        owners = self._owners[frontend]
        owners.discard(key)
        if not owners:
            del self._owners[frontend], self._holders[frontend]
        elif self._holders[frontend] == key:
            self._holders[frontend] = self._best(frontend, owners)

    def _settle(self, frontend: str, key: ServiceKey, *, worse: bool) -> None:
        """Find out who holds a frontend after one of its owners has changed; `worse` says that its claim is now."""
        holder = self._holders.setdefault(frontend, key)
        if holder != key:
            best = self._best(frontend, (holder, key))
        elif worse:
            best = self._best(frontend, self._owners[frontend])
        else:
            return
        if best != holder:
            self._holders[frontend] = best
            self._suspects.add(frontend)

    def _best(self, frontend: str, keys: Iterable[ServiceKey]) -> ServiceKey:
        return min(keys, key=lambda key: self._services[key][frontend].claim)


def udp_frontends(ports: Sequence[ServicePortPlan]) -> dict[str, UdpFrontend]:
    """Return the UDP frontends of a Service.

    An endpoint that still serves keeps its flows, although new ones may go elsewhere: while it terminates, or when
    hints or policy have changed.
    """
    found: dict[str, UdpFrontend] = {}
    for plan in ports:
        if plan.protocol != "UDP":
            continue
        serving = frozenset(plan.serving_endpoints)
        cluster, local = serving.union(plan.cluster_endpoints), serving.union(plan.local_endpoints)
        own = (ClaimRank.CLUSTER_IP, plan.name)
        internal = UdpFrontend(
            local if plan.internal_local else cluster, (plan.internal is TrafficDecision.FORWARD,), own
        )
        found[socket_text(plan.cluster_ip, plan.port)] = internal
        # Pods and the node itself may reach a policy Local frontend's other endpoints too.
        endpoints = cluster | local if plan.external_local else cluster
        everybody = (plan.external is TrafficDecision.FORWARD, bool(plan.cluster_endpoints))
        claim = (external_rank(plan), plan.name)
        external = restricted = UdpFrontend(endpoints, everybody, claim)
        if plan.source_ranges:
            restricted = UdpFrontend(endpoints, (*everybody, plan.source_ranges, plan.vips_are_sources), claim)
        others = {socket_text(address, plan.port): external for address in plan.external_ips}
        others |= {socket_text(address, plan.port): restricted for address in plan.vips}
        found = others | found  # what a Service has as its ClusterIP, it needs not claim by another name
        if plan.node_port:
            found[socket_text("", plan.node_port)] = external
    return found


def accepts_node_ports(context: Context, address: str, own_addresses: Callable[[], Collection[str]]) -> bool:
    """Return whether NodePorts answer on an address.

    `own_addresses` tells the addresses of this machine; it is called only if it matters. Loopback addresses count
    only with localhost NodePorts, which IPv6 does not have.
    """
    if context.node_port_addresses is not None:
        return address in context.node_port_addresses
    if ip_address(address).is_loopback:
        return context.localhost_node_ports and context.family is Family.IPV4
    return address in own_addresses()
