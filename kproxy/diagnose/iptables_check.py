"""Compare the iptables rules of one Service in the kernel with its plan. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from ipaddress import ip_address
from typing import Protocol

from kproxy.diagnose.explain_facts import KernelDifference, RulesComparison
from kproxy.iptables.base_rules import base_chains, ensured_rules
from kproxy.iptables.names import DISPATCH_CHAINS, NAT_SERVICES, SHARD_PREFIXES, ChainName, is_shard
from kproxy.iptables.render import DispatchRule, render_port
from kproxy.iptables.save_restore import normalize_rule, parse_save
from kproxy.model.addresses import socket_text
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan

MAX_SINGLE_CHAINS = 100
"""Maximum number of chains that are read one by one. Each takes a few milliseconds."""
_COMMENT = re.compile(r'-m comment --comment (?:"[^"]*"|\S+) ')
_SERVICE_PORT = re.compile(r'--comment "?([^ "/]+/[^ "]+)')
_MATCH = re.compile(r"-d \S+|-p \S+|--dport \S+")
_NEEDED_JUMPS = re.compile(r"-j (KUBE-(?:SERVICES|POSTROUTING|EXTERNAL-SERVICES|PROXY-FIREWALL|FORWARD))$")


class IptablesReader(Protocol):
    """Reads rules; see `kproxy.iptables.runner.IptablesRunner`, which documents the methods."""

    def save(self, table: str = "") -> AbstractContextManager[Iterator[str]]: ...  # noqa: D102

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]: ...  # noqa: D102

    def has_rule(self, chain: ChainName, rule: str) -> bool | None: ...  # noqa: D102


def compare_iptables(
    iptables: IptablesReader,
    plans: Sequence[ServicePortPlan],
    context: Context,
    *,
    lost: Collection[str] = (),
    whole: bool = True,
) -> RulesComparison | None:
    """Return what differs, and what was compared. Return None if the kernel has no rules of kproxy.

    `lost` are the frontends that belong to other Services (`IP:port/PROTOCOL` or `NodePort number/PROTOCOL`). Without
    `whole`, the settings in the context are only assumed: neither comments nor the base chains are compared. Raises
    `CommandError` if the rules cannot be read.
    """
    check = _Check(iptables, context, whole=whole)
    if NAT_SERVICES not in check.list((NAT_SERVICES,)):
        return None
    count = check.own_chains(plans, lost)
    check.jumps()
    if whole:
        check.base_chains()
    chains = f"{count} chain{'' if count == 1 else 's'} and " if count else ""
    check.result.summary = f"{chains}the dispatch rules of the Service"
    return check.result


class _Check:
    """Compares the rules of one family."""

    def __init__(self, iptables: IptablesReader, context: Context, *, whole: bool) -> None:
        self.result = RulesComparison()
        self._iptables, self._context, self._whole = iptables, context, whole

    def list(self, chains: Collection[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those `chains` that exist. Many of them, all in table nat, are read as a table."""
        if len(chains) <= MAX_SINGLE_CHAINS:
            return self._iptables.list_rules(chains)
        with self._iptables.save("nat") as lines:
            saved = parse_save(lines).chains
        return {chain: saved[chain].rules for chain in chains if chain in saved}

    def own_chains(self, plans: Sequence[ServicePortPlan], lost: Collection[str]) -> int:
        """Compare the chains and dispatch rules of the Service. Return the number of its chains."""
        wanted: dict[ChainName, list[str]] = {}
        dispatch: list[tuple[ServicePortPlan, DispatchRule]] = []
        for plan in plans:
            rendered = render_port(plan, self._context)
            wanted |= {ChainName("nat", name): _lines(text) for name, text in rendered.chains.items()}
            dispatch += ((plan, rule) for rule in rendered.dispatch if _frontend(plan, rule) not in lost)
        found = self.list(wanted)
        for chain, rules in wanted.items():
            if chain not in found:
                self._add(f"chain {chain.name}", "is missing")
            elif self._comparable(found[chain]) != self._comparable(rules):
                self._add(f"chain {chain.name}", "has other rules")
        self._dispatch_rules(dispatch)
        return len(wanted)

    def base_chains(self) -> None:
        """Compare the chains that all Services need."""
        wanted = base_chains(self._context)
        found = self.list(wanted)
        for chain, text in wanted.items():
            if chain not in found:
                self._add(f"chain {chain.name}", "is missing")
            elif found[chain] != _lines(text):
                self._add(f"chain {chain.name}", "has other rules")

    def jumps(self) -> None:
        """Check the rules that lead from the built-in chains to kproxy's."""
        for ensured in ensured_rules(self._context):
            chain, needed = ensured.chain, _NEEDED_JUMPS.search(ensured.rule)
            if needed is not None and self._iptables.has_rule(chain, ensured.rule) is False:
                self._add(f"chain {chain.name} of table {chain.table}", f"does not jump to {needed[1]}")

    def _dispatch_rules(self, dispatch: Sequence[tuple[ServicePortPlan, DispatchRule]]) -> None:
        chains = [chain for chain in DISPATCH_CHAINS if any(rule.chain == chain for _, rule in dispatch)]
        found = self.list(chains)
        for chain in chains:
            rules = set(self._comparable(found.get(chain, ())))
            missing = [
                (plan, rule)
                for plan, rule in dispatch
                if rule.chain == chain and self._comparable((rule.rule,))[0] not in rules
            ]
            if missing and any(is_shard(ChainName(chain.table, each.rpartition(" ")[2])) for each in rules):
                sharded = self._sharded(chain)
                missing = [(plan, rule) for plan, rule in missing if self._body(rule.rule) not in sharded]
            for plan, rule in missing:
                if owner := self._owner(_frontend(plan, rule), rule):
                    self.result.owners[_frontend(plan, rule)] = owner
                name = _frontend(plan, rule) or f"healthCheckNodePort {plan.health_check_node_port}"
                self._add(f"rule for {name} in chain {chain.name} of table {chain.table}", "is missing")

    def _owner(self, frontend: str, rule: DispatchRule) -> str:
        """Return the service port of another Service that has the frontend of a missing rule, or ""."""
        match = _match_of(rule.rule)
        for rules in self.list(DISPATCH_CHAINS).values() if frontend else ():
            for each in rules:
                if _match_of(each) == match and (found := _SERVICE_PORT.search(each)):
                    return found[1]
        return ""

    def _sharded(self, chain: ChainName) -> set[str]:
        """Return the rules of all shards of a dispatch chain, without the names of the shards."""
        prefix = f"-A {SHARD_PREFIXES[chain]}"
        with self._iptables.save(chain.table) as lines:
            return {self._body(normalize_rule(line)) for line in lines if line.startswith(prefix)}

    def _body(self, rule: str) -> str:
        return self._comparable((rule.split(" ", 2)[2],))[0]

    def _comparable(self, rules: Iterable[str]) -> Sequence[str]:
        return [rule if self._whole else _COMMENT.sub("", rule) for rule in rules]

    def _add(self, name: str, problem: str) -> None:
        self.result.differences.append(KernelDifference(self._context.family, name, problem))


def _match_of(rule: str) -> tuple[str, ...]:
    """Return the address, protocol and port that a dispatch rule matches."""
    return tuple(_MATCH.findall(rule))


def _lines(text: str) -> list[str]:
    return text.split("\n") if text else []


def _frontend(plan: ServicePortPlan, rule: DispatchRule) -> str:
    """Return the frontend of a dispatch rule as `FrontendConflict` names it, or "" if it has none."""
    if rule.frontend is None:
        return ""
    if rule.protocol:
        return f"NodePort {rule.frontend.port}/{plan.protocol}"
    addresses = (plan.cluster_ip, *plan.external_ips, *plan.vips)
    address = next(each for each in addresses if int(ip_address(each)) == rule.destination)
    return f"{socket_text(address, rule.frontend.port)}/{plan.protocol}"
