"""All iptables rules of one IP family as text, without a kernel, and what a change of them writes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec import Struct

from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.diff import IptablesDiff
from kproxy.iptables.ledger import IptablesLedger, IptablesSnapshot
from kproxy.iptables.names import PORT_CHAIN_PREFIXES, ChainName
from kproxy.iptables.render import render_ports
from kproxy.iptables.save_restore import UNLIMITED, RestoreInput
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import ServiceKey


class DesiredRules(Struct, frozen=True):
    """What the kernel must contain: kproxy's chains with their rules (one per line), and the ledger about them.

    The jumps to these chains from chains of other tools are not in `chains`; see `ensured_rules`.
    """

    context: Context
    ledger: IptablesLedger
    chains: dict[ChainName, str]

    def snapshot(self) -> IptablesSnapshot:
        """Return the snapshot of a kernel that has exactly these rules."""
        digests = {chain: hash(rules) for chain, rules in self.chains.items()}
        rules = {
            chain: text.split("\n") if text else []
            for chain, text in self.chains.items()
            if not chain.name.startswith(PORT_CHAIN_PREFIXES)
        }
        for rule in ensured_rules(self.context):
            rules.setdefault(rule.chain, []).append(rule.text)
        return IptablesSnapshot(digests, rules)

    def rules(self) -> Counter[tuple[str, str]]:
        """Return all rules, each with its table."""
        found = Counter((chain.table, line) for chain, text in self.chains.items() for line in text.split("\n") if line)
        found.update((rule.chain.table, rule.text) for rule in ensured_rules(self.context))
        return found

    def text(self) -> str:
        """Return the input for `iptables-restore --noflush` that creates the chains, without the jumps to them."""
        return RestoreInput(dict(self.chains)).text()


def desired_rules(
    plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], context: Context, dispatch_threshold: int
) -> DesiredRules:
    """Render the plans of all Services of a family."""
    ledger = IptablesLedger()
    chains: dict[ChainName, str] = {}
    diff = _diff(ledger, IptablesSnapshot({}, {}), plans, context, dispatch_threshold)
    for transaction in diff.transactions():
        chains |= transaction.chains
    diff.commit()
    return DesiredRules(context, ledger, chains)


def written_rules(
    old: DesiredRules,
    plans: Mapping[ServiceKey, Sequence[ServicePortPlan]],
    context: Context,
    dispatch_threshold: int,
) -> int:
    """Return how many rules kproxy writes into a kernel that has the old rules, to program the plans.

    A chain in which one rule changes is rewritten. The daemon writes less for a Service with many endpoints, whose
    chains it changes rule by rule.
    """
    diff = _diff(IptablesLedger(), old.snapshot(), plans, context, dispatch_threshold)
    return sum(transaction.rules_by_table().total() for transaction in diff.transactions())


def _diff(
    ledger: IptablesLedger,
    snapshot: IptablesSnapshot,
    plans: Mapping[ServiceKey, Sequence[ServicePortPlan]],
    context: Context,
    dispatch_threshold: int,
) -> IptablesDiff:
    return IptablesDiff(
        ledger,
        snapshot,
        ((key, render_ports(ports, context)) for key, ports in plans.items()),
        context,
        max_transaction_rules=UNLIMITED,
        dispatch_threshold=dispatch_threshold,
    )
