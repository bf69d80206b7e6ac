"""Write `iptables-restore` input and parse `iptables-save` output. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct, field

from kproxy.iptables.names import ChainName
from kproxy.iptables.patch import ChainPatch

TABLES = ("mangle", "nat", "filter")
"""The tables that kproxy writes, in this order: DNAT rules (nat) are written before drop and reject rules (filter)."""
MAX_TRANSACTION_RULES = 1200
"""Maximum number of rules in one transaction of a large change: about 40 Services with 10 endpoints each.

iptables-nft needs a constant time for each transaction, plus a time that grows with the square of the number of rules
in the transaction. CPU time to program 1,000 and 5,000 Services with 10 endpoints each:

- 600 rules per transaction: 0.8 s and 6.3 s
- 1,200 rules: 0.7 s and 4.6 s
- 2,400 rules: 0.9 s and 4.7 s
- 6,000 rules: 1.0 s and 6.2 s
- everything in one transaction: 5.3 s and several minutes
"""
UNLIMITED = 1 << 60
"""No limit on the rules in a transaction: iptables-legacy rewrites the whole table for each transaction."""
MAX_QUOTED = 80
"""Maximum number of characters of an unexpected line to quote in an error message."""
UNREADABLE_RULE = "# a rule that iptables cannot print"
"""Placeholder for the rules of a chain that iptables cannot print. It is never equal to a rule."""
_INCOMPATIBLE = re.compile(r"# Table [`'](\w+)' is incompatible(?:: (.+))?")
_RULE = re.compile(r"(?:\[\d+:\d+\] )?-A (\S+)")
_COUNTERS = re.compile(r"^\[\d+:\d+\] ")
_PROBABILITY_UNITS = 1 << 31
"""The kernel stores a probability as a multiple of 1 / _PROBABILITY_UNITS."""
_PROBABILITY = re.compile(r"(?<=--probability )\d\.\d+")


class RestoreInput(Struct):
    """A change that `iptables-restore --noflush` applies as one transaction per table.

    The `chains` are created, or flushed if they exist, and then filled with their rules (one per line). `patches`
    change individual rules of chains that have the expected number of rules. `edits` are further commands for
    individual rules, such as `-I INPUT 1 ...`, each with its table. The chains in `deleted` must not be referenced by
    any remaining rule. A `best_effort` change is allowed to fail, because nothing depends on it.
    """

    chains: dict[ChainName, str] = field(default_factory=dict)
    patches: dict[ChainName, ChainPatch] = field(default_factory=dict)
    edits: list[tuple[str, str]] = field(default_factory=list)
    deleted: list[ChainName] = field(default_factory=list)
    best_effort: bool = False

    def __bool__(self) -> bool:
        return bool(self.chains or self.patches or self.edits or self.deleted)

    @property
    def cost(self) -> int:
        """Time that iptables-nft needs for the change, in units of the time to write one rule or delete one chain."""
        patched = sum(patch.cost for patch in self.patches.values())
        return count_rules(self.chains.values()) + patched + len(self.edits) + len(self.deleted)

    def add(self, other: RestoreInput) -> None:
        """Add the chains, patches and edits of another change to this one."""
        self.chains |= other.chains
        self.patches |= other.patches
        self.edits += other.edits

    def by_table(self) -> Iterator[RestoreInput]:
        """Yield the change of each table, in the order of `TABLES`. There must be no patches."""
        for table in TABLES:
            part = RestoreInput(
                {chain: rules for chain, rules in self.chains.items() if chain.table == table},
                edits=[edit for edit in self.edits if edit[0] == table],
                deleted=[chain for chain in self.deleted if chain.table == table],
            )
            if part:
                yield part

    def rules_by_table(self) -> Counter[str]:
        """Return the number of rules that the change writes into KUBE- chains, by table."""
        written = Counter(table for table, command in self.edits if command.startswith("-I KUBE-"))
        for chain, rules in self.chains.items():
            written[chain.table] += count_rules([rules])
        for chain, patch in self.patches.items():
            written[chain.table] += sum(not command.startswith("-D") for command in patch.commands)
        return written

    def with_applicable_patches(self, rule_counts: Mapping[ChainName, int]) -> RestoreInput:
        """Return the change with only those patches whose chains have the expected number of rules in the kernel.

        The chains of the other patches are rewritten. `rule_counts` is the number of rules of each chain in the kernel.
        """
        fits = {chain: patch for chain, patch in self.patches.items() if rule_counts.get(chain) == patch.old_length}
        if len(fits) == len(self.patches):
            return self
        rewritten = {chain: patch.rules for chain, patch in self.patches.items() if chain not in fits}
        return RestoreInput({**self.chains, **rewritten}, fits, self.edits, self.deleted, self.best_effort)

    def text(self) -> str:
        """Return the input for `iptables-restore --noflush`."""
        return "".join(self._table(table) for table in TABLES)

    def _table(self, table: str) -> str:
        chains = {chain.name: rules for chain, rules in self.chains.items() if chain.table == table}
        edits = [command for chain, patch in self.patches.items() if chain.table == table for command in patch.commands]
        edits += [command for edited_table, command in self.edits if edited_table == table]
        deleted = [chain.name for chain in self.deleted if chain.table == table]
        if not (chains or edits or deleted):
            return ""
        lines = [f"*{table}"]
        lines += [f":{name} - [0:0]" for name in chains]
        lines += [f":{name} - [0:0]" for name in deleted]
        lines += [rules for rules in chains.values() if rules]
        lines += edits
        lines += [f"-X {name}" for name in deleted]
        lines.append("COMMIT\n")
        return "\n".join(lines)


class SavedChain(Struct):
    """A chain in `iptables-save` output. Its rules begin with `-A CHAIN` and are normalized (see `parse_save`)."""

    rules: list[str] = field(default_factory=list)


class SavedTables(Struct):
    """The chains in `iptables-save` output.

    `incompatible` maps each table that iptables could not print to the reason. `chains` contains no chains of these
    tables.
    """

    chains: dict[ChainName, SavedChain] = field(default_factory=dict)
    incompatible: dict[str, str] = field(default_factory=dict)


class SaveError(ValueError):
    """The output of `iptables-save` is cut off or is not a list of rules. The message is one line."""


def parse_save(lines: Iterable[str], tables: Iterable[str] = TABLES) -> SavedTables:
    """Parse the given tables in `iptables-save` output. If a table occurs twice, the second occurrence is used.

    Raises `SaveError` if the output of one of these tables ends before its `COMMIT`, or if a line is not part of such
    output. Otherwise, the missing rules would look as if they did not exist.

    If iptables cannot print a rule of a table, the output for this table is incomplete. In that case, the result
    contains no chains of the table.

    Rules are normalized where iptables prints them differently from how they were written: counters are removed, a
    probability is replaced by the value that was written, and `--nfacct-name` is followed by only one space.
    """
    chains: dict[ChainName, SavedChain] = {}
    incompatible: dict[str, str] = {}
    selected = frozenset(tables)
    table = ""
    cut_off: dict[str, None] = {}
    for line in lines:
        if (failed := parse_incompatible(line)) is not None:
            incompatible[failed[0]] = failed[1]
        elif line.startswith("*"):
            table = line[1:].strip()
            chains = {chain: saved for chain, saved in chains.items() if chain.table != table}
            if table in selected:
                cut_off[table] = None
        elif table and table not in selected:
            continue
        elif line.startswith("COMMIT") and table:
            cut_off.pop(table, None)
            table = ""
        else:
            _parse_line(table, line, chains)
    if missing := cut_off.keys() - incompatible.keys():
        raise SaveError(f"the output of iptables-save for table {min(missing)} is cut off")
    return SavedTables(
        {chain: saved for chain, saved in chains.items() if chain.table not in incompatible}, incompatible
    )


def _parse_line(table: str, line: str, chains: dict[ChainName, SavedChain]) -> None:
    """Add the chain or rule on a line to `chains`. Ignore comments and empty lines. Raises `SaveError`."""
    if table and line.startswith(":"):
        chains[ChainName(table, line[1:].rstrip("\n").split(" ", 1)[0])] = SavedChain()
    elif table and (match := _RULE.match(line)):
        chains.setdefault(ChainName(table, match[1]), SavedChain()).rules.append(normalize_rule(line))
    elif line.strip() and not line.startswith("#"):
        raise SaveError(f"not a line of iptables-save: {line[:MAX_QUOTED].rstrip()!r}")


def incompatible_line(table: str, reason: str) -> str:
    """Return the line by which `parse_save` recognizes that `iptables-save` could not print a table."""
    return f"# Table `{table}' is incompatible: {reason}\n"


def parse_incompatible(line: str) -> tuple[str, str] | None:
    """Return the table and the reason if a line says that `iptables-save` could not print a table."""
    match = _INCOMPATIBLE.match(line) if line.startswith("# Table") else None
    return (match[1], match[2] or line.strip("# \n")) if match else None


def parse_rules(listing: str) -> list[str]:
    """Return the rules in the output of `iptables -S CHAIN`, normalized as in `parse_save`."""
    return [normalize_rule(line) for line in listing.splitlines() if line.startswith("-A ")]


def count_rules(chains: Iterable[str]) -> int:
    """Return the total number of rules in `chains`. Each chain is given as text with one rule per line."""
    return sum(rules.count("\n") + 1 for rules in chains if rules)


def probability_text(chosen: int, total: int) -> str:
    """Return the probability `chosen / total` as `parse_save` returns it after iptables has printed it."""
    text = f"{round(chosen / total * _PROBABILITY_UNITS) / _PROBABILITY_UNITS:.11f}"
    return _PROBABILITY.sub(_requested_probability, f"--probability {text}").removeprefix("--probability ")


def normalize_rule(line: str) -> str:
    """Return one rule in the form that `parse_save` describes."""
    rule = _COUNTERS.sub("", line).rstrip("\n ")
    if "--probability " in rule:
        rule = _PROBABILITY.sub(_requested_probability, rule)
    return rule.replace("--nfacct-name  ", "--nfacct-name ")


def _requested_probability(match: re.Match[str]) -> str:
    """Return the probability 1/n as kproxy wrote it, with 10 decimals. Return any other probability unchanged.

    iptables prints a slightly different number, because the kernel stores a probability as a multiple of 2**-31.
    """
    stored = float(match[0])
    if not 0 < stored <= 1:
        return match[0]
    requested = 1 / round(1 / stored)
    return f"{requested:.10f}" if abs(stored - requested) < 1 / _PROBABILITY_UNITS else match[0]
