"""Network interfaces and their addresses, over rtnetlink(7)."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable

from kproxy.host.netlink import NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import attributes
from kproxy.model.types import Family


def local_addresses() -> tuple[str, ...]:
    """Return the addresses of all interfaces, in the kernel's order, link-local IPv6 ones left out.

    Raises `OSError` if the kernel does not tell.
    """
    from pyroute2 import IPRoute  # noqa: PLC0415 - 11 MB that only nodePortAddresses needs

    with IPRoute() as route:
        # On a point-to-point link, IFA_ADDRESS is the other end's.
        found = [message.get("IFA_LOCAL") or message.get("IFA_ADDRESS") for message in route.get_addr()]
    return tuple(text for text in found if text and not text.lower().startswith("fe80:"))


_RTM_GETADDR = 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFADDRMSG = struct.Struct("=BBBBI")
_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}


def own_addresses(family: Family) -> frozenset[str]:
    """Return the addresses of all interfaces of a family, link-local ones included (rtnetlink(7)). Raises `OSError`."""
    return frozenset().union(*addresses_by_interface(_FAMILIES[family]).values())


def addresses_by_interface(family: int) -> dict[int, frozenset[str]]:
    """Return the addresses of a family (`AF_UNSPEC`: of both) by the index of their interface. Raises `OSError`."""
    return retry_interrupted(lambda: _read(family))


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


log = logging.getLogger(__name__)
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100


class AddressMonitor:
    """Calls `changed` whenever an address of an interface comes or goes (rtnetlink(7)).

    `changed` is called from a thread, once for notices that come together, and must not block.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        """Start to listen, so that no change after this is missed. Raises `OSError`."""
        self._changed = changed
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        self._socket.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._thread = threading.Thread(target=self._listen, name="addresses", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread; wait at most `timeout` seconds for a call of `changed` that is under way."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if not self._thread.is_alive():
            self._socket.close()
            os.close(self._wake)

    def _listen(self) -> None:
        while True:
            select.select([self._socket.fileno(), self._wake], [], [])
            if self._stopping:
                return
            if self._drain():
                self._changed()

    def _drain(self) -> bool:
        seen = False
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return seen
            except OSError as error:
                # ENOBUFS: notices were lost, so something has changed all the same.
                log.debug("address notices: %s", error)
            seen = True
