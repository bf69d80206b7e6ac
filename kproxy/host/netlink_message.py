"""Encode and decode netlink messages and attributes (linux/netlink.h, linux/netfilter/nfnetlink.h). Pure."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from socket import AF_UNSPEC

# linux/netlink.h
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4
NLMSGERR_ATTR_MSG = 1
NLMSGERR_ATTR_OFFS = 2
NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
NLA_TYPE_MASK = ~(NLA_F_NESTED | NLA_F_NET_BYTEORDER)

# linux/netfilter/nfnetlink.h
NFNL_MSG_BATCH_BEGIN = 0x10
NFNL_MSG_BATCH_END = 0x11
NFNL_BATCH_GENID = 1

HEADER = struct.Struct("=IHHII")
"""`struct nlmsghdr`: size, type, flags, sequence number and port ID."""
NFGENMSG_SIZE = 4
"""Size of `struct nfgenmsg`, the header that follows `nlmsghdr` in every nfnetlink message."""
_ATTRIBUTE = struct.Struct("=HH")
"""`struct nlattr`: size including this header, and type."""


class MalformedMessageError(OSError):
    """A netlink message or attribute is cut off, or its size is impossible. `errno` is EBADMSG.

    The rest of the data cannot be decoded, because the start of the next message or attribute is unknown.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(errno.EBADMSG, f"malformed netlink message: {problem}")


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode a netlink attribute, padded to a multiple of 4 bytes."""
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + b"\0" * (-size % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Encode a netlink attribute that contains other attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes, begin: int, end: int) -> dict[int, tuple[int, int]]:
    """Return the attributes in `data[begin:end]`: for each type, the start and end of the attribute's payload.

    Raises `MalformedMessageError`.
    """
    if end > len(data):
        raise MalformedMessageError("its attributes extend past its end")
    found = {}
    while begin + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, begin)
        if size < _ATTRIBUTE.size or begin + size > end:
            raise MalformedMessageError(f"an attribute of {size} bytes where {end - begin} are left")
        found[kind & NLA_TYPE_MASK] = (begin + _ATTRIBUTE.size, begin + size)
        begin += align(size)
    return found


def iterate_attributes(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the type, payload start and payload end of each attribute in `data[begin:end]`.

    Use this instead of `attributes` if several attributes may have the same type. Raises `MalformedMessageError`.
    """
    if end > len(data):
        raise MalformedMessageError("its attributes extend past its end")
    while begin + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, begin)
        if size < _ATTRIBUTE.size or begin + size > end:
            raise MalformedMessageError(f"an attribute of {size} bytes where {end - begin} are left")
        yield kind & NLA_TYPE_MASK, begin + _ATTRIBUTE.size, begin + size
        begin += align(size)


def nfgenmsg(family: int = AF_UNSPEC, resource: int = 0) -> bytes:
    """Encode `struct nfgenmsg`: address family, version 0 and resource ID."""
    return struct.pack(">BBH", family, 0, resource)


def nfnl_type(subsystem: int, message: int) -> int:
    """Return the netlink message type for a message of an nfnetlink subsystem (both given as numbers)."""
    return subsystem << 8 | message


def align(size: int) -> int:
    """Round a size up to a multiple of 4, as netlink aligns messages and attributes (NLMSG_ALIGN, NLA_ALIGN)."""
    return (size + 3) & ~3
