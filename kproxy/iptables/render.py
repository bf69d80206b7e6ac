"""Render plans into iptables chains and rules. Pure.

Rules have the form in which `iptables-save` prints them, so that existing and desired rules can be compared as text.
Chains, comments and the order of rules are the same as in kube-proxy, because other tools rely on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple
from zlib import crc32

from msgspec import Struct

from kproxy.iptables.names import (
    FILTER_EXTERNAL_SERVICES,
    FILTER_NODEPORTS,
    FILTER_PROXY_FIREWALL,
    FILTER_SERVICES,
    LOCALHOST_COUNTER,
    NAT_NODEPORTS,
    NAT_SERVICES,
    ChainName,
    group_chain,
    port_hash,
)
from kproxy.iptables.save_restore import probability_text
from kproxy.model.addresses import split_socket_text
from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets
from kproxy.model.frontend_conflicts import ClaimRank, external_rank
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family

MAX_CHAIN_ENDPOINTS = 1000
"""Maximum number of endpoints among which one chain picks directly. More endpoints are divided into groups.

iptables-nft needs minutes to write a chain of 50,000 rules, and the removal of one endpoint changes the probabilities
in all rules before it.
"""
GROUP_ENDPOINTS = 256
"""Number of endpoints in a group, on average, unless this would result in more than `MAX_GROUPS` groups."""
MAX_GROUPS = 256


class FrontendMatch(NamedTuple):
    """The protocol and port of the frontend that a dispatch rule matches.

    `rank` decides which Service owns the frontend if several Services use it. The address or NodePort of the frontend
    is the `destination` of the `DispatchRule`.
    """

    protocol: str
    port: int
    rank: ClaimRank


class DispatchRule(NamedTuple):
    """A rule that a service port adds to a dispatch chain.

    If `protocol` is "", `destination` is an IP address as an integer. Otherwise it is a port of this node. `frontend`
    is None for a rule that does not match a frontend, such as the rule for a health check NodePort.
    """

    chain: ChainName
    rule: str
    destination: int
    protocol: str = ""
    frontend: FrontendMatch | None = None


class RenderedPort(Struct, frozen=True, gc=False):
    """The rules of one service port.

    `chains` maps the names of the port's per-Service chains, which are in table nat, to their rules (one per line).
    `dispatch` contains the rules that the port adds to dispatch chains.
    """

    chains: dict[str, str]
    dispatch: tuple[DispatchRule, ...]


def render_port(plan: ServicePortPlan, context: Context) -> RenderedPort:
    """Render all rules of one service port."""
    return _PortRenderer(plan, context).render()


def render_ports(ports: Sequence[ServicePortPlan], context: Context) -> dict[str, RenderedPort]:
    """Return the rules of a Service's ports, keyed by `port name/protocol`."""
    return {f"{plan.port_name}/{plan.protocol}": render_port(plan, context) for plan in ports}


def host_cidr(address: str) -> str:
    """Return an IP address as `iptables-save` prints it: with the prefix length /32 or /128."""
    return f"{address}/128" if ":" in address else f"{address}/32"


class _PortRenderer:
    """Renders the rules of one service port. The names of the service port's own chains are computed only once."""

    def __init__(self, plan: ServicePortPlan, context: Context) -> None:
        self.plan = plan
        self.context = context
        self.proto = plan.protocol.lower()
        suffix = port_hash(plan.name, plan.protocol)
        self.cluster_chain = f"KUBE-SVC-{suffix}"
        self.local_chain = f"KUBE-SVL-{suffix}"
        self.external_chain = f"KUBE-EXT-{suffix}"
        self.firewall_chain = f"KUBE-FW-{suffix}"
        self.rank = external_rank(plan)
        self.chains: dict[str, str] = {}
        self.dispatch: list[DispatchRule] = []

    def render(self) -> RenderedPort:
        plan = self.plan
        self._dispatch_cluster_ip()
        self._dispatch_external_ips()
        self._dispatch_load_balancer_ips()
        self._dispatch_node_port()
        self._dispatch_health_check()
        if plan.has_endpoints:
            masquerade = self._masquerade_rules()
            internal = self._policy_chain(local=plan.internal_local)
            if plan.cluster_endpoints:
                rules = masquerade if internal == self.cluster_chain else []
                self._write_load_balancing_chain(self.cluster_chain, rules, plan.cluster_endpoints)
            if plan.local_endpoints:
                rules = masquerade if internal == self.local_chain else []
                self._write_load_balancing_chain(self.local_chain, rules, plan.local_endpoints)
            if plan.externally_accessible:
                self._write_external_chain()
            if plan.source_ranges:
                self._write_firewall_chain()
            for endpoint in plan.reachable_endpoints:
                self._write_endpoint_chain(endpoint)
        return RenderedPort(self.chains, tuple(self.dispatch))

    # Dispatch rules.

    def _dispatch_cluster_ip(self) -> None:
        plan = self.plan
        if plan.internal is TrafficDecision.FORWARD:
            target = self._policy_chain(local=plan.internal_local)
            self._add_address_rule(NAT_SERVICES, plan.cluster_ip, "cluster IP", f"-j {target}", ClaimRank.CLUSTER_IP)
        else:
            self._add_no_endpoint_rule(FILTER_SERVICES, plan.cluster_ip, plan.internal, ClaimRank.CLUSTER_IP)

    def _dispatch_external_ips(self) -> None:
        plan = self.plan
        for address in plan.external_ips:
            if plan.has_endpoints:
                self._add_address_rule(NAT_SERVICES, address, "external IP", f"-j {self.external_chain}", self.rank)
            self._add_no_endpoint_rule(FILTER_EXTERNAL_SERVICES, address, plan.external, self.rank)

    def _dispatch_load_balancer_ips(self) -> None:
        plan = self.plan
        target = self.firewall_chain if plan.source_ranges else self.external_chain
        for address in plan.vips:
            if plan.has_endpoints:
                self._add_address_rule(NAT_SERVICES, address, "loadbalancer IP", f"-j {target}", self.rank)
                if plan.source_ranges:
                    comment = f"traffic not accepted by {self.firewall_chain}"
                    self._add_address_rule(FILTER_PROXY_FIREWALL, address, comment, "-j DROP", self.rank)
            self._add_no_endpoint_rule(FILTER_EXTERNAL_SERVICES, address, plan.external, self.rank)

    def _dispatch_node_port(self) -> None:
        plan = self.plan
        if not plan.node_port:
            return
        if plan.has_endpoints:
            jump = f"-j {self.external_chain}"
            if self.context.localhost_node_ports and self.context.accounting:
                counted = f"-m nfacct --nfacct-name {LOCALHOST_COUNTER} {jump}"
                rule = self._rule("-d 127.0.0.0/8 ", plan.name, counted, port=plan.node_port)
                self._add_node_port_rule(NAT_NODEPORTS, rule)
            self._add_node_port_rule(NAT_NODEPORTS, self._rule("", plan.name, jump, port=plan.node_port))
        self._add_no_endpoint_rule(FILTER_EXTERNAL_SERVICES, "", plan.external, self.rank)

    def _dispatch_health_check(self) -> None:
        plan = self.plan
        if plan.health_check_node_port:
            comment = f"{plan.name} health check node port"
            match = f'-p tcp -m comment --comment "{comment}" -m tcp --dport {plan.health_check_node_port}'
            rule = f"-A {FILTER_NODEPORTS.name} {match} -j ACCEPT"
            self.dispatch.append(DispatchRule(FILTER_NODEPORTS, rule, plan.health_check_node_port, "tcp"))

    def _add_no_endpoint_rule(self, chain: ChainName, address: str, decision: TrafficDecision, rank: ClaimRank) -> None:
        """Add the rules that reject or drop the traffic to a frontend, unless the `decision` is to forward it.

        Traffic is rejected if there are no endpoints at all. It is dropped if there are endpoints, but the traffic
        policy is Local and none of them is on this node.

        The rule matches `address`. If `address` is "", the rules match the NodePort on the node's NodePort addresses.
        On the other addresses of the node, the port stays available to programs on the host. kube-proxy differs: it
        rejects traffic to the port on all addresses of the node.
        """
        if decision is TrafficDecision.FORWARD:
            return
        if decision is TrafficDecision.DROP:
            comment, target = "has no local endpoints", "-j DROP"
        else:
            reply = "icmp6-port-unreachable" if self.context.family is Family.IPV6 else "icmp-port-unreachable"
            comment, target = "has no endpoints", f"-j REJECT --reject-with {reply}"
        if address:
            self._add_address_rule(chain, address, comment, target, rank)
            return
        port, comment = self.plan.node_port, f"{self.plan.name} {comment}"
        if self.context.node_port_addresses is None:
            rules = [self._rule("", comment, target, port=port, extra="-m addrtype --dst-type LOCAL ")]
        else:
            addresses = self.context.node_port_addresses
            rules = [self._rule(self._match_address(each), comment, target, port=port) for each in addresses]
        for rule in rules:
            self._add_node_port_rule(chain, rule)

    # Per-Service chains.

    def _policy_chain(self, *, local: bool) -> str:
        return self.local_chain if local else self.cluster_chain

    def _masquerade_rules(self) -> list[str]:
        """Return the rules that masquerade connections to the ClusterIP from outside the cluster.

        Masquerading makes the replies return through this node. With `masquerade_all`, the rules masquerade all
        connections to the ClusterIP. Otherwise, there are no rules if local traffic cannot be detected, or if its CIDR
        contains all addresses.
        """
        plan, local = self.plan, self.context.local_traffic
        source, interface = "", ""
        if not self.context.masquerade_all:
            if not local.detectable or local.cidr.endswith("/0"):
                return []
            source = f"! -s {local.cidr} " if local.cidr else ""
            interface = f"! -i {_interface_pattern(self.context)} " if not local.cidr else ""
        match = f"{source}{self._match_address(plan.cluster_ip)}{interface}"
        return [self._rule(match, f"{plan.name} cluster IP", "-j KUBE-MARK-MASQ")]

    def _write_load_balancing_chain(self, chain: str, rules: list[str], endpoints: Sockets) -> None:
        """Write the KUBE-SVC or KUBE-SVL chain, which picks one of `endpoints` at random.

        With session affinity, new connections from a recent client are sent to the same endpoint again. `rules` come
        first in the chain.
        """
        if len(endpoints) > MAX_CHAIN_ENDPOINTS:
            self._write_groups(chain, rules, endpoints)
            return
        jumps = self._jumps(endpoints)
        self._add_chain(chain, [*rules, *self._affinity_rules(jumps), *_random_rules(jumps)])

    def _write_groups(self, chain: str, rules: list[str], endpoints: Sockets) -> None:
        """Write a KUBE-SVC or KUBE-SVL chain for many endpoints.

        It picks a group of endpoints at random, with a probability in proportion to the size of the group. The chain of
        the group then picks an endpoint. All endpoints are therefore equally likely, as in a single chain. The group of
        an endpoint depends only on the endpoint and on the number of groups, which is a power of two. A new endpoint
        therefore usually changes only one group.
        """
        count = min(1 << (len(endpoints) // GROUP_ENDPOINTS - 1).bit_length(), MAX_GROUPS)
        groups: dict[int, list[str]] = {}
        for endpoint in endpoints:
            groups.setdefault(crc32(endpoint.encode()) % count, []).append(endpoint)
        top, remaining = [], len(endpoints)
        for number, members in sorted(groups.items()):
            jumps = self._jumps(members)
            if affinity := self._affinity_rules(jumps):
                name = group_chain(chain, number, affinity=True)
                self._add_chain(name, affinity)
                rules = [*rules, f"-j {name}"]
            name = group_chain(chain, number)
            self._add_chain(name, _random_rules(jumps))
            size = len(members)
            probability = probability_text(size, remaining) if size < remaining else ""
            chance = f"-m statistic --mode random --probability {probability} " if probability else ""
            top.append(f"{chance}-j {name}")
            remaining -= size
        self._add_chain(chain, [*rules, *top])

    def _jumps(self, endpoints: Iterable[str]) -> list[tuple[str, str]]:
        """Return the chain of each endpoint, and the comment of the rules that jump to it."""
        name = self.plan.name
        return [(self._endpoint_chain(each), self._endpoint_comment(f"{name} -> {each}")) for each in endpoints]

    def _affinity_rules(self, jumps: list[tuple[str, str]]) -> list[str]:
        """Return the rules that send new connections from a recent client to the same endpoint again, if configured."""
        if not self.plan.affinity_seconds:
            return []
        check = f"-m recent --rcheck --seconds {self.plan.affinity_seconds} --reap"
        return [f"{comment}{check} --name {name} {self._recent_options} -j {name}" for name, comment in jumps]

    def _write_external_chain(self) -> None:
        """Write the KUBE-EXT chain, which masquerades external traffic and applies the external traffic policy."""
        plan = self.plan
        subject = f"{plan.name} external destinations"
        if not plan.external_local:
            rules = [f'-m comment --comment "masquerade traffic for {subject}" -j KUBE-MARK-MASQ']
        else:
            rules = self._local_traffic_rules(subject)
        if plan.external is TrafficDecision.FORWARD:
            rules.append(f"-j {self._policy_chain(local=plan.external_local)}")
        self._add_chain(self.external_chain, rules)

    def _local_traffic_rules(self, subject: str) -> list[str]:
        """Return the rules that make all endpoints available to traffic from pods and from this node.

        `externalTrafficPolicy: Local` does not apply to this traffic. Traffic from this node is masqueraded, because a
        load balancer IP may be assigned to an interface of the node. The node would then use this IP as the source
        address of its packets.
        """
        rules = []
        local = self.context.local_traffic
        if local.detectable:
            match = f"-s {local.cidr} " if local.cidr else f"-i {_interface_pattern(self.context)} "
            match = "" if local.cidr.endswith("/0") else match
            rules.append(f'{match}-m comment --comment "pod traffic for {subject}" -j {self.cluster_chain}')
        match = "-m addrtype --src-type LOCAL"
        rules.append(f'-m comment --comment "masquerade LOCAL traffic for {subject}" {match} -j KUBE-MARK-MASQ')
        rules.append(f'-m comment --comment "route LOCAL traffic for {subject}" {match} -j {self.cluster_chain}')
        return rules

    def _write_firewall_chain(self) -> None:
        """Write the KUBE-FW chain, which accepts only traffic from the Service's source ranges.

        It jumps to the KUBE-EXT chain for allowed sources. KUBE-PROXY-FIREWALL drops the traffic of all other sources.
        """
        plan = self.plan
        sources = list(plan.source_ranges)
        if plan.vips_are_sources:
            sources += [host_cidr(address) for address in plan.vips]
        jump = f'-m comment --comment "{plan.name} loadbalancer IP" -j {self.external_chain}'
        rules = [f"-s {source} {jump}" for source in sources]
        note = f"other traffic to {plan.name} will be dropped by KUBE-PROXY-FIREWALL"
        self._add_chain(self.firewall_chain, [*rules, f'-m comment --comment "{note}"'])

    def _write_endpoint_chain(self, endpoint: str) -> None:
        """Write a KUBE-SEP chain, which masquerades hairpin traffic, records session affinity and applies DNAT."""
        name, comment = self._endpoint_chain(endpoint), self._endpoint_comment(self.plan.name)
        address, _ = split_socket_text(endpoint)
        affinity = f"-m recent --set --name {name} {self._recent_options} " if self.plan.affinity_seconds else ""
        rewrite = f"-p {self.proto} {comment}{affinity}-m {self.proto} -j DNAT --to-destination {endpoint}"
        self._add_chain(name, [f"-s {host_cidr(address)} {comment}-j KUBE-MARK-MASQ", rewrite])

    # Fragments.

    def _endpoint_chain(self, endpoint: str) -> str:
        return f"KUBE-SEP-{port_hash(self.plan.name, self.plan.protocol, endpoint)}"

    @property
    def _recent_options(self) -> str:
        mask = ":".join(["ffff"] * 8) if self.context.family is Family.IPV6 else "255.255.255.255"
        return f"--mask {mask} --rsource"

    def _endpoint_comment(self, text: str) -> str:
        """Return the comment of a per-endpoint rule, or "" in a large cluster, where comments would slow down syncs."""
        return "" if self.context.large_cluster else f'-m comment --comment "{text}" '

    def _match_address(self, address: str) -> str:
        return f"-d {host_cidr(address)} "

    def _rule(self, match: str, comment: str, target: str, *, port: int = 0, extra: str = "") -> str:
        port = port or self.plan.port
        proto = self.proto
        return f'{match}-p {proto} -m comment --comment "{comment}" {extra}-m {proto} --dport {port} {target}'

    def _add_address_rule(self, chain: ChainName, address: str, comment: str, target: str, rank: ClaimRank) -> None:
        """Add a dispatch rule for one address."""
        rule = self._rule(self._match_address(address), f"{self.plan.name} {comment}", target)
        frontend = _frontend_match(self.proto, self.plan.port, rank)
        self.dispatch.append(
            DispatchRule(chain, f"-A {chain.name} {rule}", int(ip_address(address)), frontend=frontend)
        )

    def _add_node_port_rule(self, chain: ChainName, rule: str) -> None:
        """Add a dispatch rule for the NodePort."""
        port = self.plan.node_port
        frontend = _frontend_match(self.proto, port, self.rank)
        self.dispatch.append(DispatchRule(chain, f"-A {chain.name} {rule}", port, self.proto, frontend))

    def _add_chain(self, name: str, rules: list[str]) -> None:
        self.chains[name] = "\n".join(f"-A {name} {rule}" for rule in rules)


def _random_rules(jumps: list[tuple[str, str]]) -> list[str]:
    """Return the rules that pick one of the jumps at random, all with the same probability."""
    rules = []
    for remaining, (name, comment) in zip(range(len(jumps), 0, -1), jumps, strict=True):
        chance = f"-m statistic --mode random --probability {1 / remaining:.10f} " if remaining > 1 else ""
        rules.append(f"{comment}{chance}-j {name}")
    return rules


@lru_cache(1 << 10)
def _frontend_match(protocol: str, port: int, rank: ClaimRank) -> FrontendMatch:
    """Return a cached instance, to save memory.

    The ledger contains an instance for every dispatch rule, but there are only a few distinct values.
    """
    return FrontendMatch(protocol, port, rank)


def _interface_pattern(context: Context) -> str:
    local = context.local_traffic
    return local.interface or f"{local.interface_prefix}+"
