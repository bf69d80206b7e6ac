"""How many rules a chain of nf_tables holds, whoever made them (linux/netfilter/nf_tables.h)."""

from __future__ import annotations

import socket

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkSocket, attribute, nfgenmsg
from kproxy.model.types import Family

_GETRULE = 10 << 8 | 7
_TABLE, _CHAIN = 1, 2
_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


def count_rules(family: Family, table: str, chain: str) -> int:
    """Return how many rules a chain has, 0 if it is not there.

    That costs the same however many other chains there are. Raises `OSError`, which is `DumpInterruptedError` if
    somebody changed any rules meanwhile.
    """
    names = attribute(_TABLE, table.encode() + b"\0") + attribute(_CHAIN, chain.encode() + b"\0")
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return sum(1 for _ in netlink.dump(_GETRULE, nfgenmsg(_FAMILIES[family]) + names))
