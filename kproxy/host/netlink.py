"""The little of netlink that the hot paths need: one socket; requests, acknowledgements and dumps (RFC 3549)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

from msgspec import Struct

from kproxy.host.netlink_message import (
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    aligned,
    attribute,
    attributes,
    nfgenmsg,
)

NETLINK_NETFILTER = 12
BATCH = 128
"""How many requests go to the kernel at once: few enough for a refusal of each of them to fit the socket's buffer."""
Message: TypeAlias = tuple[bytes, int, int]
"""A buffer, and where the payload of one message in it begins and ends."""
ATTEMPTS = 3
"""How often `retry_interrupted` asks in all."""
_T = TypeVar("_T")
_CHUNK = 1 << 16  # the kernel puts at most 32 KiB into one piece of a dump
_ERRNO = struct.Struct("=i")


class NetlinkError(OSError):
    """The kernel refused a request; `errno` says why."""


class DumpInterruptedError(NetlinkError):
    """What was being read changed meanwhile, so that the answer may lack something: ask again."""


def retry_interrupted(ask: Callable[[], _T]) -> _T:
    """Return what `ask` returns, which is called again if a dump was interrupted or answers were lost (netlink(7)).

    It must begin anew each time, with a socket of its own. Raises what the last of `ATTEMPTS` raised.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return ask()
        except OSError as error:
            if not isinstance(error, DumpInterruptedError) and error.errno != errno.ENOBUFS:
                raise
    return ask()


class BoundSocket:
    """A netlink socket of one protocol that numbers its messages; closed at the end of its `with`."""

    def __init__(self, protocol: int) -> None:
        """Open it. Raises `OSError` where the kernel has no such protocol."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def _message(self, kind: int, flags: int, payload: bytes) -> bytes:
        """Return a request with the next number, padded so that another may follow."""
        self._sequence += 1
        size = HEADER.size + len(payload)
        padding = b"\0" * (-size % 4)
        return HEADER.pack(size, kind, flags | NLM_F_REQUEST, self._sequence, 0) + payload + padding


class NetlinkSocket(BoundSocket):
    """A netlink socket of one protocol. It does one thing at a time: a dump is read to its end before the next call."""

    def request(self, kind: int, flags: int, payload: bytes) -> None:
        """Send one request and wait for its acknowledgement. Raises `NetlinkError`."""
        refused = self.requests(kind, flags, [payload])
        if refused:
            raise _error(refused[0])

    def requests(self, kind: int, flags: int, payloads: Sequence[bytes]) -> dict[int, int]:
        """Send requests of one kind; return the `errno` of each that the kernel refused, by its place in `payloads`.

        The kernel carries them out one after the other and goes on after a refusal.
        """
        refused: dict[int, int] = {}
        for begin in range(0, len(payloads), BATCH):
            batch = payloads[begin : begin + BATCH]
            first = self._sequence + 1
            messages = [self._message(kind, flags, payload) for payload in batch[:-1]]
            messages.append(self._message(kind, flags | NLM_F_ACK, batch[-1]))
            self._socket.send(b"".join(messages))
            # Only the last asks for an answer; refusals of the others come before that.
            refused |= {begin + sequence - first: code for sequence, code in self._answers(first) if code}
        return refused

    def dump(self, kind: int, payload: bytes) -> Iterator[Message]:
        """Ask for a dump and yield its messages. Raises `NetlinkError`, at the end `DumpInterruptedError`."""
        return self._ask(kind, NLM_F_DUMP, payload)

    def answers(self, kind: int, payload: bytes) -> Iterator[Message]:
        """Ask about one thing and yield the messages that answer. Raises `NetlinkError`."""
        return self._ask(kind, NLM_F_ACK, payload)

    def _ask(self, kind: int, flags: int, payload: bytes) -> Iterator[Message]:
        self._socket.send(self._message(kind, flags, payload))
        interrupted = 0
        while True:
            data = self._socket.recv(_CHUNK)
            begin = 0
            while begin < len(data):
                size, answer, flags, sequence, _ = HEADER.unpack_from(data, begin)
                payload_begin, end = begin + HEADER.size, begin + size
                begin += aligned(size)
                if sequence != self._sequence:
                    continue
                interrupted |= flags & NLM_F_DUMP_INTR
                if answer in {NLMSG_DONE, NLMSG_ERROR}:
                    _finish(data, payload_begin, end, interrupted=bool(interrupted))
                    return
                yield data, payload_begin, end

    def _answers(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield sequence number and `errno` (0: done) of each answer until that to the last request."""
        sequence = 0
        while sequence != self._sequence:
            answer = self._socket.recv(_CHUNK)
            _, kind, _, sequence, _ = HEADER.unpack_from(answer)
            if kind == NLMSG_ERROR and sequence >= first:
                yield sequence, -_ERRNO.unpack_from(answer, HEADER.size)[0]


def _finish(data: bytes, begin: int, end: int, *, interrupted: bool) -> None:
    """Raise what the last message of a dump says went wrong, if anything."""
    code = -_ERRNO.unpack_from(data, begin)[0] if end - begin >= _ERRNO.size else 0
    if code:
        raise _error(code)
    if interrupted:
        raise DumpInterruptedError(0, "the dump was interrupted by changes")


def _error(code: int) -> NetlinkError:
    return NetlinkError(code, os.strerror(code))


_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_BATCH_GENERATION = 1
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_SO_SNDBUFFORCE = 32
_CAPPED, _HAS_ATTRIBUTES = 0x100, 0x200
_ERROR_TEXT, _ERROR_OFFSET = 1, 2
_RECEIVE_BUFFER = 1 << 20
REFUSALS_TOLD = 20
"""How many of a batch's refused messages are told of: the first says what is wrong, the others often follow from it."""


class RejectedMessage(Struct, frozen=True):
    """What the kernel said of one message of a batch: which, why, and where in its payload (-1: it did not say)."""

    place: int
    code: int
    reason: str
    offset: int = -1


class BatchRejectedError(Exception):
    """The kernel took nothing of a batch. `refusals` name the messages that it refused, in their order."""

    def __init__(self, refusals: Sequence[RejectedMessage]) -> None:
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

        With a `generation` the batch counts only if nobody has changed any rules since. Raises `BatchRejectedError`,
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
            raise BatchRejectedError(refusals)

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

    def _answers(self, first: int, last: int) -> list[RejectedMessage]:
        """Read answers until that to the last message, or one to the batch as a whole (in the name of its begin).

        Too many refusals for the socket's buffer are told by an error; those that came first are still in it, and must
        be taken out, or it would have no room for the answers to come (netlink(7)).
        """
        refusals: list[RejectedMessage] = []
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


def _refusal(answer: bytes, size: int, flags: int, place: int) -> RejectedMessage:
    (code,) = struct.unpack_from("=i", answer, HEADER.size)
    reason, offset = os.strerror(-code), -1
    if flags & _HAS_ATTRIBUTES:
        (echoed,) = struct.unpack_from("=I", answer, HEADER.size + 4)
        begin = HEADER.size + 4 + (HEADER.size if flags & _CAPPED else aligned(echoed))
        found = attributes(answer, begin, size)
        if _ERROR_TEXT in found:
            text_begin, text_end = found[_ERROR_TEXT]
            reason = f"{reason} ({answer[text_begin:text_end].rstrip(bytes(1)).decode(errors='replace')})"
        if _ERROR_OFFSET in found:
            # Counted from the message's header.
            offset = struct.unpack_from("=I", answer, found[_ERROR_OFFSET][0])[0] - HEADER.size
    return RejectedMessage(place, -code, reason, offset)
