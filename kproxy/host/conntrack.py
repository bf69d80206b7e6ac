"""Reading the kernel's messages about UDP entries of the connection tracking table, and asking for them.

The numbers are those of linux/netfilter/nfnetlink_conntrack.h. An end of a flow is its packed address and port; what
matters of an entry are the original destination and the source of the replies, which differ if it is translated.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import TypeAlias

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import attribute, attributes, nested, nfgenmsg
from kproxy.model.addresses import socket_text, split_socket_text
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


class TupleLayout(Struct, frozen=True):
    """What differs between the families: the address family, the size of addresses, and their attributes' types."""

    family: int
    size: int
    source: int
    destination: int


IP_KINDS = {
    Family.IPV4: TupleLayout(socket.AF_INET, 4, 1, 2),
    Family.IPV6: TupleLayout(socket.AF_INET6, 16, 3, 4),
}


def question(kind: TupleLayout, address: bytes = b"", port: bytes = b"") -> bytes:
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


class ConntrackEntryReader:
    """Reads messages about entries of one family; each is given by a buffer and its place in there.

    The kernel always writes both tuples first and in the same way. Messages that look like that can be told apart by
    one number, made of all attribute headers and of the bytes of both ends: many times faster than following
    attributes, and many entries share the number because they differ only in their client.
    """

    def __init__(self, kind: TupleLayout) -> None:
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


def _tuple(direction: int, kind: TupleLayout, byte: bytes) -> bytes:
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


IsStale: TypeAlias = Callable[[str, str], bool]
"""Whether flows to this destination that are answered by this source are to be deleted."""
FEW = 4
"""Up to this many destinations are asked for one by one, more of them by reading all UDP entries.

Each question is a walk over the kernel's whole hash table (9 ms for 262,144 buckets), and each entry in an answer costs
the kernel 1.7 us: with 50,000 entries, four questions take 70 ms and reading all takes 130 ms.
"""
_GET, _DELETE = 0x101, 0x102  # IPCTNL_MSG_CT_GET and _DELETE of NFNL_SUBSYS_CTNETLINK
_PORT = struct.Struct(">H")


class UdpConntrack:
    """The UDP entries of one family, in the network namespace of the thread that calls."""

    def __init__(self, family: Family) -> None:
        self._kind = IP_KINDS[family]
        self._reader = ConntrackEntryReader(self._kind)

    def clean(self, destinations: Collection[str], is_stale: IsStale) -> int:
        """Delete the entries of flows to these destinations that are stale; return how many were.

        `is_stale` decides for all flows between the same two ends. Entries of another conntrack zone than the
        default one are left alone unless their destination is translated: they are somebody else's view of a flow
        (Open vSwitch keeps zones of its own). Raises `OSError` if something stale may be left.
        """
        wanted = _StaleFilter(self._kind, destinations, is_stale)
        questions = list(self._questions(destinations))

        def attempt() -> int:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                return self._delete(netlink, self._find(netlink, questions, wanted))

        return retry_interrupted(attempt)

    def _questions(self, destinations: Collection[str]) -> Iterator[bytes]:
        """Yield what to ask the kernel for; the answers may hold more.

        IPv6 addresses stay out of questions: kernels get their comparison the wrong way round (seen in 6.18, which
        answers with all addresses but the one asked for).
        """
        if len(destinations) > FEW:
            yield question(self._kind)
            return
        asked: dict[tuple[bytes, bytes], None] = {}
        for destination in destinations:
            address, port = split_socket_text(destination)
            by_address = address and self._kind.family == socket.AF_INET
            asked[socket.inet_aton(address) if by_address else b"", _PORT.pack(port)] = None
        for packed_address, packed_port in asked:
            yield question(self._kind, packed_address, packed_port)

    def _find(self, netlink: NetlinkSocket, questions: list[bytes], wanted: _StaleFilter) -> dict[bytes, None]:
        """Return the keys of entries to delete, each once: what one question finds, the next may find again."""
        reader = self._reader
        verdicts: dict[int, _Deletion] = {}
        keys: dict[bytes, None] = {}
        for each in questions:
            for message in netlink.dump(_GET, each):
                pair = reader.pair(message[0], message[1])
                verdict = verdicts.get(pair)
                if verdict is None:
                    verdict = wanted.verdict(reader.ends(*message))
                    if reader.is_usual(pair):
                        verdicts[pair] = verdict
                if verdict is _Deletion.DELETE or (verdict is _Deletion.DELETE_OURS and not reader.in_zone(*message)):
                    keys[reader.key(*message)] = None
        return keys

    def _delete(self, netlink: NetlinkSocket, keys: Collection[bytes]) -> int:
        header = nfgenmsg(self._kind.family)
        refused = netlink.requests(_DELETE, 0, [header + key for key in keys])
        failed = [code for code in refused.values() if code != errno.ENOENT]  # that one has ended by itself
        if failed:
            raise NetlinkError(failed[0], f"{len(failed)} entries cannot be deleted: {os.strerror(failed[0])}")
        return len(keys) - len(refused)


class _Deletion(Enum):
    """What is to become of the entries between two ends."""

    KEEP = 0
    DELETE = 1
    DELETE_OURS = 2
    """Those of the default zone only: the destination is not translated."""


class _StaleFilter:
    """Which entries to delete."""

    def __init__(self, kind: TupleLayout, destinations: Collection[str], is_stale: IsStale) -> None:
        self._kind = kind
        self._is_stale = is_stale
        self._sockets: set[bytes] = set()
        self._ports: set[bytes] = set()
        for destination in destinations:
            address, port = split_socket_text(destination)
            if address:
                self._sockets.add(socket.inet_pton(kind.family, address) + _PORT.pack(port))
            else:
                self._ports.add(_PORT.pack(port))

    def verdict(self, ends: Ends | None) -> _Deletion:
        if ends is None or (ends[0] not in self._sockets and ends[0][-2:] not in self._ports):
            return _Deletion.KEEP
        if not self._is_stale(self._text(ends[0]), self._text(ends[1])):
            return _Deletion.KEEP
        return _Deletion.DELETE if ends[0] != ends[1] else _Deletion.DELETE_OURS

    def _text(self, packed: bytes) -> str:
        address = socket.inet_ntop(self._kind.family, packed[:-2])
        return socket_text(address, _PORT.unpack(packed[-2:])[0])
