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
"""Number of frontends at which a batch of a large change is complete: about half a megabyte with 10 endpoints each."""
MAX_READS = 3
"""Maximum number of attempts to read the table while other processes keep changing tables."""
_T = TypeVar("_T")


class NftablesKernel(Protocol):
    """Access to one family's table; implemented by `kproxy.nftables.kernel.NftTable`."""

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction; with a `generation`, only if it is still the current one.

        Raises `TableError` or `GenerationChangedError`.
        """

    def generation(self) -> int:
        """Return the generation ID, which every change of any table increments. Raises `TableError`."""

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        """Read the table; return None if it does not exist.

        Raises `TableError`, in particular `TableChangingError` if tables keep changing. With `allow_interrupted`, a
        change while elements are read is not an error; elements can be missing if this table was changed.
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
        """Create a backend that has not read the table yet.

        All backends of a network namespace must share `own_generations`. `batch_frontends` is the number of frontends
        at which a batch is complete. A batch never splits a Service, so it can have more.
        """
        self._kernel = kernel
        self._own_generations = own_generations or OwnGenerations()
        self._batch_frontends = batch_frontends
        self._ledger: NftablesLedger | None = None
        # The rule set's generation after the last commit; None if another process may have changed the table since.
        self._generation: int | None = None

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` needs the plans of all Services."""
        return self._ledger is None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program `plans`: those of the Services that may have changed, or of all Services if `needs_full_sync`.

        A Service without plans is deleted. Raises `SyncError` if the kernel cannot be read or rejects a change; changes
        that it accepted earlier stay applied. Raises `DriftError` if another process changed the table.
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

        This detects deleted tables and chains, and added or deleted rules and frontends. It does not detect changes of
        endpoints, of elements in sets, or of drop verdicts. If the kernel cannot be read, this logs a warning and
        returns True.
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
        """Change the existing table to match `plans`. Objects that already match stay untouched.

        An incompatible table is replaced, and the session affinity of existing clients is lost.
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
        # Other processes keep changing tables, most likely not this one. Sync from the part of it that can be read, and
        # check the result for drift.
        try:
            snapshot = self._kernel.snapshot(allow_interrupted=True)
            return self._sync_from_snapshot(snapshot, None, plans, context)
        except (TableError, DriftError) as error:
            raise IncompatibleTableError(f"the table keeps changing while it is read: {error}") from None

    def _sync_from_snapshot(
        self, snapshot: TableSnapshot | None, generation: int | None, plans: Plans, context: Context
    ) -> NftablesLedger:
        """Change the table from its state in `snapshot` to `plans`, or create it if `snapshot` is None.

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
        """Yield the transactions of a diff, each as soon as it has `batch_frontends` frontends."""
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

        If another process changed the rule set since the last commit, raise `GenerationChangedError` with
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
                f"another process changed the rule set, and the kernel rejected a change: {error}"
            ) from None

    def _check_concurrent_changes(self, ledger: NftablesLedger, context: Context) -> None:
        """If another process changed the rule set during the sync, check that it did not change this table.

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

    A single item is processed in the calling thread. If there are several, each is processed in a thread of its own,
    which inherits the caller's network namespace. Raises the first error of `process` or `items`, but only after a
    running call has returned; no further call is started.
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
