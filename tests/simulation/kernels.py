"""Fake kernels that are fast enough for thousands of histories, and the damage that other processes do to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from importlib import import_module
from random import Random
from typing import Any, Self

from msgspec.structs import astuple, replace

from kproxy.iptables.base_rules import ensured_rules
from kproxy.model.context import Context
from kproxy.model.drift import Touched
from kproxy.model.types import Family
from kproxy.nftables import kernel as nftables_kernel
from kproxy.nftables import ruleset as nft
from kproxy.nftables.elements import DROP, SetElement
from kproxy.nftables.kernel import TableError
from kproxy.nftables.names import TABLE
from kproxy.nftables.transaction import Transaction
from tests.fakekernel import BUILTIN, FakeKernel
from tests.faketable import FakeChain, FakeSet, FakeTable, TableState

Damage = tuple[str, dict[str, Touched]]
"""What another process did, as text, and what it touched, by table."""


Refusal = tuple[str, str, bytes, int]
"""The object because of which the kernel rejects a transaction: its kind, the chain or set, the key, and an errno."""
_CODES = {os.strerror(code): code for code in (errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EOPNOTSUPP)}


def rejection(kind: str, name: str, key: bytes, code: int) -> Exception:
    """Return the error of a transaction that the kernel rejects because of one of its objects."""
    text = f"{kind} {name}: {os.strerror(code)}"
    make = getattr(nftables_kernel, "TransactionRejectedError", None)
    if make is None:
        return TableError(text)
    rejected = import_module("kproxy.nftables.rejection").RejectedObject
    found: Exception = make(text, [rejected(kind, name, text, key, code)] if name else [])
    return found


class Generations:
    """The generation ID, which all tables of a network namespace share."""

    def __init__(self) -> None:
        self.current = 1


class FastState(TableState):
    """A table whose copy shares all rules and elements, because they are immutable."""

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        chains, sets, *others = astuple(self)
        return type(self)(
            {name: replace(chain, rules=list(chain.rules)) for name, chain in chains.items()},
            {name: replace(each, elements=dict(each.elements)) for name, each in sets.items()},
            *others,
        )


class SimulatedTable(FakeTable):
    """One family's nftables table."""

    def __init__(self, family: Family, generations: Generations) -> None:
        self._generations = generations
        self.refuse: Callable[[Transaction], Refusal | None] = lambda _: None
        super().__init__(family)

    @property
    def generation_id(self) -> int:
        return self._generations.current

    @generation_id.setter
    def generation_id(self, value: int) -> None:
        self._generations.current = max(self._generations.current, value)

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        if generation in {None, self.generation_id} and (found := self.refuse(transaction)) is not None:
            raise rejection(*found)
        try:
            super().commit(transaction, generation)
        except TableError as error:
            subject, _, reason = str(error).rpartition(": ")
            kind, _, name = subject.replace("element of", "element").partition(" ")
            raise rejection(kind, name, b"", _CODES.get(reason, errno.EINVAL)) from None
        if self.table is not None and not isinstance(self.table, FastState):
            self.table = FastState(*astuple(self.table))

    def difference(self, fresh: FakeTable) -> list[str]:
        """Return what differs from the table of a fresh start."""
        return list(_table_difference(self.table, fresh.table))


def _table_difference(table: TableState | None, fresh: TableState | None) -> list[str]:
    if table is None or fresh is None:
        return [f"the table is {'missing' if table is None else 'unexpected'}"]
    found = [
        f"chain {name}: {table.chains.get(name)} instead of {fresh.chains.get(name)}"
        for name in sorted(table.chains.keys() | fresh.chains.keys())
        if table.chains.get(name) != fresh.chains.get(name)
    ]
    for name in sorted(table.sets.keys() | fresh.sets.keys()):
        ours, theirs = table.sets.get(name), fresh.sets.get(name)
        if ours is None or theirs is None or ours.layout != theirs.layout:
            found.append(f"set {name}: {ours} instead of {theirs}")
        elif ours.elements != theirs.elements:
            missing = [each for each in theirs.elements.values() if each not in ours.elements.values()]
            extra = [each for each in ours.elements.values() if each not in theirs.elements.values()]
            found.append(f"set {name}: missing {missing}, unexpected {extra}")
    return found


class FastChains(dict[str, list[str]]):
    """The chains of an iptables table. A copy shares the rules."""

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return type(self)({name: list(rules) for name, rules in self.items()})


class SimulatedIptables(FakeKernel):
    """The iptables tables of one family. `saved` is a rule set that was saved earlier and may be restored."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {name: FastChains(chains) for name, chains in self.tables.items()}
        self.saved: dict[str, FastChains] | None = None

    def count_foreign_commit(self) -> None:
        """Count a change that another process made."""
        if hasattr(self, "foreign_commits"):
            self.foreign_commits += 1

    def content(self, context: Context) -> dict[tuple[str, str], list[str]]:
        """Return kproxy's chains, and kproxy's rules in chains that other tools also use, in any order."""
        ensured = {rule.rule for rule in ensured_rules(context)}
        return {
            (table, name): rules if name not in BUILTIN[table] else sorted(rule for rule in rules if rule in ensured)
            for table, chains in self.tables.items()
            for name, rules in chains.items()
            if name != "KUBE-FIREWALL" and not name.startswith("FOREIGN")
        }


# Damage to nftables


def damage_table(kernel: SimulatedTable, random: Random, *, detectable: bool) -> Damage | None:
    """Let another process change the table; return None if it has nothing to change.

    With `detectable`, make only changes that change the use count of a chain.
    """
    table = kernel.table
    if table is None:
        return None
    kinds = ["flush chain", "delete rule", "delete table", "delete verdict"]
    if not detectable:
        kinds += ["insert rule", "replace rule", "delete element", "replace element", "add element", "flush set"]
        kinds += ["delete element", "replace element", "add chain"]
    kind = random.choice(kinds)
    done = _damage_chain(table, random, kind) or _damage_set(table, random, kind)
    if kind == "delete table":
        kernel.table = None
        done = kind, Touched(everything=True)
    if done is None:
        return None
    kernel.increment_generation()
    done[1].by.add("intruder")
    return done[0], {TABLE: done[1]}


FOREIGN_RULES = (nft.rule(nft.Drop()), nft.rule(nft.Return()), nft.rule(nft.MatchSaddr("192.0.2.0/24"), nft.Drop()))


def _damage_chain(table: TableState, random: Random, kind: str) -> tuple[str, Touched] | None:
    if kind == "add chain":
        table.chains["foreign"] = FakeChain(None, "", [nft.rule(nft.Drop())])
        return "add chain foreign", Touched(chains={"foreign"})
    if kind not in {"flush chain", "delete rule", "insert rule", "replace rule"}:
        return None
    name = random.choice([name for name, chain in table.chains.items() if chain.rules] or [""])
    if not name:
        return None
    rules = table.chains[name].rules
    index = random.randrange(len(rules))
    if kind == "flush chain":
        rules.clear()
    elif kind == "delete rule":
        del rules[index]
    elif kind == "insert rule":
        rules.insert(index, random.choice(FOREIGN_RULES))
    else:
        rules[index] = random.choice(FOREIGN_RULES)
    return f"{kind} {index} of {name}", Touched(chains={name})


def _damage_set(table: TableState, random: Random, kind: str) -> tuple[str, Touched] | None:
    if kind not in {"delete verdict", "delete element", "replace element", "add element", "flush set"}:
        return None
    found = [each for each in table.sets.values() if each.elements]
    if kind == "delete verdict":
        found = [each for each in found if any(element.value for element in _jumps(each))]
    if not found:
        return None
    chosen = random.choice(found)
    name, elements = chosen.definition.name, chosen.elements
    if kind == "flush set":
        elements.clear()
        return f"flush set {name}", Touched(sets={name})
    element = random.choice(_jumps(chosen) if kind == "delete verdict" else list(elements.values()))
    if kind in {"delete verdict", "delete element"}:
        del elements[element.key]
    elif kind == "replace element":
        elements[element.key] = _replaced(element)
    else:
        element = replace(element, key=bytes([*element.key[:-1], element.key[-1] ^ 64]))
        elements[element.key] = element
    return f"{kind} {element.key.hex()} of {name}", Touched(elements={name: {element.key}})


def _jumps(fake_set: FakeSet) -> list[SetElement]:
    return [each for each in fake_set.elements.values() if isinstance(each.value, str) and each.value != DROP]


def _replaced(element: SetElement) -> SetElement:
    if isinstance(element.value, bytes):
        return replace(element, value=bytes(len(element.value)))
    if isinstance(element.value, str):
        return replace(element, value="reject-chain" if element.value == DROP else DROP)
    return replace(element, comment="foreign")


# Damage to iptables

FOREIGN_TEXTS = ("-j DROP", "-j RETURN", '-m comment --comment "foreign" -j ACCEPT')


def damage_iptables(  # noqa: PLR0911 - one return for each kind of damage
    kernel: SimulatedIptables, random: Random, context: Context, *, detectable: bool
) -> Damage | None:
    """Let another process change a table; return None if it has nothing to change.

    With `detectable`, make only changes to chains that do not belong to a single Service.
    """
    kinds = ["flush table", "delete jump"]
    kinds += ["flush chain", "delete rule"] * (1 if detectable else 3)
    if not detectable:
        kinds += ["insert rule", "replace rule", "insert rule", "delete chain", "save", "restore", "restore"]
    kind = random.choice(kinds)
    kernel.count_foreign_commit()
    if kind == "save":
        kernel.saved = {name: FastChains(chains).__deepcopy__({}) for name, chains in kernel.tables.items()}
        return None
    table = random.choice(("nat", "nat", "filter"))
    if kind == "restore":
        if kernel.saved is None:
            return None
        kernel.tables[table] = kernel.saved[table].__deepcopy__({})
        return f"restore table {table}", {table: Touched(everything=True)}
    chains = kernel.tables[table]
    if kind == "flush table":
        kernel.tables[table] = FastChains({name: [] for name in BUILTIN[table]})
        return f"flush table {table}", {table: Touched(everything=True)}
    if kind == "delete jump":
        found = [(rule.chain.name, rule.rule) for rule in ensured_rules(context) if rule.chain.table == table]
        name, text = random.choice(found)
        if text not in chains[name]:
            return None
        chains[name].remove(text)
        return f"delete jump {text} from {table} {name}", {table: Touched(chains={name})}
    done = _damage_iptables_chain(chains, random, kind, detectable=detectable)
    return (f"{done[0]} in {table}", {table: Touched(chains=done[1])}) if done else None


SHARED = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-FORWARD")


def _damage_iptables_chain(
    chains: dict[str, list[str]], random: Random, kind: str, *, detectable: bool
) -> tuple[str, set[str]] | None:
    ours = [name for name, rules in chains.items() if name.startswith("KUBE-") and rules and name != "KUBE-FIREWALL"]
    if detectable:
        ours = [name for name in ours if name in SHARED]
    if not ours:
        return None
    name = random.choice(ours)
    rules = chains[name]
    index = random.randrange(len(rules))
    if kind == "delete chain":
        used = any(f"-j {name}" in rule for others in chains.values() for rule in others)
        if not used:
            return None
        users = [each for each, rules in chains.items() if any(rule.endswith(f"-j {name}") for rule in rules)]
        for user in users:
            chains[user][:] = [rule for rule in chains[user] if not rule.endswith(f"-j {name}")]
        del chains[name]
        return f"delete chain {name}", {name, *users}
    if kind == "flush chain":
        rules.clear()
    elif kind == "delete rule":
        del rules[index]
    elif kind == "insert rule":
        rules.insert(index, random.choice(FOREIGN_TEXTS))
    else:
        rules[index] = random.choice(FOREIGN_TEXTS)
    return f"{kind} {index} of {name}", {name}
