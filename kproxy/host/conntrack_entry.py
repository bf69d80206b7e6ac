"""Reading the kernel's messages about UDP entries of the connection tracking table, and asking for them.

The numbers are those of linux/netfilter/nfnetlink_conntrack.h. An end of a flow is its packed address and port; what
matters of an entry are the original destination and the source of the replies, which differ if it is translated.
"""

from __future__ import annotations

import socket
import struct
from typing import TypeAlias

from msgspec import Struct

from kproxy.host.netlink import attribute, attributes, nested, nfgenmsg
from kproxy.model.types import Family

Ends: TypeAlias = tuple[bytes, bytes]
"""Original destination and source of the replies, each packed."""

_ORIGINAL, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25  # CTA_TUPLE_ORIG and so on
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2  # CTA_FILTER_ORIG_FLAGS and CTA_FILTER_REPLY_FLAGS
_BY_ADDRESS, _BY_PROTOCOL, _BY_PORT = 1 << 1, 1 << 3, 1 << 5  # the kernel's CTA_FILTER_F_*, of the destination
_KEY = (_REPLY, _ZONE, _ID)
_NFGENMSG_SIZE = 4


class IpKind(Struct, frozen=True):
    """What differs between the families: the address family, the size of addresses, and their attributes' types."""

    family: int
    size: int
    source: int
    destination: int


IP_KINDS = {
    Family.IPV4: IpKind(socket.AF_INET, 4, 1, 2),
    Family.IPV6: IpKind(socket.AF_INET6, 16, 3, 4),
}


def question(kind: IpKind, address: bytes = b"", port: bytes = b"") -> bytes:
    """Return what asks for all UDP entries of a family, or for those to a packed port, or to an address and port.

    Kernels before 5.8 do not know the filter and answer with everything.
    """
    fields = _BY_PROTOCOL | (_BY_PORT if port else 0) | (_BY_ADDRESS if address else 0)
    ip = nested(_TUPLE_IP, attribute(kind.destination, address)) if address else b""
    proto = attribute(_PROTO_NUM, bytes([socket.IPPROTO_UDP]))
    proto += attribute(_PROTO_DST_PORT, port) if port else b""
    filters = (
        attribute(way, struct.pack("=I", bits)) for way, bits in ((_FILTER_ORIGINAL, fields), (_FILTER_REPLY, 0))
    )
    return nfgenmsg(kind.family) + nested(_ORIGINAL, ip, nested(_TUPLE_PROTO, proto)) + nested(_FILTER, *filters)


class EntryReader:
    """Reads messages about entries of one family; each is given by a buffer and its place in there.

    The kernel always writes both tuples first and in the same way. Messages that look like that can be told apart by
    one number, made of all attribute headers and of the bytes of both ends: many times faster than following
    attributes, and many entries share the number because they differ only in their client.
    """

    def __init__(self, kind: IpKind) -> None:
        self._kind = kind
        zeros, ones = (_tuple(_ORIGINAL, kind, byte) + _tuple(_REPLY, kind, byte) for byte in (b"\0", b"\xff"))
        headers = bytes(0xFF if left == right else 0 for left, right in zip(zeros, ones, strict=True))
        size, self._half = kind.size, len(zeros) // 2
        self._protocol = slice(24 + 2 * size, 25 + 2 * size)
        self._destination = slice(16 + size, 16 + 2 * size), slice(40 + 2 * size, 42 + 2 * size)
        first = self._half + 12
        self._source = slice(first, first + size), slice(first + 20 + 2 * size, first + 22 + 2 * size)
        pair = bytearray(headers)
        for place in (self._protocol, *self._destination, *self._source):
            pair[place] = b"\xff" * (place.stop - place.start)
        self._usual, self._headers = int.from_bytes(zeros, "little"), int.from_bytes(headers, "little")
        self._pair = int.from_bytes(pair, "little")

    def pair(self, data: bytes, begin: int) -> int:
        """Return the number of both ends; it says nothing unless `is_usual`."""
        begin += _NFGENMSG_SIZE
        return int.from_bytes(data[begin : begin + 2 * self._half], "little") & self._pair

    def is_usual(self, pair: int) -> bool:
        """Return whether the message with this number has the form in which numbers can be trusted."""
        return pair & self._headers == self._usual

    def ends(self, data: bytes, begin: int, end: int) -> Ends | None:
        """Return the ends of an entry of any form, None if it is not UDP."""
        if not self.is_usual(self.pair(data, begin)):
            return self._ends_by_attributes(data, begin, end)
        begin += _NFGENMSG_SIZE
        tuples = data[begin : begin + 2 * self._half]
        if tuples[self._protocol][0] != socket.IPPROTO_UDP:
            return None
        return b"".join(tuples[place] for place in self._destination), b"".join(tuples[place] for place in self._source)

    def key(self, data: bytes, begin: int, end: int) -> bytes:
        """Return the attributes by which the kernel finds exactly this entry again: reply tuple, zone and id.

        The original tuple would not do: a new entry for the same tuple can have the same id, which the kernel makes
        of that tuple and of the entry's place in memory.
        """
        found = attributes(data, begin + _NFGENMSG_SIZE, end)
        return b"".join(attribute(kind, data[slice(*found[kind])]) for kind in _KEY if kind in found)

    def in_zone(self, data: bytes, begin: int, end: int) -> bool:
        """Return whether the entry is in another conntrack zone than the default one, in whichever direction."""
        found = attributes(data, begin + _NFGENMSG_SIZE, end)
        return _ZONE in found or not self.is_usual(self.pair(data, begin))

    def _ends_by_attributes(self, data: bytes, begin: int, end: int) -> Ends | None:
        tuples = attributes(data, begin + _NFGENMSG_SIZE, end)
        destination = _end(data, tuples.get(_ORIGINAL), self._kind.destination, _PROTO_DST_PORT)
        source = _end(data, tuples.get(_REPLY), self._kind.source, _PROTO_SRC_PORT)
        return (destination, source) if destination and source else None


def _tuple(direction: int, kind: IpKind, byte: bytes) -> bytes:
    """Return a tuple as the kernel writes it, with every value made of one byte."""
    ip = (attribute(which, byte * kind.size) for which in (kind.source, kind.destination))
    ports = (attribute(which, byte * 2) for which in (_PROTO_SRC_PORT, _PROTO_DST_PORT))
    return nested(direction, nested(_TUPLE_IP, *ip), nested(_TUPLE_PROTO, attribute(_PROTO_NUM, byte), *ports))


def _end(data: bytes, within: tuple[int, int] | None, address: int, port: int) -> bytes | None:
    """Return one end of a tuple, None if that is not a tuple of UDP."""
    try:
        parts = attributes(data, *within) if within else {}
        ip, proto = attributes(data, *parts[_TUPLE_IP]), attributes(data, *parts[_TUPLE_PROTO])
        if data[proto[_PROTO_NUM][0]] != socket.IPPROTO_UDP:
            return None
        return data[slice(*ip[address])] + data[slice(*proto[port])]
    except KeyError:
        return None
