"""Netlink headers and attributes as bytes (linux/netlink.h). Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from socket import AF_UNSPEC

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


HEADER = struct.Struct("=IHHII")
"""`struct nlmsghdr`: size, type, flags, sequence number and port."""


_ATTRIBUTE = struct.Struct("=HH")


_TYPE = ~(NLA_F_NESTED | NLA_F_NET_BYTEORDER)


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
        begin += max(aligned(size), _ATTRIBUTE.size)
    return found


def each_attribute(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type, begin and end of each attribute's payload: for those of which one type comes several times."""
    while begin + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, begin)
        yield kind & _TYPE, begin + _ATTRIBUTE.size, begin + size
        begin += max(aligned(size), _ATTRIBUTE.size)


def nfgenmsg(family: int = AF_UNSPEC, resource: int = 0) -> bytes:
    """Return the header that every netfilter message begins with (linux/netfilter/nfnetlink.h)."""
    return struct.pack(">BBH", family, 0, resource)


def aligned(size: int) -> int:
    """Return a size rounded up to the 4 bytes that netlink aligns to."""
    return (size + 3) & ~3
