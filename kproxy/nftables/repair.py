"""Compute the transaction that restores parts of the table that other processes changed. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.model.drift import MAX_TOUCHED_ELEMENTS, Part
from kproxy.nftables.desired_table import BASE_SETS, DesiredTable, group_of
from kproxy.nftables.diff import IncompatibleTableError
from kproxy.nftables.elements import SetElement, SetLayout, set_layout
from kproxy.nftables.names import TABLE
from kproxy.nftables.rule_content import RuleContent, rule_content
from kproxy.nftables.ruleset import MapValue, NftChain, NftHook
from kproxy.nftables.transaction import Transaction

POLICY_DROP = " with policy drop"
"""Suffix of the hook's name for a base chain whose policy is not `accept`."""
_T = TypeVar("_T")


class ChainState(Struct):
    """A chain in the kernel: its hook (None for a regular chain) and its rules."""

    hook: NftHook | None
    rules: list[RuleContent]


class TableParts(Struct):
    """The current state of parts of the table. Each part that was read is present; None stands for a missing one.

    `elements` contains the elements that were read individually, by set and key. If all elements of a set were read,
    the set is in `whole_sets`, and keys that are absent from `elements` are missing in the kernel.
    """

    chains: dict[str, ChainState | None] = field(default_factory=dict)
    sets: dict[str, SetLayout | None] = field(default_factory=dict)
    elements: dict[str, dict[bytes, SetElement | None]] = field(default_factory=dict)
    whole_sets: set[str] = field(default_factory=set)


class Repair(Struct):
    """The transaction that restores the parts that differ, and the names of these parts."""

    transaction: Transaction = field(default_factory=Transaction)
    parts: list[Part] = field(default_factory=list)

    def add(self, kind: str, name: str) -> None:
        """Record a chain or set that differs."""
        self.parts.append(Part(TABLE, kind, name))  # type: ignore[arg-type]  # "chain" or "set"


def has_rules(state: ChainState, chain: NftChain, desired: DesiredTable) -> bool:
    """Return whether a chain in the kernel has the rules of a desired chain, in the same order."""
    return len(state.rules) == len(chain.rules) and all(
        found == rule_content(rule, desired.family) for found, rule in zip(state.rules, chain.rules, strict=True)
    )


def plan_repair(desired: DesiredTable, parts: TableParts) -> Repair:
    """Return the repair of all parts that differ from the desired table.

    Elements of sets to which rules add elements are not compared: they are state that clients depend on.

    Raises `IncompatibleTableError` if only a full sync can restore the parts.
    """
    repair = Repair()
    for set_name, layout in parts.sets.items():
        _repair_set(repair, desired, set_name, layout)
    for set_name in parts.elements.keys() | parts.whole_sets:
        if set_name in BASE_SETS and parts.sets.get(set_name) is not None:
            _repair_elements(repair, desired, set_name, parts)
    for chain_name, state in parts.chains.items():
        _repair_chain(repair, desired, chain_name, state)
    return repair


def _repair_set(repair: Repair, desired: DesiredTable, name: str, layout: SetLayout | None) -> None:
    definition = desired.set(name)
    if definition is None:
        if layout is not None:
            repair.transaction.deleted_sets.append(name)
            repair.add("set", name)
        return
    if layout is None:
        repair.transaction.added_sets.append(definition)
        repair.add("set", name)
        if name in BASE_SETS:
            for group in desired.groups(name):
                _add_group(repair, desired, name, group)
    elif layout != set_layout(definition, desired.family):
        raise IncompatibleTableError(f"set {name} has a different type")


def _repair_elements(repair: Repair, desired: DesiredTable, name: str, parts: TableParts) -> None:
    found = parts.elements.get(name, {})
    if b"" in found:
        raise IncompatibleTableError(f"map {name} has a catch-all element")
    matches = desired.matcher(name)
    correct: Counter[bytes] = Counter()
    keys: list[bytes] = []
    for key, existing in found.items():
        if existing is not None and matches(existing):
            correct[group_of(name, key)] += 1
        elif existing != (wanted := desired.element(name, key)):
            keys.append(key)
            _change_element(repair.transaction, name, existing, wanted)
    if name in parts.whole_sets:
        keys += _add_missing(repair, desired, name, found, correct)
    if len(keys) > MAX_TOUCHED_ELEMENTS:
        repair.add("set", name)
    else:
        repair.parts += [Part(TABLE, "element", name, key) for key in keys]


def _change_element(
    transaction: Transaction, name: str, existing: SetElement | None, wanted: SetElement | None
) -> None:
    if existing is not None:
        transaction.delete_element(name, existing)
    if wanted is not None:
        transaction.add_element(name, wanted)


def _add_missing(
    repair: Repair,
    desired: DesiredTable,
    name: str,
    found: Mapping[bytes, SetElement | None],
    correct: Mapping[bytes, int],
) -> list[bytes]:
    """Add the elements that a set lacks, and return their keys. `correct` counts the correct elements in each group."""
    keys: list[bytes] = []
    partial = {group_of(name, key) for key in found}
    for group in desired.groups(name):
        if group not in partial:
            keys += _add_group(repair, desired, name, group)
        elif correct.get(group, 0) != desired.group_size(name, group):
            lost = [element for element in desired.elements_of_group(name, group) if element.key not in found]
            for element in lost:
                repair.transaction.add_element(name, element)
            keys += [element.key for element in lost]
    return keys


def _add_group(repair: Repair, desired: DesiredTable, name: str, group: bytes) -> list[bytes]:
    """Add all elements of a group that has no elements in the kernel. Return their keys."""
    transaction = repair.transaction
    if BASE_SETS[name].value is MapValue.ENDPOINT:
        if runs := list(desired.endpoint_runs(name, group)):
            transaction.added_endpoints.setdefault(name, []).extend(runs)
    elif (element := desired.element(name, group)) is not None:
        transaction.add_element(name, element)
    return [element.key for element in desired.elements_of_group(name, group)]


def _repair_chain(repair: Repair, desired: DesiredTable, name: str, state: ChainState | None) -> None:
    transaction, chain = repair.transaction, desired.chain(name)
    if chain is None and state is None:
        return
    if chain is not None and state is not None and state.hook == chain.hook and has_rules(state, chain, desired):
        return
    if chain is not None and state is not None and (chain.hook is None) != (state.hook is None):
        raise IncompatibleTableError(f"chain {name} has a different hook")
    repair.add("chain", name)
    if state is not None:
        transaction.flushed_chains.append(name)
        if chain is None or (state.hook != chain.hook and without_policy(state.hook) != chain.hook):
            transaction.deleted_chains.append(name)
            state = None
    if chain is not None:
        if state is None or state.hook != chain.hook:
            transaction.added_chains.append(chain)  # for an existing chain, this sets the policy
        transaction.added_rules.append(chain)


def without_policy(hook: NftHook | None) -> NftHook | None:
    """Return a hook without what its name says about a policy other than `accept`."""
    return replace(hook, hook=hook.hook.removesuffix(POLICY_DROP)) if hook is not None else None


def grouped(items: Iterator[tuple[str, _T]]) -> Iterator[tuple[str, list[_T]]]:
    """Group consecutive items with the same name."""
    current: str | None = None
    group: list[_T] = []
    for name, item in items:
        if name != current and current is not None:
            yield current, group
            group = []
        current = name
        group.append(item)
    if current is not None:
        yield current, group
