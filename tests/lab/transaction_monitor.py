"""Monitor the nf_tables transactions of a namespace, as `nft monitor` does."""

from __future__ import annotations

import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from kproxy.host.netlink import NETLINK_NETFILTER
from kproxy.host.netlink_message import attributes
from tests.lab.namespace import Namespace
from tests.lab.waiting import HANG_GUARD

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUP = 7  # NFNLGRP_NFTABLES
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NEW_GENERATION = _SUBSYSTEM | 15  # NFT_MSG_NEWGEN, which ends a transaction
_PROCESS_NAME = 3  # NFTA_GEN_PROC_NAME
_TABLE_NAMES = {_SUBSYSTEM | kind for kind in (0, 2, 3, 5, 6, 8, 9, 11, 12, 14)}
"""NFT_MSG_NEWTABLE, DELTABLE, and the same for chains, rules, sets and elements.

The first attribute of each is the name of the table.
"""

_ELEMENTS = {_SUBSYSTEM | 12, _SUBSYSTEM | 14}  # NFT_MSG_NEWSETELEM, DELSETELEM
_TABLE_NAME = 1  # NFTA_TABLE_NAME, NFTA_CHAIN_TABLE and so on
_SET_NAME, _LIST = 2, 3  # NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS
_ATTRIBUTE = struct.Struct("=HH")
_CHAIN_NAMES = {_SUBSYSTEM | 3: 3, _SUBSYSTEM | 5: 3, _SUBSYSTEM | 6: 2, _SUBSYSTEM | 8: 2}
"""The attribute with the chain's name in NFT_MSG_NEWCHAIN, DELCHAIN, NEWRULE and DELRULE."""

_HEADER = struct.Struct("=IHHII")
_NFGENMSG_SIZE = 4
_CHUNK = 1 << 16
_RECEIVE_BUFFER_FORCED, _BUFFER = 33, 1 << 24  # SO_RCVBUFFORCE: there is one notification per rule


@dataclass(frozen=True)
class Transaction:
    """The process that committed it, the chains that it changed, and the elements that it added or removed.

    Elements are counted per set, named `<table> <set>`.
    """

    process: str
    chains: frozenset[str]
    elements: frozenset[tuple[str, int]] = frozenset()


class TransactionMonitor:
    """The transactions in a namespace since this object was created. Use it in a `with` block.

    Changes by iptables-legacy are not nf_tables transactions. Transactions that changed a table named `ignore_table`
    are omitted.
    """

    def __init__(self, namespace: Namespace, *, ignore_table: str = "") -> None:
        self._ignore_table = ignore_table
        self._tables: set[str] = set()
        self._chains: set[str] = set()
        self._elements: Counter[str] = Counter()
        self._socket = namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        self._socket.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCED, _BUFFER)
        self._socket.setblocking(False)

    def __enter__(self) -> TransactionMonitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def new(self) -> list[Transaction]:
        """Return the transactions committed since the last call."""
        found: list[Transaction] = []
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return found
            found += self._transactions(data)

    def wait_for(self, count: int) -> None:
        """Return as soon as `count` transactions have been committed since the last call of `new`."""
        seen = 0
        waiting = select.poll()  # select(2) cannot handle descriptors above 1023
        waiting.register(self._socket, select.POLLIN)
        while seen < count:
            if not waiting.poll(HANG_GUARD * 1000):
                raise TimeoutError(f"no transaction {seen + 1} of {count} within {HANG_GUARD:.0f} s")
            seen += len(self.new())

    def _transactions(self, data: bytes) -> Iterator[Transaction]:
        begin = 0
        while begin < len(data):
            size, kind, _, _, _ = _HEADER.unpack_from(data, begin)
            payload = attributes(data, begin + _HEADER.size + _NFGENMSG_SIZE, begin + size)
            if kind in _TABLE_NAMES:
                self._tables.add(_text(data, payload[_TABLE_NAME]))
            if kind in _CHAIN_NAMES:
                self._chains.add(_text(data, payload[_CHAIN_NAMES[kind]]))
            elif kind in _ELEMENTS:
                owner = " ".join(_text(data, payload[part]) for part in (_TABLE_NAME, _SET_NAME))
                self._elements[owner] += _length(data, *payload[_LIST])
            elif kind == _NEW_GENERATION:
                process = _text(data, payload[_PROCESS_NAME])
                if self._ignore_table not in self._tables:
                    yield Transaction(process, frozenset(self._chains), frozenset(self._elements.items()))
                self._tables.clear()
                self._chains.clear()
                self._elements.clear()
            begin += (size + 3) & ~3


def _length(data: bytes, begin: int, end: int) -> int:
    """Return the number of elements in a list attribute."""
    count = 0
    while begin + _ATTRIBUTE.size <= end:
        size, _ = _ATTRIBUTE.unpack_from(data, begin)
        begin += (size + 3) & ~3
        count += 1
    return count


def _text(data: bytes, span: tuple[int, int]) -> str:
    return data[slice(*span)].rstrip(b"\0").decode()
