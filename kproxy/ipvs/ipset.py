"""List and destroy IP sets over netlink (linux/netfilter/ipset/ip_set.h).

The program `ipset` is not used, because container images may lack it.
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
from kproxy.host.netlink_message import NLA_F_NET_BYTEORDER, attribute, attributes, iterate_attributes, nfgenmsg

# linux/netfilter/nfnetlink.h
NFNL_SUBSYS_IPSET = 6
NFGENMSG_SIZE = 4
# linux/netfilter/ipset/ip_set.h
IPSET_PROTOCOL_MIN = 6
"""The oldest protocol version that current kernels support."""
IPSET_CMD_DESTROY = 3
IPSET_CMD_LIST = 7
IPSET_ATTR_PROTOCOL = 1
IPSET_ATTR_SETNAME = 2
IPSET_ATTR_FLAGS = 6
IPSET_ATTR_DATA = 7
IPSET_ATTR_ADT = 8
"""The entries of a set. Each entry is an `IPSET_ATTR_DATA`, which contains the three attributes below."""
IPSET_ATTR_IP = 1
IPSET_ATTR_PORT = 4
IPSET_ATTR_PROTO = 7
IPSET_ATTR_IPADDR_IPV4 = 1
IPSET_ATTR_IPADDR_IPV6 = 2
IPSET_FLAG_LIST_SETNAME = 1 << 1
IPSET_ERR_BUSY = 4100

_LIST_SETS = NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_LIST
_DESTROY_SET = NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_DESTROY
_ADDRESS_FAMILIES = {IPSET_ATTR_IPADDR_IPV4: socket.AF_INET, IPSET_ATTR_IPADDR_IPV6: socket.AF_INET6}
_MODULES = Path("/sys/module")
_IP_SET_MODULE = _MODULES / "ip_set"


class IpsetEntry(Struct, frozen=True):
    """An entry of a set whose type has ports.

    If the set type has no addresses, `address` is "". If it has no protocols, `protocol` is 0; otherwise `protocol` is
    the protocol number.
    """

    address: str
    protocol: int
    port: int


def set_names() -> list[str]:
    """Return the names of all sets. Raises `OSError`.

    If the kernel module ip_set is not loaded, there are no sets. This is checked first, because a netlink request would
    load the module.
    """
    if _MODULES.exists() and not _IP_SET_MODULE.exists():
        return []
    return retry_interrupted(_list_names)


def set_entries(name: str) -> set[IpsetEntry]:
    """Return the entries of a set, or no entries if the set's type has no ports. Raises `OSError`."""
    return retry_interrupted(partial(_list_entries, name))


def destroy_sets(names: Sequence[str]) -> dict[str, str]:
    """Destroy sets with all their entries. Return the sets that could not be destroyed, with the reasons.

    Raises `OSError` if the requests cannot be sent or the replies cannot be received.
    """
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        errors = netlink.request_many(_DESTROY_SET, 0, [_encode_request(name) for name in names])
    return {
        names[index]: "in use by rules" if code == IPSET_ERR_BUSY else os.strerror(code)
        for index, code in sorted(errors.items())
    }


def _list_names() -> list[str]:
    flags = attribute(IPSET_ATTR_FLAGS | NLA_F_NET_BYTEORDER, struct.pack(">I", IPSET_FLAG_LIST_SETNAME))
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return [
            data[slice(*attributes(data, begin + NFGENMSG_SIZE, end)[IPSET_ATTR_SETNAME])].rstrip(b"\0").decode()
            for data, begin, end in netlink.dump(_LIST_SETS, _encode_request() + flags)
        ]


def _list_entries(name: str) -> set[IpsetEntry]:
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return {
            entry
            for data, begin, end in netlink.dump(_LIST_SETS, _encode_request(name))
            for entry in parse_entries(data, begin + NFGENMSG_SIZE, end)
        }


def parse_entries(data: bytes, begin: int, end: int) -> Iterator[IpsetEntry]:
    """Yield the entries of a set in the attributes of a message of a dump, without those that have no port."""
    entries = attributes(data, begin, end).get(IPSET_ATTR_ADT)
    for kind, first, last in iterate_attributes(data, *entries) if entries else ():
        fields = attributes(data, first, last)
        if kind == IPSET_ATTR_DATA and IPSET_ATTR_PORT in fields:
            (port,) = struct.unpack_from(">H", data, fields[IPSET_ATTR_PORT][0])
            address = _parse_address(data, *fields[IPSET_ATTR_IP]) if IPSET_ATTR_IP in fields else ""
            protocol = data[fields[IPSET_ATTR_PROTO][0]] if IPSET_ATTR_PROTO in fields else 0
            yield IpsetEntry(address, protocol, port)


def _parse_address(data: bytes, begin: int, end: int) -> str:
    ((kind, first, last),) = iterate_attributes(data, begin, end)
    return socket.inet_ntop(_ADDRESS_FAMILIES[kind], data[first:last])


def _encode_request(name: str = "") -> bytes:
    """Return the payload of a request for the set with this name, or for all sets if `name` is ""."""
    set_name = attribute(IPSET_ATTR_SETNAME, name.encode() + b"\0") if name else b""
    return nfgenmsg() + attribute(IPSET_ATTR_PROTOCOL, bytes([IPSET_PROTOCOL_MIN])) + set_name
