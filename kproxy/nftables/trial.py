"""Let the kernel check the transactions of a sync without committing them."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from kproxy.host.netlink import BatchRejectedError, BatchSocket, StaleGenerationError
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES
from kproxy.nftables.encode import NftMessage
from kproxy.nftables.kernel import GenerationChangedError, NetlinkCommit, TableError


class TrialCommit(NetlinkCommit):
    """Implements `Commit`, but the kernel only checks the transactions.

    Each transaction is checked as if all previous ones that the kernel has accepted had been committed: these are sent
    again with it, in one batch. The `generation` is ignored, because no commit changes the kernel's.
    """

    _accepted: tuple[NftMessage, ...] = ()

    def _send(self, messages: Sequence[NftMessage], generation: int | None) -> None:  # noqa: ARG002
        every = (*self._accepted, *messages)
        try:
            if self._socket is None:
                self._socket = BatchSocket(NFNL_SUBSYS_NFTABLES)
                self.port = self._socket.port
            self._socket.check([(each.type, each.flags, each.payload) for each in every])
        except BatchRejectedError as error:
            # An index that becomes negative means that the kernel no longer accepts a previous transaction.
            shifted = [replace(each, index=each.index - len(self._accepted)) for each in error.rejections]
            raise BatchRejectedError(shifted) from None
        except StaleGenerationError:
            raise GenerationChangedError("the rule set has changed during the check") from None
        except OSError as error:
            raise TableError(f"netlink: {error.strerror}") from None
        self._accepted = every
