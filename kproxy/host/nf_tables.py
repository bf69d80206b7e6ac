"""nf_tables questions that the iptables backend asks over netlink: NAT support and rule counts."""

from __future__ import annotations

import errno
import socket
import struct

from kproxy.host.netlink import NETLINK_NETFILTER, BatchRejectedError, BatchSocket, NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import NLM_F_CREATE, attribute, nested, nfgenmsg
from kproxy.model.types import Family

_NFTABLES = 10
_NEWTABLE, _NEWCHAIN, _GETCHAIN, _UNKNOWN = 0, 3, 4, 0xFF
_TABLE_NAME, _TABLE_FLAGS = 1, 2
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_DORMANT, _POSTROUTING, _SRCNAT = 1, 4, 100
_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


def nat_refused(family: Family) -> str:
    """Return why the kernel makes no chain of type nat for a family, "" if it would. Raises `OSError`.

    Where table nat has the chain POSTROUTING, which only nf_tables with NAT can have, nothing else is asked. Otherwise
    the kernel is given a table with such a chain, which no packet would pass, in a batch that ends with a message of
    unknown type: it takes nothing of that, and notifies nobody. It needs some 10 ms.
    """
    header = nfgenmsg(_FAMILIES[family])
    if _has_chain(header + _text(_CHAIN_TABLE, "nat") + _text(_CHAIN_NAME, "POSTROUTING")):
        return ""
    subjects = ("a table", "a chain of type nat")
    with BatchSocket(_NFTABLES) as netlink:
        try:
            netlink.commit(
                [
                    (_NFTABLES << 8 | _NEWTABLE, NLM_F_CREATE, header + _TABLE),
                    (_NFTABLES << 8 | _NEWCHAIN, NLM_F_CREATE, header + _CHAIN),
                    (_NFTABLES << 8 | _UNKNOWN, 0, header),
                ]
            )
        except BatchRejectedError as error:
            first = error.refusals[0]
    if first.place < 0:
        return f"it takes no changes from us: {first.reason}"
    return f"it refuses {subjects[first.place]}: {first.reason}" if first.place < len(subjects) else ""


def _has_chain(question: bytes) -> bool:
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return any(True for _ in netlink.answers(_NFTABLES << 8 | _GETCHAIN, question))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return False
        raise


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _number(kind: int, number: int) -> bytes:
    return attribute(kind, struct.pack(">i", number))


_TABLE = _text(_TABLE_NAME, "kproxy-probe") + _number(_TABLE_FLAGS, _DORMANT)
_CHAIN = (
    _text(_CHAIN_TABLE, "kproxy-probe")
    + _text(_CHAIN_NAME, "postrouting")
    + nested(_CHAIN_HOOK, _number(_HOOK_NUMBER, _POSTROUTING), _number(_HOOK_PRIORITY, _SRCNAT))
    + _text(_CHAIN_TYPE, "nat")
)
_GETRULE = 10 << 8 | 7
_RULE_TABLE, _RULE_CHAIN = 1, 2


def count_rules(family: Family, table: str, chain: str) -> int:
    """Return how many rules a chain has, 0 if it is not there.

    That costs the same however many other chains there are. Raises `OSError`, which is `DumpInterruptedError` if
    somebody changed any rules meanwhile.
    """
    names = attribute(_RULE_TABLE, table.encode() + b"\0") + attribute(_RULE_CHAIN, chain.encode() + b"\0")
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return sum(1 for _ in netlink.dump(_GETRULE, nfgenmsg(_FAMILIES[family]) + names))
