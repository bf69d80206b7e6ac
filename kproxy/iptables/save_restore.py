"""The two texts of iptables: what `iptables-restore` reads and what `iptables-save` prints. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec import Struct, field

from kproxy.iptables.names import ChainName
from kproxy.iptables.patch import ChainPatch

TABLES = ("mangle", "nat", "filter")
"""The tables that we write, in the order we write them: destinations before verdicts."""


class RestoreInput(Struct):
    """One atomic change per table, in the making.

    `chains` are created or, if they exist, emptied, and filled with their rules (one per line). `edits` are
    single rule commands such as `-I INPUT 1 ...`. `patches` edit chains that have as many rules as they say.
    `deleted` chains must be referenced by nothing that remains. `may_fail` marks a change that nothing depends on.
    """

    chains: dict[ChainName, str] = field(default_factory=dict)
    patches: dict[ChainName, ChainPatch] = field(default_factory=dict)
    edits: list[tuple[str, str]] = field(default_factory=list)
    deleted: list[ChainName] = field(default_factory=list)
    may_fail: bool = False

    def __bool__(self) -> bool:
        return bool(self.chains or self.patches or self.edits or self.deleted)

    @property
    def rules(self) -> int:
        """How many rules and deletions this change makes, or what takes iptables-nft as long."""
        patched = sum(patch.weight for patch in self.patches.values())
        return count_rules(self.chains.values()) + patched + len(self.edits) + len(self.deleted)

    def rules_by_table(self) -> Counter[str]:
        """Return how many rules are written into chains of ours, for each table."""
        written = Counter(table for table, command in self.edits if command.startswith("-I KUBE-"))
        for chain, rules in self.chains.items():
            written[chain.table] += count_rules([rules])
        for chain, patch in self.patches.items():
            written[chain.table] += sum(not command.startswith("-D") for command in patch.commands)
        return written

    def settled(self, lengths: Mapping[ChainName, int]) -> RestoreInput:
        """Return this change for a kernel in which chains have so many rules: where a patch fits, it stays."""
        fits = {chain: patch for chain, patch in self.patches.items() if lengths.get(chain) == patch.length}
        if len(fits) == len(self.patches):
            return self
        anew = {chain: patch.rules for chain, patch in self.patches.items() if chain not in fits}
        return RestoreInput({**self.chains, **anew}, fits, self.edits, self.deleted, self.may_fail)

    def text(self) -> str:
        """Return the input for `iptables-restore --noflush`."""
        return "".join(self._table(table) for table in TABLES)

    def _table(self, table: str) -> str:
        chains = {chain.name: rules for chain, rules in self.chains.items() if chain.table == table}
        edits = [command for chain, patch in self.patches.items() if chain.table == table for command in patch.commands]
        edits += [command for owner, command in self.edits if owner == table]
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
    """A chain as `iptables-save` printed it: its rules in our own spelling, `-A CHAIN` included."""

    rules: list[str] = field(default_factory=list)


class SavedTables(Struct):
    """What `iptables-save` printed: chains, and why it could not print a table, for each that is missing here."""

    chains: dict[ChainName, SavedChain] = field(default_factory=dict)
    incompatible: dict[str, str] = field(default_factory=dict)


def parse_save(
    lines: Iterable[str], wanted: Iterable[str] = TABLES, incompatible: set[str] | None = None
) -> dict[ChainName, SavedChain]:
    """Read `iptables-save` output as `read_save` does, and return the chains.

    The names of tables that are missing because iptables cannot print them are added to `incompatible`.
    """
    saved = read_save(lines, wanted)
    if incompatible is not None:
        incompatible.update(saved.incompatible)
    return saved.chains


def read_save(lines: Iterable[str], wanted: Iterable[str] = TABLES) -> SavedTables:
    """Read `iptables-save` output of one or more tables; of a table that comes twice, the second counts.

    Of a table that somebody put rules into which iptables cannot print, nothing is returned but that: what came
    before such a rule is not all there is.

    Rules are normalised where printing differs from writing: counters are dropped, probabilities
    are rounded to how they were asked for, `--nfacct-name` has one space.
    """
    chains: dict[ChainName, SavedChain] = {}
    incompatible: dict[str, str] = {}
    tables = frozenset(wanted)
    table = ""
    for line in lines:
        if line.startswith("# Table") and (found := _INCOMPATIBLE.match(line)):
            incompatible[found[1]] = found[2] or line.strip("# \n")
        elif line.startswith("*"):
            table = line[1:].strip()
            chains = {chain: found for chain, found in chains.items() if chain.table != table}
        elif table not in tables:
            continue
        elif line.startswith(":"):
            chains[ChainName(table, line[1:].split(" ", 1)[0])] = SavedChain()
        elif line.startswith(("-A ", "[")):
            rule = _normal(line)
            chains.setdefault(ChainName(table, rule.split(" ", 2)[1]), SavedChain()).rules.append(rule)
    return SavedTables(
        {chain: found for chain, found in chains.items() if chain.table not in incompatible}, incompatible
    )


def incompatible_line(table: str, reason: str) -> str:
    """Return the line by which `read_save` learns that a table could not be printed; iptables-save has one like it."""
    return f"# Table `{table}' is incompatible: {reason}\n"


def parse_rules(listed: str) -> list[str]:
    """Read what `iptables -S CHAIN` prints into the chain's rules, normalised as by `parse_save`."""
    return [_normal(line) for line in listed.splitlines() if line.startswith("-A ")]


_INCOMPATIBLE = re.compile(r"# Table [`'](\w+)' is incompatible(?:: (.+))?")
_COUNTERS = re.compile(r"^\[\d+:\d+\] ")
_PROBABILITY = re.compile(r"(?<=--probability )\d\.\d+")


def _normal(line: str) -> str:
    rule = _COUNTERS.sub("", line).rstrip("\n ")
    if "--probability " in rule:
        rule = _PROBABILITY.sub(_as_asked, rule)
    return rule.replace("--nfacct-name  ", "--nfacct-name ")


def _as_asked(found: re.Match[str]) -> str:
    """Return 1/n with 10 decimals: the kernel keeps a probability as a multiple of 2**-31."""
    share = float(found[0])
    if not share:
        return found[0]
    asked = 1 / round(1 / share)
    return f"{asked:.10f}" if abs(share - asked) < 2**-31 else found[0]


def count_rules(chains: Iterable[str]) -> int:
    """Return how many rules these chains' texts hold."""
    return sum(rules.count("\n") + 1 for rules in chains if rules)
