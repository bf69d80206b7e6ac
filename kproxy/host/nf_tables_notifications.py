"""Decode the kernel's notifications about nf_tables commits: which parts of which tables changed, and by whom. Pure.

The kernel notifies the group NFNLGRP_NFTABLES of each change of a commit and ends the commit with NFT_MSG_NEWGEN. Each
message has the port ID of the netlink socket that sent the commit. A datagram contains only messages of one commit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from socket import AF_INET, AF_INET6

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink_message import (
    HEADER,
    NFGENMSG_SIZE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    MalformedMessageError,
    align,
    attribute,
    attributes,
    iterate_attributes,
    nfnl_type,
)
from kproxy.model.drift import CommitAuthor, RulesChanged, Touched
from kproxy.model.types import Family

_ADDRESS_FAMILIES = {Family.IPV4: int(AF_INET), Family.IPV6: int(AF_INET6)}
_NEWGEN = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_NEWGEN)
_TABLE_CHANGES = {nf.NFT_MSG_NEWTABLE, nf.NFT_MSG_DELTABLE}
_CHAIN_NAMES = {
    nf.NFT_MSG_NEWCHAIN: nf.NFTA_CHAIN_NAME,
    nf.NFT_MSG_DELCHAIN: nf.NFTA_CHAIN_NAME,
    nf.NFT_MSG_NEWRULE: nf.NFTA_RULE_CHAIN,
    nf.NFT_MSG_DELRULE: nf.NFTA_RULE_CHAIN,
}
"""The attribute that contains the name of the chain, by message."""
_BUILTIN_CHAINS = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})
"""The chains of iptables. They are updated, but never renamed, by iptables."""
_CREATED = NLM_F_CREATE | NLM_F_EXCL
"""nft sets the first of these flags when it creates a chain, and iptables the second. To rename one, they set none."""
_SET_CHANGES = {nf.NFT_MSG_NEWSET, nf.NFT_MSG_DELSET}
_ELEMENT_CHANGES = {nf.NFT_MSG_NEWSETELEM, nf.NFT_MSG_DELSETELEM}
_KIND = struct.Struct("=4xH")
_PORT = struct.Struct("=12xI")
_ANONYMOUS_SETS = ("__set", "__map")
"""The start of the names of anonymous sets, which are parts of rules."""
MAX_TOUCHED_CHAINS = 1_000
"""If more chains of a table are touched, the whole table counts as touched. Checking all of it takes no longer."""


class CommitDecoder:
    """Collects what other processes changed in some tables, from the datagrams of the group NFNLGRP_NFTABLES."""

    def __init__(
        self,
        tables: Collection[tuple[Family, str]],
        is_own_port: Callable[[int], bool],
        is_own_commit: Callable[[CommitAuthor], bool] = lambda _: True,
    ) -> None:
        """`is_own_port` returns whether a netlink port ID belongs to kproxy or to a program that it runs.

        Messages with such a port ID are skipped. When the commit ends, `is_own_commit` tells whether that was right. If
        it was not, anything in all tables counts as changed.
        """
        self._tables = {(_ADDRESS_FAMILIES[family], name): (family, name) for family, name in tables}
        names = dict.fromkeys(name for _, name in tables)
        # The attribute with the table's name has the same number, 1, in the messages about all kinds of objects. Most
        # datagrams are about other tables. They do not contain the bytes of the attribute and are not parsed.
        self._needles = [_name_attribute(name) for name in names]
        self._is_own_port = is_own_port
        self._is_own_commit = is_own_commit
        # Whether messages were skipped that belong to a commit whose end has not been received yet.
        self._skipped = False
        self._touched: dict[tuple[Family, str], Touched] = {}
        # The tables that a commit has changed whose end has not been received yet.
        self._open: set[tuple[Family, str]] = set()
        self._last_end = b""
        # The tables of which everything is touched, with the family and the first attribute of messages about them.
        # Further messages are not decoded. One commit can have a hundred thousand.
        self._settled: list[tuple[int, bytes, tuple[Family, str]]] = []

    def feed(self, datagram: bytes) -> None:
        """Decode one datagram. Datagrams about other tables or about own commits are skipped at little cost."""
        if len(datagram) < HEADER.size:
            return
        (kind,) = _KIND.unpack_from(datagram)
        if kind == _NEWGEN:
            self._last_end = datagram
            if self._skipped:
                self._check_skipped(datagram)
            if self._open:
                self._end_commit(datagram)
            return
        for needle in self._needles:
            if needle in datagram:
                break
        else:
            return
        (port,) = _PORT.unpack_from(datagram)
        if self._is_own_port(port):
            self._skipped = True
            return
        try:
            self._decode(datagram)
        except (struct.error, IndexError, MalformedMessageError):  # it is unknown what was touched
            for table in self._tables.values():
                self._touch(table).everything = True

    def take(self) -> RulesChanged | None:
        """Return what the complete commits since the previous call changed, or None if there is nothing to report."""
        if self._open or not self._touched:
            return None
        tables, self._touched, self._settled = self._touched, {}, []
        return RulesChanged(tables)

    @property
    def generation(self) -> int | None:
        """The generation ID of the last commit whose end was received, or None if there was no commit."""
        message = self._last_end
        span = _end_attributes(message).get(nf.NFTA_GEN_ID)
        return int.from_bytes(message[span[0] : span[1]]) if span is not None else None

    def discard(self) -> bool:
        """Discard incomplete and unreported commits, because notifications were lost. Return whether there were any."""
        touched, self._touched, self._open, self._settled = self._touched, {}, set(), []
        self._skipped = False
        return bool(touched)

    def _decode(self, data: bytes) -> None:
        begin = 0
        while begin + HEADER.size + NFGENMSG_SIZE <= len(data):
            size, kind, flags, *_ = HEADER.unpack_from(data, begin)
            if size < HEADER.size + NFGENMSG_SIZE:
                return
            if kind >> 8 == nf.NFNL_SUBSYS_NFTABLES:
                payload = begin + HEADER.size
                if not self._is_settled(data, payload):
                    self._decode_message(kind & 0xFF, flags, data, payload, min(begin + size, len(data)))
            begin += align(size)

    def _decode_message(self, message: int, flags: int, data: bytes, payload: int, end: int) -> None:
        spans = attributes(data, payload + NFGENMSG_SIZE, end)
        table = self._tables.get((data[payload], _string(data, spans.get(nf.NFTA_TABLE_NAME))))
        if table is None:
            return
        touched = self._touch(table)
        _touch_part(touched, message, flags, data, spans)
        if touched.everything or len(touched.chains) > MAX_TOUCHED_CHAINS:
            touched.everything = True
            self._settled.append((data[payload], _name_attribute(table[1]), table))

    def _is_settled(self, data: bytes, payload: int) -> bool:
        """Return whether a message is about a table of which everything is touched already."""
        for family, name, table in self._settled:
            # The table is the first attribute of each message.
            if data[payload] == family and data.startswith(name, payload + NFGENMSG_SIZE):
                self._open.add(table)
                return True
        return False

    def _touch(self, table: tuple[Family, str]) -> Touched:
        self._open.add(table)
        return self._touched.setdefault(table, Touched())

    def _check_skipped(self, data: bytes) -> None:
        self._skipped = False
        author = _author(data)
        if self._is_own_commit(author):
            return
        for table in self._tables.values():
            touched = self._touched.setdefault(table, Touched())
            touched.everything = True
            touched.by |= {author.name} if author.name else set()

    def _end_commit(self, data: bytes) -> None:
        tables, self._open = self._open, set()
        name = _author(data).name
        for table in tables:
            if not self._touched[table]:  # for example, only a flowtable was changed
                del self._touched[table]
            elif name:
                self._touched[table].by.add(name)


def _name_attribute(table: str) -> bytes:
    """Return the attribute with the name of a table, without padding."""
    return attribute(nf.NFTA_TABLE_NAME, table.encode() + b"\0")[: 5 + len(table)]


def _author(message: bytes) -> CommitAuthor:
    """Return the author of a commit, from the message that ends it. What is unknown is 0 or ""."""
    spans = _end_attributes(message)
    (port,) = _PORT.unpack_from(message)
    begin, end = spans.get(nf.NFTA_GEN_PROC_PID, (0, 0))
    return CommitAuthor(port, int.from_bytes(message[begin:end]), _string(message, spans.get(nf.NFTA_GEN_PROC_NAME)))


def _end_attributes(message: bytes) -> dict[int, tuple[int, int]]:
    """Return the attributes of the message that ends a commit, or none if it is malformed."""
    try:
        return attributes(message, HEADER.size + NFGENMSG_SIZE, len(message))
    except MalformedMessageError:
        return {}


def _touch_part(touched: Touched, message: int, flags: int, data: bytes, spans: Mapping[int, tuple[int, int]]) -> None:
    if message in _TABLE_CHANGES:
        touched.everything = True
    elif message in _CHAIN_NAMES:
        name = _string(data, spans.get(_CHAIN_NAMES[message]))
        touched.chains.add(name)
        if message == nf.NFT_MSG_NEWCHAIN and not flags & _CREATED and name not in _BUILTIN_CHAINS:
            # The chain may have been renamed. The notification has only its new name, and the rules that jump to
            # the chain have changed, too. Linux before 5.15 leaves out the flags for new chains as well.
            touched.everything = True
    elif message in _SET_CHANGES:
        _touch_set(touched, _string(data, spans.get(nf.NFTA_SET_NAME)))
    elif message in _ELEMENT_CHANGES:
        set_name = _string(data, spans.get(nf.NFTA_SET_ELEM_LIST_SET))
        if set_name in touched.sets:
            return
        begin, end = spans.get(nf.NFTA_SET_ELEM_LIST_ELEMENTS, (0, 0))
        for _, element_begin, element_end in iterate_attributes(data, begin, end):
            _touch_element(touched, set_name, data, element_begin, element_end)


def _touch_set(touched: Touched, name: str) -> None:
    if not name.startswith(_ANONYMOUS_SETS):
        touched.add_set(name)


def _touch_element(touched: Touched, set_name: str, data: bytes, begin: int, end: int) -> None:
    if set_name.startswith(_ANONYMOUS_SETS):
        return
    key = attributes(data, begin, end).get(nf.NFTA_SET_ELEM_KEY)
    value = attributes(data, *key).get(nf.NFTA_DATA_VALUE) if key is not None else None
    if value is None:  # the catch-all element `*` has no key
        touched.add_set(set_name)
    else:
        touched.add_element(set_name, data[value[0] : value[1]])


def _string(data: bytes, span: tuple[int, int] | None) -> str:
    return data[span[0] : span[1]].rstrip(b"\0").decode(errors="replace") if span is not None else ""
