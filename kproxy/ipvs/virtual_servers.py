"""List and delete IPVS virtual servers over generic netlink (linux/ip_vs.h)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from kproxy.host.netlink import Message, NetlinkError, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import attribute, attributes

# linux/netlink.h
NETLINK_GENERIC = 16
# linux/genetlink.h
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2
# linux/ip_vs.h
IPVS_GENL_NAME = "IPVS"
IPVS_CMD_DEL_SERVICE = 3
IPVS_CMD_GET_SERVICE = 4
IPVS_CMD_ATTR_SERVICE = 1
IPVS_SVC_ATTR_AF = 1
IPVS_SVC_ATTR_PROTOCOL = 2
IPVS_SVC_ATTR_ADDR = 3
IPVS_SVC_ATTR_PORT = 4

_KEY_ATTRIBUTES = (IPVS_SVC_ATTR_AF, IPVS_SVC_ATTR_PROTOCOL, IPVS_SVC_ATTR_ADDR, IPVS_SVC_ATTR_PORT)
"""The attributes that identify a virtual server."""
_GENL_VERSION = 1
_GENLMSGHDR = struct.Struct("=BBH")
"""`struct genlmsghdr`: command, version, reserved."""
_U16 = struct.Struct("=H")
_PROC_IP_VS = Path("/proc/thread-self/net/ip_vs")


class VirtualServer(Struct, frozen=True):
    """A virtual server: address, protocol number and port. `key` is the encoded form of its `_KEY_ATTRIBUTES`."""

    address: str
    protocol: int
    port: int
    key: bytes


def virtual_servers() -> list[VirtualServer]:
    """Return the virtual servers that have an address. Raises `OSError`.

    There are none if IPVS is not in use. This is checked first, in /proc, because a netlink request would load the
    kernel module.
    """
    return retry_interrupted(_list_servers) if _PROC_IP_VS.exists() else []


def delete_virtual_servers(servers: Sequence[VirtualServer]) -> dict[VirtualServer, str]:
    """Delete virtual servers. Return the ones that could not be deleted, with the reasons.

    Raises `OSError` if the kernel does not support IPVS, or if the requests cannot be sent or the replies cannot be
    received.
    """
    with NetlinkSocket(NETLINK_GENERIC) as netlink:
        family_id = resolve_family_id(netlink, IPVS_GENL_NAME)
        errors = netlink.request_many(family_id, 0, [encode_deletion(server) for server in servers])
    return {servers[index]: os.strerror(code) for index, code in sorted(errors.items()) if code != errno.ESRCH}


def resolve_family_id(netlink: NetlinkSocket, name: str) -> int:
    """Return the ID of a generic netlink family. It is the message type of all requests to the family.

    Raises `NetlinkError`.
    """
    request = _header(CTRL_CMD_GETFAMILY) + attribute(CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
    ids = [
        _U16.unpack_from(data, attributes(data, begin + _GENLMSGHDR.size, end)[CTRL_ATTR_FAMILY_ID][0])[0]
        for data, begin, end in netlink.get(GENL_ID_CTRL, request)
    ]
    if not ids:
        raise NetlinkError(errno.ENOENT, os.strerror(errno.ENOENT))
    return int(ids[0])


def parse_servers(messages: Iterator[Message]) -> Iterator[VirtualServer]:
    """Yield the virtual servers in a dump. Skip virtual servers for firewall marks, because they have no address."""
    for data, begin, end in messages:
        service = attributes(data, begin + _GENLMSGHDR.size, end).get(IPVS_CMD_ATTR_SERVICE)
        spans = attributes(data, *service) if service else {}
        if not all(kind in spans for kind in _KEY_ATTRIBUTES):
            continue
        value = {kind: data[slice(*spans[kind])] for kind in _KEY_ATTRIBUTES}
        (family,), (protocol,) = _U16.unpack(value[IPVS_SVC_ATTR_AF]), _U16.unpack(value[IPVS_SVC_ATTR_PROTOCOL])
        yield VirtualServer(
            address=socket.inet_ntop(family, value[IPVS_SVC_ATTR_ADDR][: 16 if family == socket.AF_INET6 else 4]),
            protocol=protocol,
            port=int.from_bytes(value[IPVS_SVC_ATTR_PORT], "big"),
            key=b"".join(attribute(kind, value[kind]) for kind in _KEY_ATTRIBUTES),
        )


def encode_deletion(server: VirtualServer) -> bytes:
    """Return the payload of the request that deletes a virtual server together with its real servers."""
    return _header(IPVS_CMD_DEL_SERVICE) + attribute(IPVS_CMD_ATTR_SERVICE, server.key)


def _list_servers() -> list[VirtualServer]:
    with NetlinkSocket(NETLINK_GENERIC) as netlink:
        family_id = resolve_family_id(netlink, IPVS_GENL_NAME)
        return list(parse_servers(netlink.dump(family_id, _header(IPVS_CMD_GET_SERVICE))))


def _header(command: int) -> bytes:
    return _GENLMSGHDR.pack(command, _GENL_VERSION, 0)
