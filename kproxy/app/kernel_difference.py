"""Compare the desired rules of this node with the kernel, or with a dump of its rules, without changing anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Protocol

from msgspec import Struct

from kproxy.app.backends import StartError
from kproxy.app.candidate_families import IPV6_ADDRESSES
from kproxy.app.iptables_families import discover_iptables
from kproxy.host.commands import PROBE_TIMEOUT_SECONDS, CommandError, run
from kproxy.host.nf_tables_constants import NFT_TABLE_F_DORMANT
from kproxy.iptables.comparison import ScopeReader, read_scope
from kproxy.iptables.desired_rules import DesiredRules, desired_rules
from kproxy.iptables.names import ChainName
from kproxy.iptables.repair import ChainReader, Damage, Scope, find_damage
from kproxy.iptables.runner import IptablesRunner
from kproxy.iptables.save_restore import TABLES, SavedTables, parse_save
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family
from kproxy.nftables.diff import IncompatibleTableError
from kproxy.nftables.kernel import NetlinkCommit, NftTable, OwnGenerations, TableError
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.planned_table import planned_ledger
from kproxy.nftables.repair import Repair, TableParts
from kproxy.nftables.table_check import TableCheck
from kproxy.sync.planning import PlannedFamily

MAX_LISTED_CHAINS = 300
"""If more chains are damaged, all rules are read at once. Reading a chain takes about 5 ms."""
MAX_NFT_LISTINGS = 50
"""Maximum number of chains whose rules are listed with the program `nft`. Each takes about 10 ms."""


class IptablesComparison(Struct, frozen=True):
    """The damage of one family, and the rules of those damaged chains that exist."""

    desired: DesiredRules
    damage: Damage
    found: Mapping[ChainName, list[str]]


class NftablesComparison(Struct, frozen=True):
    """How the table of one family differs.

    `parts` and `repair` are None if the table does not exist, or if it must be replaced, for the `reason` on one line.
    """

    ledger: NftablesLedger
    parts: TableParts | None = None
    repair: Repair | None = None
    reason: str = ""


class ReadableRules(ScopeReader, ChainReader, Protocol):
    """The rules of a kernel (`IptablesRunner`), or of a dump."""


def list_chains(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Return the first `MAX_NFT_LISTINGS` of these chains as `nft` lists them, or none if it is not installed."""
    found: dict[str, str] = {}
    for name in islice(names, MAX_NFT_LISTINGS):
        try:
            done = run(["nft", "list", "chain", table_family(family), TABLE, name], timeout=PROBE_TIMEOUT_SECONDS)
        except CommandError:
            return found
        if not done.code:
            found[name] = done.stdout
    return found


class SavedReader:
    """Reads rules from a dump of `iptables-save` (implements what `find_damage` and `read_scope` need)."""

    def __init__(self, saved: SavedTables, lines: list[str]) -> None:
        self._saved = saved
        self._lines = lines

    @contextmanager
    def save(self, table: str = "") -> Iterator[Iterator[str]]:  # noqa: ARG002 - the reader selects the tables
        """Return the lines of the dump."""
        yield iter(self._lines)

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those chains that are in the dump."""
        return {chain: self._saved.chains[chain].rules for chain in chains if chain in self._saved.chains}

    def has_rule(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule."""
        return f"-A {chain.name} {rule}" in self.list_rules([chain]).get(chain, [])


@cache
def iptables_runners() -> dict[Family, IptablesRunner]:
    """Return the runners of the families that work on this node. Raises `StartError`."""
    try:
        return discover_iptables()
    except CommandError as error:
        raise StartError(f"iptables mode does not work on this node: {error}") from None


def kernel_families() -> list[Family]:
    """Return the families that the kernel supports."""
    return list(Family) if IPV6_ADDRESSES.exists() else [Family.IPV4]


def compare_iptables(reader: ReadableRules, planned: PlannedFamily, dispatch_threshold: int) -> IptablesComparison:
    """Compare the rules of one family. Raises `SyncError` if they cannot be read."""
    desired = desired_rules(planned.plans, planned.context, dispatch_threshold)
    scope = Scope(tables=frozenset(TABLES))
    try:
        snapshot = read_scope(reader, scope, desired.ledger, planned.context)
        if snapshot is None:
            raise SyncError(f"{planned.context.family.value}: a table has rules that iptables cannot print")
        damage = find_damage(scope, snapshot, desired.ledger, planned.context, reader)
        chains = sorted(chain for chain in (*damage.chains, *damage.stale) if chain in snapshot.digests)
        found = reader.list_rules(chains) if len(chains) <= MAX_LISTED_CHAINS else _read_all(reader)
    except CommandError as error:
        raise SyncError(str(error)) from None
    return IptablesComparison(desired, damage, {chain: found.get(chain, []) for chain in chains})


def _read_all(reader: ReadableRules) -> dict[ChainName, list[str]]:
    with reader.save() as lines:
        return {chain: content.rules for chain, content in parse_save(lines).chains.items()}


def compare_nftables(planned: PlannedFamily) -> NftablesComparison:
    """Compare the table of one family. Raises `SyncError` if it cannot be read."""
    family = planned.context.family
    ledger = planned_ledger(planned.plans, planned.context)
    table = NftTable(family, NetlinkCommit(family))
    try:
        flags = table.flags()
        if flags is None:
            return NftablesComparison(ledger)
        if flags:
            dormant = "it is dormant: the kernel does not evaluate its chains"
            reason = dormant if flags == NFT_TABLE_F_DORMANT else f"it has flags ({flags:#x})"
            return NftablesComparison(ledger, reason=reason)
        parts, repair = TableCheck(table, OwnGenerations()).examine(ledger, family)
    except IncompatibleTableError as error:
        return NftablesComparison(ledger, reason=str(error))
    except TableError as error:
        raise SyncError(f"{family.value}: {error}") from None
    return NftablesComparison(ledger, parts, repair)
