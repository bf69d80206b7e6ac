"""What the nf_tables of a namespace hold, and emptying them. What iptables-legacy made does not count."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, BatchSocket, NetlinkSocket
from kproxy.host.netlink_message import attribute, attributes, nfgenmsg

_SUBSYSTEM = 10
_DELTABLE = 2
_GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = 4, 7, 10, 13
_TABLE, _SET_NAME, _ELEMENTS = 1, 2, 3
_NFGENMSG_SIZE = 4
_SIZE = struct.Struct("=H")


class KernelObjects(Struct, frozen=True):
    """How many of each there are, in all tables of all families."""

    chains: int
    rules: int
    sets: int
    elements: int


def kernel_objects() -> KernelObjects:
    """Count what the present namespace holds."""
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        chains = sum(1 for _ in _dump(netlink, _GETCHAIN))
        rules = sum(1 for _ in _dump(netlink, _GETRULE))
        names = [_set_name(*message) for message in _dump(netlink, _GETSET)]
        elements = sum(_count(netlink, *name) for name in names)
    return KernelObjects(chains, rules, len(names), elements)


def flush() -> None:
    """Remove all tables of the present namespace, in one transaction."""
    with BatchSocket(_SUBSYSTEM) as batch:
        batch.commit([(_SUBSYSTEM << 8 | _DELTABLE, 0, nfgenmsg())])


def _dump(netlink: NetlinkSocket, kind: int, payload: bytes = nfgenmsg()) -> Iterator[tuple[bytes, int, int]]:
    return netlink.dump(_SUBSYSTEM << 8 | kind, payload)


def _set_name(data: bytes, begin: int, end: int) -> tuple[int, bytes, bytes]:
    found = attributes(data, begin + _NFGENMSG_SIZE, end)
    return data[begin], data[slice(*found[_TABLE])], data[slice(*found[_SET_NAME])]


def _count(netlink: NetlinkSocket, family: int, table: bytes, name: bytes) -> int:
    asked = nfgenmsg(family) + attribute(_TABLE, table) + attribute(_SET_NAME, name)
    count = 0
    for data, begin, end in _dump(netlink, _GETSETELEM, asked):
        found = attributes(data, begin + _NFGENMSG_SIZE, end)
        place, last = found.get(_ELEMENTS, (0, 0))
        while place < last:
            place += _SIZE.unpack_from(data, place)[0] + 3 & ~3
            count += 1
    return count
