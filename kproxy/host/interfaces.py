"""Network interfaces and their addresses, over rtnetlink(7)."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from kproxy.host.netlink import Message, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import attributes
from kproxy.model.restarts import Restarts
from kproxy.model.types import Family

# linux/rtnetlink.h
RTM_DELLINK = 17
RTM_GETADDR = 22
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100

# linux/if_addr.h
IFA_ADDRESS = 1
IFA_LOCAL = 2

_IFADDRMSG = struct.Struct("=BBBBI")
"""`struct ifaddrmsg`: family, prefix length, flags, scope and interface index."""
_IFINFOMSG = struct.Struct("=BxHiII")
"""`struct ifinfomsg`: family, type, interface index, flags and change mask."""
_ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_RECEIVE_SIZE = 1 << 16

log = logging.getLogger(__name__)


def local_addresses() -> tuple[str, ...]:
    """Return the addresses of all interfaces in the kernel's order, without IPv6 link-local addresses.

    Raises `OSError` if the addresses cannot be read from the kernel.
    """
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415 - costs 11 MB, and only nodePortAddresses needs it

    try:
        with IPRoute() as route:
            # On a point-to-point link, IFA_ADDRESS is the peer's address.
            found = [message.get("IFA_LOCAL") or message.get("IFA_ADDRESS") for message in route.get_addr()]
    except NetlinkError as error:  # not an OSError in pyroute2
        raise OSError(error.code, os.strerror(error.code)) from error
    return tuple(text for text in found if text and not text.lower().startswith("fe80:"))


def own_addresses(family: Family) -> frozenset[str]:
    """Return the addresses of all interfaces in one IP family, including link-local addresses. Raises `OSError`."""
    return frozenset().union(*addresses_by_interface(_ADDRESS_FAMILIES[family]).values())


def addresses_by_interface(address_family: int) -> dict[int, frozenset[str]]:
    """Return the addresses of each interface, keyed by interface index. Raises `OSError`.

    `address_family` is AF_INET or AF_INET6, or AF_UNSPEC for both.
    """
    return retry_interrupted(lambda: _dump_addresses(address_family))


def interface_index(name: str) -> int:
    """Return the index of an interface, or 0 if it does not exist."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def delete_interface(index: int) -> None:
    """Delete an interface and its addresses. Raises `OSError`."""
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        netlink.request(RTM_DELLINK, 0, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0))


class AddressMonitor:
    """Calls `on_change` when an address of an interface has been added, changed or removed.

    The monitor has its own thread, which calls `on_change` once for all notifications that arrive together. `on_change`
    must not block. It is also called if notifications may have been lost: after a buffer overrun, and after an
    unexpected error, which is logged and makes the monitor subscribe again.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        """Subscribe to notifications. Changes between this call and `start` are reported, too. Raises `OSError`."""
        self._on_change = on_change
        self._socket = _subscribe()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="address-monitor", daemon=True)

    def start(self) -> None:
        """Start the monitor's thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread and close the socket.

        If a running call to `on_change` does not return within `timeout` seconds, return without closing the socket.
        """
        self._stopping = True
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if not self._thread.is_alive():
            self._socket.close()
            os.close(self._wakeup)

    def _run(self) -> None:
        restarts = Restarts("address-monitor")
        failed = False
        while not self._stopping:
            try:
                if failed:
                    self._subscribe_again()
                failed = False
                self._watch()
            except Exception as error:  # noqa: BLE001 - no error may stop the monitor
                failed = True
                pause, text = restarts.failed(error, time.monotonic())
                with suppress(MemoryError):
                    log.log(logging.ERROR if text else logging.DEBUG, "%s", text or error)
                _is_ready(pause, self._wakeup)

    def _subscribe_again(self) -> None:
        subscribed = _subscribe()
        self._socket.close()
        self._socket = subscribed
        self._on_change()  # addresses may have changed meanwhile

    def _watch(self) -> None:
        while True:
            _is_ready(None, self._socket.fileno(), self._wakeup)
            if self._stopping:
                return
            if self._drain():
                self._on_change()

    def _drain(self) -> bool:
        """Receive and discard all pending notifications; return whether there were any."""
        received = False
        while True:
            try:
                self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                return received
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # The kernel dropped notifications, so addresses have changed.
            received = True


def _subscribe() -> socket.socket:
    subscribed = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        subscribed.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
    except OSError:
        subscribed.close()
        raise
    subscribed.setblocking(False)
    return subscribed


def _is_ready(seconds: float | None, *descriptors: int) -> bool:
    """Wait until a file descriptor is readable, at most `seconds`. Return whether one is."""
    poll = select.poll()  # unlike select(), it has no limit on the numbers of descriptors
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def _dump_addresses(address_family: int) -> dict[int, frozenset[str]]:
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        return parse_addresses(netlink.dump(RTM_GETADDR, _IFADDRMSG.pack(address_family, 0, 0, 0, 0)))


def parse_addresses(messages: Iterable[Message]) -> dict[int, frozenset[str]]:
    """Return the addresses in a dump, keyed by interface index."""
    found: dict[int, set[str]] = {}
    for data, begin, end in messages:
        own_family, *_, index = _IFADDRMSG.unpack_from(data, begin)
        message = attributes(data, begin + _IFADDRMSG.size, end)
        # On a point-to-point link, IFA_ADDRESS is the peer's address.
        address = message.get(IFA_LOCAL) or message.get(IFA_ADDRESS)
        if address and own_family in _ADDRESS_FAMILIES.values():
            found.setdefault(index, set()).add(socket.inet_ntop(own_family, data[slice(*address)]))
    return {index: frozenset(addresses) for index, addresses in found.items()}
