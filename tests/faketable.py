"""A fake of the kernel's nf_tables that keeps one table in memory. It applies transactions or rejects them.

`tests/kernel/test_nftables_fake.py` checks it against the real kernel.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from functools import lru_cache

from msgspec import Struct, field

from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import DROP, SetElement, SetLayout, set_layout
from kproxy.nftables.kernel import GenerationChangedError, TableError
from kproxy.nftables.repair import without_policy
from kproxy.nftables.rule_content import RuleContent, rule_content
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction

_content = lru_cache(1 << 14)(rule_content)
"""The content of a rule. Tests commit the same rules many times."""


class FakeChain(Struct):
    """A chain, with the comment that it was created with, and its rules."""

    hook: nft.NftHook | None
    comment: str
    rules: list[nft.NftRule] = field(default_factory=list)


class FakeSet(Struct):
    """A set or map, as it was created, and its elements by key."""

    definition: nft.NftSet
    layout: SetLayout
    elements: dict[bytes, SetElement] = field(default_factory=dict)


class TableState(Struct):
    """The contents of one table."""

    chains: dict[str, FakeChain] = field(default_factory=dict)
    sets: dict[str, FakeSet] = field(default_factory=dict)

    def chain_use_counts(self) -> Counter[str]:
        """Return NFTA_CHAIN_USE of each chain: how many rules it has, and how many rules and verdicts refer to it."""
        counts = Counter({name: len(chain.rules) for name, chain in self.chains.items()})
        counts.update(name for chain in self.chains.values() for rule in chain.rules for name in _target_chains(rule))
        elements = (element for fake_set in self.sets.values() for element in fake_set.elements.values())
        counts.update(element.value for element in elements if isinstance(element.value, str))
        del counts[DROP]
        return counts

    def set_use_count(self, name: str) -> int:
        """Return the number of statements that look up or update a set."""
        rules = (rule for chain in self.chains.values() for rule in chain.rules)
        return sum(_set_name(statement) == name for rule in rules for statement in rule.statements)


class FakeTable:
    """One family's table.

    `table` is None while the table does not exist. `commits` lists the accepted transactions, `reads` counts how
    often the table was read, and `snapshots` how often it was read completely. `reject` gets each transaction and
    may return a reason to reject it. Otherwise, the rules of net/netfilter/nf_tables_api.c apply: an object must
    exist to be changed or deleted; an object in use cannot be deleted; adding an existing object changes nothing,
    and fails if the new one is different.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.table: TableState | None = None
        self.table_flags = 0
        self.generation_id = 1
        self.commits: list[Transaction] = []
        self.reads = self.snapshots = 0
        self.reject: Callable[[Transaction], str | None] = lambda _: None

    @property
    def existing_table(self) -> TableState:
        """The table, which must exist."""
        assert self.table is not None
        return self.table

    def increment_generation(self) -> None:
        """Increment the generation ID, as a change of any table by another process does."""
        self.generation_id = self.generation_id + 1 & 0xFFFFFFFF or 1

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        if generation is not None and generation != self.generation_id:
            raise GenerationChangedError
        reason = self.reject(transaction)
        if reason:
            raise TableError(reason)
        try:
            self.table = _Edit(self.family, deepcopy(self.table)).apply(transaction)
        except _RejectedError as error:
            raise TableError(f"{error.subject}: {os.strerror(error.code)}") from None
        if transaction.create_table:
            self.table_flags = 0
        self.commits.append(transaction)
        self.increment_generation()

    def generation(self) -> int:
        return self.generation_id

    def chain_use_counts(self) -> Counter[str]:
        self.reads += 1
        return self.table.chain_use_counts() if self.table else Counter()

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        self.reads += 1
        self.snapshots += 1
        if self.table is None:
            return None
        table = deepcopy(self.table)
        snapshot = TableSnapshot(
            {name: fake_set.layout for name, fake_set in table.sets.items()}, flags=self.table_flags
        )
        snapshot.chains = {name: chain.hook for name, chain in table.chains.items()}
        for definition in SETS:
            fake_set = table.sets.get(definition.name)
            if fake_set is not None and fake_set.layout == set_layout(definition, self.family):
                snapshot.elements[definition.name] = fake_set.elements
        return snapshot

    def flags(self) -> int | None:
        self.reads += 1
        return self.table_flags if self.table is not None else None

    def sets(self, names: Collection[str] | None = None) -> dict[str, SetLayout]:
        self.reads += 1
        sets = self.table.sets if self.table is not None else {}
        return {name: each.layout for name, each in sets.items() if names is None or name in names}

    def chains(self, names: Collection[str] | None = None) -> dict[str, nft.NftHook | None]:
        self.reads += 1
        chains = self.table.chains if self.table is not None else {}
        return {name: each.hook for name, each in chains.items() if names is None or name in names}

    def rules(self, chain: str) -> list[RuleContent]:
        self.reads += 1
        chains = self.table.chains if self.table is not None else {}
        return [_content(rule, self.family) for rule in chains[chain].rules] if chain in chains else []

    def element(self, definition: nft.NftSet, key: bytes) -> SetElement | None:
        self.reads += 1
        fake_set = self._existing_set(definition)
        return fake_set.elements.get(key) if fake_set is not None else None

    def elements(self, definition: nft.NftSet) -> dict[bytes, SetElement]:
        self.reads += 1
        fake_set = self._existing_set(definition)
        if fake_set is None:
            raise TableError(f"cannot read the table: {os.strerror(errno.ENOENT)}")
        return dict(fake_set.elements)

    def walk_rules(self) -> Iterator[tuple[str, RuleContent]]:
        self.reads += 1
        for name, chain in list(self.table.chains.items()) if self.table is not None else ():
            for rule in list(chain.rules):
                yield name, _content(rule, self.family)

    def walk_elements(self, definition: nft.NftSet) -> Iterator[SetElement]:
        self.reads += 1
        fake_set = self._existing_set(definition)
        yield from list(fake_set.elements.values()) if fake_set is not None else ()

    def _existing_set(self, definition: nft.NftSet) -> FakeSet | None:
        return self.table.sets.get(definition.name) if self.table is not None else None


class _RejectedError(Exception):
    """The kernel rejects a transaction with the error `code`, because of `subject`."""

    def __init__(self, code: int, subject: str) -> None:
        super().__init__(code, subject)
        self.code = code
        self.subject = subject


class _Edit:
    """Applies one transaction to a copy of the table."""

    def __init__(self, family: Family, table: TableState | None) -> None:
        self._family = family
        self._state = table

    @property
    def _table(self) -> TableState:
        if self._state is None:
            raise _RejectedError(errno.ENOENT, "table")
        return self._state

    def apply(self, transaction: Transaction) -> TableState | None:
        if transaction.create_table and self._state is None:
            self._state = TableState()
        if transaction.replace_table:
            assert self._table is not None
            self._state = TableState()
        self._delete(transaction)
        for definition in transaction.added_sets:
            self._add_set(definition)
        for chain in transaction.added_chains:
            self._add_chain(chain)
        for chain in transaction.added_rules:
            for rule in chain.rules:
                self._add_rule(chain.name, rule)
        for name, elements in transaction.all_added_elements().items():
            for element in elements:
                self._add_element(name, element)
        if transaction.delete_table:
            assert self._table is not None
            self._state = None
        return self._state

    def _delete(self, transaction: Transaction) -> None:
        for name, elements in transaction.deleted_elements.items():
            for element in elements:
                if self._set(name).elements.pop(element.key, None) is None:
                    raise _RejectedError(errno.ENOENT, f"element of {name}")
        for name in transaction.flushed_chains:
            self._chain(name).rules.clear()
        for name in transaction.deleted_sets:
            assert self._set(name) is not None
            if self._table.set_use_count(name):
                raise _RejectedError(errno.EBUSY, f"set {name}")
            del self._table.sets[name]
        for name in transaction.deleted_chains:
            if self._table.chain_use_counts()[name] > len(self._chain(name).rules):
                raise _RejectedError(errno.EBUSY, f"chain {name}")
            del self._table.chains[name]

    def _add_set(self, definition: nft.NftSet) -> None:
        layout = set_layout(definition, self._family)
        if self._table.sets.setdefault(definition.name, FakeSet(definition, layout)).layout != layout:
            raise _RejectedError(errno.EEXIST, f"set {definition.name}")

    def _add_chain(self, chain: nft.NftChain) -> None:
        new = FakeChain(chain.hook, chain.comment)
        existing = self._table.chains.setdefault(chain.name, new)
        if without_policy(existing.hook) != chain.hook:
            raise _RejectedError(errno.EOPNOTSUPP, f"chain {chain.name}")
        existing.hook = chain.hook

    def _add_rule(self, chain_name: str, rule: nft.NftRule) -> None:
        for target in _target_chains(rule):
            self._check_target(target)
        for statement in rule.statements:
            if set_name := _set_name(statement):
                self._set(set_name)
        self._chain(chain_name).rules.append(rule)

    def _add_element(self, set_name: str, element: SetElement) -> None:
        elements = self._set(set_name).elements
        existing = elements.get(element.key)
        if existing is not None and existing.value != element.value:
            raise _RejectedError(errno.EEXIST, f"element of {set_name}")
        if isinstance(element.value, str) and element.value != DROP:
            self._check_target(element.value)
        elements.setdefault(element.key, element)

    def _set(self, name: str) -> FakeSet:
        if name not in self._table.sets:
            raise _RejectedError(errno.ENOENT, f"set {name}")
        return self._table.sets[name]

    def _chain(self, name: str) -> FakeChain:
        if name not in self._table.chains:
            raise _RejectedError(errno.ENOENT, f"chain {name}")
        return self._table.chains[name]

    def _check_target(self, name: str) -> None:
        if self._chain(name).hook is not None:
            raise _RejectedError(errno.EOPNOTSUPP, f"chain {name}")


def _target_chains(rule: nft.NftRule) -> list[str]:
    return [statement.chain for statement in rule.statements if isinstance(statement, (nft.Jump, nft.Goto))]


def _set_name(statement: nft.Statement) -> str:
    match statement:
        case nft.Lookup() | nft.UpdateSet():
            return statement.set
        case nft.DnatMap() | nft.VerdictMap():
            return statement.map
        case _:
            return ""
