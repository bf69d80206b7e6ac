"""Access to one family's table in the kernel: read it, and commit transactions over netlink or with `nft`."""

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
"""Timeout after which the program `nft` counts as hung."""
_NO_NF_TABLES = {errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}
_T = TypeVar("_T")


class TableError(Exception):
    """The kernel rejected a transaction as a whole, or the table cannot be read. The message is one line.

    `inconclusive` means that the kernel may not have seen the transaction, for example because `nft` was killed.
    """

    def __init__(self, text: str, *, inconclusive: bool = False) -> None:
        super().__init__(text)
        self.inconclusive = inconclusive


class GenerationChangedError(Exception):
    """The rule set no longer has the generation ID that a transaction requires. Nothing was applied."""


class TableChangingError(TableError):
    """Every attempt to read the table was interrupted by a change of some table."""


# Generations


def next_generation(generation: int) -> int:
    """Return the generation ID after one commit: nf_tables counts in 32 bits and skips 0."""
    return generation + 1 & 0xFFFFFFFF or 1


class OwnGenerations:
    """The latest consecutive generations that this process committed, by any of its backends.

    All tables of a network namespace share the generation ID. Without this record, the backend of one family would
    mistake the other backend's commits for those of another process.
    """

    def __init__(self) -> None:
        self._first = self._last = 0

    def record_commit(self, base: int) -> int:
        """Record a commit on top of the generation `base`; return the new generation."""
        if base != self._last:
            self._first = base
        self._last = next_generation(base)
        return self._last

    def newest_after(self, generation: int) -> int:
        """Return the newest generation for which this process made every commit since the given one."""
        return self._last if self._first <= generation <= self._last else generation


# Commits


class Commit(Protocol):
    """Commits transactions."""

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction; with a `generation`, only if it is still the current one.

        Raises `TableError` or `GenerationChangedError`.
        """


class NetlinkCommit:
    """Commits transactions over netlink, on one socket that stays open."""

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
    """Commits transactions with `nft -f`, for a kernel that accepts nft's messages but not kproxy's.

    It cannot detect concurrent changes by other processes.
    """

    def __init__(self, family: Family, table: str = TABLE, *, timeout: float = NFT_TIMEOUT_SECONDS) -> None:
        """`timeout` is in seconds."""
        self._writer = NftWriter(family, table)
        self._timeout = timeout

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:  # noqa: ARG002
        """Commit a transaction. Ignores `generation`, which nft cannot check. Raises `TableError`."""
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
        """Commit a transaction. Raises `TableError` or `GenerationChangedError`."""
        self._commit(transaction, generation)

    def generation(self) -> int:
        """Return the generation ID, which every change of any table increments. Raises `TableError`."""
        return _read(self._reader.generation)

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        """Read the table; return None if it does not exist.

        Raises `TableError`, in particular `TableChangingError` if tables keep changing. With `allow_interrupted`, a
        change while elements are read is not an error; elements can be missing if this table was changed.
        """
        return _read(partial(self._reader.snapshot, allow_interrupted=allow_interrupted))

    def chain_use_counts(self) -> Counter[str]:
        """Return the use count of each chain (NFTA_CHAIN_USE). Raises `TableError`."""
        return _read(self._reader.chain_use_counts)


def remove_table(family: Family) -> bool:
    """Delete a family's table `kube-proxy`; return whether it existed.

    Raises `CommandError` if the table cannot be deleted.
    """
    try:
        if not TableReader(family).exists():
            return False
        NetlinkCommit(family)(Transaction(delete_table=True))
    except OSError as error:
        if error.errno in _NO_NF_TABLES:
            return False  # a kernel without nf_tables has no table
        raise CommandError(f"cannot check for the nftables table of {family.value}: {error.strerror}") from None
    except TableError as error:
        raise CommandError(f"cannot delete the nftables table of {family.value}: {error}") from None
    return True


def _read(read: Callable[[], _T]) -> _T:
    try:
        return retry_interrupted(read)
    except DumpInterruptedError:
        raise TableChangingError("tables keep changing while they are read") from None
    except OSError as error:
        raise TableError(f"cannot read the table: {error.strerror}") from None
