"""The iptables backend of one IP family: renders plans, applies the changes and keeps a ledger of accepted rules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from math import isqrt
from typing import Protocol

from kproxy.host.commands import CommandError
from kproxy.iptables.base_rules import EnsuredRule, ensured_rules
from kproxy.iptables.diff import IptablesDiff, RenderedServices
from kproxy.iptables.dispatch import DISPATCH_THRESHOLD
from kproxy.iptables.isolation import IsolatingSync
from kproxy.iptables.ledger import Digest, IptablesLedger, IptablesSnapshot, ServiceRecord, record_chains
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName
from kproxy.iptables.render import RenderedPort, render_port
from kproxy.iptables.runner import RestoreError
from kproxy.iptables.save_restore import RestoreInput, parse_save
from kproxy.model.context import Context
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import ApplyResult, DriftError, Plans, SyncError
from kproxy.model.types import ServiceKey

log = logging.getLogger(__name__)
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
UNLIMITED = 1 << 60
"""No limit on the rules in a transaction: iptables-legacy rewrites the whole table for each transaction."""
MAX_SINGLE_CHAIN_READS = 200
"""Maximum number of chains that are read one by one. Reading a chain takes about 5 ms, reading all rules a second."""


class IptablesKernel(Protocol):
    """Access to the iptables rules of one IP family. `kproxy.iptables.runner.IptablesRunner` implements it."""

    def save(self) -> AbstractContextManager[Iterator[str]]:
        """Read all rules as `iptables-save` prints them.

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


class IptablesBackend:
    """Keeps the iptables rules of one IP family in sync with the plans passed to `sync`.

    The backend reads all existing rules only if it does not know them: in the first sync, and in the first sync after a
    failure, after `verify` has found drift, or after a call to `forget`.
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
        self._records: Mapping[ServiceKey, ServiceRecord] = {}
        """The records of the last successful sync. They outlive the ledger."""
        self._suspects: dict[ServiceKey, str] = {}
        """The Services whose rules the kernel rejected last, with the reasons."""

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
        if self._ledger is not None:
            ledger, snapshot = self._ledger, None
            max_transaction_rules = self._transaction_limit(ledger)
        else:
            ledger, snapshot = IptablesLedger(), self._read_kernel(context)
            max_transaction_rules = self._max_transaction_rules
        suspects = SuspectFilter(self._suspects, self._records, snapshot)
        diff = IptablesDiff(
            ledger,
            snapshot,
            suspects.without_suspects((key, render_ports(ports, context)) for key, ports in plans.by_service()),
            context,
            max_transaction_rules=max_transaction_rules,
            dispatch_threshold=self._dispatch_threshold,
            rule_counter=self._kernel.count_rules if self._patching else None,
            held=suspects.held,
        )
        full = snapshot is not None
        self._ledger = None
        written: Counter[str] = Counter()
        touched: set[ChainName] | None = None if full else set()
        try:
            try:
                self._apply(diff, written, touched)
            except RestoreError as error:
                if error.affects_all:
                    raise
                log.info("%s: iptables rejected a change; searching for the Services: %s", context.family.value, error)
                if touched is None:
                    ledger, snapshot = IptablesLedger(), self._read_kernel(context)
                else:
                    self._read_deviations(ledger, touched, [key for key, _ in plans.by_service()])
                desired = ((key, render_ports(ports, context)) for key, ports in plans.by_service())
                rejected = self._isolate(ledger, snapshot, desired, context, written)
            else:
                if overwritten := self._concurrently_changed(diff.patched):
                    log.warning("rewriting %d chains: another process changed them during the sync", len(overwritten))
                    self._apply(self._rewrite(ledger, overwritten, plans, context), written)
                rejected = {}
                if suspects.waiting:
                    rejected = self._isolate(ledger, None, suspects.waiting.items(), context, written)
        except (RestoreError, CommandError) as error:
            raise SyncError(str(error)) from None
        unchanged = {} if full else {key: reason for key, reason in self._suspects.items() if key not in suspects.seen}
        self._suspects = unchanged | rejected
        self._records = ledger.services
        self._ledger = ledger
        return ApplyResult(written, ledger.rule_counts, ledger.resolution.conflicts, rejected)

    def _isolate(
        self,
        ledger: IptablesLedger,
        snapshot: IptablesSnapshot | None,
        desired: RenderedServices,
        context: Context,
        written: Counter[str],
    ) -> dict[ServiceKey, str]:
        """Program all desired Services except those whose rules the kernel rejects. Return these with the reasons.

        Raises `RestoreError` if the kernel rejects other rules, or `CommandError`.
        """
        diff = IptablesDiff(
            ledger,
            snapshot,
            desired,
            context,
            max_transaction_rules=self._max_transaction_rules,
            dispatch_threshold=self._dispatch_threshold,
        )
        isolating = IsolatingSync(
            self._kernel.restore,
            diff,
            self._records,
            max_transaction_rules=self._max_transaction_rules,
            written=written,
        )
        unused = isolating.run()
        diff.commit()
        for transaction in diff.deletions(unused, best_effort=True):
            self._delete_chains(transaction)
        return isolating.rejected

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
        existing = self._read_chains({*touched, *own, *shared})
        for chain, digest in shared.items():
            if existing.get(chain) != digest:
                raise DriftError(f"another process changed chain {chain.name} of table {chain.table}")
        ledger.deviations.update({chain: existing.get(chain) for chain in {*touched, *own}})

    def _read_chains(self, chains: Collection[ChainName]) -> dict[ChainName, Digest]:
        """Return the digests of those chains that exist. Raises `CommandError`."""
        if len(chains) <= MAX_SINGLE_CHAIN_READS:
            found = self._kernel.list_rules(chains)
        else:
            with self._kernel.save() as lines:
                saved = parse_save(lines)
            if saved.incompatible:
                table, reason = next(iter(saved.incompatible.items()))
                raise CommandError(f"cannot read table {table}: {reason}")
            found = {chain: content.rules for chain, content in saved.chains.items() if chain in chains}
        return {chain: hash("\n".join(rules)) for chain, rules in found.items()}

    def verify(self, context: Context) -> bool:
        """Check for drift: return whether the rules that lead packets to the per-Service chains are unchanged.

        If they have changed, the ledger is discarded as in `forget`. The check covers:

        - the canary chains, which are missing if another process has deleted all chains of a table
        - the rules that kproxy has inserted into chains that other tools also use
        - the shared chains, but not the shards of the dispatch chains

        A rule in a chain of other tools counts as unchanged if iptables cannot determine whether it exists. Return True
        without a check if there is no ledger. If the rules cannot be read from the kernel, log a warning and return
        True.
        """
        if self._ledger is None:
            return True
        expected = dict(self._ledger.shared_chains())
        ensured = ensured_rules(context)
        try:
            existing = self._kernel.list_rules(dict.fromkeys((*CANARIES, *expected, *(rule.chain for rule in ensured))))
            intact = (
                all(canary in existing for canary in CANARIES)
                and all(
                    chain in existing and hash("\n".join(existing[chain])) == digest
                    for chain, digest in expected.items()
                )
                and all(self._may_exist(rule, existing.get(rule.chain, [])) for rule in ensured)
            )
        except CommandError as error:
            log.warning("cannot check the iptables rules for drift: %s", error)
            return True
        if not intact:
            self._ledger = None
        return intact

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:  # noqa: ARG002
        """Request a full sync if the touched parts may be damaged. Otherwise, run a quick drift check."""
        if any(each.everything for each in touched.values()):
            self.forget()
        return RepairResult(needs_full_sync=self._ledger is None or not self.verify(context))

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:  # noqa: ARG002
        """Run a quick drift check. Return None if the rules are intact."""
        return None if self.verify(context) else RepairResult(needs_full_sync=True)

    def forget(self) -> None:
        """Discard the ledger: the next `sync` reads all rules from the kernel."""
        self._ledger = None

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

    def _read_kernel(self, context: Context) -> IptablesSnapshot:
        try:
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
        return snapshot

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

    def _may_exist(self, rule: EnsuredRule, existing: list[str]) -> bool:
        """Return False if an ensured rule does not exist, and True if it exists or if this cannot be determined.

        `existing` are the rules of the chain that could be read.
        """
        return rule.is_satisfied_by_any(existing) or self._kernel.has_rule(rule.chain, rule.rule) is not False


class SuspectFilter:
    """Takes the Services whose rules the kernel rejected last out of a sync, so that they do not make it fail.

    Without a snapshot, a sync does not change Services that it does not cover. With a snapshot, it covers all Services:
    these Services are `held`, with the records of their rules if these still exist.

    `waiting` are the Services that were taken out, with their new rules. `seen` also contains deleted Services.
    """

    def __init__(
        self,
        suspects: Collection[ServiceKey],
        records: Mapping[ServiceKey, ServiceRecord],
        snapshot: IptablesSnapshot | None,
    ) -> None:
        self.waiting: dict[ServiceKey, Mapping[str, RenderedPort]] = {}
        self.held: dict[ServiceKey, ServiceRecord] = {}
        self.seen: set[ServiceKey] = set()
        self._suspects = suspects
        self._records = records
        self._snapshot = snapshot

    def without_suspects(self, services: RenderedServices) -> Iterator[tuple[ServiceKey, Mapping[str, RenderedPort]]]:
        """Yield the Services, but collect those in `waiting` that the kernel rejected last."""
        for key, ports in services:
            if key in self._suspects:
                self.seen.add(key)
                if ports:
                    self.waiting[key] = ports
                    if self._snapshot is None:
                        continue
                    record = self._records.get(key, {})
                    chains = (ChainName("nat", name) for name, _ in record_chains(record))
                    self.held[key] = record if all(chain in self._snapshot.digests for chain in chains) else {}
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


def render_ports(ports: Sequence[ServicePortPlan], context: Context) -> dict[str, RenderedPort]:
    """Return the rules of a Service's ports, keyed by `port name/protocol`."""
    return {f"{plan.port_name}/{plan.protocol}": render_port(plan, context) for plan in ports}
