"""Virtual servers of IPVS: looking for them and deleting them (linux/ip_vs.h, over generic netlink)."""

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

NETLINK_GENERIC = 16
_CTRL, _GETFAMILY = 16, 3
_FAMILY_ID, _FAMILY_NAME = 1, 2
_DEL_SERVICE, _GET_SERVICE = 3, 4
_SERVICE = 1
_AF, _PROTOCOL, _ADDRESS, _PORT = 1, 2, 3, 4
_KEY = (_AF, _PROTOCOL, _ADDRESS, _PORT)
_NUMBER = struct.Struct("=H")
_HEADER = struct.Struct("=BBH")
"""`struct genlmsghdr`: command, version, reserved."""
_PROC = Path("/proc/thread-self/net/ip_vs")


class VirtualServer(Struct, frozen=True):
    """A virtual server for an address, a protocol by its number, and a port; `key` is how the kernel names it."""

    address: str
    protocol: int
    port: int
    key: bytes


def virtual_servers() -> list[VirtualServer]:
    """Return the virtual servers that have an address, none where IPVS is not in use. Raises `OSError`.

    A module that is not loaded stays so: to ask the kernel would load it.
    """
    return retry_interrupted(_list) if _PROC.exists() else []


def _list() -> list[VirtualServer]:
    with NetlinkSocket(NETLINK_GENERIC) as netlink:
        return list(read_servers(netlink.dump(family_number(netlink, "IPVS"), _HEADER.pack(_GET_SERVICE, 1, 0))))


def delete_virtual_servers(servers: Sequence[VirtualServer]) -> dict[VirtualServer, str]:
    """Delete virtual servers; return why for each that stays. Raises `OSError`."""
    with NetlinkSocket(NETLINK_GENERIC) as netlink:
        refused = netlink.request_many(family_number(netlink, "IPVS"), 0, [deletion(server) for server in servers])
    return {servers[place]: os.strerror(code) for place, code in sorted(refused.items()) if code != errno.ESRCH}


def family_number(netlink: NetlinkSocket, name: str) -> int:
    """Return the number by which a family of generic netlink is reached. Raises `NetlinkError`."""
    question = _HEADER.pack(_GETFAMILY, 1, 0) + attribute(_FAMILY_NAME, name.encode() + b"\0")
    numbers = [
        _NUMBER.unpack_from(data, attributes(data, begin + _HEADER.size, end)[_FAMILY_ID][0])[0]
        for data, begin, end in netlink.get(_CTRL, question)
    ]
    if not numbers:
        raise NetlinkError(errno.ENOENT, os.strerror(errno.ENOENT))
    return int(numbers[0])


def read_servers(messages: Iterator[Message]) -> Iterator[VirtualServer]:
    """Yield the virtual servers of a dump; those for marks of packets, which have no address, are passed over."""
    for data, begin, end in messages:
        service = attributes(data, begin + _HEADER.size, end).get(_SERVICE)
        found = attributes(data, *service) if service else {}
        if not all(kind in found for kind in _KEY):
            continue
        value = {kind: data[slice(*found[kind])] for kind in _KEY}
        (family,), (protocol,) = _NUMBER.unpack(value[_AF]), _NUMBER.unpack(value[_PROTOCOL])
        yield VirtualServer(
            address=socket.inet_ntop(family, value[_ADDRESS][: 16 if family == socket.AF_INET6 else 4]),
            protocol=protocol,
            port=int.from_bytes(value[_PORT], "big"),
            key=b"".join(attribute(kind, value[kind]) for kind in _KEY),
        )


def deletion(server: VirtualServer) -> bytes:
    """Return the payload of the request that deletes a virtual server, with its real servers."""
    return _HEADER.pack(_DEL_SERVICE, 1, 0) + attribute(_SERVICE, server.key)
