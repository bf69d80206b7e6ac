"""Rules that do not depend on Services: jumps from the built-in chains, masquerading and forwarding. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

from kproxy.iptables.names import (
    DISPATCH_CHAINS,
    FILTER_FIREWALL,
    FILTER_FORWARD,
    INVALID_COUNTER,
    MARK_MASQ,
    NAT_NODEPORTS,
    NAT_SERVICES,
    POSTROUTING,
    ChainName,
)
from kproxy.iptables.render import host_cidr
from kproxy.model.context import Context
from kproxy.model.types import Family


class EnsuredRule(Struct, frozen=True):
    """A rule in a chain that other tools also use.

    It is inserted at the top of the chain if it is missing. An existing rule is left unchanged.
    """

    chain: ChainName
    rule: str

    @property
    def text(self) -> str:
        """The rule as `iptables-save` prints it."""
        return f"-A {self.chain.name} {self.rule}"

    def is_satisfied_by(self, rule: str) -> bool:
        """Return whether an existing rule, as `iptables-save` prints it, is equivalent to this one.

        The comparison ignores comments and `--ctstate NEW`, because they differ between versions of kube-proxy. A rule
        with any other additional match applies to fewer packets and is therefore not equivalent.
        """
        return rule == self.text or _strip_optional_matches(rule) == _strip_optional_matches(self.text)

    def is_satisfied_by_any(self, rules: Iterable[str]) -> bool:
        """Return whether any of the existing rules is equivalent to this one."""
        return any(self.is_satisfied_by(rule) for rule in rules)


_OPTIONAL_MATCH = re.compile(r' -m (comment --comment ("[^"]*"|\S+)|conntrack --ctstate NEW)(?= )')


def _strip_optional_matches(rule: str) -> str:
    return _OPTIONAL_MATCH.sub("", rule)


def _jump(table: str, chain: str, target: str, comment: str, *, new_only: bool) -> EnsuredRule:
    state = "-m conntrack --ctstate NEW " if new_only else ""
    rule = f'{state}-m comment --comment "{comment}" -j {target}'
    return EnsuredRule(ChainName(table, chain), rule)


_KUBELET_FIREWALL = tuple(
    EnsuredRule(ChainName("filter", chain), f"-j {FILTER_FIREWALL.name}") for chain in ("INPUT", "OUTPUT")
)
_JUMPS = (
    *(
        _jump("filter", chain, "KUBE-PROXY-FIREWALL", "kubernetes load balancer firewall", new_only=True)
        for chain in ("INPUT", "FORWARD", "OUTPUT")
    ),
    _jump("filter", "FORWARD", "KUBE-FORWARD", "kubernetes forwarding rules", new_only=False),
    _jump("filter", "INPUT", "KUBE-NODEPORTS", "kubernetes health check service ports", new_only=False),
    *(
        _jump("filter", chain, "KUBE-SERVICES", "kubernetes service portals", new_only=True)
        for chain in ("FORWARD", "OUTPUT")
    ),
    *(
        _jump(
            "filter",
            chain,
            "KUBE-EXTERNAL-SERVICES",
            "kubernetes externally-visible service portals",
            new_only=True,
        )
        for chain in ("INPUT", "FORWARD")
    ),
    *(
        _jump("nat", chain, "KUBE-SERVICES", "kubernetes service portals", new_only=False)
        for chain in ("PREROUTING", "OUTPUT")
    ),
    _jump("nat", "POSTROUTING", "KUBE-POSTROUTING", "kubernetes postrouting rules", new_only=False),
)
_MARTIAN_RULE = EnsuredRule(
    FILTER_FIREWALL,
    '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" '
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
)


def ensured_rules(context: Context) -> tuple[EnsuredRule, ...]:
    """Return the rules that must exist in chains that other tools also use, in order from the top.

    NodePorts on localhost need the sysctl `route_localnet`. Without further rules, the sysctl would allow other hosts
    on the network to reach programs that listen on 127.0.0.1 (CVE-2020-8558). A rule in KUBE-FIREWALL drops these
    packets.
    """
    martian_rules = (_MARTIAN_RULE,) if context.localhost_node_ports else ()
    return (*martian_rules, *_KUBELET_FIREWALL, *_JUMPS)


def base_chains(context: Context) -> dict[ChainName, str]:
    """Return the chains whose rules do not depend on Services, with their rules."""
    mark = f"{context.masquerade_mark:#x}"
    random = " --random-fully" if context.random_fully else ""
    snat = "kubernetes service traffic requiring SNAT"
    return {
        MARK_MASQ: f"-A {MARK_MASQ.name} -j MARK --set-xmark {mark}/{mark}",
        POSTROUTING: "\n".join(
            f"-A {POSTROUTING.name} {rule}"
            for rule in (
                f"-m mark ! --mark {mark}/{mark} -j RETURN",
                f"-j MARK --set-xmark {mark}/0x0",
                f'-m comment --comment "{snat}" -j MASQUERADE{random}',
            )
        ),
        FILTER_FORWARD: "\n".join(_forward_rules(context, mark)),
    }


def _forward_rules(context: Context, mark: str) -> list[str]:
    comment = '-m comment --comment "kubernetes forwarding'
    rules = []
    if context.drop_invalid:
        # conntrack does not translate the source of an INVALID reply back to the Service's address. The client would
        # receive a packet from an address that it does not know and reset the connection
        # (kubernetes/kubernetes#74839).
        counter = f"-m nfacct --nfacct-name {INVALID_COUNTER} " if context.accounting else ""
        rules.append(f"-m conntrack --ctstate INVALID {counter}-j DROP")
    rules.append(f'{comment} rules" -m mark --mark {mark}/{mark} -j ACCEPT')
    rules.append(f'{comment} conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT')
    return [f"-A {FILTER_FORWARD.name} {rule}" for rule in rules]


def dispatch_trailing_rules(context: Context) -> dict[ChainName, tuple[str, ...]]:
    """Return the rules at the end of each dispatch chain, after the rules of all Services.

    Only KUBE-SERVICES in table nat has trailing rules. They jump to KUBE-NODEPORTS.
    """
    comment = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
    jump = f"-j {NAT_NODEPORTS.name}"
    if context.node_port_addresses is None:
        loopback = ""
        if context.family is Family.IPV6:
            loopback = "! -d ::1/128 "
        elif not context.localhost_node_ports:
            loopback = "! -d 127.0.0.0/8 "
        rules = [f"{loopback}{comment} -m addrtype --dst-type LOCAL {jump}"]
    else:
        rules = [f"-d {host_cidr(address)} {comment} {jump}" for address in context.node_port_addresses]
    trailing_rules: dict[ChainName, tuple[str, ...]] = dict.fromkeys(DISPATCH_CHAINS, ())
    trailing_rules[NAT_SERVICES] = tuple(f"-A {NAT_SERVICES.name} {rule}" for rule in rules)
    return trailing_rules
