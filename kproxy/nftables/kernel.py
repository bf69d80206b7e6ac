"""The edge to the kernel: transactions of one family's table, by netlink or by the program `nft`."""

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
from kproxy.model.types import Family
from kproxy.nftables.decode import TableReader
from kproxy.nftables.encode import NFNL_SUBSYS_NFTABLES, NftMessage, TransactionEncoder, refused_element
from kproxy.nftables.names import TABLE
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction


def following(generation: int) -> int:
    """Return the generation after one's own change (nf_tables counts in 32 bits and leaves out 0)."""
    return generation + 1 & 0xFFFFFFFF or 1


class OwnGenerations:
    """The latest unbroken series of generations that this process has made, whichever of its backends did.

    Without it, each family's changes would look to the other like those of a stranger.
    """

    def __init__(self) -> None:
        self._begin = self._end = 0

    def made(self, before: int) -> int:
        """Note that a change was made right after a generation; return its own."""
        if before != self._end:
            self._begin = before
        self._end = following(before)
        return self._end

    def since(self, generation: int) -> int:
        """Return the last generation up to which all changes after the given one are our own."""
        return self._end if self._begin <= generation <= self._end else generation


_T = TypeVar("_T")
NFT_TIMEOUT_SECONDS = 900
"""After this, `nft` is taken for hung."""


class TableError(Exception):
    """The kernel refused a transaction, none of which is in force; the message says what and why on one line.

    `undecided` says that the kernel was not even asked, as far as is known: the program `nft` was ended, for one.
    """

    def __init__(self, text: str, *, undecided: bool = False) -> None:
        super().__init__(text)
        self.undecided = undecided


class GenerationChangedError(Exception):
    """Somebody has changed tables since the generation that a transaction was made for; none of it is in force."""


class TableChangingError(TableError):
    """Tables changed each time that one was being read."""


class Commit(Protocol):
    """Makes transactions."""

    def __call__(self, change: Transaction, generation: int | None = None, /) -> None:
        """Make a transaction; with a generation only if nothing has changed since.

        Raises `TableError` or `GenerationChangedError`.
        """


class NetlinkCommit:
    """Makes transactions by netlink, over one socket that stays open."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._encoder = TransactionEncoder(family, table)
        self._writer = NftWriter(family, table)
        self._socket: BatchSocket | None = None

    def __call__(self, change: Transaction, generation: int | None = None, /) -> None:
        """Make a transaction."""
        messages = list(self._encoder.encode(change))
        try:
            if self._socket is None:
                self._socket = BatchSocket(NFNL_SUBSYS_NFTABLES)
            self._socket.commit([(each.kind, each.flags, each.payload) for each in messages], generation)
        except StaleGenerationError:
            raise GenerationChangedError("tables have changed meanwhile") from None
        except BatchRejectedError as error:
            raise TableError(self._complaint(messages, error.rejections)) from None
        except OSError as error:
            raise TableError(f"netlink: {error.strerror}") from None

    def _complaint(self, messages: Sequence[NftMessage], rejections: Sequence[RejectedMessage]) -> str:
        refusal = rejections[0]
        if refusal.index < 0:
            return f"the kernel refused the change as a whole: {refusal.reason}"
        message = messages[refusal.index]
        more = f" (and {len(rejections) - 1} more)" if len(rejections) > 1 else ""
        return f"{self._subject(message, refusal.offset)}: {refusal.reason}{more}"

    def _subject(self, message: NftMessage, offset: int) -> str:
        if not message.elements:
            return message.subject
        element = refused_element(message, offset)
        if element is None:
            return f"{len(message.elements)} elements of {message.subject}"
        owner = f" of {element.comment}" if element.comment else ""
        return f"element {self._writer.key(message.subject, element.key)} of {message.subject}{owner}"


class NftCommit:
    """Makes transactions by `nft -f`: for a kernel that takes nft's messages but not kproxy's.

    It cannot tell whether somebody else has changed something meanwhile.
    """

    def __init__(self, family: Family, table: str = TABLE, *, timeout: float = NFT_TIMEOUT_SECONDS) -> None:
        """`timeout` is in seconds."""
        self._writer = NftWriter(family, table)
        self._timeout = timeout

    def __call__(self, change: Transaction, generation: int | None = None, /) -> None:  # noqa: ARG002 - nft has no way
        """Make a transaction; `generation` is not looked at."""
        try:
            done = run(["nft", "-f", "-"], self._writer.commands(change), timeout=self._timeout)
        except InconclusiveError as error:
            raise TableError(str(error), undecided=True) from None
        except CommandError as error:
            raise TableError(str(error)) from None
        if done.code:
            raise TableError(f"nft: {done.error_message}", undecided=done.code < 0)


class NftTable:
    """One family's table in the kernel: reading it, and changing it by transactions."""

    def __init__(self, family: Family, commit: Commit) -> None:
        self._reader = TableReader(family)
        self._commit = commit

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        """Make a transaction. Raises `TableError` or `GenerationChangedError`."""
        self._commit(change, generation)

    def generation(self) -> int:
        """Return the number of the last change that anybody made to any table. Raises `TableError`."""
        return _read(self._reader.generation)

    def view(self, *, lenient: bool = False) -> TableSnapshot | None:
        """Return what the table holds, None if there is none. Raises `TableError`, `TableChangingError` if it changes.

        With `lenient`, elements are read even while tables change: some may be missing if that is this one.
        """
        return _read(partial(self._reader.view, lenient=lenient))

    def uses(self) -> Counter[str]:
        """Return how often each chain is used. Raises `TableError`."""
        return _read(self._reader.uses)


def _read(ask: Callable[[], _T]) -> _T:
    try:
        return retry_interrupted(ask)
    except DumpInterruptedError:
        raise TableChangingError("tables keep changing while they are read") from None
    except OSError as error:
        raise TableError(f"cannot read the table: {error.strerror}") from None


_NO_NF_TABLES = {errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}


def remove_table(family: Family) -> bool:
    """Delete a family's table `kube-proxy` and return whether it was there.

    Raises `CommandError` if the table is there and stays.
    """
    try:
        if not TableReader(family).exists():
            return False
        NetlinkCommit(family)(Transaction(drop=True))
    except OSError as error:
        if error.errno in _NO_NF_TABLES:
            return False  # a kernel without nf_tables has no table
        raise CommandError(f"cannot look for the nftables table of {family.value}: {error.strerror}") from None
    except TableError as error:
        raise CommandError(f"cannot delete the nftables table of {family.value}: {error}") from None
    return True
