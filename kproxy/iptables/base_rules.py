"""The rules that exist whatever the Services: jumps from the built-in chains, masquerading, forwarding. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

from kproxy.iptables.names import (
    DISPATCH,
    FILTER_FIREWALL,
    FILTER_FORWARD,
    MARK_MASQ,
    NAT_NODEPORTS,
    NAT_SERVICES,
    POSTROUTING,
    ChainName,
)
from kproxy.iptables.render import host_cidr
from kproxy.model.context import Context
from kproxy.model.types import Family

INVALID_COUNTER = "ct_state_invalid_dropped_pkts"


class EnsuredRule(Struct, frozen=True):
    """A rule in a chain that is not ours alone: put at the top where it is missing, never rewritten."""

    chain: ChainName
    rule: str

    @property
    def text(self) -> str:
        """The rule as it is listed."""
        return f"-A {self.chain.name} {self.rule}"

    def is_met_by(self, listed: str) -> bool:
        """Return whether a rule as it is listed does what this one does.

        Comments, and the connection state that jumps are limited to, differ between versions of kube-proxy; any
        other match would make it narrower.
        """
        return listed == self.text or _essence(listed) == _essence(self.text)

    def is_met_by_one_of(self, listed: Iterable[str]) -> bool:
        """Return whether one of several rules as they are listed does what this one does."""
        return any(self.is_met_by(each) for each in listed)


_UNESSENTIAL = re.compile(r' -m (comment --comment ("[^"]*"|\S+)|conntrack --ctstate NEW)(?= )')


def _essence(rule: str) -> str:
    return _UNESSENTIAL.sub("", rule)


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
_MARTIAN_COMMENT = "block incoming localnet connections"
_MARTIANS = EnsuredRule(
    FILTER_FIREWALL,
    f'! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "{_MARTIAN_COMMENT}" '
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
)


def ensured_rules(context: Context) -> tuple[EnsuredRule, ...]:
    """Return the rules that belong in chains shared with others, in the order they have from the top.

    The martian rule guards `route_localnet`, which localhost NodePorts need: without it, neighbours could reach
    services that listen on 127.0.0.1 (CVE-2020-8558).
    """
    martians = (_MARTIANS,) if context.localhost_node_ports else ()
    return (*martians, *_KUBELET_FIREWALL, *_JUMPS)


def base_chains(context: Context) -> dict[ChainName, str]:
    """Return the chains that are ours and the same for every set of Services, with their rules."""
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
        # conntrack leaves the address of an INVALID reply as it is: the client would see a stranger and
        # reset its connection (kubernetes/kubernetes#74839).
        counter = f"-m nfacct --nfacct-name {INVALID_COUNTER} " if context.accounting else ""
        rules.append(f"-m conntrack --ctstate INVALID {counter}-j DROP")
    rules.append(f'{comment} rules" -m mark --mark {mark}/{mark} -j ACCEPT')
    rules.append(f'{comment} conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT')
    return [f"-A {FILTER_FORWARD.name} {rule}" for rule in rules]


def dispatch_tails(context: Context) -> dict[ChainName, tuple[str, ...]]:
    """Return the rules that end each dispatch chain: the way to NodePorts comes after all Services' addresses."""
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
    tails: dict[ChainName, tuple[str, ...]] = dict.fromkeys(DISPATCH, ())
    tails[NAT_SERVICES] = tuple(f"-A {NAT_SERVICES.name} {rule}" for rule in rules)
    return tails
