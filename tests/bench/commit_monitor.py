"""When the kernel's rules changed: its own notice of each transaction, with the moment at which it arrived."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import threading
import time
from typing import Self

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER
from kproxy.host.netlink_message import attributes
from tests.lab.namespace import Namespace

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUP = 7  # NFNLGRP_NFTABLES
_NEW_GENERATION = 10 << 8 | 15  # NFT_MSG_NEWGEN, which ends a transaction
_PROCESS_NAME = 3  # NFTA_GEN_PROC_NAME
_HEADER = struct.Struct("=IHHII")
_NFGENMSG_SIZE = 4
_CHUNK = 1 << 16
_RECEIVE_BUFFER_FORCED, _BUFFER = 33, 1 << 24

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")
_FILTER = b"".join(
    _INSTRUCTION.pack(*each)
    for each in (
        (0x28, 0, 0, 4),  # load the half word at 4, the type of the first message
        (0x15, 0, 1, socket.htons(_NEW_GENERATION)),  # BPF loads it as if it came from a network
        (0x06, 0, 0, 0xFFFFFFFF),
        (0x06, 0, 0, 0),
    )
)
"""Lets only the ends of transactions through: of a large one, the kernel tells of every element too, which would
overflow any buffer. It sends the end in a packet of its own (`nf_tables_gen_notify`)."""


class Notice(Struct, frozen=True):
    """A transaction is in force: since when (nanoseconds of CLOCK_MONOTONIC), and which program made it."""

    moment: int
    process: str


class Notices:
    """Listens to a namespace's nf_tables in a thread of its own. Use it in a `with`.

    Changes by iptables-legacy give no notice.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._socket = namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCED, _BUFFER)
        code = ctypes.create_string_buffer(_FILTER, len(_FILTER))
        program = struct.pack("@HP", len(_FILTER) // _INSTRUCTION.size, ctypes.addressof(code))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        self._wake, self._woken = os.pipe()
        self._lock = threading.Lock()
        self._found: list[Notice] = []
        self._thread = threading.Thread(target=self._listen, name="notices", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._woken)
        self._thread.join()
        os.close(self._wake)
        self._socket.close()

    def since(self, moment: int) -> list[Notice]:
        """Return the notices that came after a moment, in their order, without leaving out any that has been sent."""
        while True:
            with self._lock:
                if not select.select([self._socket], [], [], 0)[0]:
                    return [each for each in self._found if each.moment > moment]
            time.sleep(0)

    def forget(self) -> None:
        """Drop the notices so far."""
        with self._lock:
            self._found.clear()

    def _listen(self) -> None:
        poll = select.poll()
        for each in (self._socket.fileno(), self._wake):
            poll.register(each, select.POLLIN)
        while self._wake not in dict(poll.poll()):
            with self._lock:
                data = self._socket.recv(_CHUNK)
                self._found.append(Notice(time.monotonic_ns(), _process(data)))


def _process(data: bytes) -> str:
    size = _HEADER.unpack_from(data)[0]
    begin, end = attributes(data, _HEADER.size + _NFGENMSG_SIZE, size)[_PROCESS_NAME]
    return data[begin:end].rstrip(b"\0").decode()
