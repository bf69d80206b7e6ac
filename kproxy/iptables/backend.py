"""The iptables backend of one IP family: renders plans, applies the changes and keeps a ledger of accepted rules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from math import isqrt
from typing import NamedTuple, Protocol

from kproxy.host.commands import CommandError
from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.comparison import RuleComparison
from kproxy.iptables.diff import IptablesDiff, RenderedServices
from kproxy.iptables.dispatch import DISPATCH_THRESHOLD
from kproxy.iptables.held_services import ExistingServices
from kproxy.iptables.isolation import IsolatingSync
from kproxy.iptables.ledger import Digest, IptablesLedger, IptablesSnapshot, ServiceRecord, record_chains
from kproxy.iptables.names import FILTER_FIREWALL, ChainName, deletion_order
from kproxy.iptables.render import RenderedPort, render_ports
from kproxy.iptables.repair import Damage, Scope, find_damage
from kproxy.iptables.runner import RestoreError
from kproxy.iptables.save_restore import MAX_TRANSACTION_RULES, TABLES, UNLIMITED, RestoreInput, SavedChain, parse_save
from kproxy.model.context import Context
from kproxy.model.drift import Part, RepairResult, Touched
from kproxy.model.sync_report import ApplyResult, DriftError, Plans, SyncError
from kproxy.model.types import ServiceKey

log = logging.getLogger(__name__)
INCREMENTAL_FACTOR = 17
"""Determines how many rules one transaction may contain when existing rules change.

The maximum is this factor times the square root of the number of existing rules, but at least `max_transaction_rules`.
The reason is that the kernel validates all rules for each transaction that changes active chains. The time for a
transaction therefore has two parts: one grows with the total number of rules, the other with the square of the number
of rules in the transaction. The total time is lowest if both parts are equal. CPU time to rewrite the rules of 1,000
Services with 10 endpoints each:

- in a cluster of 1,000 Services, with 1,200, 2,500 and 8,000 rules per transaction: 0.85, 0.80 and 1.2 s
- in a cluster of 5,000 Services, with 2,000, 5,600 and 8,000 rules: 1.6, 1.2 and 1.4 s
- in a cluster of 10,000 Services, with 4,000, 8,000 and 12,000 rules: 1.9, 1.7 and 2.5 s
"""
MAX_REPAIRED_SERVICES = 100
"""If more Services than this are damaged, and they are more than half of all Services, a full sync restores them."""
MAX_SINGLE_CHAIN_READS = 200
"""Maximum number of chains that are read one by one. Reading a chain takes about 5 ms, reading all rules a second."""


class IptablesKernel(Protocol):
    """Access to the iptables rules of one IP family. `kproxy.iptables.runner.IptablesRunner` implements it."""

    def save(self, table: str = "") -> AbstractContextManager[Iterator[str]]:
        """Read the rules of one table, or of all tables, as `iptables-save` prints them.

        A table that cannot be printed is reported on a line that `parse_save` recognizes. Raises `CommandError`.
        """

    def restore(self, text: str) -> None:
        """Apply input for `iptables-restore --noflush`. Raises `RestoreError` or `CommandError`."""

    def restore_each(self, texts: Iterable[str]) -> None:
        """Apply several inputs in order, and stop at the first failure. Raises `RestoreError` or `CommandError`."""

    def has_rule(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule, or None if this cannot be determined. Raises `CommandError`."""

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those `chains` that exist, as `iptables-save` prints them.

        Rules that iptables cannot print may be missing. Raises `CommandError`.
        """

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        """Return the number of rules in each chain. Chains whose rules cannot be counted are omitted."""

    def create_chain(self, chain: ChainName) -> None:
        """Create a chain if it does not exist. Raises `CommandError`."""

    def awaken(self, table: str) -> bool:
        """Clear the flag of a dormant table, whose chains the kernel does not evaluate. Return whether it was set.

        Raises `CommandError`.
        """

    def foreign_changes(self) -> int | None:
        """Return a number that is different after another process has changed rules, or None during own changes.

        Raises `OSError` or `CommandError`.
        """

    def latest_foreign_changes(self) -> int:
        """Return the latest result of `foreign_changes` that was not None. Raises `OSError` or `CommandError`."""

    def fingerprints(self, groups: Iterable[Sequence[ChainName]]) -> list[int] | None:
        """Return a number for each group of chains, which identifies the rules of these chains.

        It is 0 if there are none. Return None if the variant of iptables does not support this. Raises `OSError` or
        `CommandError`.
        """

    def chain_names(self) -> dict[str, set[str]]:
        """Return the names of the chains of each table, if `fingerprints` are supported. Raises `OSError`."""


class LastRead(NamedTuple):
    """What a check has read of some `tables` before it found that a full sync is necessary.

    `changes` is the value of `IptablesKernel.foreign_changes` before it. `ledger` is what the kernel had accepted.
    """

    changes: int
    snapshot: IptablesSnapshot
    tables: frozenset[str]
    ledger: IptablesLedger


class IptablesBackend:
    """Keeps the iptables rules of one IP family in sync with the plans passed to `sync`.

    The backend reads all existing rules only if it does not know them: in the first sync, and in the first sync after a
    failure, after large damage by other processes, or after a call to `forget`.
    """

    def __init__(
        self,
        kernel: IptablesKernel,
        *,
        max_transaction_rules: int = MAX_TRANSACTION_RULES,
        dispatch_threshold: int = DISPATCH_THRESHOLD,
        patching: bool = True,
    ) -> None:
        """Create a backend that has not read any rules from the kernel yet.

        `max_transaction_rules` limits the rules in one transaction of a large change; use `UNLIMITED` for
        iptables-legacy. A dispatch chain of more than `dispatch_threshold` rules is split by destination; 0 means that
        it is never split. With `patching`, a long chain in which only a few rules changed is patched rule by rule
        instead of being rewritten.
        """
        self._kernel = kernel
        self._max_transaction_rules = max_transaction_rules
        self._dispatch_threshold = dispatch_threshold
        self._patching = patching
        self._ledger: IptablesLedger | None = None
        self._records: Mapping[ServiceKey, ServiceRecord] | None = None
        """The records of the last successful sync. They outlive the ledger. None before the first one."""
        self._suspects: dict[ServiceKey, str] = {}
        """The Services whose rules the kernel rejected last, with the reasons."""
        self._kept: dict[ServiceKey, dict[str, str]] = {}
        """The rules of the per-Service chains that these Services keep, by name, as far as they could be read."""
        self._comparison = RuleComparison(kernel)
        self._last_read: LastRead | None = None

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` needs the plans of all Services."""
        return self._ledger is None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program `plans`.

        They must cover all Services if `needs_full_sync` is true, and otherwise the Services that may have changed. The
        rules of a Service without plans are deleted. If the kernel rejects the rules of some Services, all others are
        programmed nevertheless (see `kproxy.iptables.isolation`).

        Raises `SyncError` if the rules cannot be read or a change fails for a reason that does not depend on a Service;
        earlier transactions stay applied. Raises `DriftError` if a change fails and another process has changed a
        shared chain.
        """
        is_full = self._ledger is None
        if is_full:
            self._comparison.full_sync_began()
        if self._ledger is not None:
            ledger, snapshot = self._ledger, None
            max_transaction_rules = self._transaction_limit(ledger)
        else:
            ledger, snapshot = IptablesLedger(), self._take_last_read(context) or self._read_kernel(context)[0]
            max_transaction_rules = self._max_transaction_rules
        suspects = SuspectFilter(self._suspects, self._records or {}, self._kept, snapshot)
        covered: dict[ServiceKey, None] = {}
        diff = IptablesDiff(
            ledger,
            snapshot,
            suspects.without_suspects(_rendered(plans, context, covered)),
            context,
            max_transaction_rules=max_transaction_rules,
            dispatch_threshold=self._dispatch_threshold,
            rule_counter=self._kernel.count_rules if self._patching else None,
            held=suspects.held,
            kept=self._kept,
        )
        self._ledger = None
        written: Counter[str] = Counter()
        touched: set[ChainName] | None = None if is_full else set()
        try:
            try:
                self._apply(diff, written, touched)
            except RestoreError as error:
                if error.affects_all:
                    raise
                log.info("%s: iptables rejected a change; searching for the Services: %s", context.family.value, error)
                existing = None
                if touched is None:
                    ledger = IptablesLedger()
                    snapshot, chains = self._read_kernel(context)
                    existing = ExistingServices(chains) if self._records is None else None
                else:
                    self._read_deviations(ledger, touched, [key for key, _ in plans.by_service()])
                desired = _rendered(plans, context, covered)
                rejected = self._isolate(ledger, snapshot, desired, context, written=written, existing=existing)
            else:
                if overwritten := self._concurrently_changed(diff.patched):
                    log.warning("rewriting %d chains: another process changed them during the sync", len(overwritten))
                    self._apply(self._rewrite(ledger, overwritten, plans, context), written)
                rejected = {}
                if suspects.waiting:
                    waiting = suspects.waiting.items()
                    rejected = self._isolate(ledger, None, waiting, context, written=written)
        except (RestoreError, CommandError) as error:
            raise SyncError(str(error)) from None
        self._suspects = {key: each for key, each in self._suspects.items() if key not in covered and not is_full}
        self._suspects |= rejected
        self._records = ledger.services
        self._keep_rules(ledger, rejected)
        self._ledger = ledger
        self._comparison.synced(covered, is_full=is_full)
        compare_soon = is_full and not self._comparison.knows_all(ledger)
        return ApplyResult(written, ledger.rule_counts, ledger.resolution.conflicts, rejected, compare_soon)

    def _isolate(
        self,
        ledger: IptablesLedger,
        snapshot: IptablesSnapshot | None,
        desired: RenderedServices,
        context: Context,
        *,
        written: Counter[str],
        existing: ExistingServices | None = None,
    ) -> dict[ServiceKey, str]:
        """Program all desired Services except those whose rules the kernel rejects. Return these with the reasons.

        They keep the rules of the last successful sync. If there was none, they keep their `existing` rules. Raises
        `RestoreError` if the kernel rejects other rules, `DriftError` or `CommandError`.
        """
        diff = IptablesDiff(
            ledger,
            snapshot,
            desired,
            context,
            max_transaction_rules=self._max_transaction_rules,
            dispatch_threshold=self._dispatch_threshold,
            kept=self._kept,
        )
        records = self._records or {}
        record_of = existing.record if existing is not None else lambda key: records.get(key, {})
        unused, rejected = self._run_isolated(ledger, diff, record_of, written)
        diff.commit()
        for transaction in diff.deletions(unused, best_effort=True):
            self._delete_chains(transaction)
        return rejected

    def _run_isolated(
        self,
        ledger: IptablesLedger,
        diff: IptablesDiff,
        record_of: Callable[[ServiceKey], ServiceRecord],
        written: Counter[str],
    ) -> tuple[list[ChainName], dict[ServiceKey, str]]:
        """Apply a diff of a ledger as `IsolatingSync` does. Return the unused chains, and the rejected Services."""

        def confirm(key: ServiceKey) -> None:
            chains = {ChainName("nat", name): digest for name, digest in record_chains(ledger.services.get(key, {}))}
            found = self._read_chains(chains)
            for chain, digest in chains.items():
                if chain not in found or hash(found[chain]) != ledger.existing(chain, digest):
                    raise DriftError(f"another process changed chain {chain.name} of table nat")

        isolating = IsolatingSync(
            self._kernel.restore,
            diff,
            record_of,
            confirm,
            max_transaction_rules=self._max_transaction_rules,
            written=written,
        )
        return isolating.run(), isolating.rejected

    def _read_deviations(
        self, ledger: IptablesLedger, touched: Collection[ChainName], covered: Iterable[ServiceKey]
    ) -> None:
        """Read which chains the kernel has after an incremental sync of which only some transactions were accepted.

        The chains that the sync may have changed are read, and all other chains of the Services that it covers. Raises
        `DriftError` if another process has changed a shared chain, which may be why the sync failed. Raises
        `CommandError` if the rules cannot be read.
        """
        shared = {chain: digest for chain, digest in ledger.shared_chains() if chain not in touched}
        records = (ledger.services.get(key, {}) for key in covered)
        own = {ChainName("nat", name) for record in records for name, _ in record_chains(record)}
        existing = {chain: hash(rules) for chain, rules in self._read_chains({*touched, *own, *shared}).items()}
        for chain, digest in shared.items():
            if existing.get(chain) != digest:
                raise DriftError(f"another process changed chain {chain.name} of table {chain.table}")
        ledger.deviations.update({chain: existing.get(chain) for chain in {*touched, *own}})

    def _keep_rules(self, ledger: IptablesLedger, rejected: Collection[ServiceKey]) -> None:
        """Keep the rules of the Services that were rejected last, so that they can be restored.

        Read those of the `rejected` ones that are unknown. Rules that the kernel did not accept again when another
        process had changed them stay known, because they are tried again with the Service.
        """
        kept = {key: self._kept[key] for key in self._suspects if key in self._kept}
        unknown: dict[ChainName, tuple[ServiceKey, Digest]] = {}
        for key in rejected:
            known, kept[key] = kept.get(key, {}), {}
            for name, digest in record_chains(ledger.services.get(key, {})):
                chain = ChainName("nat", name)
                existing = ledger.existing(chain, digest)
                if name in known and hash(known[name]) in {digest, existing}:
                    kept[key][name] = known[name]
                elif existing is not None:
                    unknown[chain] = key, existing
        with suppress(CommandError):
            for chain, rules in self._read_chains(unknown).items() if unknown else ():
                key, existing = unknown[chain]
                if hash(rules) == existing:
                    kept[key][chain.name] = rules
        self._kept = kept

    def _read_chains(self, chains: Collection[ChainName]) -> dict[ChainName, str]:
        """Return the rules of those chains that exist, one per line. Raises `CommandError`."""
        if len(chains) <= MAX_SINGLE_CHAIN_READS:
            found = self._kernel.list_rules(chains)
        else:
            with self._kernel.save() as lines:
                saved = parse_save(lines)
            if saved.incompatible:
                table, reason = next(iter(saved.incompatible.items()))
                raise CommandError(f"cannot read table {table}: {reason}")
            found = {chain: content.rules for chain, content in saved.chains.items() if chain in chains}
        return {chain: "\n".join(rules) for chain, rules in found.items()}

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        """Compare the touched chains with the ledger, and restore exactly those rules that differ.

        See `kproxy.sync.family_sync.Backend`. Chains of other tools in which kproxy has no rules are not read.
        """
        return self._check(Scope.of(touched), plans, context)

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        """Compare the next part of the rules with the ledger. See `RuleComparison`."""
        if self._ledger is None:
            return None
        return self._comparison.next_step(self._ledger, context, lambda scope: self._check(scope, plans, context))

    def _check(self, scope: Scope, plans: Plans, context: Context) -> RepairResult:
        """Compare the chains in `scope` with the ledger, and restore those that differ. Raises `SyncError`.

        Another process may be about to delete more chains than it had deleted when the chains were read, so that the
        kernel rejects a rule that jumps to one of them. All chains of the tables are then checked.

        Nothing is checked while a full sync is necessary anyway: it must not begin earlier because of other tools.
        """
        relevant = scope.relevant(context)
        if self._ledger is None or not relevant:
            return RepairResult()
        awakened, findings = self._awaken(relevant.touched_tables)
        changes = self._foreign_changes()
        snapshot = self._read(relevant, self._ledger, context)
        damage = self._find_damage(relevant, snapshot, self._ledger, context) if snapshot is not None else None
        if damage is not None:
            findings += damage.findings
        if (
            snapshot is None
            or damage is None
            or not self._is_restorable(damage)
            or self._is_cheaper_to_sync(damage, self._ledger)
        ):
            if snapshot is not None and changes is not None:
                self._last_read = LastRead(changes, snapshot, relevant.tables, self._ledger)
            self._ledger = None
            return RepairResult(tuple(awakened), tuple(findings), needs_full_sync=True)
        if not damage:
            return RepairResult(tuple(awakened), tuple(findings))
        ledger = self._ledger
        try:
            rejected = self._restore(damage, plans, context, isolate=bool(scope.tables))
        except SyncError:
            if scope.tables:
                raise
            self._ledger = ledger  # nothing but damaged chains was written, and the second check finds all of them
            return self._check(Scope(tables=damage.tables), plans, context)
        needs_full_sync = not rejected <= self._suspects.keys()  # it quarantines those that were not rejected before
        if needs_full_sync:
            self.forget()
        repaired = tuple(sorted({*awakened, *damage.without(rejected).parts(scope)}))
        return RepairResult(repaired, tuple(findings), needs_full_sync=needs_full_sync)

    def _awaken(self, tables: Iterable[str]) -> tuple[list[Part], list[str]]:
        """Clear the flags of dormant tables. Return these tables, and findings about those that remain dormant."""
        awakened: list[Part] = []
        findings: list[str] = []
        for table in sorted(tables):
            try:
                if self._kernel.awaken(table):
                    awakened.append(Part(table, "table"))
            except CommandError as error:
                findings.append(f"Services have no effect: {error}")
        return awakened, findings

    def _foreign_changes(self) -> int | None:
        """Return the number of `IptablesKernel.foreign_changes`, or None if it is unknown."""
        try:
            return self._kernel.foreign_changes()
        except (OSError, CommandError):
            return None

    def _read(self, scope: Scope, ledger: IptablesLedger, context: Context) -> IptablesSnapshot | None:
        """Return the chains in `scope`, or None if they cannot be read. Raises `SyncError`."""
        try:
            return self._comparison.read(scope, ledger, context) if scope else IptablesSnapshot({}, {})
        except CommandError as error:
            raise SyncError(str(error)) from None

    def _find_damage(
        self, scope: Scope, snapshot: IptablesSnapshot, ledger: IptablesLedger, context: Context
    ) -> Damage:
        """Return what is damaged in `scope`. Raises `SyncError`."""
        try:
            return find_damage(scope, snapshot, ledger, context, self._kernel)
        except CommandError as error:
            raise SyncError(str(error)) from None

    def _take_last_read(self, context: Context) -> IptablesSnapshot | None:
        """Return a snapshot of all tables if a check has just read one and no other process has changed rules since.

        The snapshot is used only once, because a sync changes the rules. Raises `SyncError`.
        """
        last, self._last_read = self._last_read, None
        if last is None or last.changes != self._foreign_changes():
            return None
        missing = frozenset(TABLES) - last.tables
        rest = self._read(Scope(tables=missing), last.ledger, context)
        if rest is None or last.changes != self._foreign_changes():
            return None
        return IptablesSnapshot(last.snapshot.digests | rest.digests, last.snapshot.rules | rest.rules)

    def _is_restorable(self, damage: Damage) -> bool:
        """Return whether the rules of all damaged chains are known: those of a rejected Service may not be."""
        return all(
            chain.name in self._kept.get(key, {}) for chain, key in damage.owners.items() if key in self._suspects
        )

    def _is_cheaper_to_sync(self, damage: Damage, ledger: IptablesLedger) -> bool:
        damaged = len(set(damage.owners.values()))
        return damaged > MAX_REPAIRED_SERVICES and damaged * 2 > len(ledger.services)

    def _restore(self, damage: Damage, plans: Plans, context: Context, *, isolate: bool) -> set[ServiceKey]:
        """Write the damaged chains. Return the Services whose chains the kernel rejects.

        A Service that the kernel rejected last keeps its older rules. With `isolate`, the chains of other Services are
        restored even if the kernel rejects those of some Services. Raises `SyncError`; the ledger is then discarded.
        """
        assert self._ledger is not None
        ledger, self._ledger = self._ledger, None
        touched: set[ChainName] = set()
        rejected: set[ServiceKey] = set()
        try:
            try:
                self._apply(self._repair_diff(damage, ledger, plans, context), Counter(), touched)
            except RestoreError as error:
                if error.affects_all or not isolate:
                    raise
                self._read_deviations(ledger, touched | damage.chains, set(damage.owners.values()))
                rejected = self._restore_each(damage, ledger, plans, context)
            if damage.stale:
                self._delete_chains(RestoreInput(deleted=sorted(damage.stale, key=deletion_order), best_effort=True))
        except (RestoreError, CommandError, DriftError) as error:
            raise SyncError(str(error)) from None
        self._ledger = ledger
        return rejected

    def _repair_diff(self, damage: Damage, ledger: IptablesLedger, plans: Plans, context: Context) -> IptablesDiff:
        owners = sorted(set(damage.owners.values()))
        return IptablesDiff(
            ledger,
            None,
            ((key, {} if key in self._suspects else render_ports(plans.of(key), context)) for key in owners),
            context,
            max_transaction_rules=self._transaction_limit(ledger),
            dispatch_threshold=self._dispatch_threshold,
            force_rewrite=damage.chains,
            edits=damage.edits,
            held={key: ledger.services.get(key, {}) for key in owners if key in self._suspects},
            kept=self._kept,
        )

    def _restore_each(self, damage: Damage, ledger: IptablesLedger, plans: Plans, context: Context) -> set[ServiceKey]:
        """Restore the damaged chains of all Services except those whose rules the kernel rejects.

        Return these. Their chains stay as they are until the Services are tried again. Raises `RestoreError` or
        `CommandError`.
        """
        diff = self._repair_diff(damage, ledger, plans, context)
        unused, rejected = self._run_isolated(ledger, diff, lambda key: ledger.services.get(key, {}), Counter())
        if damage.edits:
            self._kernel.restore(RestoreInput(edits=damage.edits).text())
        diff.commit()
        for transaction in diff.deletions(unused, best_effort=True):
            self._delete_chains(transaction)
        for key, reason in rejected.items():
            log.warning(
                "%s: cannot restore the rules of Service %s, which another process changed: %s",
                context.family.value,
                key,
                reason,
            )
        return set(rejected)

    def forget(self) -> None:
        """Discard the ledger: the next `sync` reads all rules from the kernel."""
        self._ledger = self._last_read = None

    def _apply(self, diff: IptablesDiff, written: Counter[str], touched: set[ChainName] | None = None) -> None:
        """Apply the transactions of a diff. Add the number of rules that they write, by table, to `written`.

        Add the chains that they change to `touched`. Raises `RestoreError` or `CommandError`.
        """
        best_effort: list[RestoreInput] = []

        def texts() -> Iterator[str]:
            for transaction in diff.transactions():
                if transaction.best_effort:
                    best_effort.append(transaction)
                    continue
                written.update(transaction.rules_by_table())
                if touched is not None:
                    touched.update(transaction.chains, transaction.patches, transaction.deleted)
                yield transaction.text()

        self._kernel.restore_each(texts())
        for transaction in best_effort:
            self._delete_chains(transaction)
        diff.commit()

    def _concurrently_changed(self, patched: Mapping[ChainName, tuple[ServiceKey, int]]) -> dict[ChainName, ServiceKey]:
        """Return the patched chains whose number of rules is unexpected or unknown, with their Services.

        Another process may have changed a chain after this sync counted its rules and before the patch was applied. For
        example, if another proxy has already removed the rule of the same endpoint, then the patch deletes the rule of
        a remaining endpoint.
        """
        counts = self._kernel.count_rules(patched) if patched else {}
        return {chain: key for chain, (key, expected) in patched.items() if counts.get(chain) != expected}

    def _rewrite(
        self, ledger: IptablesLedger, chains: Mapping[ChainName, ServiceKey], plans: Plans, context: Context
    ) -> IptablesDiff:
        """Return a diff that rewrites `chains`, a map of chains to their Services, even if they match the ledger."""
        return IptablesDiff(
            ledger,
            None,
            ((key, render_ports(plans.of(key), context)) for key in dict.fromkeys(chains.values())),
            context,
            max_transaction_rules=self._transaction_limit(ledger),
            dispatch_threshold=self._dispatch_threshold,
            force_rewrite=chains,
        )

    def _transaction_limit(self, ledger: IptablesLedger) -> int:
        """Return the maximum number of rules in a transaction that changes existing rules."""
        return max(self._max_transaction_rules, INCREMENTAL_FACTOR * isqrt(sum(ledger.rule_counts.values())))

    def _delete_chains(self, transaction: RestoreInput) -> None:
        """Delete as many of a transaction's chains as possible. The transaction must contain only deletions of chains.

        If the kernel rejects the transaction, each half of the chains is tried separately.
        """
        try:
            self._kernel.restore(transaction.text())
        except RestoreError as error:
            chains = transaction.deleted
            if len(chains) == 1:
                log.warning(
                    "cannot delete stale chain %s in table %s, other rules may use it: %s",
                    chains[0].name,
                    chains[0].table,
                    error,
                )
                return
            for half in (chains[: len(chains) // 2], chains[len(chains) // 2 :]):
                self._delete_chains(RestoreInput(deleted=half, best_effort=True))

    def _read_kernel(self, context: Context) -> tuple[IptablesSnapshot, Mapping[ChainName, SavedChain]]:
        """Return the snapshot of the rules, and the rules of all chains that could be read. Raises `SyncError`."""
        try:
            for table in TABLES:
                self._kernel.awaken(table)
            with self._kernel.save() as lines:
                saved = parse_save(lines)
            snapshot = IptablesSnapshot.from_saved(saved.chains)
            for table, reason in saved.incompatible.items():
                self._read_ensured_rules(snapshot, table, context)
                log.warning(
                    "table %s has rules that only nft can print (%s): stale chains may remain there", table, reason
                )
        except CommandError as error:
            raise SyncError(str(error)) from None
        return snapshot, saved.chains

    def _read_ensured_rules(self, snapshot: IptablesSnapshot, table: str, context: Context) -> None:
        """Add to the snapshot the ensured rules of a table that cannot be dumped.

        The rules are read by listing individual chains and by checking individual rules. A rule that cannot be found
        this way may exist nevertheless, and the sync then inserts it a second time. The duplicate is harmless. Later
        checks find the duplicate, because it precedes the rule that iptables cannot print.
        """
        if FILTER_FIREWALL.table == table:
            self._kernel.create_chain(FILTER_FIREWALL)
            snapshot.rules[FILTER_FIREWALL] = []
        ensured = [rule for rule in ensured_rules(context) if rule.chain.table == table]
        snapshot.rules |= self._kernel.list_rules(dict.fromkeys(rule.chain for rule in ensured))
        for rule in ensured:
            existing = snapshot.rules.setdefault(rule.chain, [])
            if not rule.is_satisfied_by_any(existing) and self._kernel.has_rule(rule.chain, rule.rule):
                existing.append(rule.text)


def _rendered(
    plans: Plans, context: Context, covered: dict[ServiceKey, None]
) -> Iterator[tuple[ServiceKey, Mapping[str, RenderedPort]]]:
    """Yield the rules of all Services in `plans`, and add the Services to `covered`."""
    for key, ports in plans.by_service():
        covered[key] = None
        yield key, render_ports(ports, context)


class SuspectFilter:
    """Takes the Services whose rules the kernel rejected last out of a sync, so that they do not make it fail.

    Without a snapshot, a sync does not change Services that it does not cover. With a snapshot, it covers all Services:
    these Services are `held`, with the records of their rules if these still exist or can be restored: `kept` contains
    the rules of their chains.

    `waiting` are the Services that were taken out, with their new rules.
    """

    def __init__(
        self,
        suspects: Collection[ServiceKey],
        records: Mapping[ServiceKey, ServiceRecord],
        kept: Mapping[ServiceKey, Collection[str]],
        snapshot: IptablesSnapshot | None,
    ) -> None:
        self.waiting: dict[ServiceKey, Mapping[str, RenderedPort]] = {}
        self.held: dict[ServiceKey, ServiceRecord] = {}
        self._suspects = suspects
        self._records = records
        self._kept = kept
        self._snapshot = snapshot

    def without_suspects(self, services: RenderedServices) -> Iterator[tuple[ServiceKey, Mapping[str, RenderedPort]]]:
        """Yield the Services, but collect those in `waiting` that the kernel rejected last."""
        for key, ports in services:
            if key in self._suspects and ports:
                self.waiting[key] = ports
                if self._snapshot is None:
                    continue
                record, kept = self._records.get(key, {}), self._kept.get(key, ())
                names = (name for name, _ in record_chains(record) if name not in kept)
                is_complete = all(ChainName("nat", name) in self._snapshot.digests for name in names)
                self.held[key] = record if is_complete else {}
            yield key, ports


class IptablesPrinter:
    """A backend that prints the changes that it would make if the kernel had no rules."""

    needs_full_sync = True

    def __init__(self, show: Callable[[str], object], *, dispatch_threshold: int = DISPATCH_THRESHOLD) -> None:
        """Create a printer that passes each part of its output to `show`."""
        self._show = show
        self._dispatch_threshold = dispatch_threshold

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Print the `iptables-restore --noflush` input that programs `plans`."""
        ledger = IptablesLedger()
        diff = IptablesDiff(
            ledger,
            IptablesSnapshot({}, {}),
            ((key, render_ports(ports, context)) for key, ports in plans.by_service()),
            context,
            max_transaction_rules=UNLIMITED,
            dispatch_threshold=self._dispatch_threshold,
        )
        for transaction in diff.transactions():
            self._show(transaction.text())
        diff.commit()
        return ApplyResult({}, {}, ledger.resolution.conflicts)

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:  # noqa: ARG002
        """Return that nothing differs: there is no kernel to check."""
        return RepairResult()

    def compare_next(self, plans: Plans, context: Context) -> None:
        """Return None: there is no kernel to check."""

    def forget(self) -> None:
        """Do nothing: every `sync` prints everything."""
