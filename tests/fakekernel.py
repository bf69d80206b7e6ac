"""A kernel for rules in memory: one that understands what `iptables-restore --noflush` reads. It refuses on demand.

`tests/kernel/test_fakekernel.py` checks it against the real one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

from kproxy.iptables.names import ChainName
from kproxy.iptables.runner import RestoreError

BUILTIN = {
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
TARGETS = {"ACCEPT", "DROP", "REJECT", "RETURN", "MARK", "MASQUERADE", "DNAT"}

Table = dict[str, list[str]]


class FakeKernel:
    """The tables of one family. `refuse` may look at an input and return why it is not accepted."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {table: {name: [] for name in names} for table, names in BUILTIN.items()}
        self.inputs: list[str] = []
        self.reads = 0
        self.refuse: Callable[[str], str | None] = lambda _: None

    @contextmanager
    def save(self) -> Iterator[Iterator[str]]:
        self.reads += 1
        yield iter(self.dump())

    def has(self, chain: ChainName, rule: str) -> bool:
        return rule in self.tables[chain.table].get(chain.name, [])

    def look(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        return {
            chain: [f"-A {chain.name} {rule}" for rule in self.tables[chain.table][chain.name]]
            for chain in chains
            if chain.name in self.tables[chain.table]
        }

    def lengths(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        return {chain: len(self.tables[chain.table].get(chain.name, [])) for chain in chains}

    def create(self, chain: ChainName) -> None:
        self.tables[chain.table].setdefault(chain.name, [])

    def dump(self) -> list[str]:
        lines = []
        for table, chains in self.tables.items():
            lines.append(f"*{table}\n")
            lines += [f":{name} {'ACCEPT' if name in BUILTIN[table] else '-'} [0:0]\n" for name in sorted(chains)]
            lines += [f"-A {name} {rule}\n" for name in sorted(chains) for rule in chains[name]]
            lines.append("COMMIT\n")
        return lines

    def restore(self, text: str) -> None:
        self.inputs.append(text)
        reason = self.refuse(text)
        if reason:
            raise RestoreError(reason)
        name, table = "", {}
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("*"):
                name = line[1:]
                table = deepcopy(self.tables[name])
            elif line == "COMMIT":
                self.tables[name] = table
            else:
                self._edit(table, name, line, number)

    def restore_each(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.restore(text)

    def _edit(self, table: Table, name: str, line: str, number: int) -> None:
        command, rest = line.split(" ", 1)
        if command.startswith(":"):
            table[command[1:]] = [] if command[1:] not in BUILTIN[name] else table[command[1:]]
            return
        chain, _, rule = rest.partition(" ")
        if chain not in table:
            raise RestoreError(f"line {number}: no chain {chain}", line=line)
        if command == "-X":
            jump = f"-j {chain}"
            if table[chain] or any(
                jump in each and _target(each) == chain for rules in table.values() for each in rules
            ):
                raise RestoreError(f"line {number}: {chain} is in use", line=line)
            del table[chain]
            return
        target = _target(rule)
        if target and target not in TARGETS and target not in table:
            raise RestoreError(f"line {number}: no chain {target}", line=line)
        if command == "-A":
            table[chain].append(rule)
        elif command == "-D" and rule in table[chain]:
            table[chain].remove(rule)
        elif command in {"-I", "-R", "-D"} and (found := re.fullmatch(r"(\d+)(?: (.+))?", rule)):
            place = int(found[1]) - 1
            if place >= len(table[chain]) + (command == "-I"):
                raise RestoreError(f"line {number}: no rule {place + 1} in {chain}", line=line)
            table[chain][place : place + (command != "-I")] = [found[2]] if found[2] else []
        else:
            raise RestoreError(f"line {number}: cannot {command}", line=line)


def _target(rule: str) -> str:
    found = re.search(r"-j (\S+)", rule)
    return found[1] if found else ""
