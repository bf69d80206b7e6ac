"""Find out which of kproxy's iptables rules other processes damaged, and what restores them.

Pure, except that it may read individual chains of other tools from the kernel.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Protocol, TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.iptables.base_rules import EnsuredRule, ensured_rules
from kproxy.iptables.foreign_rules import (
    Frontends,
    conditional_match,
    first_blocking_rule,
    group_by_chain,
    restore_commands,
)
from kproxy.iptables.ledger import IptablesLedger, IptablesSnapshot
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, PORT_CHAIN_PREFIXES, ChainName, is_own
from kproxy.iptables.save_restore import UNREADABLE_RULE, normalize_rule, parse_incompatible
from kproxy.model.context import Context
from kproxy.model.drift import Part, Touched
from kproxy.model.types import ServiceKey

Owners: TypeAlias = dict[ChainName, ServiceKey]
"""The Services of per-Service chains."""


class ChainReader(Protocol):
    """Reads individual chains from the kernel. See `kproxy.iptables.backend.IptablesKernel`."""

    def has_rule(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule, or None if this cannot be determined."""

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those `chains` that exist."""


class Scope(Struct, frozen=True):
    """The parts of the rules to check: all chains of some tables, and individual chains."""

    tables: frozenset[str] = frozenset()
    chains: frozenset[ChainName] = frozenset()

    @classmethod
    def of(cls, touched: Mapping[str, Touched]) -> Scope:
        """Return the scope that covers everything that other processes touched, keyed by table."""
        return cls(
            frozenset(table for table, each in touched.items() if each.everything),
            frozenset(
                ChainName(table, name) for table, each in touched.items() if not each.everything for name in each.chains
            ),
        )

    def __bool__(self) -> bool:
        return bool(self.tables or self.chains)

    def __contains__(self, chain: object) -> bool:
        return isinstance(chain, ChainName) and (chain.table in self.tables or chain in self.chains)

    @property
    def touched_tables(self) -> frozenset[str]:
        """The tables to which these parts belong."""
        return self.tables | {chain.table for chain in self.chains}

    def relevant(self, context: Context) -> Scope:
        """Return the scope without the chains of other tools in which kproxy has no rules."""
        shared = {rule.chain for rule in ensured_rules(context)}
        return Scope(self.tables, frozenset(chain for chain in self.chains if chain in shared or is_own(chain)))


class Damage(Struct):
    """What must be changed to restore kproxy's rules.

    `chains` must be rewritten; those in `owners` are per-Service chains. `edits` are commands for individual rules in
    the chains `edited`, each with its table. `stale` chains belong to no Service and must be deleted. `findings` are
    rules of other tools that take traffic away from Services and that kproxy does not change.
    """

    chains: set[ChainName] = field(default_factory=set)
    owners: Owners = field(default_factory=dict)
    edits: list[tuple[str, str]] = field(default_factory=list)
    edited: set[ChainName] = field(default_factory=set)
    stale: list[ChainName] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.chains or self.edits or self.stale)

    @property
    def tables(self) -> frozenset[str]:
        """The tables of the damaged chains."""
        return frozenset(chain.table for chain in (*self.chains, *self.edited, *self.stale))

    def without(self, keys: Container[ServiceKey]) -> Damage:
        """Return the damage without the chains of some Services."""
        owners = {chain: key for chain, key in self.owners.items() if key not in keys}
        return replace(self, chains=self.chains - (self.owners.keys() - owners.keys()), owners=owners)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        """Return the damaged parts, sorted.

        A damaged table counts as a part, too, if `scope` contains the table as a whole: the next check of the table
        then waits, as that of a chain would.
        """
        chains = {*self.chains, *self.edited, *self.stale}
        tables = {Part(chain.table, "table") for chain in chains if chain.table in scope.tables}
        return tuple(sorted({*tables, *(Part(chain.table, "chain", chain.name) for chain in chains)}))


def find_damage(
    scope: Scope, snapshot: IptablesSnapshot, ledger: IptablesLedger, context: Context, kernel: ChainReader
) -> Damage:
    """Compare the chains in `scope` with the ledger. `snapshot` contains those of them that exist.

    `kernel` is only asked for chains that are not in the snapshot, and for rules that iptables cannot print.
    """
    damage = Damage()
    used: set[str] = set()
    for chain, digest in _shared_chains(ledger):
        if chain in scope and snapshot.digests.get(chain) != digest:
            damage.chains.add(chain)
    for key, chain, expected in _service_chains(ledger, scope):
        used.add(chain.name)
        if snapshot.digests.get(chain) != expected:
            damage.chains.add(chain)
            damage.owners[chain] = key
    damage.chains |= {chain for chain in CANARIES if chain in scope and snapshot.digests.get(chain) != hash("")}
    if FILTER_FIREWALL in scope and FILTER_FIREWALL not in snapshot.rules:
        damage.chains.add(FILTER_FIREWALL)
    _EnsuredRuleCheck(scope, snapshot, ledger, kernel).run(damage, context)
    shards = {shard for record in ledger.dispatch.values() for shard in record.chains}
    damage.stale = [chain for chain in snapshot.stale_chains(used, shards) if chain in scope]
    return damage


def _shared_chains(ledger: IptablesLedger) -> Iterator[tuple[ChainName, int]]:
    yield from ledger.base.items()
    for record in ledger.dispatch.values():
        yield from record.chains.items()


def _service_chains(ledger: IptablesLedger, scope: Scope) -> Iterator[tuple[ServiceKey, ChainName, int | None]]:
    """Yield the per-Service chains in `scope` with their Services and digests.

    The digest of a chain that does not exist in the kernel, because the kernel rejected its Service, is None.
    """
    everything = "nat" in scope.tables
    names = {
        chain.name for chain in scope.chains if chain.table == "nat" and chain.name.startswith(PORT_CHAIN_PREFIXES)
    }
    for key, record in ledger.services.items() if everything or names else ():
        for port in record.values():
            if everything or not names.isdisjoint(port.names.split()):
                for name, digest in port.chains():
                    if everything or name in names:
                        chain = ChainName("nat", name)
                        yield key, chain, ledger.existing(chain, digest)


class _EnsuredRuleCheck:
    """Finds what is wrong with kproxy's rules in the chains that other tools use, too."""

    def __init__(self, scope: Scope, snapshot: IptablesSnapshot, ledger: IptablesLedger, kernel: ChainReader) -> None:
        self._scope = scope
        self._snapshot = snapshot
        self._ledger = ledger
        self._kernel = kernel

    def run(self, damage: Damage, context: Context) -> None:
        """Add what is wrong to `damage`."""
        for chain, wanted in group_by_chain(ensured_rules(context)).items():
            if chain not in self._scope:
                continue
            # A chain that iptables cannot print at all seems to be missing.
            rules = self._snapshot.rules.get(chain, [UNREADABLE_RULE])
            own = {rule for rule in rules if any(each.is_satisfied_by(rule) for each in wanted)}
            blocked_from = first_blocking_rule(rules, wanted, self._read)
            if commands := restore_commands(rules, [*self._restorable(wanted, rules)], blocked_from):
                damage.edits += [(chain.table, command) for command in commands]
                damage.edited.add(chain)
            # After translation, packets that reach POSTROUTING are no longer addressed to a Service.
            before = _preceding(rules[:blocked_from], own) if chain.name != "POSTROUTING" else ()
            damage.findings += [
                f"a rule of another program in chain {chain.name} of table {chain.table} decides about traffic to "
                f"Services before kproxy's rules: {rule}"
                for rule in before
                if (match := conditional_match(rule)) is not None and self._frontends.are_matched_by(match)
            ]

    def _read(self, chain: ChainName) -> list[str]:
        known = self._snapshot.rules.get(chain)
        return self._kernel.list_rules([chain]).get(chain, []) if known is None else known

    def _restorable(self, wanted: Iterable[EnsuredRule], rules: list[str]) -> Iterator[EnsuredRule]:
        """Yield the rules that exist or that are certainly missing.

        A rule that seems to be missing may follow one that iptables cannot print.
        """
        for rule in wanted:
            if (
                UNREADABLE_RULE not in rules
                or rule.is_satisfied_by_any(rules)
                or self._kernel.has_rule(rule.chain, rule.rule) is False
            ):
                yield rule

    @cached_property
    def _frontends(self) -> Frontends:
        ports = (port for record in self._ledger.services.values() for port in record.values())
        rules = [rule for port in ports for rule in port.dispatch if rule.frontend is not None]
        return Frontends(
            frozenset(rule.destination for rule in rules if not rule.protocol),
            frozenset((rule.protocol, rule.destination) for rule in rules if rule.protocol),
        )


def _preceding(rules: list[str], own: Container[str]) -> Iterator[str]:
    """Yield the rules of other tools that precede the last rule of kproxy."""
    last = max((index for index, rule in enumerate(rules) if rule in own), default=0)
    return (rule for rule in rules[:last] if rule not in own)


def make_snapshot(chains: Mapping[ChainName, list[str]]) -> IptablesSnapshot:
    """Return the snapshot of some chains, given their rules."""
    snapshot = IptablesSnapshot({}, {})
    for chain, rules in chains.items():
        _add_chain(snapshot, chain, rules)
    return snapshot


def stream_snapshot(lines: Iterable[str], scope: Container[ChainName]) -> tuple[IptablesSnapshot, dict[str, str]]:
    """Return the snapshot of the chains in `scope`, and the tables that iptables could not print, with the reasons.

    `lines` is the output of `iptables-save`. The rules of per-Service chains are not kept in memory. The snapshot may
    contain some chains of the tables that could not be printed.
    """
    snapshot = IptablesSnapshot({}, {})
    incompatible: dict[str, str] = {}
    for (table, name), group in groupby(_by_chain(lines), key=itemgetter(0, 1)):
        chain = ChainName(table, name)
        if not name:
            incompatible |= filter(None, (parse_incompatible(line) for _, _, line in group))
        elif chain in scope:
            _add_chain(snapshot, chain, [normalize_rule(line) for _, _, line in group if line.startswith("-A ")])
    return snapshot, incompatible


def _by_chain(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each line with its table and its chain. A line that does not belong to a chain has the chain ""."""
    table = ""
    for line in lines:
        if line.startswith("-A "):
            yield table, line.split(" ", 2)[1], line
        elif line.startswith(":"):
            yield table, line[1:].split(" ", 1)[0], line
        else:
            if line.startswith("*"):
                table = line[1:].strip()
            yield table, "", line


def _add_chain(snapshot: IptablesSnapshot, chain: ChainName, rules: list[str]) -> None:
    if chain.name.startswith("KUBE-"):
        snapshot.digests[chain] = hash("\n".join(rules))
    if not chain.name.startswith(PORT_CHAIN_PREFIXES):
        snapshot.rules[chain] = rules
