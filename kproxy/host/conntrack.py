"""Deleting UDP entries of the kernel's connection tracking table, over netlink.

Ends of flows are `ip:port` texts as `kproxy.model.endpoints` writes them; a destination may also be `:port`, which
is that port of any address.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import TypeAlias

from kproxy.host.conntrack_entry import IP_KINDS, Ends, EntryReader, IpKind, question
from kproxy.host.netlink import (
    NETLINK_NETFILTER,
    NetlinkError,
    NetlinkSocket,
    nfgenmsg,
    retried,
)
from kproxy.model.endpoints import socket_text, split_socket_text
from kproxy.model.types import Family

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
        self._reader = EntryReader(self._kind)

    def clean(self, destinations: Collection[str], is_stale: IsStale) -> int:
        """Delete the entries of flows to these destinations that are stale; return how many were.

        `is_stale` decides for all flows between the same two ends. Entries of another conntrack zone than the
        default one are left alone unless their destination is translated: they are somebody else's view of a flow
        (Open vSwitch keeps zones of its own). Raises `OSError` if something stale may be left.
        """
        wanted = _Wanted(self._kind, destinations, is_stale)
        questions = list(self._questions(destinations))

        def attempt() -> int:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                return self._delete(netlink, self._find(netlink, questions, wanted))

        return retried(attempt)

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

    def _find(self, netlink: NetlinkSocket, questions: list[bytes], wanted: _Wanted) -> dict[bytes, None]:
        """Return the keys of entries to delete, each once: what one question finds, the next may find again."""
        reader = self._reader
        verdicts: dict[int, _Verdict] = {}
        keys: dict[bytes, None] = {}
        for each in questions:
            for message in netlink.dump(_GET, each):
                pair = reader.pair(message[0], message[1])
                verdict = verdicts.get(pair)
                if verdict is None:
                    verdict = wanted.verdict(reader.ends(*message))
                    if reader.is_usual(pair):
                        verdicts[pair] = verdict
                if verdict is _Verdict.DELETE or (verdict is _Verdict.DELETE_OURS and not reader.in_zone(*message)):
                    keys[reader.key(*message)] = None
        return keys

    def _delete(self, netlink: NetlinkSocket, keys: Collection[bytes]) -> int:
        header = nfgenmsg(self._kind.family)
        refused = netlink.requests(_DELETE, 0, [header + key for key in keys])
        failed = [code for code in refused.values() if code != errno.ENOENT]  # that one has ended by itself
        if failed:
            raise NetlinkError(failed[0], f"{len(failed)} entries cannot be deleted: {os.strerror(failed[0])}")
        return len(keys) - len(refused)


class _Verdict(Enum):
    """What is to become of the entries between two ends."""

    KEEP = 0
    DELETE = 1
    DELETE_OURS = 2
    """Those of the default zone only: the destination is not translated."""


class _Wanted:
    """Which entries to delete."""

    def __init__(self, kind: IpKind, destinations: Collection[str], is_stale: IsStale) -> None:
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

    def verdict(self, ends: Ends | None) -> _Verdict:
        if ends is None or (ends[0] not in self._sockets and ends[0][-2:] not in self._ports):
            return _Verdict.KEEP
        if not self._is_stale(self._text(ends[0]), self._text(ends[1])):
            return _Verdict.KEEP
        return _Verdict.DELETE if ends[0] != ends[1] else _Verdict.DELETE_OURS

    def _text(self, packed: bytes) -> str:
        address = socket.inet_ntop(self._kind.family, packed[:-2])
        return socket_text(address, _PORT.unpack(packed[-2:])[0])
