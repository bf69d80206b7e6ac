"""From plans to rules: every chain and rule that one service port needs. Pure.

Rules are written the way `iptables-save` prints them, so that what the kernel holds can be compared with what
is wanted as text. kube-proxy's chains, comments and order of rules are kept: other tools rely on them.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

from msgspec import Struct

from kproxy.iptables.names import (
    FILTER_EXTERNAL_SERVICES,
    FILTER_NODEPORTS,
    FILTER_PROXY_FIREWALL,
    FILTER_SERVICES,
    NAT_NODEPORTS,
    NAT_SERVICES,
    ChainName,
    port_hash,
)
from kproxy.model.addresses import split_socket_text
from kproxy.model.context import Context
from kproxy.model.endpoints import Sockets
from kproxy.model.frontend_conflicts import ClaimRank, external_rank
from kproxy.model.plan import ServicePortPlan, TrafficDecision
from kproxy.model.types import Family

LOCALHOST_COUNTER = "localhost_nps_accepted_pkts"


class FrontendClaim(NamedTuple):
    """A service port's claim to a frontend at an address or NodePort: its protocol, its port and how good it is."""

    protocol: str
    port: int
    rank: ClaimRank


class DispatchRule(NamedTuple):
    """A rule that a service port adds to a chain which all Services share.

    It is about one destination: `place` is an address as a number, or with a `protocol` one of the node's ports.
    `claim` is None for a rule that is about no frontend.
    """

    chain: ChainName
    rule: str
    place: int
    protocol: str = ""
    claim: FrontendClaim | None = None


class RenderedPort(Struct, frozen=True, gc=False):
    """The rules of one service port.

    `chains` are its own chains of table nat: name -> rules, one per line. `dispatch` are the rules it
    adds to chains that all Services share.
    """

    chains: dict[str, str]
    dispatch: tuple[DispatchRule, ...]


def render_port(plan: ServicePortPlan, context: Context) -> RenderedPort:
    """Return all rules of one service port."""
    return _PortRenderer(plan, context).render()


def host_cidr(address: str) -> str:
    """Return an address as iptables-save prints it."""
    return f"{address}/128" if ":" in address else f"{address}/32"


class _PortRenderer:
    """The names and match fragments of one service port, computed once and shared by its rules."""

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
        self._dispatch_vips()
        self._dispatch_node_port()
        self._dispatch_health_check()
        if plan.has_endpoints:
            masquerade = self._masquerade_rules()
            internal = self._policy_chain(local=plan.internal_local)
            if plan.cluster_endpoints:
                rules = masquerade if internal == self.cluster_chain else []
                self._policy(self.cluster_chain, rules, plan.cluster_endpoints)
            if plan.local_endpoints:
                rules = masquerade if internal == self.local_chain else []
                self._policy(self.local_chain, rules, plan.local_endpoints)
            if plan.externally_accessible:
                self._external()
            if plan.source_ranges:
                self._firewall()
            for socket in plan.reachable_endpoints:
                self._endpoint(socket)
        return RenderedPort(self.chains, tuple(self.dispatch))

    # What leads to the port's chains, or refuses.

    def _dispatch_cluster_ip(self) -> None:
        plan = self.plan
        if plan.internal is TrafficDecision.FORWARD:
            target = self._policy_chain(local=plan.internal_local)
            self._lead(NAT_SERVICES, plan.cluster_ip, "cluster IP", f"-j {target}", ClaimRank.CLUSTER_IP)
        else:
            self._refuse(FILTER_SERVICES, plan.cluster_ip, plan.internal, ClaimRank.CLUSTER_IP)

    def _dispatch_external_ips(self) -> None:
        plan = self.plan
        for address in plan.external_ips:
            if plan.has_endpoints:
                self._lead(NAT_SERVICES, address, "external IP", f"-j {self.external_chain}", self.rank)
            self._refuse(FILTER_EXTERNAL_SERVICES, address, plan.external, self.rank)

    def _dispatch_vips(self) -> None:
        plan = self.plan
        target = self.firewall_chain if plan.source_ranges else self.external_chain
        for address in plan.vips:
            if plan.has_endpoints:
                self._lead(NAT_SERVICES, address, "loadbalancer IP", f"-j {target}", self.rank)
                if plan.source_ranges:
                    comment = f"traffic not accepted by {self.firewall_chain}"
                    self._lead(FILTER_PROXY_FIREWALL, address, comment, "-j DROP", self.rank)
            self._refuse(FILTER_EXTERNAL_SERVICES, address, plan.external, self.rank)

    def _dispatch_node_port(self) -> None:
        plan = self.plan
        if not plan.node_port:
            return
        if plan.has_endpoints:
            jump = f"-j {self.external_chain}"
            if self.context.localhost_node_ports and self.context.accounting:
                counted = f"-m nfacct --nfacct-name {LOCALHOST_COUNTER} {jump}"
                rule = self._rule("-d 127.0.0.0/8 ", plan.name, counted, port=plan.node_port)
                self._add_node_port(NAT_NODEPORTS, rule)
            self._add_node_port(NAT_NODEPORTS, self._rule("", plan.name, jump, port=plan.node_port))
        self._refuse(FILTER_EXTERNAL_SERVICES, "", plan.external, self.rank)

    def _dispatch_health_check(self) -> None:
        plan = self.plan
        if plan.health_check_node_port:
            comment = f"{plan.name} health check node port"
            match = f'-p tcp -m comment --comment "{comment}" -m tcp --dport {plan.health_check_node_port}'
            rule = f"-A {FILTER_NODEPORTS.name} {match} -j ACCEPT"
            self.dispatch.append(DispatchRule(FILTER_NODEPORTS, rule, plan.health_check_node_port, "tcp"))

    def _refuse(self, chain: ChainName, address: str, decision: TrafficDecision, rank: ClaimRank) -> None:
        """Add the rule that answers where no endpoint may: none at all is refused, no local one is dropped.

        It is for an address, or without one for the NodePort on the addresses that NodePorts answer on. On this node's
        other addresses, the port is left to programs of the host; kube-proxy refuses it there as well.
        """
        if decision is TrafficDecision.FORWARD:
            return
        if decision is TrafficDecision.DROP:
            comment, target = "has no local endpoints", "-j DROP"
        else:
            reply = "icmp6-port-unreachable" if self.context.family is Family.IPV6 else "icmp-port-unreachable"
            comment, target = "has no endpoints", f"-j REJECT --reject-with {reply}"
        if address:
            self._lead(chain, address, comment, target, rank)
            return
        port, comment = self.plan.node_port, f"{self.plan.name} {comment}"
        if self.context.node_port_addresses is None:
            rules = [self._rule("", comment, target, port=port, extra="-m addrtype --dst-type LOCAL ")]
        else:
            own = self.context.node_port_addresses
            rules = [self._rule(self._to(each), comment, target, port=port) for each in own]
        for rule in rules:
            self._add_node_port(chain, rule)

    # The port's own chains.

    def _policy_chain(self, *, local: bool) -> str:
        return self.local_chain if local else self.cluster_chain

    def _masquerade_rules(self) -> list[str]:
        """Mark connections to the ClusterIP from outside of the cluster: replies must come back through here."""
        plan, local = self.plan, self.context.local_traffic
        source, interface = "", ""
        if not self.context.masquerade_all:
            if not local.detectable or local.cidr.endswith("/0"):
                return []
            source = f"! -s {local.cidr} " if local.cidr else ""
            interface = f"! -i {_interface(self.context)} " if not local.cidr else ""
        match = f"{source}{self._to(plan.cluster_ip)}{interface}"
        return [self._rule(match, f"{plan.name} cluster IP", "-j KUBE-MARK-MASQ")]

    def _policy(self, chain: str, rules: list[str], sockets: Sockets) -> None:
        """Write the chain that picks one of `sockets`: the client's last one under affinity, else at random."""
        plan = self.plan
        jumps = [(self._endpoint_chain(socket), self._comment(f"{plan.name} -> {socket}")) for socket in sockets]
        rules = list(rules)
        if plan.affinity_seconds:
            check = f"-m recent --rcheck --seconds {plan.affinity_seconds} --reap"
            rules += [f"{comment}{check} --name {name} {self._recent_tail} -j {name}" for name, comment in jumps]
        for remaining, (name, comment) in zip(range(len(jumps), 0, -1), jumps, strict=True):
            chance = f"-m statistic --mode random --probability {1 / remaining:.10f} " if remaining > 1 else ""
            rules.append(f"{comment}{chance}-j {name}")
        self._write(chain, rules)

    def _external(self) -> None:
        """Write the chain of external traffic, which decides about masquerading and policy."""
        plan = self.plan
        subject = f"{plan.name} external destinations"
        if not plan.external_local:
            rules = [f'-m comment --comment "masquerade traffic for {subject}" -j KUBE-MARK-MASQ']
        else:
            rules = self._short_circuit(subject)
        if plan.external is TrafficDecision.FORWARD:
            rules.append(f"-j {self._policy_chain(local=plan.external_local)}")
        self._write(self.external_chain, rules)

    def _short_circuit(self, subject: str) -> list[str]:
        """Let pods and the node itself reach a policy Local frontend as if it were the ClusterIP.

        The node is masqueraded: a VIP may be one of its own addresses, and would be its source address.
        """
        rules = []
        local = self.context.local_traffic
        if local.detectable:
            match = f"-s {local.cidr} " if local.cidr else f"-i {_interface(self.context)} "
            match = "" if local.cidr.endswith("/0") else match
            rules.append(f'{match}-m comment --comment "pod traffic for {subject}" -j {self.cluster_chain}')
        own = "-m addrtype --src-type LOCAL"
        rules.append(f'-m comment --comment "masquerade LOCAL traffic for {subject}" {own} -j KUBE-MARK-MASQ')
        rules.append(f'-m comment --comment "route LOCAL traffic for {subject}" {own} -j {self.cluster_chain}')
        return rules

    def _firewall(self) -> None:
        """Write the chain that lets allowed sources through; all others fall to KUBE-PROXY-FIREWALL's drop."""
        plan = self.plan
        sources = list(plan.source_ranges)
        if plan.vips_are_sources:
            sources += [host_cidr(address) for address in plan.vips]
        tail = f'-m comment --comment "{plan.name} loadbalancer IP" -j {self.external_chain}'
        rules = [f"-s {source} {tail}" for source in sources]
        fate = f"other traffic to {plan.name} will be dropped by KUBE-PROXY-FIREWALL"
        self._write(self.firewall_chain, [*rules, f'-m comment --comment "{fate}"'])

    def _endpoint(self, socket: str) -> None:
        """Write an endpoint's chain: hairpin traffic is marked, affinity remembered, the destination rewritten."""
        name, comment = self._endpoint_chain(socket), self._comment(self.plan.name)
        address, _ = split_socket_text(socket)
        affinity = f"-m recent --set --name {name} {self._recent_tail} " if self.plan.affinity_seconds else ""
        rewrite = f"-p {self.proto} {comment}{affinity}-m {self.proto} -j DNAT --to-destination {socket}"
        self._write(name, [f"-s {host_cidr(address)} {comment}-j KUBE-MARK-MASQ", rewrite])

    # Fragments.

    def _endpoint_chain(self, socket: str) -> str:
        return f"KUBE-SEP-{port_hash(self.plan.name, self.plan.protocol, socket)}"

    @property
    def _recent_tail(self) -> str:
        mask = ":".join(["ffff"] * 8) if self.context.family is Family.IPV6 else "255.255.255.255"
        return f"--mask {mask} --rsource"

    def _comment(self, text: str) -> str:
        """Return the comment of a per-endpoint rule: with many endpoints they cost more than they tell."""
        return "" if self.context.large_cluster else f'-m comment --comment "{text}" '

    def _to(self, address: str) -> str:
        return f"-d {host_cidr(address)} "

    def _rule(self, match: str, comment: str, target: str, *, port: int = 0, extra: str = "") -> str:
        port = port or self.plan.port
        proto = self.proto
        return f'{match}-p {proto} -m comment --comment "{comment}" {extra}-m {proto} --dport {port} {target}'

    def _lead(self, chain: ChainName, address: str, comment: str, target: str, rank: ClaimRank) -> None:
        """Add a rule about the port's connections to one address."""
        rule = self._rule(self._to(address), f"{self.plan.name} {comment}", target)
        claim = _claim(self.proto, self.plan.port, rank)
        self.dispatch.append(DispatchRule(chain, f"-A {chain.name} {rule}", int(ip_address(address)), claim=claim))

    def _add_node_port(self, chain: ChainName, rule: str) -> None:
        """Add a rule about the port's connections to its NodePort."""
        port = self.plan.node_port
        claim = _claim(self.proto, port, self.rank)
        self.dispatch.append(DispatchRule(chain, f"-A {chain.name} {rule}", port, self.proto, claim))

    def _write(self, name: str, rules: list[str]) -> None:
        self.chains[name] = "\n".join(f"-A {name} {rule}" for rule in rules)


@lru_cache(1 << 10)
def _claim(protocol: str, port: int, rank: ClaimRank) -> FrontendClaim:
    """Return the same value for the same claim: there are few, and every Service's rules are remembered."""
    return FrontendClaim(protocol, port, rank)


def _interface(context: Context) -> str:
    local = context.local_traffic
    return local.interface or f"{local.interface_prefix}+"
