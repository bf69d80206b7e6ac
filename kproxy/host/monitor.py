"""Notices from the kernel."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable

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

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
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
