"""One network interface by its name: looking for it, and taking it away (rtnetlink(7))."""

from __future__ import annotations

import socket
import struct

from kproxy.host.netlink import NetlinkSocket

_RTM_DELLINK = 17
_IFINFOMSG = struct.Struct("=BxHiII")


def interface_index(name: str) -> int:
    """Return the index of an interface, 0 if there is none of that name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def delete_interface(index: int) -> None:
    """Delete an interface with its addresses. Raises `OSError`."""
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        netlink.request(_RTM_DELLINK, 0, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0))
