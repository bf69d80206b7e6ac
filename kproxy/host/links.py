"""Read the network interfaces of this network namespace over rtnetlink(7), and those of the default routes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from kproxy.host.netlink import Message, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import attributes
from kproxy.host.observed import Link

RTM_GETLINK = 18  # linux/rtnetlink.h

# linux/if_link.h
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_INFO_KIND = 1

ARPHRD_LOOPBACK = 772  # linux/if_arp.h
IFF_UP = 1  # linux/if.h
_IFINFOMSG = struct.Struct("=BxHiII")
"""`struct ifinfomsg`: family, type, interface index, flags and change mask."""
_NET = Path("/proc/thread-self/net")


def links() -> tuple[Link, ...]:
    """Return all network interfaces. Needs no privileges. Raises `OSError`."""
    return retry_interrupted(_dump)


def parse_links(messages: Iterable[Message]) -> tuple[Link, ...]:
    """Return the interfaces in a dump."""
    found = []
    for data, begin, end in messages:
        _, kind, index, flags, _ = _IFINFOMSG.unpack_from(data, begin)
        message = attributes(data, begin + _IFINFOMSG.size, end)
        info = attributes(data, *message[IFLA_LINKINFO]) if IFLA_LINKINFO in message else {}
        found.append(
            Link(
                index,
                _text(data, message.get(IFLA_IFNAME)),
                _number(data, message.get(IFLA_MTU)),
                _text(data, info.get(IFLA_INFO_KIND)),
                _number(data, message.get(IFLA_MASTER)),
                bool(flags & IFF_UP),
                kind == ARPHRD_LOOPBACK,
            )
        )
    return tuple(found)


def default_route_interfaces() -> tuple[str, ...]:
    """Return the names of the interfaces of the default routes of both families, sorted."""
    return tuple(sorted(parse_default_routes(_read("route"), _read("ipv6_route"))))


def parse_default_routes(ipv4: str, ipv6: str) -> set[str]:
    """Return the interfaces of the default routes in /proc/net/route and /proc/net/ipv6_route (proc(5))."""
    found = set()
    for line in ipv4.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000":
            found.add(fields[0])
    for line in ipv6.splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00":
            found.add(fields[9])
    return found - {"lo"}


def _dump() -> tuple[Link, ...]:
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        return parse_links(netlink.dump(RTM_GETLINK, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)))


def _text(data: bytes, span: tuple[int, int] | None) -> str:
    return data[slice(*span)].rstrip(b"\0").decode(errors="replace") if span else ""


def _number(data: bytes, span: tuple[int, int] | None) -> int:
    return int(struct.unpack_from("=I", data, span[0])[0]) if span else 0


def _read(name: str) -> str:
    try:
        return (_NET / name).read_text()
    except OSError:
        return ""
