"""Sets of addresses and ports that iptables rules match against: looking for them and destroying them (ip_set).

As `ipset` does it (linux/netfilter/ipset/ip_set.h), which a container's image need not have.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import attribute, attributes, iterate_attributes, nfgenmsg

_SUBSYSTEM = 6 << 8  # NFNL_SUBSYS_IPSET
_DESTROY, _LIST = 3, 7
_PROTOCOL, _SETNAME, _FLAGS, _DATA, _ADT = 1, 2, 6, 7, 8
_IP, _PORT, _PROTO = 1, 4, 7
_IP_VERSIONS = {1: socket.AF_INET, 2: socket.AF_INET6}
_NET_BYTEORDER = 0x4000
_NAMES_ONLY = 1 << 1
_BUSY = 4100  # IPSET_ERR_BUSY
_HEADER = 4  # struct nfgenmsg
_MODULES = Path("/sys/module")
_MODULE = _MODULES / "ip_set"


def set_names() -> list[str]:
    """Return the names of all sets, none where the kernel has no ip_set in use. Raises `OSError`.

    A module that is not loaded stays so: to ask the kernel would load it.
    """
    if _MODULES.exists() and not _MODULE.exists():
        return []
    return retry_interrupted(_names)


def _names() -> list[str]:
    flags = attribute(_FLAGS | _NET_BYTEORDER, struct.pack(">I", _NAMES_ONLY))
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return [
            data[slice(*attributes(data, begin + _HEADER, end)[_SETNAME])].rstrip(b"\0").decode()
            for data, begin, end in netlink.dump(_SUBSYSTEM | _LIST, _question() + flags)
        ]


class IpsetEntry(Struct, frozen=True):
    """One entry of a set of ports: its address ("" if its type has none), protocol (0: none) and port."""

    address: str
    protocol: int
    port: int


def set_entries(name: str) -> set[IpsetEntry]:
    """Return the entries of a set, none if they have no ports. Raises `OSError`."""
    return retry_interrupted(partial(_entries_of, name))


def _entries_of(name: str) -> set[IpsetEntry]:
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return {
            entry
            for data, begin, end in netlink.dump(_SUBSYSTEM | _LIST, _question(name))
            for entry in _entries(data, begin + _HEADER, end)
        }


def _entries(data: bytes, begin: int, end: int) -> Iterator[IpsetEntry]:
    entries = attributes(data, begin, end).get(_ADT)
    for kind, first, last in iterate_attributes(data, *entries) if entries else ():
        found = attributes(data, first, last)
        if kind == _DATA and _PORT in found:
            (port,) = struct.unpack_from(">H", data, found[_PORT][0])
            address = _address(data, *found[_IP]) if _IP in found else ""
            yield IpsetEntry(address, data[found[_PROTO][0]] if _PROTO in found else 0, port)


def _address(data: bytes, begin: int, end: int) -> str:
    ((kind, first, last),) = iterate_attributes(data, begin, end)
    return socket.inet_ntop(_IP_VERSIONS[kind], data[first:last])


def destroy_sets(names: Sequence[str]) -> dict[str, str]:
    """Destroy sets with all that they hold; return why for each that stays. Raises `OSError`."""
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        refused = netlink.request_many(_SUBSYSTEM | _DESTROY, 0, [_question(name) for name in names])
    return {
        names[place]: "rules use it" if code == _BUSY else os.strerror(code) for place, code in sorted(refused.items())
    }


def _question(name: str = "") -> bytes:
    """Return what begins a request: about all sets, or one."""
    about = attribute(_SETNAME, name.encode() + b"\0") if name else b""
    return nfgenmsg() + attribute(_PROTOCOL, bytes([6])) + about
