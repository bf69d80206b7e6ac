"""Simulate nftables rules: the hooks that a packet traverses, and their chains.

One run computes all possible outcomes: a rule with numgen splits a packet into branches, each with a probability.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.nftables_parser import BaseChainHook, ListedChain, base_chains, parse_table
from kproxy.simulate.nftables_statements import ListedVerdict
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


class NftablesSimulator(Simulator):
    """Simulates the rules of one IP family, given the output of `nft list table ip kube-proxy` or `ip6 kube-proxy`.

    Raises `UnknownRuleError` if the text contains anything that is not supported.
    """

    def __init__(self, dump: str, family: Family) -> None:
        super().__init__(family)
        self._chains: dict[str, ListedChain] = parse_table(dump, family)

    def _receive(self, branches: Branches) -> Branches:
        branches = self._hook("prerouting", branches, to_anywhere)
        branches = self._hook("input", branches, to_node)
        branches = self._hook("forward", branches, to_elsewhere)
        return self._hook("postrouting", branches, to_elsewhere)

    def _transmit(self, branches: Branches) -> Branches:
        # On `lo`, a packet to the node itself traverses the chains of type filter, but not those of type nat: NAT for
        # its connection has already been decided.
        branches = self._hook("output", branches, to_anywhere)
        branches = self._hook("postrouting", branches, to_anywhere)
        looped, sent = partition(branches, to_node)
        looped = update(looped, lambda state: replace(state, interface="lo"))
        looped = self._hook("prerouting", looped, to_node, nat_settled=True)
        return self._hook("input", looped, to_node) + sent

    def _hook(
        self, hook: str, branches: Branches, traverses: Callable[[PacketState], bool], *, nat_settled: bool = False
    ) -> Branches:
        """Run the base chains of a hook for the branches that traverse the hook.

        If `nat_settled` is true, chains of type nat do not run.
        """
        branches, others = partition(branches, traverses)
        for base, chain in base_chains(self._chains, hook):
            if not (nat_settled and base.type == "nat"):
                branches = self._run_base_chain(base, chain, branches)
        return branches + others

    def _run_base_chain(self, base: BaseChainHook, chain: ListedChain, branches: Branches) -> Branches:
        """Run a base chain and apply its policy.

        Branches that the chain does not see, or that already have a verdict, do not change.
        """
        branches, others = partition(branches, lambda state: state.verdict is None and _sees(base, state))
        decided, undecided = self._run_chain(chain, branches)
        if base.drops:
            undecided = update(undecided, lambda state: state.decide(Verdict.DROPPED))
        return decided + undecided + others

    def _run_chain(self, chain: ListedChain, branches: Branches) -> tuple[Branches, Branches]:
        """Run a chain.

        Return two lists: the branches that leave the base chain, and the branches that return to the calling chain. For
        a base chain, the policy applies to the branches in the second list.
        """
        decided: Branches = []
        returned: Branches = []
        for rule in chain.rules:
            if not branches:
                break
            matched, branches = rule.evaluate(branches)
            for verdict, chosen in matched:
                ended, returning, continued = self._apply_verdict(verdict, chosen)
                decided += ended
                returned += returning
                branches += continued
        return decided, returned + branches

    def _apply_verdict(self, verdict: ListedVerdict, branches: Branches) -> tuple[Branches, Branches, Branches]:
        """Apply a verdict of a rule.

        Return three lists: the branches that leave the base chain, the branches that leave only this chain, and the
        branches that continue with the next rule of this chain. After `goto`, a packet that reaches the end of the
        other chain does not come back to this chain, but returns to the caller of this chain.
        """
        match verdict.action:
            case "terminate":
                return update(branches, verdict.change), [], []
            case "return":
                return [], branches, []
            case "continue":
                return [], [], branches
            case "goto":
                return (*self._run_chain(self._chains[verdict.chain], branches), [])
            case "jump":
                decided, returned = self._run_chain(self._chains[verdict.chain], branches)
                return decided, [], returned


def _sees(base: BaseChainHook, state: PacketState) -> bool:
    """Return whether a base chain sees a packet.

    A chain of type filter sees every packet. A chain of type nat sees only the first packet of a connection, and only
    if no earlier nat chain at the same hook has translated that packet.
    """
    if base.type == "filter":
        return True
    translated = state.masqueraded if base.hook == "postrouting" else bool(state.endpoint)
    return state.packet.conntrack_state == "NEW" and not translated
