"""The periodic comparison of all iptables rules with the ledger, in small steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from itertools import chain as concatenate
from math import ceil
from typing import Protocol, TypeAlias

from kproxy.host.commands import CommandError
from kproxy.iptables.chain_groups import (
    Group,
    all_chains,
    all_groups,
    chains_of,
    count_chains,
    fingerprint,
    shared_chains,
)
from kproxy.iptables.ledger import IptablesLedger, IptablesSnapshot
from kproxy.iptables.names import ChainName
from kproxy.iptables.repair import Scope, make_snapshot, stream_snapshot
from kproxy.iptables.save_restore import TABLES
from kproxy.iptables.table_content import read_table
from kproxy.model.context import Context
from kproxy.model.drift import RepairResult
from kproxy.model.sync_report import SyncError
from kproxy.model.types import ServiceKey

CHAINS_PER_STEP = 1000
"""Number of chains to examine in one step. It takes about 25 ms."""
MAX_STEPS = 20
"""Maximum number of such steps in a comparison: of a large cluster, each step examines more chains.

There is one step per second, so that a comparison of any size takes less than half a minute.
"""
CHAIN_COST = 80
"""Time to list one chain, in units of the time that `iptables-save` needs for one rule."""
MIN_RULES = 10_000
"""With fewer rules than this, `iptables-save` is fast in any case."""
MAX_SINGLE_CHAINS = 1000
"""How many chains of a table that iptables cannot print completely are read one by one. Each takes 3 ms."""

Check: TypeAlias = Callable[[Scope], RepairResult]
"""Compares the chains in a scope with the ledger and restores those that differ. Raises `SyncError`."""
TableReader: TypeAlias = Callable[[str], IptablesSnapshot | None]
"""Reads all chains of a table in which kproxy has rules, or returns None if they must be read by other means."""


class ScopeReader(Protocol):
    """Reads rules, of a kernel or of a dump."""

    def save(self, table: str = "") -> AbstractContextManager[Iterator[str]]:
        """Read the rules of one table, or of all tables, as `iptables-save` prints them."""

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those `chains` that exist."""


class RuleReader(ScopeReader, Protocol):
    """The part of `kproxy.iptables.backend.IptablesKernel` that reads rules."""

    def foreign_changes(self) -> int | None:
        """Return a number that is different after another process has changed rules.

        Return None while this process is changing rules, in any family. Raises `OSError` or `CommandError`.
        """

    def latest_foreign_changes(self) -> int:
        """Return the latest result of `foreign_changes` that was not None. Raises `OSError` or `CommandError`."""

    def fingerprints(self, groups: Iterable[Sequence[ChainName]]) -> list[int] | None:
        """Return a number for each group of chains, which identifies the rules of these chains. 0 means no rules.

        Return None if the kernel has no such numbers. Raises `OSError` or `CommandError`.
        """

    def chain_names(self) -> dict[str, set[str]]:
        """Return the names of the chains of each table, if the kernel has `fingerprints`. Raises `OSError`."""


class RuleComparison:
    """Decides which chains are compared with the ledger in each step.

    Listing rules with iptables is expensive. With iptables-nft, the rules are therefore compared by fingerprints. A
    fingerprint is recorded when the content is known to equal the ledger: either it was compared, or no other process
    has changed any rule since a sync. It stays valid when the same rules are written again. Only groups of chains whose
    fingerprints are not the recorded ones are listed, together at the end of the comparison.

    With iptables-legacy, each comparison takes one step, in which all tables are read.
    """

    def __init__(self, kernel: RuleReader) -> None:
        self._kernel = kernel
        self._recorded: dict[Group, int] = {}
        self._intact_at: int | None = None
        """The value of `foreign_changes` at which all rules equaled the ledger."""
        self._began_at: int | None = None
        self._remaining: Iterator[Group] | None = None
        """The groups that the current comparison has not examined yet. None means that no comparison is running."""
        self._suspects: dict[Group, int] = {}
        self._learning = False
        self._chains_per_step = CHAINS_PER_STEP
        self._has_fingerprints = True
        self._complete = False

    def full_sync_began(self) -> None:
        """Note that a sync is about to read all rules."""
        self._stop()
        self._intact_at = self._began_at = None
        with suppress(OSError, CommandError):
            self._has_fingerprints = self._kernel.fingerprints([]) is not None
            self._began_at = self._kernel.latest_foreign_changes()

    def synced(self, services: Iterable[ServiceKey], *, is_full: bool) -> None:
        """Note that a sync has succeeded. `services` are those that it covered."""
        if is_full:
            self._intact_at = self._began_at
            return
        for key in services:
            self._recorded.pop(key, None)

    def knows_all(self, ledger: IptablesLedger) -> bool:
        """Return whether the fingerprints of all groups have been recorded, or there are no fingerprints."""
        return not self._has_fingerprints or all(group in self._recorded for group in all_groups(ledger))

    def read(self, scope: Scope, ledger: IptablesLedger, context: Context) -> IptablesSnapshot | None:
        """Read the chains in `scope`, as `read_scope` does. Raises `CommandError`."""
        names = cache(self._kernel.chain_names)

        def read_by_content(table: str) -> IptablesSnapshot | None:
            if not self._has_fingerprints or not self._recorded or sum(ledger.rule_counts.values()) < MIN_RULES:
                return None
            try:
                existing = {ChainName(table, name) for name in names().get(table, ())}
                return read_table(self._kernel, table, existing, ledger, context, recorded=self._recorded)
            except OSError:  # for example, other processes change the rules all the time
                return None

        return read_scope(self._kernel, scope, ledger, context, read_by_content)

    def next_step(self, ledger: IptablesLedger, context: Context, check: Check) -> RepairResult | None:
        """Take the next step. Return None if the comparison is complete. Raises `SyncError`."""
        if self._complete:
            self._complete = False
            return None
        try:
            if self._remaining is None and not self._begin(ledger):
                return None
            if not self._has_fingerprints:
                return self._end(check(Scope(tables=frozenset(TABLES))), {})
            return self._step(ledger, context, check)
        except OSError as error:
            self._stop()
            raise SyncError(f"cannot read the rules of iptables: {error.strerror or error}") from None
        except CommandError as error:
            self._stop()
            raise SyncError(str(error)) from None

    def _begin(self, ledger: IptablesLedger) -> bool:
        """Begin a comparison. Return False if there is nothing to compare."""
        self._suspects = {}
        self._began_at = self._kernel.latest_foreign_changes()
        self._has_fingerprints = self._kernel.fingerprints([]) is not None
        self._learning = self._has_fingerprints and self._began_at == self._intact_at
        groups: Iterable[Group] = [*all_groups(ledger)]
        if self._learning:
            groups = [group for group in groups if group not in self._recorded]
            if not groups:
                return False
        else:
            self._recorded = {key: each for key, each in self._recorded.items() if chains_of(key, ledger)}
        self._remaining = iter(groups)
        self._chains_per_step = max(CHAINS_PER_STEP, ceil(count_chains(ledger) / MAX_STEPS))
        return True

    def _step(self, ledger: IptablesLedger, context: Context, check: Check) -> RepairResult:
        assert self._remaining is not None
        found = self._examine(ledger, self._chains_per_step)
        if self._learning:
            if (changes := self._kernel.foreign_changes()) != self._intact_at:
                self._stop()  # the next step begins again: with a comparison of the content, unless `changes` is None
                self._complete = changes is None
                return RepairResult()
            self._recorded |= found
            if not found:
                self._stop()
                self._complete = True
            return RepairResult()
        self._suspects |= {group: each for group, each in found.items() if self._recorded.get(group) != each}
        if found:
            return RepairResult()
        shared = shared_chains(ledger, context)
        suspects = concatenate.from_iterable(chains_of(group, ledger) for group in self._suspects)
        result = check(Scope(chains=frozenset((*shared, *suspects))))
        if result.repaired and not result.needs_full_sync:
            # Whoever changed these chains, for example by restoring a rule set, may have created others.
            more = check(Scope(tables=frozenset(part.table for part in result.repaired)))
            findings = tuple(dict.fromkeys((*result.findings, *more.findings)))
            result = RepairResult((*result.repaired, *more.repaired), findings, more.needs_full_sync)
        return self._end(result, self._suspects)

    def _examine(self, ledger: IptablesLedger, limit: int) -> dict[Group, int]:
        """Return the fingerprints of the next groups, with at most `limit` chains unless one group has more."""
        assert self._remaining is not None
        groups: dict[Group, list[ChainName]] = {}
        size = 0
        for group in self._remaining:
            if chains := chains_of(group, ledger):
                groups[group] = chains
                size += len(chains)
                if size >= limit:
                    break
        numbers = (self._kernel.fingerprints(groups.values()) if groups else None) or ()
        return {group: fingerprint(number, group, ledger) for group, number in zip(groups, numbers, strict=True)}

    def _end(self, result: RepairResult, compared: dict[Group, int]) -> RepairResult:
        """End the comparison. If all rules were intact, `compared` are new fingerprints of intact chains."""
        if not (result.repaired or result.needs_full_sync):
            self._recorded |= compared
        if not result.needs_full_sync:
            self._intact_at = self._began_at
        self._stop()
        self._complete = True
        return result

    def _stop(self) -> None:
        self._remaining = None
        self._suspects = {}


def read_scope(
    kernel: ScopeReader,
    scope: Scope,
    ledger: IptablesLedger,
    context: Context,
    read_table: TableReader = lambda _: None,
) -> IptablesSnapshot | None:
    """Read the chains in `scope`: a few chains one by one, and otherwise a whole table, if possible by `read_table`.

    Return None if a table has too many chains to read them one by one, and iptables cannot print it as a whole because
    of a rule that another tool created. Raises `CommandError`.
    """
    snapshot = IptablesSnapshot({}, {})
    # iptables-nft takes as long to print one table as to print all of them.
    cost = sum(ledger.rule_counts.values()) + 5 * CHAIN_COST
    for table in TABLES:
        chains = {chain for chain in scope.chains if chain.table == table}
        if table in scope.tables or len(chains) * CHAIN_COST > cost:
            if (known := read_table(table)) is not None:
                snapshot.digests |= known.digests
                snapshot.rules |= known.rules
                continue
            with kernel.save(table) as lines:
                found, incompatible = stream_snapshot(lines, scope)
            if table not in incompatible:
                snapshot.digests |= found.digests
                snapshot.rules |= found.rules
                continue
            if table in scope.tables:
                chains = all_chains(table, ledger, context)
            if len(chains) > MAX_SINGLE_CHAINS:
                return None
        listed = make_snapshot(kernel.list_rules(chains))
        snapshot.digests |= listed.digests
        snapshot.rules |= listed.rules
    return snapshot
