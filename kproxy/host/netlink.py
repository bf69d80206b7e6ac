"""Netlink sockets: requests, acknowledgments, dumps (RFC 3549) and nfnetlink batches."""

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
    NFNL_BATCH_GENID,
    NFNL_MSG_BATCH_BEGIN,
    NFNL_MSG_BATCH_END,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSG_OVERRUN,
    NLMSGERR_ATTR_MSG,
    NLMSGERR_ATTR_OFFS,
    MalformedMessageError,
    align,
    attribute,
    attributes,
    nfgenmsg,
)

# Constants that the module `socket` does not have: linux/netlink.h, linux/socket.h, asm-generic/socket.h.
NETLINK_NETFILTER = 12
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
SOL_NETLINK = 270
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

REQUESTS_PER_SEND = 128
"""Maximum number of requests sent in one datagram. If the kernel rejects all of them, the errors must fit into the
socket's receive buffer.
"""
MAX_ATTEMPTS = 3
"""Maximum number of calls that `retry_interrupted` makes, including the first one."""
MAX_REJECTIONS = 1_000
"""Maximum number of rejected messages to report for a batch."""
_RECEIVE_SIZE = 1 << 16
"""Maximum size of a received datagram in bytes. The kernel puts at most 32 KiB of a dump into one datagram."""
_BATCH_RECEIVE_BUFFER = 1 << 20
"""Size of the receive buffer of a `BatchSocket` in bytes."""
_ERRNO = struct.Struct("=i")
"""The first field in the payload of NLMSG_ERROR and NLMSG_DONE: 0 or a negative errno (`struct nlmsgerr`)."""

_MAX_ERRNO = 4999
"""The largest error code: MAX_ERRNO in linux/err.h is 4095, and some subsystems have codes from 4096 up."""

Message: TypeAlias = tuple[bytes, int, int]
"""A buffer with received messages, and the start and end of one message's payload in the buffer."""
_T = TypeVar("_T")


class NetlinkError(OSError):
    """The kernel rejected a request, or a batch could not be sent or its replies could not be received.

    `errno` is the reason.
    """


class DumpInterruptedError(NetlinkError):
    """The dumped objects changed during the dump (NLM_F_DUMP_INTR).

    The dump may be inconsistent and should be repeated. `errno` is 0.
    """


class RejectedMessage(Struct, frozen=True):
    """A message of a batch that the kernel rejected.

    `index` is the index of the message in the batch, or -1 if the kernel rejected the batch as a whole. `code` is the
    errno. `reason` is the text for this errno, followed by the kernel's explanation if the kernel sent one. `offset` is
    the position of the invalid attribute in the message's payload, in bytes, or -1 if the kernel did not report it.
    """

    index: int
    code: int
    reason: str
    offset: int = -1


class BatchRejectedError(Exception):
    """The kernel rejected a batch and applied no part of it.

    `rejections` are the messages that caused this, in the order of the batch; at most `MAX_REJECTIONS` are reported.
    """

    def __init__(self, rejections: Sequence[RejectedMessage]) -> None:
        super().__init__(rejections[0].reason)
        self.rejections = rejections


class StaleGenerationError(Exception):
    """The kernel rejected a batch because the rule set of the network namespace has a different generation ID."""


def retry_interrupted(read: Callable[[], _T]) -> _T:
    """Call a function that reads a dump, until the dump is consistent and complete; return the function's result.

    The function is called again if it raises `DumpInterruptedError`, or an `OSError` with ENOBUFS, which means that
    messages were lost (netlink(7)). It must start from scratch in each call, with a new socket. It is called at most
    `MAX_ATTEMPTS` times; the exception of the last call propagates. If the function cannot decode what the kernel sent,
    this raises `MalformedMessageError`.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return _decode(read)
        except OSError as error:
            if not isinstance(error, DumpInterruptedError) and error.errno != errno.ENOBUFS:
                raise
    return _decode(read)


def _decode(read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (struct.error, LookupError, ValueError) as error:  # an attribute is missing, too short, or not text
        raise MalformedMessageError(f"{type(error).__name__}: {error}") from error


class BoundSocket:
    """A netlink socket that numbers its messages. A context manager."""

    def __init__(self, protocol: int) -> None:
        """Open a socket for a netlink protocol such as NETLINK_ROUTE.

        Raises `OSError` if the kernel does not support the protocol.
        """
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._sequence = 0

    @property
    def port(self) -> int:
        """The socket's port ID (netlink(7)). Notifications about changes made with this socket contain it."""
        port: int = self._socket.getsockname()[0]
        return port

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def _message(self, kind: int, flags: int, payload: bytes) -> bytes:
        """Encode a request with the next sequence number. It is padded so that another message can follow it."""
        self._sequence += 1
        size = HEADER.size + len(payload)
        padding = b"\0" * (-size % 4)
        return HEADER.pack(size, kind, flags | NLM_F_REQUEST, self._sequence, 0) + payload + padding


class NetlinkSocket(BoundSocket):
    """A netlink socket for requests and dumps.

    The iterator that `dump` or `get` returns must be exhausted before any method is called again.
    """

    def request(self, kind: int, flags: int, payload: bytes) -> None:
        """Send one request and wait for its acknowledgment. Raises `NetlinkError` if the kernel rejects it."""
        errors = self.request_many(kind, flags, [payload])
        if errors:
            raise _error(errors[0])

    def request_many(self, kind: int, flags: int, payloads: Sequence[bytes]) -> dict[int, int]:
        """Send requests of one type; return the errnos of rejected requests, keyed by index in `payloads`.

        The kernel processes the requests in order. If it rejects a request, it still processes the remaining ones.
        Raises `OSError` if the requests cannot be sent or the replies cannot be received.
        """
        errors: dict[int, int] = {}
        for begin in range(0, len(payloads), REQUESTS_PER_SEND):
            batch = payloads[begin : begin + REQUESTS_PER_SEND]
            first = self._sequence + 1
            messages = [self._message(kind, flags, payload) for payload in batch[:-1]]
            messages.append(self._message(kind, flags | NLM_F_ACK, batch[-1]))
            self._socket.send(b"".join(messages))
            # Only the last request asks for an acknowledgment. Before that acknowledgment, the kernel sends an error
            # for each earlier request that it rejected.
            errors |= {begin + sequence - first: code for sequence, code in self._receive_errors(first) if code}
        return errors

    def dump(self, kind: int, payload: bytes) -> Iterator[Message]:
        """Request a dump and yield its messages.

        Raises `NetlinkError` if the kernel rejects the request. Raises `DumpInterruptedError` after the last message if
        the dump may be inconsistent. Raises another `OSError` if the dump ends early: `MalformedMessageError` if a
        message is cut off, or an error with ENOBUFS if messages were lost.
        """
        return self._query(kind, NLM_F_DUMP, payload)

    def get(self, kind: int, payload: bytes) -> Iterator[Message]:
        """Request one object and yield the messages of the reply.

        Raises `NetlinkError` if the kernel rejects the request.
        """
        return self._query(kind, NLM_F_ACK, payload)

    def _query(self, kind: int, flags: int, payload: bytes) -> Iterator[Message]:
        self._socket.send(self._message(kind, flags, payload))
        interrupted = 0
        while True:
            data = self._socket.recv(_RECEIVE_SIZE)
            begin = 0
            if not data:
                raise MalformedMessageError("an empty datagram")
            while begin < len(data):
                if begin + HEADER.size > len(data):
                    raise MalformedMessageError("its header is cut off")
                size, reply_kind, flags, sequence, _ = HEADER.unpack_from(data, begin)
                payload_begin, end = begin + HEADER.size, begin + size
                if size < HEADER.size or end > len(data):
                    raise MalformedMessageError(f"{size} bytes where {len(data) - begin} are left")
                begin += align(size)
                if sequence != self._sequence:
                    continue
                interrupted |= flags & NLM_F_DUMP_INTR
                if reply_kind == NLMSG_OVERRUN:
                    raise NetlinkError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
                if reply_kind in {NLMSG_DONE, NLMSG_ERROR}:
                    _check_end(data, payload_begin, end, interrupted=bool(interrupted))
                    return
                yield data, payload_begin, end

    def _receive_errors(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield the sequence number and errno of each reply, up to the reply to the last request.

        The errno 0 means that the kernel has accepted the request.
        """
        sequence = 0
        while sequence != self._sequence:
            reply = self._socket.recv(_RECEIVE_SIZE)
            if len(reply) < HEADER.size + _ERRNO.size:
                raise MalformedMessageError(f"a reply of {len(reply)} bytes")
            _, kind, _, sequence, _ = HEADER.unpack_from(reply)
            if kind == NLMSG_ERROR and sequence >= first:
                yield sequence, -_ERRNO.unpack_from(reply, HEADER.size)[0]


class BatchSocket(BoundSocket):
    """A netlink socket that sends batches of messages to one nfnetlink subsystem."""

    def __init__(self, subsystem: int) -> None:
        """Open a socket for a subsystem, given as an NFNL_SUBSYS_* number.

        Raises `OSError` if the kernel does not support nfnetlink.
        """
        super().__init__(NETLINK_NETFILTER)
        self._subsystem = subsystem
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BATCH_RECEIVE_BUFFER)
        self._send_buffer = 0

    def commit(self, messages: Sequence[tuple[int, int, bytes]], generation: int | None = None) -> None:
        """Send messages as a batch and wait until the kernel has committed it.

        Each message is given by its type, flags and payload. There must be at least one message. If a `generation` is
        given, the kernel commits the batch only if the rule set still has this generation ID. If it has another ID,
        this raises `StaleGenerationError`. Raises `BatchRejectedError` if the kernel rejects the batch for another
        reason. Raises `NetlinkError` if the batch cannot be sent or the replies cannot be received.
        """
        self._submit(messages, generation, end=True)

    def check(self, messages: Sequence[tuple[int, int, bytes]]) -> None:
        """Let the kernel check a batch as `commit` does, but without committing it. Raises the same errors.

        The batch lacks the message that ends it. The kernel then takes all of its changes back when it has processed
        them (`nfnetlink_rcv_batch` in net/netfilter/nfnetlink.c).
        """
        self._submit(messages, None, end=False)

    def _submit(self, messages: Sequence[tuple[int, int, bytes]], generation: int | None, *, end: bool) -> None:
        first = self._sequence + 1
        genid = attribute(NFNL_BATCH_GENID, struct.pack(">I", generation)) if generation is not None else b""
        begin_payload = nfgenmsg(resource=self._subsystem) + genid
        parts = [self._message(NFNL_MSG_BATCH_BEGIN, 0, begin_payload)]
        parts += [self._message(kind, flags, payload) for kind, flags, payload in messages[:-1]]
        kind, flags, payload = messages[-1]
        parts.append(self._message(kind, flags | NLM_F_ACK, payload))
        last = self._sequence
        if end:
            parts.append(self._message(NFNL_MSG_BATCH_END, 0, nfgenmsg(resource=self._subsystem)))
        self._send(b"".join(parts))
        rejections = self._receive_rejections(first, last)
        if rejections:
            raise BatchRejectedError(rejections)

    def _send(self, batch: bytes) -> None:
        if len(batch) > self._send_buffer:
            # A batch is sent as one datagram. For a datagram larger than net.core.wmem_max, SO_SNDBUFFORCE is needed,
            # which requires CAP_NET_ADMIN.
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, len(batch))
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(batch))
            self._send_buffer = len(batch)
        try:
            self._socket.send(batch)
        except OSError as error:
            raise NetlinkError(error.errno, error.strerror) from None

    def _receive_rejections(self, first: int, last: int) -> list[RejectedMessage]:
        """Receive the replies to a batch and return the rejected messages.

        `first` is the sequence number of the message that begins the batch, and `last` is that of the last message
        before the end of the batch. The final reply is the reply to message `last`, or an error in reply to message
        `first`, which applies to the whole batch.

        If the errors do not fit into the receive buffer, recv(2) fails with ENOBUFS. The buffer still contains the
        first errors. It must be drained, because otherwise replies to the next batch would be lost, too (netlink(7)).
        """
        rejections: list[RejectedMessage] = []
        overrun = False
        while True:
            try:
                reply = self._socket.recv(_RECEIVE_SIZE, socket.MSG_DONTWAIT if overrun else 0)
            except BlockingIOError:
                if rejections:
                    return rejections
                raise NetlinkError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)) from None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise NetlinkError(error.errno, error.strerror) from None
                overrun = True
                continue
            size, kind, flags, sequence, _ = HEADER.unpack_from(reply)
            if kind != NLMSG_ERROR or not first <= sequence <= last:
                continue
            rejection = _parse_error(reply, size, flags, sequence - first - 1)
            if rejection.code == errno.ERESTART and sequence == first:
                raise StaleGenerationError
            if rejection.code and len(rejections) < MAX_REJECTIONS:
                rejections.append(rejection)
            if sequence == last or (sequence == first and rejection.code):
                return rejections


def _check_end(data: bytes, begin: int, end: int, *, interrupted: bool) -> None:
    """Raise `NetlinkError` if the last message of a reply reports an error.

    If it reports success but `interrupted` is true, raise `DumpInterruptedError`.
    """
    code = -_ERRNO.unpack_from(data, begin)[0] if end - begin >= _ERRNO.size else 0
    if not 0 <= code <= _MAX_ERRNO:
        raise MalformedMessageError(f"the error code {code}")
    if code:
        raise _error(code)
    if interrupted:
        raise DumpInterruptedError(0, "dump interrupted by concurrent changes")


def _error(code: int) -> NetlinkError:
    return NetlinkError(code, os.strerror(code))


def _parse_error(reply: bytes, size: int, flags: int, index: int) -> RejectedMessage:
    """Parse an NLMSG_ERROR message and its extended acknowledgment (`struct nlmsgerr`, NLMSGERR_ATTR_*).

    The kernel replied to the message at position `index` in the batch, or to the batch as a whole if `index` is -1.
    """
    (code,) = _ERRNO.unpack_from(reply, HEADER.size)
    reason, offset = os.strerror(-code), -1
    if flags & NLM_F_ACK_TLVS:
        # After the errno, the kernel echoes the header of the request. Unless NLM_F_CAPPED is set, it then echoes the
        # payload of the request, too.
        echo = HEADER.size + _ERRNO.size
        (echo_size,) = struct.unpack_from("=I", reply, echo)
        found = attributes(reply, echo + (HEADER.size if flags & NLM_F_CAPPED else align(echo_size)), size)
        if NLMSGERR_ATTR_MSG in found:
            begin, end = found[NLMSGERR_ATTR_MSG]
            reason = f"{reason} ({reply[begin:end].rstrip(bytes(1)).decode(errors='replace')})"
        if NLMSGERR_ATTR_OFFS in found:
            # The kernel's offset is relative to the start of the message's header.
            offset = struct.unpack_from("=I", reply, found[NLMSGERR_ATTR_OFFS][0])[0] - HEADER.size
    return RejectedMessage(index, -code, reason, offset)
