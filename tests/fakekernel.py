"""A fake of the kernel's iptables tables in memory. It applies `iptables-restore --noflush` input or rejects it.

`tests/kernel/test_fakekernel.py` checks it against the real kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

from kproxy.host.commands import CommandError
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
    """The tables of one family.

    `inputs` lists all inputs, including rejected ones, and `reads` counts the dumps. `reject` gets each input and may
    return a reason to reject it. `reject_line` gets each line with its table and may return a reason to reject the
    transaction for this table; if `names_lines` is false, the error does not name the line. A test that changes the
    tables as another process counts its changes in `foreign_commits`. If `has_fingerprints` is false, the fake behaves
    like iptables-legacy. The tables in `dormant` have no effect; with an `awakening_error`, they cannot be awakened.
    """

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {table: {name: [] for name in names} for table, names in BUILTIN.items()}
        self.inputs: list[str] = []
        self.reads = 0
        self.reject: Callable[[str], str | None] = lambda _: None
        self.reject_line: Callable[[str, str], str | None] = lambda *_: None
        self.names_lines = True
        self.foreign_commits = 0
        self.has_fingerprints = True
        self.fingerprinted: list[ChainName] = []
        self.dormant: set[str] = set()
        self.awakening_error = ""

    @contextmanager
    def save(self, table: str = "") -> Iterator[Iterator[str]]:
        self.reads += 1
        yield iter(self.dump(table))

    def awaken(self, table: str) -> bool:
        if table in self.dormant and self.awakening_error:
            raise CommandError(self.awakening_error)
        was_dormant = table in self.dormant
        self.dormant.discard(table)
        return was_dormant

    def foreign_changes(self) -> int:
        return self.foreign_commits

    def latest_foreign_changes(self) -> int:
        return self.foreign_commits

    def fingerprints(self, groups: Iterable[Sequence[ChainName]]) -> list[int] | None:
        if not self.has_fingerprints:
            return None
        found = []
        for group in groups:
            self.fingerprinted += group
            rules = [self.tables[table].get(name, []) for table, name in group]
            found.append(hash(str(rules)) if any(rules) else 0)
        return found

    def chain_names(self) -> dict[str, set[str]]:
        return {table: set(chains) for table, chains in self.tables.items()}

    def has_rule(self, chain: ChainName, rule: str) -> bool:
        return rule in self.tables[chain.table].get(chain.name, [])

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        return {
            chain: [f"-A {chain.name} {rule}" for rule in self.tables[chain.table][chain.name]]
            for chain in chains
            if chain.name in self.tables[chain.table]
        }

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        return {chain: len(self.tables[chain.table].get(chain.name, [])) for chain in chains}

    def create_chain(self, chain: ChainName) -> None:
        self.tables[chain.table].setdefault(chain.name, [])

    def dump(self, only: str = "") -> list[str]:
        """Return all tables, or only one, as lines of `iptables-save` output."""
        lines = []
        for table, chains in self.tables.items():
            if only not in ("", table):
                continue
            lines.append(f"*{table}\n")
            lines += [f":{name} {'ACCEPT' if name in BUILTIN[table] else '-'} [0:0]\n" for name in sorted(chains)]
            lines += [f"-A {name} {rule}\n" for name in sorted(chains) for rule in chains[name]]
            lines.append("COMMIT\n")
        return lines

    def restore(self, text: str) -> None:
        self.inputs.append(text)
        reason = self.reject(text)
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
                self._check(name, line, number)
                self._edit(table, name, line, number)

    def restore_each(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.restore(text)

    def _check(self, table: str, line: str, number: int) -> None:
        reason = self.reject_line(table, line)
        if not reason:
            return
        if not self.names_lines:
            raise RestoreError(reason)
        chain = line.split(" ")[1] if line.startswith("-") else ""
        raise RestoreError(f"line {number}: {reason}", line=line, chain=chain)

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
                jump in rule and _target(rule) == chain for rules in table.values() for rule in rules
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
        elif command in {"-I", "-R", "-D"} and (match := re.fullmatch(r"(\d+)(?: (.+))?", rule)):
            index = int(match[1]) - 1
            if index >= len(table[chain]) + (command == "-I"):
                raise RestoreError(f"line {number}: no rule {index + 1} in {chain}", line=line)
            table[chain][index : index + (command != "-I")] = [match[2]] if match[2] else []
        else:
            raise RestoreError(f"line {number}: cannot {command}", line=line)


def _target(rule: str) -> str:
    match = re.search(r"-j (\S+)", rule)
    return match[1] if match else ""
