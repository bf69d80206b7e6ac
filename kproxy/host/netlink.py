"""The little of netlink that the hot paths need: one socket, requests with acknowledgement (RFC 3549)."""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import Self

NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

NLMSG_ERROR = 2

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkError(OSError):
    """The kernel refused a request; `errno` says why."""


def attribute(kind: int, payload: bytes) -> bytes:
    """Return a netlink attribute, padded to 4 bytes."""
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + b"\0" * (-size % 4)


def nfgenmsg(family: int = socket.AF_UNSPEC, resource: int = 0) -> bytes:
    """Return the header that every netfilter message begins with (linux/netfilter/nfnetlink.h)."""
    return struct.pack(">BBH", family, 0, resource)


class NetlinkSocket:
    """A netlink socket of one protocol, for requests whose answer is an acknowledgement."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def request(self, kind: int, flags: int, payload: bytes) -> None:
        """Send one request and wait for its acknowledgement. Raises `NetlinkError`."""
        self._sequence += 1
        size = _HEADER.size + len(payload)
        header = _HEADER.pack(size, kind, flags | NLM_F_REQUEST | NLM_F_ACK, self._sequence, 0)
        self._socket.send(header + payload)
        while True:
            answer = self._socket.recv(65536)
            _, answer_kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sequence == self._sequence and answer_kind == NLMSG_ERROR:
                break
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if code:
            raise NetlinkError(-code, os.strerror(-code))
