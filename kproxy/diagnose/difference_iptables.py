"""Describe damage to iptables rules, with the Services that it affects. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kproxy.diagnose.difference import FamilyDifference, RuleDifference
from kproxy.iptables.desired_rules import DesiredRules
from kproxy.iptables.ledger import record_chains
from kproxy.iptables.names import ChainName
from kproxy.iptables.repair import Damage
from kproxy.iptables.save_restore import TABLES
from kproxy.model.types import ServiceKey

_COMMENT = re.compile(r'--comment "?([a-z0-9][a-z0-9.-]*/[a-z0-9][a-z0-9.-]*?)(?::[a-z0-9-]*)?(?=[" ])')
"""The Service in the comment of a rule of kproxy or kube-proxy: `namespace/name:port cluster IP`."""

_POSITION = re.compile(r"^\d+ ")


class RuleOwners:
    """Finds the Services to which chains and rules belong."""

    def __init__(self, desired: DesiredRules) -> None:
        self._chains: dict[ChainName, ServiceKey] = {}
        self._rules: dict[str, set[ServiceKey]] = {}
        for key, record in desired.ledger.services.items():
            for name, _ in record_chains(record):
                self._chains[ChainName("nat", name)] = key
            for port in record.values():
                for rule in port.dispatch:
                    self._rules.setdefault(_body(rule.rule), set()).add(key)

    def of_chain(self, chain: ChainName, rules: Iterable[str] = ()) -> tuple[ServiceKey, ...]:
        """Return the Service of a per-Service chain. If it is unknown, it is the one in the comments of its rules."""
        if (owner := self._chains.get(chain)) is not None:
            return (owner,)
        return tuple(sorted({match[1] for rule in rules if (match := _COMMENT.search(rule))}))

    def of_rule(self, chain: ChainName, rule: str) -> tuple[ServiceKey, ...]:
        """Return the Services of a rule."""
        if chain in self._chains:
            return (self._chains[chain],)
        if (owners := self._rules.get(_body(rule))) is not None:
            return tuple(sorted(owners))
        return (match[1],) if (match := _COMMENT.search(rule)) else ()


def iptables_difference(
    desired: DesiredRules, damage: Damage, found: Mapping[ChainName, Sequence[str]]
) -> FamilyDifference:
    """Describe the damage of one family. `found` contains the rules of those damaged chains that exist."""
    owners = RuleOwners(desired)
    differences: list[RuleDifference] = []
    nothing_exists = all(chain in damage.chains and chain not in found for chain, _ in desired.ledger.shared_chains())
    if nothing_exists:
        differences.append(_no_rules(desired))
    for chain in () if nothing_exists else sorted(damage.chains):
        text = desired.chains.get(chain, "")
        differences += _chain(owners, chain, text.split("\n") if text else [], found.get(chain))
    for chain in damage.stale:
        rules = tuple(found.get(chain, ()))
        differences.append(
            RuleDifference(
                change="extra",
                kind="chain",
                table=chain.table,
                name=chain.name,
                services=owners.of_chain(chain, rules),
                found=rules,
            )
        )
    differences += () if nothing_exists else _edits(damage.edits)
    return FamilyDifference(
        family=desired.context.family.value, differences=tuple(differences), findings=tuple(damage.findings)
    )


def _no_rules(desired: DesiredRules) -> RuleDifference:
    """Describe a kernel that has none of kproxy's chains."""
    effect = ": no Service works" if desired.ledger.services else ""
    chains, rules = len(desired.chains), desired.rules().total()
    return RuleDifference(
        change="missing",
        kind="table",
        table=", ".join(TABLES),
        name=", ".join(TABLES),
        remark=f"kproxy's {chains:,} chains with {rules:,} rules do not exist{effect}",
    )


def _chain(
    owners: RuleOwners, chain: ChainName, expected: Sequence[str], found: Sequence[str] | None
) -> Iterator[RuleDifference]:
    if found is None:
        yield RuleDifference(
            change="missing",
            kind="chain",
            table=chain.table,
            name=chain.name,
            services=owners.of_chain(chain, expected),
            expected=tuple(expected),
        )
        return
    missing, extra = list((Counter(expected) - Counter(found)).elements()), Counter(found) - Counter(expected)
    if not missing and not extra:
        remark = "has the right rules in a different order"
        services = owners.of_chain(chain)
        yield RuleDifference(
            change="changed", kind="chain", table=chain.table, name=chain.name, services=services, remark=remark
        )
        return
    grouped: dict[tuple[ServiceKey, ...], tuple[list[str], list[str]]] = {}
    for rule in missing:
        grouped.setdefault(owners.of_rule(chain, rule), ([], []))[0].append(rule)
    for rule in extra.elements():
        grouped.setdefault(owners.of_rule(chain, rule), ([], []))[1].append(rule)
    for services, (lacking, surplus) in grouped.items():
        yield RuleDifference(
            change="changed" if lacking and surplus else "missing" if lacking else "extra",
            kind="rule",
            table=chain.table,
            name=chain.name,
            services=services,
            expected=tuple(lacking),
            found=tuple(surplus),
        )


def _edits(edits: Iterable[tuple[str, str]]) -> Iterator[RuleDifference]:
    """Describe commands that change kproxy's rules in chains that other programs use, too."""
    rules: dict[tuple[str, str, str], set[str]] = {}
    for table, command in edits:
        action, name, rest = command.split(" ", 2)
        rules.setdefault((table, name, f"-A {name} {_POSITION.sub('', rest)}"), set()).add(action)
    for (table, name, rule), actions in rules.items():
        moved = len(actions) > 1
        yield RuleDifference(
            change="changed" if moved else "extra" if "-D" in actions else "missing",
            kind="rule",
            table=table,
            name=name,
            expected=() if "-I" not in actions else (rule,),
            found=() if "-D" not in actions else (rule,),
            remark="comes after a rule of another program that ends the evaluation of the chain" if moved else "",
        )


def _body(rule: str) -> str:
    """Return a rule without `-A CHAIN`, because a rule of a dispatch chain may be in one of its shards."""
    return rule.split(" ", 2)[2] if rule.startswith("-A ") and rule.count(" ") > 1 else rule
