"""Describe parts of the nftables table that differ from the desired table, with the Services that they affect. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from kproxy.diagnose.difference import DifferenceChange, FamilyDifference, RuleDifference
from kproxy.model.drift import Part
from kproxy.model.types import Family, ServiceKey
from kproxy.nftables import names
from kproxy.nftables.desired_table import BASE_SETS, DesiredTable, group_of
from kproxy.nftables.elements import SetElement
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.repair import ChainState, Repair, TableParts
from kproxy.nftables.rule_content import RuleContent, rule_content
from kproxy.nftables.ruleset import MapValue, NftChain

_SERVICE_OF_NAME = re.compile(r"[a-z]+-[A-Z2-7]{8}-([a-z0-9.-]+/[a-z0-9.-]+)/")
"""The Service in the name of a per-Service chain or set, such as `service-AXK6CI2C-demo/web/tcp/http`."""
_NO_RULE = re.compile(r'type \S+ hook |comment "')
"""The lines of a chain's listing that are not rules: its hook, and its comment."""
_UNKNOWN_RULE = "(a rule that is not kproxy's)"


class ElementOwners:
    """Finds the Services to which elements, chains and sets belong."""

    def __init__(self, ledger: NftablesLedger) -> None:
        self._ledger = ledger
        self._plain: dict[tuple[str, bytes], set[ServiceKey]] = {}
        self._named: dict[str, ServiceKey] = {}
        for key, service in ledger.services.items():
            self._plain.setdefault((names.CLUSTER_IPS, service.cluster_ip), set()).add(key)
            for hairpin in service.hairpins:
                self._plain.setdefault((names.HAIRPINS, hairpin), set()).add(key)
            self._named |= dict.fromkeys((each.name for each in service.chains), key)
            self._named |= dict.fromkeys((each.name for each in service.sets), key)

    def of_element(self, set_name: str, key: bytes, *elements: SetElement | None) -> tuple[ServiceKey, ...]:
        """Return the Services of an element, which may be missing in the kernel or in the desired table."""
        if BASE_SETS[set_name].value is MapValue.NONE:
            return tuple(sorted(self._plain.get((set_name, key), ())))
        comments = [each.comment for each in elements if each is not None and each.comment]
        owner = self._ledger.owner(group_of(set_name, key))
        found = dict.fromkeys((*([owner.service_port] if owner is not None else ()), *comments))
        return tuple(dict.fromkeys(each.partition(":")[0] for each in found))

    def of_name(self, name: str) -> tuple[ServiceKey, ...]:
        """Return the Service of a per-Service chain or set."""
        if (key := self._named.get(name)) is not None:
            return (key,)
        return (match[1],) if (match := _SERVICE_OF_NAME.match(name)) else ()


def nftables_difference(
    ledger: NftablesLedger,
    family: Family,
    parts: TableParts,
    repair: Repair,
    listed: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> FamilyDifference:
    """Describe the parts of a table that the repair would change. `parts` is the whole table as it is in the kernel.

    `listed` contains the rules of some chains as `nft` lists them, to show those that are not kproxy's.
    """
    describe = _Description(ledger, family, parts, listed)
    differences = [each for part in sorted(repair.parts) for each in describe.part(part)]
    return FamilyDifference(family=family.value, differences=tuple(differences))


def missing_table(ledger: NftablesLedger, family: Family) -> FamilyDifference:
    """Describe a table that does not exist."""
    return _whole_table(family, "missing", f"does not exist{': no Service works' if ledger.services else ''}")


def unusable_table(family: Family, reason: str) -> FamilyDifference:
    """Describe a table that must be replaced as a whole."""
    return _whole_table(family, "changed", f"must be replaced: {reason}")


def _whole_table(family: Family, change: DifferenceChange, remark: str) -> FamilyDifference:
    whole = RuleDifference(change=change, kind="table", table=names.TABLE, name=names.TABLE, remark=remark)
    return FamilyDifference(family=family.value, differences=(whole,))


class _Description:
    def __init__(
        self, ledger: NftablesLedger, family: Family, parts: TableParts, listed: Mapping[str, Sequence[str]]
    ) -> None:
        self._desired = DesiredTable(ledger, family)
        self._family = family
        self._parts = parts
        self._listed = listed
        self._writer = NftWriter(family)
        self._owners = ElementOwners(ledger)

    def part(self, part: Part) -> Iterator[RuleDifference]:
        if part.kind == "element":
            yield self._element(part.name, part.key)
        elif part.kind == "chain":
            yield self._chain(part.name)
        else:
            yield self._set(part.name)

    def _element(self, name: str, key: bytes) -> RuleDifference:
        expected, found = self._desired.element(name, key), self._parts.elements.get(name, {}).get(key)
        return RuleDifference(
            change=_change(exists=found is not None, wanted=expected is not None),
            kind="element",
            table=names.TABLE,
            name=name,
            services=self._owners.of_element(name, key, expected, found),
            expected=() if expected is None else (self._writer.added_element(name, expected),),
            found=() if found is None else (self._writer.added_element(name, found),),
        )

    def _set(self, name: str) -> RuleDifference:
        layout = self._parts.sets.get(name)
        change = _change(exists=layout is not None, wanted=self._desired.set(name) is not None)
        return RuleDifference(
            change=change,
            kind="set",
            table=names.TABLE,
            name=name,
            services=self._owners.of_name(name),
            remark="has many wrong or missing elements" if change == "changed" else "",
        )

    def _chain(self, name: str) -> RuleDifference:
        chain, state = self._desired.chain(name), self._parts.chains.get(name)
        expected, found = self._rules(name, chain, state)
        return RuleDifference(
            change=_change(exists=state is not None, wanted=chain is not None),
            kind="chain",
            table=names.TABLE,
            name=name,
            services=self._owners.of_name(name),
            expected=tuple(expected),
            found=tuple(found),
            remark=_chain_remark(chain, state, any_rule=bool(expected or found)),
        )

    def _rules(self, name: str, chain: NftChain | None, state: ChainState | None) -> tuple[list[str], list[str]]:
        """Return the rules that a chain lacks, and those that it must not have, without those that are right."""
        wanted = list(chain.rules) if chain is not None else []
        contents = [rule_content(rule, self._family) for rule in wanted]
        surplus = Counter(state.rules if state is not None else ())
        lacking = []
        for rule, content in zip(wanted, contents, strict=True):
            if surplus[content] > 0:
                surplus[content] -= 1
            else:
                lacking.append(self._writer.rule(rule))
        texts = dict(self._listed_rules(name, state))
        texts |= {content: self._writer.rule(rule) for rule, content in zip(wanted, contents, strict=True)}
        found = [
            texts.get(content) or (f'{_UNKNOWN_RULE} comment "{content.comment}"' if content.comment else _UNKNOWN_RULE)
            for content in surplus.elements()
        ]
        return lacking, found

    def _listed_rules(self, name: str, state: ChainState | None) -> Iterator[tuple[RuleContent, str]]:
        listed = self._listed.get(name, ())
        if state is not None and len(listed) == len(state.rules):  # the chain has not changed in between
            yield from zip(state.rules, listed, strict=True)


def rules_of_listing(listing: str) -> list[str]:
    """Return the rules in the output of `nft list chain`."""
    lines = [line.strip() for line in listing.splitlines() if line.startswith("\t\t")]
    return [line for line in lines if not _NO_RULE.match(line)]


def _change(*, exists: bool, wanted: bool) -> DifferenceChange:
    if not wanted:
        return "extra"
    return "changed" if exists else "missing"


def _chain_remark(chain: NftChain | None, state: ChainState | None, *, any_rule: bool) -> str:
    if chain is None or state is None:
        return ""
    if state.hook != chain.hook:
        return "has another hook, priority or policy"
    return "" if any_rule else "has the right rules in a different order"
