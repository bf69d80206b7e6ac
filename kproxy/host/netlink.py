"""The little of netlink that the hot paths need: one socket; requests, acknowledgements and dumps (RFC 3549)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NLMSG_ERROR = 2
NLMSG_DONE = 3

NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000

BATCH = 128
"""How many requests go to the kernel at once: few enough for a refusal of each of them to fit the socket's buffer."""

Message: TypeAlias = tuple[bytes, int, int]
"""A buffer, and where the payload of one message in it begins and ends."""

ATTEMPTS = 3
"""How often `retried` asks in all."""

_T = TypeVar("_T")

_CHUNK = 1 << 16  # the kernel puts at most 32 KiB into one piece of a dump
HEADER = struct.Struct("=IHHII")
"""`struct nlmsghdr`: size, type, flags, sequence number and port."""

_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")
_TYPE = ~(NLA_F_NESTED | NLA_F_NET_BYTEORDER)


class NetlinkError(OSError):
    """The kernel refused a request; `errno` says why."""


class DumpInterruptedError(NetlinkError):
    """What was being read changed meanwhile, so that the answer may lack something: ask again."""


def retried(ask: Callable[[], _T]) -> _T:
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


def attribute(kind: int, payload: bytes) -> bytes:
    """Return a netlink attribute, padded to 4 bytes."""
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + b"\0" * (-size % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return a netlink attribute that holds others."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes, begin: int, end: int) -> dict[int, tuple[int, int]]:
    """Return where the payload of each attribute between two places of a buffer begins and ends, by its type."""
    found = {}
    while begin + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, begin)
        found[kind & _TYPE] = (begin + _ATTRIBUTE.size, begin + size)
        begin += max(_aligned(size), _ATTRIBUTE.size)
    return found


def each_attribute(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type, begin and end of each attribute's payload: for those of which one type comes several times."""
    while begin + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, begin)
        yield kind & _TYPE, begin + _ATTRIBUTE.size, begin + size
        begin += max(_aligned(size), _ATTRIBUTE.size)


def nfgenmsg(family: int = socket.AF_UNSPEC, resource: int = 0) -> bytes:
    """Return the header that every netfilter message begins with (linux/netfilter/nfnetlink.h)."""
    return struct.pack(">BBH", family, 0, resource)


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
                begin += _aligned(size)
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


def _aligned(size: int) -> int:
    return (size + 3) & ~3
