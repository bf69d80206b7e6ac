"""An nftables table in memory, which refuses on demand.

`tests/kernel/test_nftables_fake.py` checks it against the real one.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy

from msgspec import Struct, field

from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import DROP, SetElement, SetLayout, set_layout
from kproxy.nftables.kernel import GenerationChangedError, TableError
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction


class FakeChain(Struct):
    """A chain and its rules; its comment is that of when it was made."""

    hook: nft.NftHook | None
    comment: str
    rules: list[nft.NftRule] = field(default_factory=list)


class FakeSet(Struct):
    """A set as it was made, and its elements by their keys."""

    made: nft.NftSet
    shape: SetLayout
    elements: dict[bytes, SetElement] = field(default_factory=dict)


class TableState(Struct):
    """What one nftables table holds."""

    chains: dict[str, FakeChain] = field(default_factory=dict)
    sets: dict[str, FakeSet] = field(default_factory=dict)

    def uses(self) -> Counter[str]:
        """How often each chain is used: by its rules, and by what leads to it."""
        found = Counter({name: len(chain.rules) for name, chain in self.chains.items()})
        found.update(go.chain for chain in self.chains.values() for rule in chain.rules for go in _gotos(rule))
        for each in self.sets.values():
            found.update(each.value for each in each.elements.values() if isinstance(each.value, str))
        del found[DROP]
        return found

    def readers(self, name: str) -> int:
        """How many statements of rules look at a set or write to it."""
        rules = (rule for chain in self.chains.values() for rule in chain.rules)
        return sum(_set_of(statement) == name for rule in rules for statement in rule.statements)


class FakeTable:
    """One family's table, with the transactions that it took. `refuse` may look at one and return why it may not be.

    The kernel's rules are those of net/netfilter/nf_tables_api.c: what a change is about must be there; what is used
    cannot be deleted; what is there stays as it is, and is refused if something else is wanted in its place.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.table: TableState | None = None
        self.current = 1
        self.commits: list[Transaction] = []
        self.reads = 0
        self.refuse: Callable[[Transaction], str | None] = lambda _: None

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        if generation is not None and generation != self.current:
            raise GenerationChangedError
        reason = self.refuse(change)
        if reason:
            raise TableError(reason)
        after = deepcopy(self.table)
        try:
            self.table = _Edit(self.family, after).make(change)
        except _RefusedError as error:
            raise TableError(f"{error.subject}: {os.strerror(error.code)}") from None
        self.commits.append(change)
        self.current = self.current + 1 & 0xFFFFFFFF or 1

    def generation(self) -> int:
        return self.current

    def uses(self) -> Counter[str]:
        self.reads += 1
        return self.table.uses() if self.table else Counter()

    def view(self, *, lenient: bool = False) -> TableSnapshot | None:
        self.reads += 1
        if self.table is None:
            return None
        table = deepcopy(self.table)
        view = TableSnapshot({name: found.shape for name, found in table.sets.items()})
        view.chains = {name: chain.hook for name, chain in table.chains.items()}
        for each in SETS:
            found = table.sets.get(each.name)
            if found is not None and found.shape == set_layout(each, self.family):
                view.elements[each.name] = found.elements
        return view


class _RefusedError(Exception):
    def __init__(self, code: int, subject: str) -> None:
        super().__init__(code, subject)
        self.code = code
        self.subject = subject


class _Edit:
    """Carries out a transaction on a table of its own."""

    def __init__(self, family: Family, table: TableState | None) -> None:
        self._family = family
        self._state = table

    @property
    def _table(self) -> TableState:
        if self._state is None:
            raise _RefusedError(errno.ENOENT, "table")
        return self._state

    def make(self, change: Transaction) -> TableState | None:
        if change.create and self._state is None:
            self._state = TableState()
        if change.replace:
            assert self._table is not None
            self._state = TableState()
        self._remove(change)
        for found in change.sets:
            self._new_set(found)
        for chain in change.chains:
            self._new_chain(chain)
        for chain in change.rules:
            for rule in chain.rules:
                self._new_rule(chain.name, rule)
        for name, elements in change.additions().items():
            for element in elements:
                self._add(name, element)
        if change.drop:
            assert self._table is not None
            self._state = None
        return self._state

    def _remove(self, change: Transaction) -> None:
        for name, elements in change.removed.items():
            for element in elements:
                if self._set(name).elements.pop(element.key, None) is None:
                    raise _RefusedError(errno.ENOENT, f"element of {name}")
        for name in change.flushed:
            self._chain(name).rules.clear()
        for name in change.deleted_sets:
            assert self._set(name) is not None
            if self._table.readers(name):
                raise _RefusedError(errno.EBUSY, f"set {name}")
            del self._table.sets[name]
        for name in change.deleted_chains:
            if self._table.uses()[name] > len(self._chain(name).rules):
                raise _RefusedError(errno.EBUSY, f"chain {name}")
            del self._table.chains[name]

    def _new_set(self, found: nft.NftSet) -> None:
        shape = set_layout(found, self._family)
        if self._table.sets.setdefault(found.name, FakeSet(found, shape)).shape != shape:
            raise _RefusedError(errno.EEXIST, f"set {found.name}")

    def _new_chain(self, chain: nft.NftChain) -> None:
        made = FakeChain(chain.hook, chain.comment)
        if self._table.chains.setdefault(chain.name, made).hook != chain.hook:
            raise _RefusedError(errno.EOPNOTSUPP, f"chain {chain.name}")

    def _new_rule(self, name: str, rule: nft.NftRule) -> None:
        for go in _gotos(rule):
            self._target(go.chain)
        for statement in rule.statements:
            if used := _set_of(statement):
                self._set(used)
        self._chain(name).rules.append(rule)

    def _add(self, name: str, element: SetElement) -> None:
        found = self._set(name)
        known = found.elements.get(element.key)
        if known is not None and known.value != element.value:
            raise _RefusedError(errno.EEXIST, f"element of {name}")
        if isinstance(element.value, str) and element.value != DROP:
            self._target(element.value)
        found.elements.setdefault(element.key, element)

    def _set(self, name: str) -> FakeSet:
        if name not in self._table.sets:
            raise _RefusedError(errno.ENOENT, f"set {name}")
        return self._table.sets[name]

    def _chain(self, name: str) -> FakeChain:
        if name not in self._table.chains:
            raise _RefusedError(errno.ENOENT, f"chain {name}")
        return self._table.chains[name]

    def _target(self, name: str) -> None:
        if self._chain(name).hook is not None:
            raise _RefusedError(errno.EOPNOTSUPP, f"chain {name}")


def _gotos(rule: nft.NftRule) -> list[nft.Go]:
    return [statement for statement in rule.statements if isinstance(statement, nft.Go)]


def _set_of(statement: nft.Statement) -> str:
    match statement:
        case nft.Lookup() | nft.UpdateSet():
            return statement.set
        case nft.DnatMap() | nft.VerdictMap():
            return statement.map
        case _:
            return ""
