"""Count or delete the nf_tables objects of a network namespace. Rules of iptables-legacy are not included."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, BatchSocket, NetlinkSocket
from kproxy.host.netlink_message import attribute, attributes, nfgenmsg

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_DELTABLE = 2
_GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = 4, 7, 10, 13
_TABLE, _SET_NAME, _ELEMENTS = 1, 2, 3
_NFGENMSG_SIZE = 4
_SIZE = struct.Struct("=H")


class KernelObjects(Struct, frozen=True):
    """Number of objects of each kind, in all tables of all families."""

    chains: int
    rules: int
    sets: int
    elements: int


def kernel_objects() -> KernelObjects:
    """Count the objects in the current network namespace."""
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        chains = sum(1 for _ in _dump(netlink, _GETCHAIN))
        rules = sum(1 for _ in _dump(netlink, _GETRULE))
        sets = [_set_name(*message) for message in _dump(netlink, _GETSET)]
        elements = sum(_count_elements(netlink, *each) for each in sets)
    return KernelObjects(chains, rules, len(sets), elements)


def flush() -> None:
    """Delete all tables of the current network namespace in one transaction."""
    with BatchSocket(_SUBSYSTEM) as batch:
        batch.commit([(_SUBSYSTEM << 8 | _DELTABLE, 0, nfgenmsg())])


def _dump(netlink: NetlinkSocket, kind: int, payload: bytes = nfgenmsg()) -> Iterator[tuple[bytes, int, int]]:
    return netlink.dump(_SUBSYSTEM << 8 | kind, payload)


def _set_name(data: bytes, begin: int, end: int) -> tuple[int, bytes, bytes]:
    """Return the family, table and name of a set."""
    found = attributes(data, begin + _NFGENMSG_SIZE, end)
    return data[begin], data[slice(*found[_TABLE])], data[slice(*found[_SET_NAME])]


def _count_elements(netlink: NetlinkSocket, family: int, table: bytes, name: bytes) -> int:
    request = nfgenmsg(family) + attribute(_TABLE, table) + attribute(_SET_NAME, name)
    count = 0
    for data, begin, end in _dump(netlink, _GETSETELEM, request):
        found = attributes(data, begin + _NFGENMSG_SIZE, end)
        position, last = found.get(_ELEMENTS, (0, 0))
        while position < last:
            position += _SIZE.unpack_from(data, position)[0] + 3 & ~3
            count += 1
    return count
