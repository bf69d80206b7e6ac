"""Batches of netfilter messages, which the kernel takes whole or not at all (linux/netfilter/nfnetlink.h)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from msgspec import Struct

from kproxy.host.netlink import (
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLMSG_ERROR,
    BoundSocket,
    NetlinkError,
    attribute,
    attributes,
    nfgenmsg,
)

_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_BATCH_GENERATION = 1

_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_SO_SNDBUFFORCE = 32
_CAPPED, _HAS_ATTRIBUTES = 0x100, 0x200
_ERROR_TEXT, _ERROR_OFFSET = 1, 2

_CHUNK = 1 << 16
_RECEIVE_BUFFER = 1 << 20

REFUSALS_TOLD = 20
"""How many of a batch's refused messages are told of: the first says what is wrong, the others often follow from it."""


class Refusal(Struct, frozen=True):
    """What the kernel said of one message of a batch: which, why, and where in its payload (-1: it did not say)."""

    place: int
    code: int
    reason: str
    offset: int = -1


class BatchRefusedError(Exception):
    """The kernel took nothing of a batch. `refusals` name the messages that it refused, in their order."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__(refusals[0].reason)
        self.refusals = refusals


class StaleGenerationError(Exception):
    """Somebody else changed the rules of this network namespace after the generation that a batch was made for."""


class BatchSocket(BoundSocket):
    """A netlink socket that sends batches to one netfilter subsystem, one after the other."""

    def __init__(self, subsystem: int) -> None:
        """Open it for the subsystem of this number. Raises `OSError` where there is no netlink of netfilter."""
        super().__init__(NETLINK_NETFILTER)
        self._subsystem = subsystem
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._send_buffer = 0

    def commit(self, messages: Sequence[tuple[int, int, bytes]], generation: int | None = None) -> None:
        """Send messages (type, flags, payload) as one batch and wait until the kernel has taken it.

        With a `generation` the batch counts only if nobody has changed any rules since. Raises `BatchRefusedError`,
        `StaleGenerationError` or, where the kernel cannot be asked at all, `NetlinkError`.
        """
        first = self._sequence + 1
        stamp = attribute(_BATCH_GENERATION, struct.pack(">I", generation)) if generation is not None else b""
        begin_payload = nfgenmsg(resource=self._subsystem) + stamp
        parts = [self._message(_BATCH_BEGIN, 0, begin_payload)]
        parts += [self._message(kind, flags, payload) for kind, flags, payload in messages[:-1]]
        kind, flags, payload = messages[-1]
        parts.append(self._message(kind, flags | NLM_F_ACK, payload))
        last = self._sequence
        parts.append(self._message(_BATCH_END, 0, nfgenmsg(resource=self._subsystem)))
        self._send(b"".join(parts))
        refusals = self._answers(first, last)
        if refusals:
            raise BatchRefusedError(refusals)

    def _send(self, batch: bytes) -> None:
        if len(batch) > self._send_buffer:
            # One batch is one datagram; only the privileged may send more than net.core.wmem_max.
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, len(batch))
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(batch))
            self._send_buffer = len(batch)
        try:
            self._socket.send(batch)
        except OSError as error:
            raise NetlinkError(error.errno, error.strerror) from None

    def _answers(self, first: int, last: int) -> list[Refusal]:
        """Read answers until that to the last message, or one to the batch as a whole (in the name of its begin).

        Too many refusals for the socket's buffer are told by an error; those that came first are still in it, and must
        be taken out, or it would have no room for the answers to come (netlink(7)).
        """
        refusals: list[Refusal] = []
        overrun = False
        while True:
            try:
                answer = self._socket.recv(_CHUNK, socket.MSG_DONTWAIT if overrun else 0)
            except BlockingIOError:
                if refusals:
                    return refusals
                raise NetlinkError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)) from None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno, error.strerror) from None
                overrun = True
                continue
            size, kind, flags, sequence, _ = HEADER.unpack_from(answer)
            if kind != NLMSG_ERROR or not first <= sequence <= last:
                continue
            refusal = _refusal(answer, size, flags, sequence - first - 1)
            if refusal.code == errno.ERESTART and sequence == first:
                raise StaleGenerationError
            if refusal.code and len(refusals) < REFUSALS_TOLD:
                refusals.append(refusal)
            if sequence == last or (sequence == first and refusal.code):
                return refusals


def _refusal(answer: bytes, size: int, flags: int, place: int) -> Refusal:
    (code,) = struct.unpack_from("=i", answer, HEADER.size)
    reason, offset = os.strerror(-code), -1
    if flags & _HAS_ATTRIBUTES:
        (echoed,) = struct.unpack_from("=I", answer, HEADER.size + 4)
        begin = HEADER.size + 4 + (HEADER.size if flags & _CAPPED else (echoed + 3) & ~3)
        found = attributes(answer, begin, size)
        if _ERROR_TEXT in found:
            text_begin, text_end = found[_ERROR_TEXT]
            reason = f"{reason} ({answer[text_begin:text_end].rstrip(bytes(1)).decode(errors='replace')})"
        if _ERROR_OFFSET in found:
            # Counted from the message's header.
            offset = struct.unpack_from("=I", answer, found[_ERROR_OFFSET][0])[0] - HEADER.size
    return Refusal(place, -code, reason, offset)
