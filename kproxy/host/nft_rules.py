"""How many rules chains of nf_tables hold, whoever made them (linux/netfilter/nf_tables.h)."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkSocket, attribute, nfgenmsg
from kproxy.model.types import Family

_GETRULE = 10 << 8 | 7
_TABLE, _CHAIN = 1, 2
_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


def count_rules(family: Family, table: str, chains: Iterable[str]) -> dict[str, int]:
    """Return how many rules each chain of a table has, 0 for a chain that is not there.

    A look at one chain costs the same however many others there are. Raises `OSError`, which is
    `DumpInterruptedError` if somebody changed any rules meanwhile.
    """
    found = {}
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        of_table = nfgenmsg(_FAMILIES[family]) + attribute(_TABLE, table.encode() + b"\0")
        for chain in chains:
            request = of_table + attribute(_CHAIN, chain.encode() + b"\0")
            found[chain] = sum(1 for _ in netlink.dump(_GETRULE, request))
    return found
