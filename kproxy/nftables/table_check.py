"""Check the table for changes by other processes, and restore what they changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Protocol, TypeVar

from kproxy.host.nf_tables_constants import NFT_TABLE_F_DORMANT
from kproxy.model.drift import Part, RepairResult, Touched
from kproxy.model.types import Family
from kproxy.nftables.desired_table import BASE_SETS, DesiredTable, group_of
from kproxy.nftables.diff import IncompatibleTableError
from kproxy.nftables.elements import SetElement, SetLayout
from kproxy.nftables.kernel import GenerationChangedError, OwnGenerations, TableChangingError
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.names import TABLE
from kproxy.nftables.repair import ChainState, Repair, TableParts, grouped, has_rules, plan_repair
from kproxy.nftables.rule_content import RuleContent
from kproxy.nftables.ruleset import NftHook, NftSet
from kproxy.nftables.transaction import Transaction

MAX_ATTEMPTS = 5
"""Maximum number of attempts to repair the table while other processes keep changing tables.

The last attempt does not insist on the generation ID: it fails only if its own objects have changed.
"""
STEP_SECONDS = 0.015
"""Seconds of CPU time after which a step of a comparison ends."""
_CHUNK = 200
"""Number of objects to compare before the CPU time is checked."""
_T = TypeVar("_T")


class CheckedTable(Protocol):
    """What the check needs of `kproxy.nftables.kernel.NftTable`, which documents the methods."""

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None: ...  # noqa: D102

    def generation(self) -> int: ...  # noqa: D102

    def flags(self) -> int | None: ...  # noqa: D102

    def sets(self, names: Collection[str] | None = None) -> dict[str, SetLayout]: ...  # noqa: D102

    def chains(self, names: Collection[str] | None = None) -> dict[str, NftHook | None]: ...  # noqa: D102

    def rules(self, chain: str) -> list[RuleContent]: ...  # noqa: D102

    def element(self, definition: NftSet, key: bytes) -> SetElement | None: ...  # noqa: D102

    def elements(self, definition: NftSet) -> dict[bytes, SetElement]: ...  # noqa: D102

    def walk_rules(self) -> Iterator[tuple[str, RuleContent]]: ...  # noqa: D102

    def walk_elements(self, definition: NftSet) -> Iterator[SetElement]: ...  # noqa: D102


class TableCheck:
    """Compares parts of one family's table with a ledger, and restores the parts that differ.

    All methods raise `TableError` if the table cannot be read, or if the kernel rejects the repair.
    """

    def __init__(self, kernel: CheckedTable, own_generations: OwnGenerations) -> None:
        self._kernel = kernel
        self._own_generations = own_generations
        self._ledger: NftablesLedger | None = None
        self._comparison: Iterator[Touched] | None = None
        # The generation at which the running comparison began, and the one at which the last complete one began.
        self._began = 0
        self._compared: int | None = None

    def awaken(self) -> bool:
        """Clear the flag of a dormant table, whose chains the kernel does not evaluate. Return whether it was set.

        This is a transaction of its own, because the kernel rejects other changes to base chains in it.
        """
        if self._kernel.flags() != NFT_TABLE_F_DORMANT:
            return False
        self._kernel.commit(Transaction(create_table=True))
        return True

    def repair(self, ledger: NftablesLedger, family: Family, touched: Touched) -> RepairResult:
        """Restore those of the touched parts that differ from the ledger."""
        awakened = touched.everything and self.awaken()
        if self._kernel.flags() != 0:
            return RepairResult(needs_full_sync=True)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                repair = self._try_to_repair(ledger, family, touched, is_last=attempt == MAX_ATTEMPTS)
                break
            except GenerationChangedError:
                continue
            except IncompatibleTableError:
                return RepairResult(needs_full_sync=True)
        parts = (Part(TABLE, "table"), *repair.parts) if awakened else tuple(repair.parts)
        return RepairResult(parts)

    def examine(self, ledger: NftablesLedger, family: Family) -> tuple[TableParts, Repair]:
        """Read the whole table. Return it with the repair that it needs, which is not made.

        Raises `IncompatibleTableError` if only a full sync can restore the table.
        """
        desired = DesiredTable(ledger, family)
        parts = self._read_everything(desired)
        return parts, plan_repair(desired, parts)

    def compare_next(self, ledger: NftablesLedger, family: Family) -> RepairResult | None:
        """Compare the next part of the table with the ledger. Return None if the comparison is complete.

        If only this process has made commits since the last complete comparison, the comparison is complete at once.
        """
        if ledger is not self._ledger:
            self._ledger, self._comparison, self._compared = ledger, None, None
        if self._comparison is None:
            generation = self._kernel.generation()
            if self._compared is not None and self._own_generations.newest_after(self._compared) == generation:
                self._compared = generation
                return None
            self._began = generation
            self._comparison = self._compare(ledger, family)
        suspects, complete = self._next_suspects(self._comparison)
        if complete:
            self._comparison = None
            self._compared = self._began
            if not suspects:
                return None
        return self.repair(ledger, family, suspects) if suspects else RepairResult()

    def _next_suspects(self, comparison: Iterator[Touched]) -> tuple[Touched, bool]:
        suspects = Touched()
        end = time.thread_time() + STEP_SECONDS
        for found in comparison:
            suspects.everything |= found.everything
            for part in found.parts(TABLE):
                suspects.add_part(part)
            if time.thread_time() >= end:
                return suspects, False
        return suspects, True

    # A repair

    def _try_to_repair(self, ledger: NftablesLedger, family: Family, touched: Touched, *, is_last: bool) -> Repair:
        """Read the touched parts, and restore those that differ.

        Raises `GenerationChangedError` if another process has changed any table meanwhile, unless `is_last` is true.
        """
        generation = self._kernel.generation()
        desired = DesiredTable(ledger, family)
        repair = plan_repair(desired, self._read(desired, touched))
        transaction = repair.transaction
        for part in (transaction.split_off_new_chains(), transaction):
            if not part:
                continue
            if is_last:
                self._kernel.commit(part)
            else:
                generation = self._own_generations.commit(self._kernel.commit, part, generation)
        return repair

    def _read(self, desired: DesiredTable, touched: Touched) -> TableParts:
        kernel = self._kernel
        if touched.everything:
            return self._read_everything(desired)
        parts = TableParts()
        set_names = {*touched.sets, *touched.elements}
        layouts = kernel.sets(set_names)
        parts.sets = {name: layouts.get(name) for name in sorted(set_names)}
        for name in touched.elements.keys() & layouts.keys() & BASE_SETS.keys():
            definition = BASE_SETS[name]
            parts.elements[name] = {key: kernel.element(definition, key) for key in touched.elements[name]}
        for name in touched.sets & layouts.keys() & BASE_SETS.keys():
            self._read_whole_set(parts, desired, name)
        hooks = kernel.chains(touched.chains)
        for name in sorted(touched.chains):
            parts.chains[name] = ChainState(hooks[name], kernel.rules(name)) if name in hooks else None
        return parts

    def _read_everything(self, desired: DesiredTable) -> TableParts:
        layouts, hooks = self._kernel.sets(), self._kernel.chains()
        parts = TableParts(sets={name: layouts.get(name) for name in dict.fromkeys((*desired.set_names(), *layouts))})
        for name in BASE_SETS.keys() & layouts.keys():
            self._read_whole_set(parts, desired, name)
        rules = dict(grouped(self._kernel.walk_rules()))
        for name in dict.fromkeys((*desired.chain_names(), *hooks)):
            state = ChainState(hooks[name], rules.get(name, [])) if name in hooks else None
            chain = desired.chain(name)
            if chain is not None and state is not None and not has_rules(state, chain, desired):
                state.rules = self._kernel.rules(name)  # the walk may have been interrupted
            parts.chains[name] = state
        return parts

    def _read_whole_set(self, parts: TableParts, desired: DesiredTable, name: str) -> None:
        definition = BASE_SETS[name]
        try:
            parts.elements[name] = dict(self._kernel.elements(definition))
            parts.whole_sets.add(name)
            return
        except TableChangingError:
            pass
        # Other processes keep changing tables. Look again at each element that seems to differ.
        walked = {element.key: element for element in self._kernel.walk_elements(definition)}
        wrong = [key for key, element in walked.items() if element != desired.element(name, key)]
        missing = [element.key for element in desired.elements(name) if element.key not in walked]
        parts.elements[name] = {key: self._kernel.element(definition, key) for key in (*wrong, *missing)}

    # A comparison. It yields what may differ, often nothing, so that the caller can pause it. What it has read may be
    # out of date, because the table and the ledger change during the pauses. The caller checks the suspects again.

    def _compare(self, ledger: NftablesLedger, family: Family) -> Iterator[Touched]:
        flags = self._kernel.flags()
        if flags != 0:
            yield Touched(everything=True)
            return
        yield from self._compare_sets(DesiredTable(ledger, family))
        yield from self._compare_chains(DesiredTable(ledger, family))
        for name in BASE_SETS:
            yield from self._compare_elements(DesiredTable(ledger, family), name)

    def _compare_sets(self, desired: DesiredTable) -> Iterator[Touched]:
        layouts = self._kernel.sets()
        yield Touched()
        for names in _chunks(list(dict.fromkeys((*desired.set_names(), *layouts)))):
            parts = TableParts(sets={name: layouts.get(name) for name in names})
            yield Touched(sets=_suspects(desired, parts))

    def _compare_chains(self, desired: DesiredTable) -> Iterator[Touched]:
        hooks = self._kernel.chains()
        yield Touched()
        unseen = dict.fromkeys((*desired.chain_names(), *hooks))
        for name, rules in grouped(self._kernel.walk_rules()):
            unseen.pop(name, None)
            state = ChainState(hooks[name], rules) if name in hooks else None
            yield Touched(chains=_suspects(desired, TableParts(chains={name: state})))
        for names in _chunks(list(unseen)):
            states = {name: ChainState(hooks[name], []) if name in hooks else None for name in names}
            yield Touched(chains=_suspects(desired, TableParts(chains=states)))

    def _compare_elements(self, desired: DesiredTable, name: str) -> Iterator[Touched]:
        found: Counter[bytes] = Counter()  # the number of correct elements in each group
        matches = desired.matcher(name)
        wrong: set[bytes] = set()
        for number, element in enumerate(self._kernel.walk_elements(BASE_SETS[name]), 1):
            if matches(element):
                found[group_of(name, element.key)] += 1
            else:
                wrong.add(element.key)
            if number % _CHUNK == 0:
                yield Touched(elements={name: wrong} if wrong else {})
                wrong = set()
        yield Touched(elements={name: wrong} if wrong else {})
        for groups in _chunks(desired.groups(name)):
            missing = {element.key for element in desired.missing(name, groups, found)}
            yield Touched(elements={name: missing} if missing else {})


def _suspects(desired: DesiredTable, parts: TableParts) -> set[str]:
    """Return the names of the sets or chains that differ."""
    try:
        return {part.name for part in plan_repair(desired, parts).parts}
    except IncompatibleTableError:
        return {*parts.sets, *parts.chains}


def _chunks(items: list[_T]) -> Iterator[list[_T]]:
    yield from (items[begin : begin + _CHUNK] for begin in range(0, len(items), _CHUNK))
