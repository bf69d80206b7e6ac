"""Read one family's table from the kernel, and commit transactions to it over netlink or with `nft`."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

from kproxy.host.commands import CommandError, CommandRunner, InconclusiveError
from kproxy.host.netlink import (
    BatchRejectedError,
    BatchSocket,
    DumpInterruptedError,
    RejectedMessage,
    StaleGenerationError,
    retry_interrupted,
)
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES
from kproxy.model.drift import CommitAuthor
from kproxy.model.types import Family
from kproxy.nftables.decode import TableReader
from kproxy.nftables.elements import EndpointElements, SetElement, SetLayout
from kproxy.nftables.encode import NftMessage, TransactionEncoder, is_about_table, rejected_element, split_elements
from kproxy.nftables.names import TABLE
from kproxy.nftables.nft_errors import NftErrors, error_code
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.rejection import UNIVERSAL_CODES, RejectedObject
from kproxy.nftables.rule_content import RuleContent
from kproxy.nftables.ruleset import NftHook, NftSet
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction

NFT_TIMEOUT_SECONDS = 900
"""Timeout after which the program `nft` is considered hung and is killed."""
MAX_COMMIT_WAIT_SECONDS = 2.0
"""Maximum number of seconds to wait for a commit for another family."""
_NO_NF_TABLES = {errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}
_T = TypeVar("_T")


class TableError(Exception):
    """A transaction failed, or the table cannot be read. The message is one line.

    If the kernel rejected the transaction, or `nft` could not be started, nothing was applied. In two cases it is
    unknown whether the transaction was applied: if sending it or receiving the reply over netlink failed, and if `nft`
    was killed, for example after a timeout.

    `inconclusive` is true if `nft` was killed, or could not be started for a reason that may be temporary. The error
    then does not show whether the kernel accepts the transaction.
    """

    def __init__(self, text: str, *, inconclusive: bool = False) -> None:
        super().__init__(text)
        self.inconclusive = inconclusive


class TransactionRejectedError(TableError):
    """The kernel rejected a transaction because of some of its objects, and applied no part of it.

    `objects` are the rejected objects in the order of the transaction, as far as they are known. This error is not
    raised if the kernel would reject any transaction, for example because of missing permissions.
    """

    def __init__(self, text: str, objects: Sequence[RejectedObject] = ()) -> None:
        super().__init__(text)
        self.objects = tuple(objects)


class GenerationChangedError(Exception):
    """A transaction was not applied, because the rule set no longer has the generation ID that the caller passed."""


class TableChangingError(TableError):
    """Every attempt to read the table was interrupted by a change to this or another table."""


# Generations


def next_generation(generation: int) -> int:
    """Return the generation ID that follows `generation`. The generation ID is a 32-bit counter that skips 0."""
    return generation + 1 & 0xFFFFFFFF or 1


class OwnGenerations:
    """The most recent unbroken run of generations that this process committed, across all its backends.

    All tables of a network namespace share one generation ID. Without this record, the backend of one family would
    mistake the commits of the other family's backend for commits by another process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._first = self._last = 0

    def commit(self, commit: Commit, transaction: Transaction, generation: int) -> int:
        """Commit a transaction if only this process has made commits since `generation`. Return the new generation ID.

        The kernel makes one commit at a time. The threads of the families therefore wait for each other here, so that
        a commit of one of them does not change the generation ID while another one is on its way. They wait for a
        limited time, because the program `nft` can hang.

        Raises the same errors as `Commit`.
        """
        acquired = self._commit_lock.acquire(timeout=MAX_COMMIT_WAIT_SECONDS)
        try:
            current = self.newest_after(generation)
            commit(transaction, current)
            return self.record_commit(current)
        finally:
            if acquired:
                self._commit_lock.release()

    def record_commit(self, base: int) -> int:
        """Record a commit that this process made on top of generation `base`. Return the new generation."""
        new = next_generation(base)
        with self._lock:
            if base != self._last:
                self._first = base
            self._last = new
        return new

    def newest_after(self, generation: int) -> int:
        """Return the newest generation that was reached from `generation` only by commits of this process.

        Return `generation` itself if there is no newer one.
        """
        with self._lock:
            return self._last if self._first <= generation <= self._last else generation


# Commits


class Commit(Protocol):
    """Commits transactions."""

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. If a `generation` is given, commit only if it is still the current generation ID.

        Raises `GenerationChangedError` if the generation ID has changed, `TransactionRejectedError` if the kernel
        rejects objects of the transaction, and `TableError` for any other failure.
        """


class NetlinkCommit:
    """Commits transactions over netlink. All commits use the same socket."""

    port = 0
    """The port ID of the socket, or 0 before the first commit."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._encoder = TransactionEncoder(family, table)
        self._writer = NftWriter(family, table)
        self._socket: BatchSocket | None = None

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. See `Commit`."""
        messages = list(self._encoder.encode(transaction))
        try:
            self._send(messages, generation)
        except BatchRejectedError as error:
            rejections = error.rejections
        else:
            return
        if _may_hide_others(messages, rejections):
            # Find all rejected elements, not only the first one of each message.
            indexes = {each.index for each in rejections}
            messages = list(chain.from_iterable(_split(messages, indexes)))
            try:
                self._send(messages, generation)
            except BatchRejectedError as error:
                rejections = error.rejections
            else:
                return  # what the kernel objected to is gone
        raise self._error(messages, rejections)

    def _send(self, messages: Sequence[NftMessage], generation: int | None) -> None:
        """Send messages as one batch. Raises `BatchRejectedError`, `GenerationChangedError` or `TableError`."""
        try:
            if self._socket is None:
                self._socket = BatchSocket(NFNL_SUBSYS_NFTABLES)
                self.port = self._socket.port
            self._socket.commit([(each.type, each.flags, each.payload) for each in messages], generation)
        except StaleGenerationError:
            raise GenerationChangedError("the rule set has changed since the expected generation") from None
        except OSError as error:
            raise TableError(f"netlink: {error.strerror}") from None

    def has_made_commits(self, port: int) -> bool:
        """Return whether a netlink port ID is that of the socket with which this object commits."""
        return port == self.port

    def is_author(self, commit: CommitAuthor) -> bool:
        """Return whether this object has made a commit. The socket stays open, so no other one can have its port ID."""
        return commit.port == self.port

    def _error(self, messages: Sequence[NftMessage], rejections: Sequence[RejectedMessage]) -> TableError:
        first = rejections[0]
        if first.index < 0:
            return TableError(f"the kernel rejected the transaction: {first.reason}")
        more = f" (and {len(rejections) - 1} more)" if len(rejections) > 1 else ""
        text = f"{self._subject(messages[first.index], first.offset)}: {first.reason}{more}"
        # The batch as a whole can be rejected after some of its messages.
        if any(each.index < 0 or each.code in UNIVERSAL_CODES for each in rejections):
            return TableError(text)
        return TransactionRejectedError(text, [self._object(messages[each.index], each) for each in rejections])

    def _object(self, message: NftMessage, rejection: RejectedMessage) -> RejectedObject:
        reason = f"{self._subject(message, rejection.offset)}: {rejection.reason}"
        if is_about_table(rejection.offset):
            return RejectedObject("table", message.name, reason, code=rejection.code)
        element = _element(message, rejection.offset)
        if element is None:
            return RejectedObject(message.kind, message.name, reason, code=rejection.code)
        return RejectedObject("element", message.name, reason, element.key, rejection.code)

    def _subject(self, message: NftMessage, offset: int) -> str:
        if not message.elements:
            return message.subject
        element = _element(message, offset)
        if element is None:
            return f"{len(message.elements)} elements of {message.subject}"
        service_port = f" of {element.comment}" if element.comment else ""
        return f"element {self._writer.key(message.subject, element.key)} of {message.subject}{service_port}"


def _may_hide_others(messages: Sequence[NftMessage], rejections: Sequence[RejectedMessage]) -> bool:
    """Return whether single elements were rejected, and the same messages have other elements."""
    if any(each.index < 0 or each.code in UNIVERSAL_CODES or is_about_table(each.offset) for each in rejections):
        return False
    elements = [messages[each.index].elements for each in rejections]
    return any(len(each) > 1 or (each and isinstance(each[0], EndpointElements)) for each in elements)


def _split(messages: Sequence[NftMessage], indexes: Collection[int]) -> Iterator[Iterable[NftMessage]]:
    """Split the elements of the messages with these indexes into messages of their own."""
    for index, message in enumerate(messages):
        yield split_elements(message) if index in indexes and message.elements else (message,)


def _element(message: NftMessage, offset: int) -> SetElement | None:
    """Return the rejected element of a message. If the kernel reported no offset, this is the only element."""
    if offset < 0 and len(message.elements) == 1 and isinstance(message.elements[0], SetElement):
        return message.elements[0]
    return rejected_element(message, offset)


class NftCommit:
    """Commits transactions with `nft -f`, for a kernel that accepts nft's messages but rejects kproxy's own messages.

    It cannot detect concurrent changes by other processes.
    """

    def __init__(self, family: Family, table: str = TABLE, *, timeout: float = NFT_TIMEOUT_SECONDS) -> None:
        """Create a `Commit` that kills `nft` after `timeout` seconds."""
        self._writer = NftWriter(family, table)
        self._timeout = timeout
        self._commands = CommandRunner()

    def has_made_commits(self, port: int) -> bool:
        """Return whether a netlink port ID belongs to a `nft` that this object has just run: it is nft's PID."""
        return self._commands.has_run(port)

    def is_author(self, commit: CommitAuthor) -> bool:
        """Return whether a commit was made by `nft`, if `has_made_commits` has returned True for its port ID."""
        return self._commands.has_committed(commit)

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:  # noqa: ARG002 - see below
        """Commit a transaction. `generation` is ignored, because nft cannot check it. Raises `TableError`."""
        try:
            done = self._commands.run(["nft", "-f", "-"], self._writer.commands(transaction), timeout=self._timeout)
        except InconclusiveError as error:
            raise TableError(str(error), inconclusive=True) from None
        except CommandError as error:
            raise TableError(str(error)) from None
        if not done.code:
            return
        text = f"nft: {done.error_message}"
        if done.code < 0:
            raise TableError(text, inconclusive=True)
        objects = NftErrors(self._writer, transaction).objects(done.stderr)
        if {error_code(done.stderr), *(each.code for each in objects)} & UNIVERSAL_CODES:
            raise TableError(text)
        raise TransactionRejectedError(text, objects)


# The table


class NftTable:
    """One family's table in the kernel."""

    def __init__(self, family: Family, commit: Commit) -> None:
        self._reader = TableReader(family)
        self._commit = commit

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. See `Commit`."""
        self._commit(transaction, generation)

    def generation(self) -> int:
        """Return the generation ID, which the kernel increments whenever any table changes. Raises `TableError`."""
        return _read(self._reader.generation)

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        """Read the table. Return None if it does not exist.

        Raises `TableError`, in particular `TableChangingError` if tables keep changing. With `allow_interrupted`, a
        change to any table is tolerated while elements are read. If it was a change to this table, the result may lack
        some elements.
        """
        return _read(partial(self._reader.snapshot, allow_interrupted=allow_interrupted))

    def chain_use_counts(self) -> Counter[str]:
        """Return the use count of each chain (NFTA_CHAIN_USE). Raises `TableError`."""
        return _read(self._reader.chain_use_counts)

    def flags(self) -> int | None:
        """Return the table's flags, or None if the table does not exist. Raises `TableError`."""
        return _read(self._reader.flags)

    def sets(self, names: Collection[str] | None = None) -> dict[str, SetLayout]:
        """Return the layouts of the named sets that exist, by default of all sets. Raises `TableError`."""
        return _read(lambda: self._reader.sets(names))

    def chains(self, names: Collection[str] | None = None) -> dict[str, NftHook | None]:
        """Return the hooks of the named chains that exist, by default of all chains. Raises `TableError`."""
        return _read(lambda: self._reader.chains(names))

    def rules(self, chain: str) -> list[RuleContent]:
        """Return the rules of a chain. Raises `TableError`."""
        return _read(lambda: [content for _, content in self._reader.rules(chain)])

    def element(self, definition: NftSet, key: bytes) -> SetElement | None:
        """Return one element of a set, or None if it does not exist. Raises `TableError`."""
        return _read(lambda: self._reader.element(definition, key))

    def elements(self, definition: NftSet) -> dict[bytes, SetElement]:
        """Return all elements of a set, by key. Raises `TableError`, in particular `TableChangingError`."""
        return _read(lambda: self._reader.elements(definition))

    def walk_rules(self) -> Iterator[tuple[str, RuleContent]]:
        """Yield the rules of all chains, each with the name of its chain, while the kernel dumps them.

        The rules of a chain are consecutive. If any table changes meanwhile, some may be missing or repeated. Raises
        `TableError`.
        """
        return _walk(self._reader.rules())

    def walk_elements(self, definition: NftSet) -> Iterator[SetElement]:
        """Yield the elements of a set, while the kernel dumps them.

        If any table changes meanwhile, some may be missing or repeated. Raises `TableError`.
        """
        return _walk(self._reader.walk_elements(definition))


def remove_table(family: Family) -> bool:
    """Delete a family's table `kube-proxy`. Return whether it existed.

    Raises `CommandError` if the table cannot be deleted, or if kproxy cannot determine whether it exists.
    """
    try:
        if not TableReader(family).exists():
            return False
        NetlinkCommit(family)(Transaction(delete_table=True))
    except OSError as error:
        if error.errno in _NO_NF_TABLES:
            return False  # a kernel without nf_tables has no table
        raise CommandError(f"cannot check for the {family.value} nftables table: {error.strerror}") from None
    except TableError as error:
        raise CommandError(f"cannot delete the {family.value} nftables table: {error}") from None
    return True


def _read(read: Callable[[], _T]) -> _T:
    try:
        return retry_interrupted(read)
    except DumpInterruptedError:
        raise TableChangingError("tables keep changing while they are read") from None
    except OSError as error:
        raise TableError(f"cannot read the table: {error.strerror}") from None


def _walk(items: Iterator[_T]) -> Iterator[_T]:
    try:
        with suppress(DumpInterruptedError):
            yield from items
    except OSError as error:
        if error.errno != errno.ENOENT:  # deleted meanwhile: nothing is left
            raise TableError(f"cannot read the table: {error.strerror}") from None
