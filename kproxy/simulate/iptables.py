"""Simulate iptables rules: the hooks that a packet traverses, and their chains.

One run computes all possible outcomes: a rule with `-m statistic` splits a packet into branches, each with a
probability.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.iptables_rules import SavedRules, SimulatedRule, parse_dump
from kproxy.simulate.packet import (
    Branches,
    PacketState,
    Simulator,
    Verdict,
    partition,
    to_anywhere,
    to_elsewhere,
    to_node,
    update,
)


class IptablesSimulator(Simulator):
    """Simulates the rules of one IP family, given the output of `iptables-save` or `ip6tables-save`.

    Raises `UnknownRuleError` if the text contains anything that is not supported.
    """

    def __init__(self, dump: str, family: Family) -> None:
        super().__init__(family)
        self._rules: SavedRules = parse_dump(dump)

    def _receive(self, branches: Branches) -> Branches:
        branches = self._nat_hook("PREROUTING", branches, to_anywhere)
        branches = self._filter_hook("INPUT", branches, to_node)
        branches = self._filter_hook("FORWARD", branches, to_elsewhere)
        branches = self._nat_hook("INPUT", branches, to_node)
        return self._nat_hook("POSTROUTING", branches, to_elsewhere)

    def _transmit(self, branches: Branches) -> Branches:
        # On `lo`, a packet to the node itself traverses the filter table, but not the nat table: NAT for its connection
        # has already been decided.
        branches = self._nat_hook("OUTPUT", branches, to_anywhere)
        branches = self._filter_hook("OUTPUT", branches, to_anywhere)
        branches = self._nat_hook("POSTROUTING", branches, to_anywhere)
        looped = update(branches, lambda state: replace(state, interface="lo"))
        return self._filter_hook("INPUT", looped, to_node)

    def _nat_hook(self, chain: str, branches: Branches, traverses: Callable[[PacketState], bool]) -> Branches:
        return self._hook(
            "nat", chain, branches, lambda state: state.packet.conntrack_state == "NEW" and traverses(state)
        )

    def _filter_hook(self, chain: str, branches: Branches, traverses: Callable[[PacketState], bool]) -> Branches:
        return self._hook("filter", chain, branches, traverses)

    def _hook(self, table: str, chain: str, branches: Branches, traverses: Callable[[PacketState], bool]) -> Branches:
        """Run a built-in chain and apply its policy.

        Branches that do not traverse the chain, or that already have a verdict, do not change.
        """
        branches, others = partition(branches, lambda state: state.verdict is None and traverses(state))
        found = self._rules.tables[table].get(chain)
        if not branches or found is None:
            return branches + others
        decided, undecided = self._run_chain(table, chain, branches)
        if found.policy == "DROP":
            undecided = update(undecided, lambda state: state.decide(Verdict.DROPPED))
        return decided + undecided + others

    def _run_chain(self, table: str, chain: str, branches: Branches) -> tuple[Branches, Branches]:
        """Run a chain of a table.

        Return two lists: the branches that leave the built-in chain of the table, and the branches that return to the
        calling chain. For a built-in chain, the policy applies to the branches in the second list.
        """
        decided: Branches = []
        returned: Branches = []
        for rule in self._rules.tables[table][chain].rules:
            matched, branches = self._match(rule, branches)
            if not matched:
                continue
            if rule.target == "RETURN":
                returned += matched
                continue
            ended, continued = self._apply_target(table, rule, matched)
            decided += ended
            branches += continued
            if not branches:
                break
        return decided, returned + branches

    def _match(self, rule: SimulatedRule, branches: Branches) -> tuple[Branches, Branches]:
        """Return two lists: the branches that match a rule, and the branches that do not.

        The rule's counter and the session affinity that the rule records are added to the branches that match.
        """
        matched, missed = partition(branches, lambda state: self._matches(rule, state))
        if rule.probability < 1.0:
            missed += [(state, probability * (1.0 - rule.probability)) for state, probability in matched]
            matched = [(state, probability * rule.probability) for state, probability in matched if rule.probability]
        if rule.counter:
            matched = update(matched, lambda state: replace(state, counters=(*state.counters, rule.counter)))
        if rule.recent_set:
            matched = update(matched, lambda state: replace(state, affinity_recorded=True))
        return matched, missed

    def _matches(self, rule: SimulatedRule, state: PacketState) -> bool:
        if not all(match(state) for match in rule.matches):
            return False
        if not rule.recent_check:
            return True
        endpoints = self._rules.affinity_endpoints.get(rule.recent_check, ())
        return not state.packet.affinity_endpoints.isdisjoint(endpoints)

    def _apply_target(self, table: str, rule: SimulatedRule, branches: Branches) -> tuple[Branches, Branches]:
        """Apply the target of a rule to the branches that match the rule.

        Return two lists: the branches that leave the built-in chain, and the branches that continue with the next
        rule.
        """
        if not rule.target:
            return [], branches
        if rule.target == "MARK":
            return [], update(branches, lambda state: replace(state, mark=_set_mark(state.mark, rule)))
        if rule.target in _TERMINATING_TARGETS:
            change = _TERMINATING_TARGETS[rule.target]
            return update(branches, lambda state: change(state, rule)), []
        return self._run_chain(table, rule.target, branches)


_TERMINATING_TARGETS: dict[str, Callable[[PacketState, SimulatedRule], PacketState]] = {
    "ACCEPT": lambda state, _: state,
    "DROP": lambda state, _: state.decide(Verdict.DROPPED),
    "REJECT": lambda state, rule: state.decide(Verdict.REJECTED, rule.reject_with),
    "MASQUERADE": lambda state, _: replace(state, masqueraded=True),
    "DNAT": lambda state, rule: state.dnat(rule.endpoint, rule.address, rule.port),
}
"""The targets after which a packet leaves the built-in chain of a table, with their effect on the packet."""


def _set_mark(mark: int, rule: SimulatedRule) -> int:
    """Apply `--set-xmark value/mask`: clear the bits in the mask, then XOR the mark with the value."""
    return (mark & ~rule.mark_mask) ^ rule.mark_value
