"""The rules that a Service keeps while the kernel rejects its new ones. Pure."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from ipaddress import ip_address
from typing import TypeAlias

from msgspec import Struct

from kproxy.iptables.ledger import PortRecord, ServiceRecord
from kproxy.iptables.names import (
    DISPATCH_CHAINS,
    FILTER_EXTERNAL_SERVICES,
    FILTER_SERVICES,
    PORT_CHAIN_PREFIXES,
    SHARD_PREFIXES,
    ChainName,
    is_shard,
)
from kproxy.iptables.render import DispatchRule, FrontendMatch
from kproxy.iptables.save_restore import SavedChain
from kproxy.model.frontend_conflicts import ClaimRank
from kproxy.model.types import ServiceKey

ChainTexts: TypeAlias = Mapping[str, str]
"""The rules of per-Service chains, one per line, by the names of the chains."""
_NAME = re.compile(r'--comment "([^\s":]+/[^\s":]+)(?::([^\s"]+))?[ "]')
_JUMP = re.compile(r" -[jg] (KUBE-\S+)")
_ADDRESS = re.compile(r" -d (\S+)/(?:32|128) ")
_PORT = re.compile(r" --dport (\d+)(?: |$)")
_PROTOCOL = re.compile(r" -p (tcp|udp|sctp) ")
_HEALTH_CHECK = ' health check node port" '


class _FoundRule(Struct, frozen=True):
    """A dispatch rule in the kernel, in the form that it has in a dispatch chain that is not split."""

    chain: ChainName
    text: str
    port_name: str
    protocol: str


class ExistingServices:
    """Finds the rules of Services in the kernel. A new process has no records of the rules that the kernel accepted.

    The Service of a dispatch rule is recognized by the comment of the rule, which begins with `"namespace/name`. Its
    per-Service chains are those that can be reached from its dispatch rules.
    """

    def __init__(self, chains: Mapping[ChainName, SavedChain]) -> None:
        """`chains` are all existing chains."""
        self._chains = chains

    def record(self, key: ServiceKey) -> ServiceRecord:
        """Return the record of the rules that a Service has in the kernel. It is empty if there are none."""
        ports: dict[str, list[_FoundRule]] = {}
        for rule in self._dispatch_rules.get(key, ()):
            ports.setdefault(f"{rule.port_name}/{rule.protocol.upper()}", []).append(rule)
        return {name: self._port(rules) for name, rules in ports.items()}

    @cached_property
    def _dispatch_rules(self) -> dict[ServiceKey, list[_FoundRule]]:
        found: dict[ServiceKey, list[_FoundRule]] = {}
        for chain, saved in self._chains.items():
            dispatch_chain = _dispatch_chain(chain)
            if dispatch_chain is None:
                continue
            for rule in saved.rules:
                name, protocol = _NAME.search(rule), _PROTOCOL.search(rule)
                if name is not None and protocol is not None and _PORT.search(rule):
                    text = f"-A {dispatch_chain.name} {rule.split(' ', 2)[2]}"
                    each = _FoundRule(dispatch_chain, text, name[2] or "", protocol[1])
                    found.setdefault(name[1], []).append(each)
        return found

    def _port(self, rules: Sequence[_FoundRule]) -> PortRecord:
        chains = dict(self._reachable(rules))
        return PortRecord(
            " ".join(chains),
            array("q", (hash("\n".join(texts)) for texts in chains.values())).tobytes(),
            sum(map(len, chains.values())),
            tuple(dict.fromkeys(_dispatch_rule(rule, _external_rank(rules)) for rule in rules)),
        )

    def _reachable(self, rules: Sequence[_FoundRule]) -> Iterator[tuple[str, list[str]]]:
        """Yield the per-Service chains that can be reached from dispatch rules, each once, with their rules."""
        waiting = [rule.text for rule in rules if rule.chain.table == "nat"]
        seen: set[str] = set()
        while waiting:
            jump = _JUMP.search(waiting.pop())
            if jump is None or jump[1] in seen or not jump[1].startswith(PORT_CHAIN_PREFIXES):
                continue
            chain = ChainName("nat", jump[1])
            if chain in self._chains and not is_shard(chain):
                seen.add(chain.name)
                yield chain.name, self._chains[chain].rules
                waiting += self._chains[chain].rules


def _dispatch_chain(chain: ChainName) -> ChainName | None:
    """Return the dispatch chain to which a chain belongs: itself, or that of which it is a shard."""
    if chain in DISPATCH_CHAINS:
        return chain
    if not is_shard(chain):
        return None
    found = (each for each in SHARD_PREFIXES if each.table == chain.table)
    return next((each for each in found if chain.name.startswith(SHARD_PREFIXES[each])), None)


def _external_rank(rules: Sequence[_FoundRule]) -> ClaimRank:
    """Return the rank of a service port's claim to its frontends, except to its ClusterIP."""
    texts = [rule.text for rule in rules if rule.chain == FILTER_EXTERNAL_SERVICES]
    if any(" -j REJECT" in text for text in texts):
        return ClaimRank.REJECTS
    return ClaimRank.DROPS if texts else ClaimRank.FORWARDS


def _dispatch_rule(rule: _FoundRule, external_rank: ClaimRank) -> DispatchRule:
    address, dport = _ADDRESS.search(rule.text), _PORT.search(rule.text)
    assert dport is not None
    port = int(dport[1])
    if _HEALTH_CHECK in rule.text:
        return DispatchRule(rule.chain, rule.text, port, rule.protocol)
    is_cluster_ip = rule.chain == FILTER_SERVICES or ' cluster IP" ' in rule.text
    frontend = FrontendMatch(rule.protocol, port, ClaimRank.CLUSTER_IP if is_cluster_ip else external_rank)
    if address is not None:
        return DispatchRule(rule.chain, rule.text, int(ip_address(address[1])), frontend=frontend)
    return DispatchRule(rule.chain, rule.text, port, rule.protocol, frontend)
