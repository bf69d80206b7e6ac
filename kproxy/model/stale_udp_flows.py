"""Find stale UDP conntrack entries, which send packets to something other than an endpoint of their frontend. Pure.

NAT rules process only the first packet of a flow. Connection tracking translates all later packets in the same way, for
as long as packets keep arriving. A UDP client that keeps sending from the same port therefore stays with its endpoint,
even after that endpoint is gone.

Flows and frontends are identified by `ip:port` strings. A NodePort is the frontend `:port`, without an address.
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


class UdpFrontend(NamedTuple):
    """One UDP frontend of a Service.

    Flows to any of the `endpoints` may continue. If several Services have the same frontend, the Service with the
    lowest `claim` owns it (`kproxy.model.frontend_conflicts`).

    `translated_clients` is an opaque value. It changes whenever the set of clients whose packets are sent to an
    endpoint changes. kproxy's rules reject or drop packets from all other clients, but an earlier rule of another
    program may accept a packet from one of them. This packet then leaves the node untranslated, and so do all later
    packets of its flow. If packets of that client are translated later, the flow is stale: a change of this value
    therefore makes the frontend `unchecked`.
    """

    endpoints: frozenset[str]
    translated_clients: tuple[object, ...]
    claim: tuple[int, str]


class UdpFrontends:
    """The UDP frontends of one family that are in the kernel, and the frontends that may have stale flows.

    A frontend may have stale flows if an update created or deleted it, removed one of its endpoints, or made another
    Service its owner. It may also have stale flows if it had no endpoints before the update, or if the update changed
    the set of clients whose packets are translated. Frontends of other protocols are ignored.
    """

    def __init__(self) -> None:
        self._services: dict[ServiceKey, dict[str, UdpFrontend]] = {}
        self._claimants: dict[str, set[ServiceKey]] = {}
        self._owners: dict[str, ServiceKey] = {}
        self._unchecked: set[str] = set()

    @property
    def unchecked(self) -> Collection[str]:
        """The frontends that may have stale flows."""
        return self._unchecked

    def update(self, plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], *, complete: bool) -> None:
        """Record the plans that the kernel has accepted: of all Services if `complete`, otherwise of some Services.

        If `complete`, every frontend may have stale flows, which an earlier process or a failed sync may have left
        behind.
        """
        if complete:
            for key in self._services.keys() - plans.keys():
                self._replace(key, {})
        for key, ports in plans.items():
            self._replace(key, udp_frontends(ports))
        if complete:
            self._unchecked.update(self._claimants)

    def mark_checked(self) -> None:
        """Record that all stale flows have been deleted."""
        self._unchecked.clear()

    def is_stale(self, destination: str, source: str, accepts_node_ports: Callable[[str], bool]) -> bool:
        """Return whether flows to `destination` are stale if their replies come from `source`.

        Only flows to `unchecked` frontends can be stale. If the frontend exists, a flow is stale unless `source` is one
        of the frontend's endpoints. There are two ways for a flow to become stale. In the first, `source` is an
        endpoint that no longer serves the frontend. In the second, `source` equals `destination`, because the client's
        first packet was not translated: the frontend did not exist, had no endpoints, or did not accept this client.

        If the frontend no longer exists, translated flows are stale. Untranslated flows are not stale, because they
        belong to the program that uses the address or port now.

        `accepts_node_ports` returns whether an address accepts NodePort connections. On any other address, flows to the
        port number of a NodePort belong to other programs and are never stale.
        """
        address, port = split_socket_text(destination)
        node_port = socket_text("", port)
        frontends = [destination]
        if (node_port in self._unchecked or node_port in self._claimants) and accepts_node_ports(address):
            frontends.append(node_port)
        if self._unchecked.isdisjoint(frontends):
            return False
        # The rules that match addresses precede the rules that match NodePorts.
        existing = next((frontend for frontend in frontends if frontend in self._claimants), None)
        if existing is None:
            return source != destination
        return source not in self._services[self._owners[existing]][existing].endpoints

    def _replace(self, key: ServiceKey, new: dict[str, UdpFrontend]) -> None:
        old = self._services.pop(key, {})
        if new:
            self._services[key] = new
        for frontend in old.keys() - new.keys():
            self._unchecked.add(frontend)
            self._remove_claim(frontend, key)
        for frontend, state in new.items():
            before = old.get(frontend)
            if (
                before is None
                or before.translated_clients != state.translated_clients
                or not before.endpoints <= state.endpoints
                # While a frontend has no endpoints, packets that the node itself sends to NodePorts and external
                # addresses are not translated.
                or not before.endpoints
            ):
                self._unchecked.add(frontend)
            self._claimants.setdefault(frontend, set()).add(key)
            self._update_owner(frontend, key, worse=before is not None and before.claim < state.claim)

    def _remove_claim(self, frontend: str, key: ServiceKey) -> None:
        claimants = self._claimants[frontend]
        claimants.discard(key)
        if not claimants:
            del self._claimants[frontend], self._owners[frontend]
        elif self._owners[frontend] == key:
            self._owners[frontend] = self._best(frontend, claimants)

    def _update_owner(self, frontend: str, key: ServiceKey, *, worse: bool) -> None:
        """Determine the owner of a frontend after the claim of the Service `key` was added or changed.

        `worse` means that the Service had a better claim before the change.
        """
        owner = self._owners.setdefault(frontend, key)
        if owner != key:
            best = self._best(frontend, (owner, key))
        elif worse:
            best = self._best(frontend, self._claimants[frontend])
        else:
            return
        if best != owner:
            self._owners[frontend] = best
            self._unchecked.add(frontend)

    def _best(self, frontend: str, keys: Iterable[ServiceKey]) -> ServiceKey:
        return min(keys, key=lambda key: self._services[key][frontend].claim)


def udp_frontends(ports: Sequence[ServicePortPlan]) -> dict[str, UdpFrontend]:
    """Return the UDP frontends of a Service.

    An endpoint that still serves traffic keeps its flows even if new flows are sent to other endpoints, for example
    because it is terminating, or because hints or traffic policies changed.
    """
    frontends: dict[str, UdpFrontend] = {}
    for plan in ports:
        if plan.protocol != "UDP":
            continue
        serving = frozenset(plan.serving_endpoints)
        cluster, local = serving.union(plan.cluster_endpoints), serving.union(plan.local_endpoints)
        frontends[socket_text(plan.cluster_ip, plan.port)] = UdpFrontend(
            local if plan.internal_local else cluster,
            (plan.internal is TrafficDecision.FORWARD,),
            (ClaimRank.CLUSTER_IP, plan.name),
        )
        # Even with external policy Local, traffic from pods and from the node itself uses the endpoints of all nodes.
        endpoints = cluster | local if plan.external_local else cluster
        clients = (plan.external is TrafficDecision.FORWARD, bool(plan.cluster_endpoints))
        claim = (external_rank(plan), plan.name)
        external = restricted = UdpFrontend(endpoints, clients, claim)
        if plan.source_ranges:
            restricted = UdpFrontend(endpoints, (*clients, plan.source_ranges, plan.vips_are_sources), claim)
        others = {socket_text(address, plan.port): external for address in plan.external_ips}
        others |= {socket_text(address, plan.port): restricted for address in plan.vips}
        frontends = others | frontends  # if a ClusterIP is also an external address, its claim wins
        if plan.node_port:
            frontends[socket_text("", plan.node_port)] = external
    return frontends


def accepts_node_ports(context: Context, address: str, own_addresses: Callable[[], Collection[str]]) -> bool:
    """Return whether an address accepts NodePort connections.

    If the context lists `node_port_addresses`, only these accept NodePort connections. Otherwise all addresses of this
    machine do, except loopback addresses: they accept NodePort connections only in IPv4 with `localhost_node_ports`.
    `own_addresses` returns the addresses of this machine. It is called only if the result depends on them.
    """
    if context.node_port_addresses is not None:
        return address in context.node_port_addresses
    if ip_address(address).is_loopback:
        return context.localhost_node_ports and context.family is Family.IPV4
    return address in own_addresses()
