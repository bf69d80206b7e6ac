"""The nftables backend of one IP family: sync plans into the kernel's table and keep a ledger of what it accepted."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

from kproxy.model.context import Context
from kproxy.model.sync_report import ApplyResult, DriftError, Plans, SyncError
from kproxy.model.types import Family
from kproxy.nftables.base_table import SETS
from kproxy.nftables.diff import IncompatibleTableError, NftablesDiff
from kproxy.nftables.elements import set_layout
from kproxy.nftables.kernel import GenerationChangedError, OwnGenerations, TableChangingError, TableError
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.render import render_service
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction

log = logging.getLogger(__name__)
BATCH_FRONTENDS = 1_000
"""Maximum number of frontends in one batch of a large change: about half a megabyte with 10 endpoints each."""
MAX_READS = 3
"""How often a sync reads the table if other processes keep changing tables meanwhile."""
_T = TypeVar("_T")


class NftablesKernel(Protocol):
    """Access to one family's table; `kproxy.nftables.kernel.NftTable` is the implementation."""

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction; with a `generation`, only if it is still the current one.

        Raises `TableError` or `GenerationChangedError`.
        """

    def generation(self) -> int:
        """Return the generation ID, which every change of any table increments. Raises `TableError`."""

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        """Read the table; return None if it does not exist.

        Raises `TableError`, which is `TableChangingError` if tables keep changing. With `allow_interrupted`, a change
        while elements are read is not an error; elements can be missing if it was a change of this table.
        """

    def chain_use_counts(self) -> Counter[str]:
        """Return the use count of each chain (NFTA_CHAIN_USE). Raises `TableError`."""


class NftablesBackend:
    """Keeps one family's table in sync with the plans.

    It reads the table only when it has no ledger: at startup, after a failure, and after a change by another process.
    """

    def __init__(
        self,
        kernel: NftablesKernel,
        own_generations: OwnGenerations | None = None,
        *,
        batch_frontends: int = BATCH_FRONTENDS,
    ) -> None:
        """All backends of a network namespace share `own_generations`.

        `batch_frontends` is the maximum number of frontends in a batch. A batch never splits a Service.
        """
        self._kernel = kernel
        self._own_generations = own_generations or OwnGenerations()
        self._batch_frontends = batch_frontends
        self._ledger: NftablesLedger | None = None
        # The ruleset's generation after the last commit; None if another process may have changed the table since.
        self._generation: int | None = None

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` needs the plans of all Services."""
        return self._ledger is None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program `plans`: those of the Services that may have changed, or of all if `needs_full_sync`.

        A Service without plans is deleted. Raises `SyncError` if the kernel rejected a change; changes that it accepted
        before stay.
        """
        ledger, self._ledger = self._ledger, None
        try:
            self._ledger = self._full_sync(plans, context) if ledger is None else self._update(ledger, plans, context)
        except TableError as error:
            raise SyncError(str(error)) from None
        return ApplyResult({}, {}, self._ledger.conflicts())

    def forget(self) -> None:
        """Make the next `sync` read the table."""
        self._ledger = None

    def verify(self, context: Context) -> bool:
        """Check for drift by the use count of every chain; if one differs, make the next `sync` read the table.

        This detects deleted tables and chains, and added or deleted rules and frontends. It does not detect changed
        endpoints, elements of sets and verdicts that drop.
        """
        if self._ledger is None:
            return True
        try:
            in_sync = self._kernel.chain_use_counts() == self._ledger.chain_use_counts()
        except TableError as error:
            log.warning("%s: cannot check the table for drift: %s", context.family.value, error)
            return True
        if not in_sync:
            self._ledger = None
        return in_sync

    def _update(self, ledger: NftablesLedger, plans: Plans, context: Context) -> NftablesLedger:
        diff = NftablesDiff(ledger, context)
        run_pipelined(self._commit, self._batches(diff, plans, context, self._batch_frontends))
        self._check_concurrent_changes(ledger, context)
        return ledger

    def _full_sync(self, plans: Plans, context: Context) -> NftablesLedger:
        """Bring the existing table to `plans`; matching objects stay untouched.

        An incompatible table is replaced, and session affinity of existing clients is lost.
        """
        try:
            return self._read_and_sync(plans, context)
        except IncompatibleTableError as error:
            log.info("%s: replacing the existing table: %s", context.family.value, error)
            return self._replace(plans, context)

    def _read_and_sync(self, plans: Plans, context: Context) -> NftablesLedger:
        for _ in range(MAX_READS):
            try:
                generation = self._kernel.generation()
                return self._sync_from_snapshot(self._kernel.snapshot(), generation, plans, context)
            except (GenerationChangedError, TableChangingError):
                continue
        # Other processes keep changing tables, most likely not this one. Sync from what can be read of it, and check
        # the result for drift.
        try:
            snapshot = self._kernel.snapshot(allow_interrupted=True)
            return self._sync_from_snapshot(snapshot, None, plans, context)
        except (TableError, DriftError) as error:
            raise IncompatibleTableError(f"the table keeps changing while it is read: {error}") from None

    def _sync_from_snapshot(
        self, snapshot: TableSnapshot | None, generation: int | None, plans: Plans, context: Context
    ) -> NftablesLedger:
        """Bring the table from a snapshot, or from nothing, to `plans`.

        Raises `GenerationChangedError` if `generation` is not current. An existing table changes in one transaction,
        because its chains must match each other and the context; a new one is filled in batches.
        """
        if snapshot is not None:
            _check_compatible(snapshot, context.family)
        ledger = NftablesLedger()
        diff = NftablesDiff(ledger, context, snapshot, create=snapshot is None)
        batch_frontends = self._batch_frontends if snapshot is None else math.inf
        self._generation = generation
        batches = self._batches(diff, plans, context, batch_frontends)
        run_pipelined(lambda batch: self._commit(batch[1], must_be_current=not batch[0]), enumerate(batches))
        self._check_concurrent_changes(ledger, context)
        return ledger

    def _batches(
        self, diff: NftablesDiff, plans: Plans, context: Context, batch_frontends: float
    ) -> Iterator[Transaction]:
        """Yield the transactions of a diff, each as soon as it has the maximum number of frontends."""
        for key, ports in plans.by_service():
            diff.put(key, render_service(ports, context))
            if diff.frontend_count >= batch_frontends:
                yield diff.next_transaction()
        yield diff.last_transaction()

    def _replace(self, plans: Plans, context: Context) -> NftablesLedger:
        ledger = NftablesLedger()
        self._generation = None
        self._kernel.commit(_new_table(ledger, plans, context))
        self._check_concurrent_changes(ledger, context)
        return ledger

    def _commit(self, transaction: Transaction, *, must_be_current: bool = False) -> None:
        """Commit a transaction, its new chains first (`Transaction.split_off_new_chains`).

        If another process changed the ruleset since the last commit, raise `GenerationChangedError` with
        `must_be_current`, else commit anyway. If the kernel then rejects the transaction, raise `DriftError`: the table
        may no longer match the ledger.
        """
        if (new_chains := transaction.split_off_new_chains()) is not None:
            self._commit_one(new_chains, must_be_current=must_be_current)
        if transaction:
            self._commit_one(transaction, must_be_current=must_be_current and new_chains is None)

    def _commit_one(self, transaction: Transaction, *, must_be_current: bool) -> None:
        if self._generation is not None:
            current = self._own_generations.newest_after(self._generation)
            try:
                self._kernel.commit(transaction, current)
            except GenerationChangedError:
                self._generation = None
                if must_be_current:
                    raise
            else:
                self._generation = self._own_generations.record_commit(current)
                return
        try:
            self._kernel.commit(transaction)
        except TableError as error:
            raise DriftError(
                f"another process changed the ruleset, and the kernel rejected a change: {error}"
            ) from None

    def _check_concurrent_changes(self, ledger: NftablesLedger, context: Context) -> None:
        """If another process changed the ruleset during the sync, check that it did not change this table.

        Raises `DriftError` if it did. The generation is read before the table: the next commit detects any later
        change. If the table cannot be read because tables keep changing, the next sync checks again.
        """
        if self._generation is not None:
            return
        try:
            generation = self._kernel.generation()
            use_counts = self._kernel.chain_use_counts()
        except TableChangingError as error:
            log.debug("%s: cannot check the table for drift: %s", context.family.value, error)
            return
        if use_counts != ledger.chain_use_counts():
            log.warning("%s: another process changed the table, starting a full sync", context.family.value)
            raise DriftError("another process changed the table")
        self._generation = generation


class NftablesPrinter:
    """A backend that prints the table instead of programming it."""

    needs_full_sync = True

    def __init__(self, family: Family, show: Callable[[str], object]) -> None:
        self._writer = NftWriter(family)
        self._show = show

    def verify(self, context: Context) -> bool:  # noqa: ARG002 - there is no kernel state to check
        """Return True."""
        return True

    def forget(self) -> None:
        """Do nothing: every sync is a full sync."""

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Print the table for all `plans` as `nft list table` prints it."""
        ledger = NftablesLedger()
        transaction = _new_table(ledger, plans, context)
        elements = transaction.all_added_elements()
        self._show(self._writer.table(transaction.added_sets, elements, transaction.added_rules))
        return ApplyResult({}, {}, ledger.conflicts())


def _new_table(ledger: NftablesLedger, plans: Plans, context: Context) -> Transaction:
    """Return the transaction that creates the whole table, and add its contents to the ledger."""
    diff = NftablesDiff(ledger, context, create=True)
    for key, ports in plans.by_service():
        diff.put(key, render_service(ports, context))
    return diff.last_transaction()


def _check_compatible(snapshot: TableSnapshot, family: Family) -> None:
    """Raise `IncompatibleTableError` if the table has something that only deleting the table can change or remove.

    The type of a set cannot change. An unknown verdict map can keep its chains from being deleted. A catch-all element
    (`*`) would match keys that must not match.
    """
    if snapshot.flags:
        raise IncompatibleTableError(f"the table has flags ({snapshot.flags:#x})")
    desired = {each.name: set_layout(each, family) for each in SETS}
    for name, layout in snapshot.sets.items():
        if desired.get(name, layout) != layout:
            raise IncompatibleTableError(f"set {name} has a different type")
        if name not in desired and layout.has_verdicts:
            raise IncompatibleTableError(f"verdict map {name} is unknown")
    for name, elements in snapshot.elements.items():
        if b"" in elements:
            raise IncompatibleTableError(f"map {name} has a catch-all element")


def run_pipelined(process: Callable[[_T], object], items: Iterable[_T]) -> None:
    """Call `process` with each item, in order and one at a time, while the next item is computed.

    A single item is processed in the calling thread, each of several in a thread of its own, which belongs to the same
    network namespace. Raises the first error of `process` or `items`, after a running call has ended; no further call
    starts.
    """
    iterator = iter(items)
    ready = list(islice(iterator, 2))
    if len(ready) == 1:
        process(ready[0])
    if len(ready) < 2:
        return
    running = _BackgroundCall(process, ready.pop(0))
    try:
        while ready:
            running.result()
            running = _BackgroundCall(process, ready.pop())
            ready += islice(iterator, 1)
    finally:
        running.join()
    running.result()


class _BackgroundCall(Generic[_T]):
    """A call in a daemon thread of its own. Unlike the threads of an executor, it does not delay the process's exit."""

    def __init__(self, process: Callable[[_T], object], item: _T) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(process, item), name="nft-commit", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the call has returned or raised an error."""
        self._thread.join()

    def result(self) -> None:
        """Wait for the call. Raises the error that it raised."""
        self.join()
        if self._error is not None:
            raise self._error

    def _run(self, process: Callable[[_T], object], item: _T) -> None:
        try:
            process(item)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error
