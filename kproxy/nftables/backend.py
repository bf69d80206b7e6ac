"""The nftables backend of one family: plans in, kernel rules out, and a ledger of what was accepted."""

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

_T = TypeVar("_T")


def pipelined(do: Callable[[_T], object], things: Iterable[_T]) -> None:
    """Call `do` with each thing, in their order, one at a time, while the next thing is being made.

    A single thing is done in the calling thread; of several, each is done in a thread that belongs to the same network
    namespace. Raises what `do` or making a thing raised: nothing more is begun then, and what was begun has ended.
    """
    iterator = iter(things)
    ready = list(islice(iterator, 2))
    if len(ready) == 1:
        do(ready[0])
    if len(ready) < 2:
        return
    running = _BackgroundCall(do, ready.pop(0))
    try:
        while ready:
            running.result()
            running = _BackgroundCall(do, ready.pop())
            ready += islice(iterator, 1)
    finally:
        running.join()
    running.result()


class _BackgroundCall(Generic[_T]):
    """A call in a daemon thread of its own: Python does not wait for one at exit, as it does for an executor's."""

    def __init__(self, do: Callable[[_T], object], thing: _T) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(do, thing), name="nft-commit", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the call has returned or raised."""
        self._thread.join()

    def result(self) -> None:
        """Wait for the call, and raise what it raised."""
        self.join()
        if self._error is not None:
            raise self._error

    def _run(self, do: Callable[[_T], object], thing: _T) -> None:
        try:
            do(thing)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error


log = logging.getLogger(__name__)
BATCH_FRONTENDS = 1_000
"""How many frontends one batch of a large change has: with 10 endpoints each about half a megabyte."""
READS = 3
"""How often a sync reads the table anew because others change tables at the same time."""


class NftablesKernel(Protocol):
    """The way to one family's table; `kproxy.nftables.kernel.NftTable` is the real one."""

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        """Make a transaction; with a generation only if nothing has changed since.

        Raises `TableError` or `GenerationChangedError`.
        """

    def generation(self) -> int:
        """Return the number of the last change that anybody made to any table. Raises `TableError`."""

    def view(self, *, lenient: bool = False) -> TableSnapshot | None:
        """Return what the table holds, None if there is none. Raises `TableError`, `TableChangingError` if it changes.

        With `lenient`, elements are read even while tables change: some may be missing if that is this one.
        """

    def uses(self) -> Counter[str]:
        """Return how often each chain is used. Raises `TableError`."""


class NftablesBackend:
    """Keeps one family's table equal to the plans that it is given.

    The table is read when nothing is known about it (at start, after a failure, and when somebody else has changed
    it) and at no other time.
    """

    def __init__(
        self, kernel: NftablesKernel, own: OwnGenerations | None = None, *, batch_frontends: int = BATCH_FRONTENDS
    ) -> None:
        """`own` is shared by all backends that change tables of the same network namespace.

        `batch_frontends` is how many frontends a batch may have; no Service is ever spread over two.
        """
        self._kernel = kernel
        self._own = own or OwnGenerations()
        self._batch_frontends = batch_frontends
        self._ledger: NftablesLedger | None = None
        self._generation: int | None = None

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` must be given the plans of all Services."""
        return self._ledger is None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Bring the table to `plans`: the Services that may have changed, or all if `needs_full_sync`.

        A Service without plans is deleted. Raises `SyncError` if the kernel refused; what was accepted before stays.
        """
        ledger, self._ledger = self._ledger, None
        try:
            self._ledger = self._load(plans, context) if ledger is None else self._update(ledger, plans, context)
        except TableError as error:
            raise SyncError(str(error)) from None
        return ApplyResult({}, {}, self._ledger.conflicts())

    def forget(self) -> None:
        """Let the next `sync` read the table."""
        self._ledger = None

    def verify(self, context: Context) -> bool:  # noqa: ARG002 - the ledger knows what it was given
        """Return whether every chain is used as often as it should be; if not, forget what is known.

        That tells of deleted tables and chains, of rules that were added or deleted, and of frontends that were; not of
        endpoints, members of sets and verdicts that drop.
        """
        if self._ledger is None:
            return True
        try:
            whole = self._kernel.uses() == self._ledger.uses()
        except TableError as error:
            log.warning("cannot look at the table: %s", error)
            return True
        if not whole:
            self._ledger = None
        return whole

    def _update(self, ledger: NftablesLedger, plans: Plans, context: Context) -> NftablesLedger:
        change = NftablesDiff(ledger, context)
        pipelined(self._commit, self._batches(change, plans, context, self._batch_frontends))
        self._settle(ledger, context)
        return ledger

    def _load(self, plans: Plans, context: Context) -> NftablesLedger:
        """Write everything, whatever is there; what is right already stays untouched.

        A table that cannot be taken over is replaced, and then no client is remembered any more.
        """
        try:
            return self._load_over_read(plans, context)
        except IncompatibleTableError as error:
            log.info("%s: the table of before cannot be taken over, a new one takes its place", error)
            return self._replace(plans, context)

    def _load_over_read(self, plans: Plans, context: Context) -> NftablesLedger:
        for _ in range(READS):
            try:
                generation = self._kernel.generation()
                return self._load_over(self._kernel.view(), generation, plans, context)
            except (GenerationChangedError, TableChangingError):
                continue
        # Others keep changing tables. Hardly this one: what was read of it is mostly true, and checked in the end.
        try:
            return self._load_over(self._kernel.view(lenient=True), None, plans, context)
        except (TableError, DriftError) as error:
            raise IncompatibleTableError(f"it changes while it is read ({error})") from None

    def _load_over(
        self, view: TableSnapshot | None, generation: int | None, plans: Plans, context: Context
    ) -> NftablesLedger:
        """Bring a table that was read to the plans. Raises `GenerationChangedError` if `generation` is not current.

        What is taken over changes in one step, for its chains must agree with each other and with the settings.
        """
        if view is not None:
            _check_usable(view, context.family)
        ledger = NftablesLedger()
        change = NftablesDiff(ledger, context, view, create=view is None)
        size = math.inf if view is not None else self._batch_frontends
        self._generation = generation
        batches = self._batches(change, plans, context, size)
        pipelined(lambda batch: self._commit(batch[1], must_be_fresh=not batch[0]), enumerate(batches))
        self._settle(ledger, context)
        return ledger

    def _batches(self, change: NftablesDiff, plans: Plans, context: Context, size: float) -> Iterator[Transaction]:
        """Yield the transactions of a change, each as soon as it has as many frontends as it may."""
        for key, ports in plans.by_service():
            change.put(key, render_service(ports, context))
            if change.size >= size:
                yield change.take()
        yield change.finish()

    def _replace(self, plans: Plans, context: Context) -> NftablesLedger:
        ledger = NftablesLedger()
        change = NftablesDiff(ledger, context, create=True)
        for key, ports in plans.by_service():
            change.put(key, render_service(ports, context))
        self._generation = None
        self._kernel.commit(change.finish())
        self._settle(ledger, context)
        return ledger

    def _commit(self, change: Transaction, *, must_be_fresh: bool = False) -> None:
        """Make a transaction, and note whether others have made changes since the one before.

        With `must_be_fresh`, raises `GenerationChangedError`. Else, what is refused is a reason to look at the table
        again: it may be no longer what it was.
        """
        if (first := change.split_off_new_chains()) is not None:
            self._commit_at_once(first, must_be_fresh=must_be_fresh)
        if change:
            self._commit_at_once(change, must_be_fresh=must_be_fresh and first is None)

    def _commit_at_once(self, change: Transaction, *, must_be_fresh: bool) -> None:
        if self._generation is not None:
            last = self._own.since(self._generation)
            try:
                self._kernel.commit(change, last)
            except GenerationChangedError:
                self._generation = None
                if must_be_fresh:
                    raise
            else:
                self._generation = self._own.made(last)
                return
        try:
            self._kernel.commit(change)
        except TableError as error:
            raise DriftError(f"somebody else has changed tables, and now: {error}") from None

    def _settle(self, ledger: NftablesLedger, context: Context) -> None:
        """If others have made changes meanwhile, make sure that they were not to this table.

        The generation is asked for first: a change after that is noticed at the next transaction. Where changes of
        others are too many to look at all, the next transaction has a look as well.
        """
        if self._generation is not None:
            return
        try:
            generation = self._kernel.generation()
            uses = self._kernel.uses()
        except TableChangingError as error:
            log.debug("%s: %s", context.family.value, error)
            return
        if uses != ledger.uses():
            log.warning("%s: somebody else has changed the table: programming everything anew", context.family.value)
            raise DriftError("somebody else has changed the table")
        self._generation = generation


class NftablesPrinter:
    """A backend that hands on, as text, the table that it would make."""

    needs_full_sync = True

    def __init__(self, family: Family, show: Callable[[str], object]) -> None:
        self._writer = NftWriter(family)
        self._show = show

    def verify(self, context: Context) -> bool:  # noqa: ARG002 - there is no kernel that could differ
        """Return that nothing is missing."""
        return True

    def forget(self) -> None:
        """Do nothing: everything is handed on each time."""

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Hand on the table for all `plans`, as `nft list table` prints it."""
        ledger = NftablesLedger()
        change = NftablesDiff(ledger, context, create=True)
        for key, ports in plans.by_service():
            change.put(key, render_service(ports, context))
        made = change.finish()
        self._show(self._writer.table(made.sets, made.additions(), made.rules))
        return ApplyResult({}, {}, ledger.conflicts())


def _check_usable(view: TableSnapshot, family: Family) -> None:
    """Raise `IncompatibleTableError` if the table has something that can neither be changed nor removed alone.

    The type of a set cannot be changed, others' maps of verdicts keep chains from being deleted, and an element for
    all other keys would catch what is to go on.
    """
    if view.flags:
        raise IncompatibleTableError("the table has flags")
    shapes = {each.name: set_layout(each, family) for each in SETS}
    for name, shape in view.sets.items():
        if shapes.get(name, shape) != shape:
            raise IncompatibleTableError(f"set {name} is of another type")
        if name not in shapes and shape.has_verdicts:
            raise IncompatibleTableError(f"map {name} is somebody else's")
    for name, elements in view.elements.items():
        if b"" in elements:
            raise IncompatibleTableError(f"map {name} has an element for all keys")
