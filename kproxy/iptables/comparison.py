"""The periodic comparison of all iptables rules with the ledger, in small steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import chain as concatenate
from math import ceil
from typing import Protocol, TypeAlias

from kproxy.host.commands import CommandError
from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.ledger import Digest, IptablesLedger, IptablesSnapshot
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName
from kproxy.iptables.repair import Scope, make_snapshot, stream_snapshot
from kproxy.iptables.save_restore import TABLES
from kproxy.model.context import Context
from kproxy.model.drift import RepairResult
from kproxy.model.sync_report import SyncError
from kproxy.model.types import ServiceKey

CHAINS_PER_STEP = 1000
"""Number of chains to examine in one step while other processes may have changed rules. It takes about 25 ms."""
MAX_STEPS = 20
"""Maximum number of such steps in a comparison: of a large cluster, each step examines more chains.

There is one step per second, so that a comparison of any size takes less than half a minute.
"""
LEARNED_CHAINS_PER_STEP = 250
"""Number of chains to examine in one step while no other process has changed any rule since the last sync."""
CHAIN_COST = 80
"""Time to list one chain, in units of the time that `iptables-save` needs for one rule."""
MAX_SINGLE_CHAINS = 1000
"""How many chains of a table that iptables cannot print completely are read one by one. Each takes 3 ms."""

Check: TypeAlias = Callable[[Scope], RepairResult]
"""Compares the chains in a scope with the ledger and restores those that differ. Raises `SyncError`."""
Group: TypeAlias = ServiceKey | ChainName
"""A Service, which stands for its per-Service chains, or a dispatch chain or shard."""


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
        """Return a number for each group of chains, which is different after any rule of these chains was written.

        Return None if the kernel has no such numbers. Raises `OSError` or `CommandError`.
        """


class RuleComparison:
    """Decides which chains are compared with the ledger in each step.

    Listing rules with iptables is expensive. With iptables-nft, the rules are therefore compared by fingerprints. A
    fingerprint is recorded when the content is known to equal the ledger: either it was compared, or no other process
    has changed any rule since a sync. Only groups of chains whose fingerprints are not the recorded ones are listed,
    together at the end of the comparison.

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
            self._began_at = self._kernel.latest_foreign_changes()

    def synced(self, services: Iterable[ServiceKey], *, is_full: bool) -> None:
        """Note that a sync has succeeded. `services` are those that it covered."""
        if is_full:
            self._intact_at = self._began_at
            return
        for key in services:
            self._recorded.pop(key, None)

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
        groups: Iterable[Group] = [*_dispatch_chains(ledger), *ledger.services]
        if self._learning:
            groups = [group for group in groups if group not in self._recorded]
            if not groups:
                return False
        else:
            self._recorded = {key: each for key, each in self._recorded.items() if _chains(key, ledger)}
        self._remaining = iter(groups)
        self._chains_per_step = max(CHAINS_PER_STEP, ceil(_count_chains(ledger) / MAX_STEPS))
        return True

    def _step(self, ledger: IptablesLedger, context: Context, check: Check) -> RepairResult:
        assert self._remaining is not None
        found = self._examine(ledger, LEARNED_CHAINS_PER_STEP if self._learning else self._chains_per_step)
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
        shared = (*CANARIES, FILTER_FIREWALL, *ledger.base, *(rule.chain for rule in ensured_rules(context)))
        suspects = concatenate.from_iterable(_chains(group, ledger) for group in self._suspects)
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
            if chains := _chains(group, ledger):
                groups[group] = chains
                size += len(chains)
                if size >= limit:
                    break
        fingerprints = (self._kernel.fingerprints(groups.values()) if groups else None) or ()
        # A chain without rules always has the same fingerprint. It must not match one that was recorded before a sync
        # added rules to the chain.
        return {
            group: hash((fingerprint, _dispatch_digest(group, ledger)))
            for group, fingerprint in zip(groups, fingerprints, strict=True)
        }

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


def _dispatch_chains(ledger: IptablesLedger) -> Iterator[ChainName]:
    return concatenate.from_iterable(record.chains for record in ledger.dispatch.values())


def _count_chains(ledger: IptablesLedger) -> int:
    ports = (port for record in ledger.services.values() for port in record.values() if port.names)
    return sum(1 for _ in _dispatch_chains(ledger)) + sum(port.names.count(" ") + 1 for port in ports)


def _dispatch_digest(group: Group, ledger: IptablesLedger) -> Digest | None:
    """Return the digest that the ledger has for a dispatch chain or shard, and None for a Service."""
    if isinstance(group, ChainName):
        return next((record.chains[group] for record in ledger.dispatch.values() if group in record.chains), None)
    return None  # `synced` forgets the fingerprint of every Service that may have changed


def _chains(group: Group, ledger: IptablesLedger) -> list[ChainName]:
    """Return the chains of a group, or none if it is no longer in the ledger."""
    if isinstance(group, ChainName):
        return [group] if any(group in record.chains for record in ledger.dispatch.values()) else []
    ports = ledger.services.get(group, {}).values()
    return [ChainName("nat", name) for port in ports for name in port.names.split()]


def read_scope(kernel: ScopeReader, scope: Scope, ledger: IptablesLedger, context: Context) -> IptablesSnapshot | None:
    """Read the chains in `scope`: a few chains one by one, and otherwise a whole table.

    Return None if a table has too many chains to read them one by one, and iptables cannot print it as a whole because
    of a rule that another tool created. Raises `CommandError`.
    """
    snapshot = IptablesSnapshot({}, {})
    # iptables-nft takes as long to print one table as to print all of them.
    cost = sum(ledger.rule_counts.values()) + 5 * CHAIN_COST
    for table in TABLES:
        chains = {chain for chain in scope.chains if chain.table == table}
        if table in scope.tables or len(chains) * CHAIN_COST > cost:
            with kernel.save(table) as lines:
                found, incompatible = stream_snapshot(lines, scope)
            if table not in incompatible:
                snapshot.digests |= found.digests
                snapshot.rules |= found.rules
                continue
            if table in scope.tables:
                chains = _all_chains(table, ledger, context)
            if len(chains) > MAX_SINGLE_CHAINS:
                return None
        listed = make_snapshot(kernel.list_rules(chains))
        snapshot.digests |= listed.digests
        snapshot.rules |= listed.rules
    return snapshot


def _all_chains(table: str, ledger: IptablesLedger, context: Context) -> set[ChainName]:
    """Return all chains of a table in which kproxy has rules."""
    groups: Iterable[Group] = concatenate(_dispatch_chains(ledger), ledger.services)
    chains = concatenate.from_iterable(_chains(group, ledger) for group in groups)
    shared = (*CANARIES, FILTER_FIREWALL, *ledger.base, *(rule.chain for rule in ensured_rules(context)))
    return {chain for chain in concatenate(chains, shared) if chain.table == table}
