"""The addresses that this machine answers for, straight from the kernel."""

from __future__ import annotations

import socket
import struct

from kproxy.host.netlink import NetlinkSocket, attributes, retried
from kproxy.model.types import Family

_RTM_GETADDR = 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFADDRMSG = struct.Struct("=BBBBI")
_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


def own_addresses(family: Family) -> frozenset[str]:
    """Return the addresses of all interfaces of a family, link-local ones included (rtnetlink(7)). Raises `OSError`."""
    return frozenset().union(*addresses_by_interface(_FAMILIES[family]).values())


def addresses_by_interface(family: int) -> dict[int, frozenset[str]]:
    """Return the addresses of a family (`AF_UNSPEC`: of both) by the index of their interface. Raises `OSError`."""
    return retried(lambda: _read(family))


def _read(family: int) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = {}
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        for data, begin, end in netlink.dump(_RTM_GETADDR, _IFADDRMSG.pack(family, 0, 0, 0, 0)):
            own, *_, index = _IFADDRMSG.unpack_from(data, begin)
            parts = attributes(data, begin + _IFADDRMSG.size, end)
            # On a point-to-point link, IFA_ADDRESS is the other end's.
            place = parts.get(_IFA_LOCAL) or parts.get(_IFA_ADDRESS)
            if place and own in _FAMILIES.values():
                found.setdefault(index, set()).add(socket.inet_ntop(own, data[slice(*place)]))
    return {index: frozenset(addresses) for index, addresses in found.items()}
