"""Count the rules that a change of the desired state writes, in either mode. Pure."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from kproxy.diagnose.difference_objects import WrittenRules
from kproxy.iptables.desired_rules import desired_rules, written_rules
from kproxy.nftables.planned_table import planned_ledger, table_items, written_items
from kproxy.sync.planning import PlannedFamily


class Rendering(Struct, frozen=True):
    """What the rules depend on besides the plans: the mode, and `kproxy.iptablesDispatchThreshold`."""

    mode: str
    dispatch_threshold: int


def count_written(
    old: PlannedFamily, old_rendering: Rendering, new: PlannedFamily, rendering: Rendering
) -> WrittenRules:
    """Count what changes in one family."""
    before, after = _items(old, old_rendering), _items(new, rendering)
    if old_rendering.mode != rendering.mode:
        written = after.total()
    elif rendering.mode == "iptables":
        rules = desired_rules(old.plans, old.context, old_rendering.dispatch_threshold)
        written = written_rules(rules, new.plans, new.context, rendering.dispatch_threshold)
    else:
        written = written_items(planned_ledger(old.plans, old.context), new.plans, new.context)
    return WrittenRules(
        family=new.context.family.value,
        added=(after - before).total(),
        removed=(before - after).total(),
        written=written,
    )


def _items(planned: PlannedFamily, rendering: Rendering) -> Counter[tuple[str, object]]:
    """Return all rules, and all elements of sets and maps."""
    items: Counter[tuple[str, object]] = Counter()
    if rendering.mode == "iptables":
        items.update(desired_rules(planned.plans, planned.context, rendering.dispatch_threshold).rules())
    else:
        items.update(table_items(planned_ledger(planned.plans, planned.context), planned.context))
    return items
