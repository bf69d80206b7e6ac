"""The nftables backend of one IP family. It programs the kernel and keeps a ledger of what the kernel has accepted."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain as concatenated
from itertools import islice
from typing import Protocol, TypeVar

from msgspec.structs import replace

from kproxy.host.background import BackgroundCall, ThreadStartError
from kproxy.host.nf_tables_constants import NFT_TABLE_F_DORMANT
from kproxy.model.context import Context
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import ApplyResult, DriftError, Plans, SyncError
from kproxy.model.types import Family, ServiceKey
from kproxy.nftables.base_table import base_sets
from kproxy.nftables.diff import Batch, IncompatibleTableError, NftablesDiff
from kproxy.nftables.elements import set_layout
from kproxy.nftables.held_services import HeldServices
from kproxy.nftables.isolation import Changes, Isolation, NoCulpritError, Rejection
from kproxy.nftables.kernel import (
    GenerationChangedError,
    OwnGenerations,
    TableChangingError,
    TableError,
    TransactionRejectedError,
)
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.names import TABLE
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.rejection import DRIFT_CODES, ServiceChange
from kproxy.nftables.render import RenderedService, render_service
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.table_check import CheckedTable, TableCheck
from kproxy.nftables.transaction import Transaction

log = logging.getLogger(__name__)
BATCH_FRONTENDS = 1_000
"""A large change is committed in batches. A batch is complete when it has this many frontends.

If each frontend has 10 endpoints, such a batch is about half a megabyte.
"""
MAX_READS = 3
"""Maximum number of attempts to read a consistent table while other processes keep changing tables."""
_T = TypeVar("_T")
_R = TypeVar("_R", RepairResult, RepairResult | None)


class NftablesKernel(CheckedTable, Protocol):
    """Access to one family's table; implemented by `kproxy.nftables.kernel.NftTable`."""

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. If a `generation` is given, commit only if it is still the current generation ID.

        Raises `GenerationChangedError` if the generation ID has changed, `TransactionRejectedError` if the kernel
        rejects objects of the transaction, and `TableError` for any other failure.
        """

    def generation(self) -> int:
        """Return the generation ID, which the kernel increments whenever any table changes. Raises `TableError`."""

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        """Read the table. Return None if it does not exist.

        Raises `TableError`, in particular `TableChangingError` if tables keep changing. With `allow_interrupted`, a
        change to any table is tolerated while elements are read. If it was a change to this table, the result may lack
        some elements.
        """

    def chain_use_counts(self) -> Counter[str]:
        """Return the use count of each chain (NFTA_CHAIN_USE). Raises `TableError`."""


class NftablesBackend:
    """Keeps one family's table in sync with the plans.

    The backend reads the whole table only if it has no ledger: at startup, after a failed sync, after another process
    changed the table, and after `forget`.
    """

    def __init__(
        self,
        kernel: NftablesKernel,
        own_generations: OwnGenerations | None = None,
        *,
        batch_frontends: int = BATCH_FRONTENDS,
    ) -> None:
        """Create a backend that has not read the table yet.

        All backends of a network namespace must share `own_generations`. A batch is complete when it has
        `batch_frontends` frontends. It can have more, because a Service is never split across batches.
        """
        self._kernel = kernel
        self._own_generations = own_generations or OwnGenerations()
        self._check = TableCheck(kernel, self._own_generations)
        self._batch_frontends = batch_frontends
        self._ledger: NftablesLedger | None = None
        # The generation ID at which this process last knew the contents of the table, or None if another process may
        # have changed the table since then.
        self._generation: int | None = None
        # Whether the next commit must fail if the generation ID is not `_generation`.
        self._must_be_current = False
        # The Services that the kernel rejected when it was last asked.
        self._rejected: set[ServiceKey] = set()
        # What the kernel accepted last for each Service with chains of its own, and for each rejected Service.
        self._accepted: dict[ServiceKey, RenderedService] = {}
        # The Services for which `_accepted` may change at the end of the sync.
        self._accepting: set[ServiceKey] = set()

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` needs the plans of all Services."""
        return self._ledger is None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Program the table according to the plans of all Services that may have changed.

        A Service without plans is deleted. If `needs_full_sync` is true, `plans` must cover all Services.

        If the kernel rejects some Services, all others are programmed, and the result contains the rejected ones. A
        rejected Service keeps what the kernel has accepted last, also if an earlier process programmed it. Then there
        is one exception: chains of the Service that another program has changed, and their frontends, are removed.

        Raises `SyncError` if the table cannot be read from the kernel, or if a commit fails for a reason that is not a
        Service. Changes that the kernel accepted earlier in the sync remain applied. Raises `DriftError` if another
        process changed the table. After an error, `needs_full_sync` is true.
        """
        ledger, self._ledger = self._ledger, None
        self._accepting.clear()
        try:
            if ledger is None:
                self._ledger, rejected = self._full_sync(plans, context)
            else:
                self._ledger, rejected = ledger, self._update(ledger, plans, context)
        except TableError as error:
            raise SyncError(str(error)) from None
        except NoCulpritError as error:
            if error.is_drift or self._generation is None:
                raise _drift_error(error) from None
            raise SyncError(str(error)) from None
        self._rejected |= rejected.keys()
        self._record_accepted(self._ledger, rejected)
        return ApplyResult({}, {}, self._ledger.conflicts(), rejected)

    def _record_accepted(self, ledger: NftablesLedger, rejected: Collection[ServiceKey]) -> None:
        for key in self._accepting.union(rejected):
            accepted = ledger.services.get(key)
            if accepted is not None and (accepted.chains or key in rejected):
                self._accepted[key] = accepted
            else:
                self._accepted.pop(key, None)

    def forget(self) -> None:
        """Discard the ledger, so that the next `sync` reads the table and must be a full sync."""
        self._ledger = None

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:  # noqa: ARG002
        """Restore the touched parts of the table that differ from the ledger. See `kproxy.sync.family_sync.Backend`."""
        if self._ledger is None:
            return RepairResult(needs_full_sync=True)
        ledger, family = self._ledger, context.family
        return self._checked(lambda: self._check.repair(ledger, family, touched.get(TABLE, Touched())))

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:  # noqa: ARG002
        """Compare the next part of the table with the ledger. See `kproxy.sync.family_sync.Backend`."""
        if self._ledger is None:
            return None
        ledger, family = self._ledger, context.family
        return self._checked(lambda: self._check.compare_next(ledger, family))

    def _checked(self, check: Callable[[], _R]) -> _R:
        """Return the result of a check. If the check fails or cannot restore the table, request a full sync."""
        try:
            result = check()
        except TableError as error:
            self._ledger = None
            raise SyncError(str(error)) from None
        if result is not None and result.needs_full_sync:
            self._ledger = None
        return result

    def _update(self, ledger: NftablesLedger, plans: Plans, context: Context) -> dict[ServiceKey, str]:
        self._must_be_current = False
        rejected = self._program(NftablesDiff(ledger, context), ledger, plans, context, is_full=False)
        self._check_concurrent_changes(ledger, context)
        return rejected

    def _full_sync(self, plans: Plans, context: Context) -> tuple[NftablesLedger, dict[ServiceKey, str]]:
        """Create the table, or change the existing one to match `plans`. Return the ledger and the rejected Services.

        Existing sets and elements that already match stay untouched. The rules of existing chains are rewritten.

        If the table is incompatible or keeps changing while it is read, a new table replaces it. Clients then lose
        their session affinity.
        """
        try:
            return self._read_and_sync(plans, context)
        except IncompatibleTableError as error:
            log.info("%s: replacing the existing table: %s", context.family.value, error)
            return self._replace(plans, context)

    def _read_and_sync(self, plans: Plans, context: Context) -> tuple[NftablesLedger, dict[ServiceKey, str]]:
        held = HeldServices(self._accepted, context.family, self._kernel.rules)
        failures = 0
        while failures < MAX_READS:
            try:
                generation = self._kernel.generation()
                done = self._sync_from_snapshot(self._kernel.snapshot(), generation, plans, context, held)
            except (GenerationChangedError, TableChangingError):
                failures += 1
            else:
                if done is not None:
                    return done
        # Other processes keep changing tables, but probably not kproxy's. Read kproxy's table once more, and tolerate
        # changes while its elements are read. After the sync, `_check_concurrent_changes` checks the table for drift.
        try:
            done = None
            while done is None:
                snapshot = self._kernel.snapshot(allow_interrupted=True)
                done = self._sync_from_snapshot(snapshot, None, plans, context, held)
        except (TableError, DriftError, NoCulpritError) as error:
            raise IncompatibleTableError(f"the table keeps changing while it is read: {error}") from None
        return done

    def _sync_from_snapshot(
        self,
        snapshot: TableSnapshot | None,
        generation: int | None,
        plans: Plans,
        context: Context,
        held: HeldServices,
    ) -> tuple[NftablesLedger, dict[ServiceKey, str]] | None:
        """Change the table from its state in `snapshot` to the desired state. Create it if `snapshot` is None.

        An existing table is changed in one transaction, because its chains must be consistent with each other and with
        the context. If there are new chains, `_commit` adds them in an earlier transaction. A new table is filled in
        batches.

        Return the ledger and the rejected Services. Return None if the table must be read again, because the kernel
        rejected Services, which are now in `held`.

        Raises `GenerationChangedError` if `generation` is not the current one when the first commit is made.
        """
        if snapshot is not None:
            generation = self._awaken(snapshot, generation)
            _check_compatible(snapshot, context)
        self._generation = generation
        self._must_be_current = generation is not None
        ledger = NftablesLedger()
        if snapshot is None:
            rejected = self._program(NftablesDiff(ledger, context, create=True), ledger, plans, context, is_full=True)
        elif self._commit_whole(ledger, snapshot, plans, context, held):
            rejected = self._program_held(ledger, plans, context, held)
        else:
            return None
        self._check_concurrent_changes(ledger, context)
        return ledger, rejected

    def _awaken(self, snapshot: TableSnapshot, generation: int | None) -> int | None:
        """Clear the flag of a dormant table. Return the new generation ID, or None if `generation` is None."""
        if snapshot.flags != NFT_TABLE_F_DORMANT:
            return generation
        awakening = Transaction(create_table=True)
        snapshot.flags = 0
        if generation is None:
            self._kernel.commit(awakening)
            return None
        return self._own_generations.commit(self._kernel.commit, awakening, generation)

    def _replace(self, plans: Plans, context: Context) -> tuple[NftablesLedger, dict[ServiceKey, str]]:
        self._generation = None
        self._must_be_current = False
        held = HeldServices(self._accepted, context.family, self._kernel.rules)
        ledger = NftablesLedger()
        while not self._commit_whole(ledger, None, plans, context, held):
            ledger = NftablesLedger()
        rejected = self._program_held(ledger, plans, context, held)
        self._check_concurrent_changes(ledger, context)
        return ledger, rejected

    def _commit_whole(
        self,
        ledger: NftablesLedger,
        snapshot: TableSnapshot | None,
        plans: Plans,
        context: Context,
        held: HeldServices,
    ) -> bool:
        """Program the complete table in one transaction, with Services in `held` as they are in the snapshot.

        Without a snapshot, a new table replaces any existing one. Return False, and hold more Services, if the kernel
        rejects Services. Raises `NoCulpritError` if it rejects the transaction for another reason.
        """
        diff = NftablesDiff(ledger, context, snapshot, create=snapshot is None)
        for key, ports in plans.by_service():
            diff.put(key, held.state(key, self._render(key, ports, context), snapshot))
        transaction = diff.last_transaction()
        try:
            if snapshot is None:
                self._kernel.commit(transaction)
            else:
                self._commit(transaction)
        except TransactionRejectedError as error:
            if (
                snapshot is not None
                and self._generation is None
                and {each.code for each in error.objects} & DRIFT_CODES
            ):
                raise  # the snapshot may be wrong
            held.add(_rejection(error), {key: ServiceChange(None, each) for key, each in ledger.services.items()})
            return False
        return True

    def _program_held(
        self, ledger: NftablesLedger, plans: Plans, context: Context, held: HeldServices
    ) -> dict[ServiceKey, str]:
        """Program the Services in `held` that are not known to be culprits. Return all rejected Services."""
        self._rejected = set(held.culprits)
        if not held.holds_all:
            return held.culprits
        return self._program(NftablesDiff(ledger, context), ledger, plans, context, is_full=True)

    def _program(
        self, diff: NftablesDiff, ledger: NftablesLedger, plans: Plans, context: Context, *, is_full: bool
    ) -> dict[ServiceKey, str]:
        """Program Services in batches. Return the Services that the kernel rejected, with the reasons.

        `is_full` tells whether this is part of a full sync, in which the contents of the table are known.

        Raises `NoCulpritError` if the kernel rejects a batch for a reason that is not a Service.
        """
        known = frozenset(self._rejected)
        rejected: dict[ServiceKey, str] = {}
        waiting: deque[Batch] = deque()  # not committed yet
        batches = self._batches(diff, plans, context)

        def commit(batch: Batch) -> None:
            self._commit(batch.transaction)
            waiting.popleft()

        while True:
            try:
                run_pipelined(commit, _recorded(batches, waiting))
                break
            except TransactionRejectedError as error:
                # The diff has already moved on, at most to the next batch.
                rejection = _rejection(error)
            failed = waiting[0]
            after, *later = diff.roll_back(waiting)
            waiting.clear()
            isolation = Isolation(
                lambda changes: self._try(diff, changes), lambda: self._may_be_drift(diff, is_full=is_full), known
            )
            changes = {key: ServiceChange(failed.before[key], new) for key, new in after.items()}
            isolation.program(changes, rejection)
            if diff.context_changed and (again := self._try(diff, {})) is not None:
                raise NoCulpritError(again)
            rejected |= isolation.culprits
            if is_full:
                self._restore_accepted(diff, isolation.culprits)
            if later:
                for key, new in later[0].items():
                    diff.put(key, new)
                batches = concatenated([diff.next_batch()], batches)
        ledger.context = context
        return rejected

    def _restore_accepted(self, diff: NftablesDiff, culprits: Iterable[ServiceKey]) -> None:
        """Program rejected Services as the kernel accepted them last. They may not be in the table any more."""
        for key in culprits:
            if key in self._accepted:
                self._try(diff, {key: ServiceChange(None, self._accepted[key])})

    def _may_be_drift(self, diff: NftablesDiff, *, is_full: bool) -> bool:
        """Return whether another process may have changed what the ledger describes."""
        return not diff.creates_table and (not is_full or self._generation is None)

    def _try(self, diff: NftablesDiff, changes: Changes) -> Rejection | None:
        """Commit changes in one transaction. If the kernel rejects it, take the changes back and return the reason."""
        for key, change in changes.items():
            diff.put(key, change.new)
        batch = diff.next_batch()
        try:
            self._commit(batch.transaction)
        except TransactionRejectedError as error:
            diff.roll_back([batch])
            return _rejection(error)
        return None

    def _render(self, key: ServiceKey, plans: Sequence[ServicePortPlan], context: Context) -> RenderedService | None:
        rendered = render_service(plans, context)
        if (rendered is not None and rendered.chains) or key in self._accepted:
            self._accepting.add(key)
        return rendered

    def _batches(self, diff: NftablesDiff, plans: Plans, context: Context) -> Iterator[Batch]:
        """Yield the batches of a diff. Each except the last is yielded once it has `batch_frontends` frontends."""
        for key, ports in plans.by_service():
            self._rejected.discard(key)
            diff.put(key, self._render(key, ports, context))
            if diff.frontend_count >= self._batch_frontends:
                yield diff.next_batch()
        yield diff.next_batch()

    def _commit(self, transaction: Transaction) -> None:
        """Commit a transaction. Commit its new chains first (see `Transaction.split_off_new_chains`).

        If another process has changed the rule set since `_generation`, the transaction is committed anyway, unless
        `_must_be_current` is true: then the method raises `GenerationChangedError`. If `_generation` is None, the
        transaction is always committed.

        Raises `TransactionRejectedError` if the kernel rejects the transaction because of its objects. The table is
        then as before. For any other failure, raises `DriftError` if the generation ID is unknown, because the table
        may no longer match the ledger, and `TableError` otherwise.
        """
        new_chains = transaction.split_off_new_chains()
        if new_chains is not None:
            self._commit_one(new_chains)
        if not transaction:
            return
        try:
            self._commit_one(transaction)
        except TransactionRejectedError:
            if new_chains is not None:
                self._delete_new_chains(new_chains)
            raise

    def _delete_new_chains(self, new_chains: Transaction) -> None:
        try:
            self._commit_one(new_chains.undo_new_chains())
        except TransactionRejectedError as error:
            raise TableError(str(error)) from None

    def _commit_one(self, transaction: Transaction) -> None:
        if self._generation is not None:
            try:
                self._generation = self._own_generations.commit(self._kernel.commit, transaction, self._generation)
            except GenerationChangedError:
                self._generation = None
                if self._must_be_current:
                    raise
            else:
                self._must_be_current = False
                return
        try:
            self._kernel.commit(transaction)
        except TransactionRejectedError:
            raise
        except TableError as error:
            raise _drift_error(error) from None

    def _check_concurrent_changes(self, ledger: NftablesLedger, context: Context) -> None:
        """If another process has changed the rule set, check that it did not change this table.

        Raises `DriftError` if it did. The generation ID is read before the table. If another process changes the rule
        set after that, the next commit detects the change. If the table cannot be read because tables keep changing,
        the next sync repeats the check.
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


def _rejection(error: TransactionRejectedError) -> Rejection:
    return Rejection(str(error), error.objects)


def _drift_error(error: Exception) -> DriftError:
    return DriftError(f"another process changed the rule set, and the kernel rejected a change: {error}")


def _recorded(batches: Iterable[Batch], record: deque[Batch]) -> Iterator[Batch]:
    """Yield batches, and append each to `record` before."""
    for batch in batches:
        record.append(batch)
        yield batch


class NftablesPrinter:
    """A backend that prints the table instead of programming it."""

    needs_full_sync = True

    def __init__(self, family: Family, show: Callable[[str], object]) -> None:
        self._writer = NftWriter(family)
        self._show = show

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:  # noqa: ARG002
        """Return that nothing differs: a printed table cannot drift."""
        return RepairResult()

    def compare_next(self, plans: Plans, context: Context) -> None:
        """Return None: a printed table cannot drift."""

    def forget(self) -> None:
        """Do nothing: every sync is a full sync."""

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Print the table for `plans` in the format of `nft list table`."""
        ledger = NftablesLedger()
        transaction = _new_table(ledger, plans, context)
        elements = transaction.all_added_elements()
        self._show(self._writer.table(transaction.added_sets, elements, transaction.added_rules))
        return ApplyResult({}, {}, ledger.conflicts())


def _new_table(ledger: NftablesLedger, plans: Plans, context: Context) -> Transaction:
    """Return the transaction that creates the whole table, and record the table's contents in the ledger.

    The transaction first deletes any existing table.
    """
    diff = NftablesDiff(ledger, context, create=True)
    for key, ports in plans.by_service():
        diff.put(key, render_service(ports, context))
    return diff.last_transaction()


def _check_compatible(snapshot: TableSnapshot, context: Context) -> None:
    """Raise `IncompatibleTableError` if the table must be replaced, because the diff cannot correct its contents.

    Table flags mark a table that a process owns. The type of a set cannot be changed. If an unknown verdict map refers
    to a chain, the kernel may reject the deletion of that chain. A catch-all element (`*`) would match keys that must
    not match.
    """
    if snapshot.flags:
        raise IncompatibleTableError(f"the table has flags ({snapshot.flags:#x})")
    desired = {each.name: set_layout(each, context.family) for each in base_sets(context)}
    for name, layout in snapshot.sets.items():
        if name in desired and layout == replace(desired[name], counters=not desired[name].counters):
            raise IncompatibleTableError(
                f"kproxy.connectionCounters has changed to {str(desired[name].counters).lower()}"
            )
        if desired.get(name, layout) != layout:
            raise IncompatibleTableError(f"set {name} has a different type")
        if name not in desired and layout.has_verdicts:
            raise IncompatibleTableError(f"verdict map {name} is unknown")
    for name, elements in snapshot.elements.items():
        if b"" in elements:
            raise IncompatibleTableError(f"map {name} has a catch-all element")


def run_pipelined(process: Callable[[_T], object], items: Iterable[_T]) -> None:
    """Call `process` with each item, in order and one call at a time, and fetch other items during the calls.

    The first two items are fetched before the first call. After that, the next item is fetched while `process` runs
    with the item before it. If there is only one item, it is processed in the calling thread. If there are more, each
    is processed in a new thread, which inherits the caller's network namespace. If no thread can be started, it is
    processed in the calling thread as well.

    Raises any error that `process` or `items` raises. No further call is then started, and the error is raised only
    after a running call has returned. If both that call and the computation of the next item fail, the error of `items`
    is raised.
    """
    iterator = iter(items)
    ready = list(islice(iterator, 2))
    if len(ready) == 1:
        process(ready[0])
    if len(ready) < 2:
        return
    running = _call(process, ready.pop(0))
    try:
        while ready:
            running.result()
            running = _call(process, ready.pop())
            ready += islice(iterator, 1)
    finally:
        running.join()
    running.result()


def _call(process: Callable[[_T], object], item: _T) -> BackgroundCall | _FinishedCall:
    """Call a function in a new thread, or in this one if no thread can be started."""
    try:
        return BackgroundCall(partial(process, item))
    except ThreadStartError as error:
        log.debug("committing without another thread: %s", error)
        return _FinishedCall(partial(process, item))


class _FinishedCall:
    """A function call that has been made in the caller's thread, with the interface of `BackgroundCall`."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._error: Exception | None = None
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised by `result`
            self._error = error

    def join(self) -> None:
        """Do nothing: the call has ended."""

    def result(self) -> None:
        """If the call raised an error, raise that error again."""
        if self._error is not None:
            raise self._error
