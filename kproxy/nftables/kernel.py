"""Read one family's table from the kernel, and commit transactions to it over netlink or with `nft`."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from kproxy.host.commands import CommandError, InconclusiveError, run
from kproxy.host.netlink import (
    BatchRejectedError,
    BatchSocket,
    DumpInterruptedError,
    RejectedMessage,
    StaleGenerationError,
    retry_interrupted,
)
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES
from kproxy.model.types import Family
from kproxy.nftables.decode import TableReader
from kproxy.nftables.encode import NftMessage, TransactionEncoder, rejected_element
from kproxy.nftables.names import TABLE
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction

NFT_TIMEOUT_SECONDS = 900
"""Timeout after which the program `nft` is considered hung and is killed."""
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
        self._first = self._last = 0

    def record_commit(self, base: int) -> int:
        """Record a commit that this process made on top of generation `base`. Return the new generation."""
        if base != self._last:
            self._first = base
        self._last = next_generation(base)
        return self._last

    def newest_after(self, generation: int) -> int:
        """Return the newest generation that was reached from `generation` only by commits of this process.

        Return `generation` itself if there is no newer one.
        """
        return self._last if self._first <= generation <= self._last else generation


# Commits


class Commit(Protocol):
    """Commits transactions."""

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. If a `generation` is given, commit only if it is still the current generation ID.

        Raises `GenerationChangedError` if the generation ID has changed, and `TableError` for any other failure.
        """


class NetlinkCommit:
    """Commits transactions over netlink. All commits use the same socket."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._encoder = TransactionEncoder(family, table)
        self._writer = NftWriter(family, table)
        self._socket: BatchSocket | None = None

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. See `Commit`."""
        messages = list(self._encoder.encode(transaction))
        try:
            if self._socket is None:
                self._socket = BatchSocket(NFNL_SUBSYS_NFTABLES)
            self._socket.commit([(each.type, each.flags, each.payload) for each in messages], generation)
        except StaleGenerationError:
            raise GenerationChangedError("the rule set has changed since the expected generation") from None
        except BatchRejectedError as error:
            raise TableError(self._describe(messages, error.rejections)) from None
        except OSError as error:
            raise TableError(f"netlink: {error.strerror}") from None

    def _describe(self, messages: Sequence[NftMessage], rejections: Sequence[RejectedMessage]) -> str:
        first = rejections[0]
        if first.index < 0:
            return f"the kernel rejected the transaction: {first.reason}"
        more = f" (and {len(rejections) - 1} more)" if len(rejections) > 1 else ""
        return f"{self._subject(messages[first.index], first.offset)}: {first.reason}{more}"

    def _subject(self, message: NftMessage, offset: int) -> str:
        if not message.elements:
            return message.subject
        element = rejected_element(message, offset)
        if element is None:
            return f"{len(message.elements)} elements of {message.subject}"
        service_port = f" of {element.comment}" if element.comment else ""
        return f"element {self._writer.key(message.subject, element.key)} of {message.subject}{service_port}"


class NftCommit:
    """Commits transactions with `nft -f`, for a kernel that accepts nft's messages but rejects kproxy's own messages.

    It cannot detect concurrent changes by other processes.
    """

    def __init__(self, family: Family, table: str = TABLE, *, timeout: float = NFT_TIMEOUT_SECONDS) -> None:
        """Create a `Commit` that kills `nft` after `timeout` seconds."""
        self._writer = NftWriter(family, table)
        self._timeout = timeout

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:  # noqa: ARG002 - see below
        """Commit a transaction. `generation` is ignored, because nft cannot check it. Raises `TableError`."""
        try:
            done = run(["nft", "-f", "-"], self._writer.commands(transaction), timeout=self._timeout)
        except InconclusiveError as error:
            raise TableError(str(error), inconclusive=True) from None
        except CommandError as error:
            raise TableError(str(error)) from None
        if done.code:
            raise TableError(f"nft: {done.error_message}", inconclusive=done.code < 0)


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
