"""The whole nftables table of one IP family, without a kernel, and what a change of it writes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import ServiceKey
from kproxy.nftables.desired_table import BASE_SETS, DesiredTable
from kproxy.nftables.diff import NftablesDiff
from kproxy.nftables.elements import SetElement
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import render_service
from kproxy.nftables.ruleset import NftRule
from kproxy.nftables.transaction import Transaction

TableItem: TypeAlias = tuple[str, SetElement | NftRule]
"""A rule with its chain, or an element with its set."""


def planned_ledger(plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], context: Context) -> NftablesLedger:
    """Return the ledger of a table that has exactly the rules of these plans."""
    ledger = NftablesLedger()
    _change(ledger, plans, context, create=True)
    return ledger


def table_items(ledger: NftablesLedger, context: Context) -> Counter[TableItem]:
    """Return all elements and rules that a ledger describes."""
    desired = DesiredTable(ledger, context.family)
    items: Counter[TableItem] = Counter((name, element) for name in BASE_SETS for element in desired.elements(name))
    for name in desired.chain_names():
        chain = desired.chain(name)
        items.update((name, rule) for rule in (chain.rules if chain is not None else ()))
    return items


def written_items(old: NftablesLedger, plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], context: Context) -> int:
    """Return how many elements and rules kproxy adds and deletes to program the plans. The old ledger is changed."""
    transaction = _change(old, plans, context, create=False)
    elements = (*transaction.all_added_elements().values(), *transaction.deleted_elements.values())
    return sum(map(len, elements)) + sum(len(chain.rules) for chain in transaction.added_rules)


def _change(
    ledger: NftablesLedger, plans: Mapping[ServiceKey, Sequence[ServicePortPlan]], context: Context, *, create: bool
) -> Transaction:
    diff = NftablesDiff(ledger, context, create=create)
    for key in dict.fromkeys((*ledger.services, *plans)):
        diff.put(key, render_service(plans.get(key, ()), context))
    transaction = diff.next_transaction()
    ledger.context = context
    return transaction
