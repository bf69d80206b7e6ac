"""Times of rule set changes, taken from the kernel's notification of each nf_tables transaction."""

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
_RECEIVE_BUFFER_FORCED, _BUFFER = 33, 1 << 24  # SO_RCVBUFFORCE, bytes

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")
_FILTER = b"".join(
    _INSTRUCTION.pack(*each)
    for each in (
        (0x28, 0, 0, 4),  # load the half word at offset 4, the type of the first message
        (0x15, 0, 1, socket.htons(_NEW_GENERATION)),  # BPF loads half words in network byte order
        (0x06, 0, 0, 0xFFFFFFFF),
        (0x06, 0, 0, 0),
    )
)
"""A BPF filter that passes only the end of a transaction. The kernel also sends a notification for every element, which
overflows any buffer if the transaction is large. It sends the end in a separate packet (`nf_tables_gen_notify`)."""


class Commit(Struct, frozen=True):
    """A committed transaction: when its notification arrived (nanoseconds of CLOCK_MONOTONIC), and its process name."""

    time: int
    process: str


class CommitMonitor:
    """Records the commits in a network namespace, in a background thread. Use it as a context manager.

    iptables-legacy does not use nf_tables, so its changes are not recorded.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._socket = namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCED, _BUFFER)
        code = ctypes.create_string_buffer(_FILTER, len(_FILTER))
        program = struct.pack("@HP", len(_FILTER) // _INSTRUCTION.size, ctypes.addressof(code))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        self._stop_reader, self._stop_writer = os.pipe()
        self._lock = threading.Lock()
        self._commits: list[Commit] = []
        self._thread = threading.Thread(target=self._listen, name="commit-monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stop_writer)
        self._thread.join()
        os.close(self._stop_reader)
        self._socket.close()

    def since(self, start: int) -> list[Commit]:
        """Return the commits after a time, in order, including notifications still in the socket's buffer."""
        while True:
            with self._lock:
                if not select.select([self._socket], [], [], 0)[0]:
                    return [each for each in self._commits if each.time > start]
            time.sleep(0)

    def clear(self) -> None:
        """Discard the commits recorded so far."""
        with self._lock:
            self._commits.clear()

    def _listen(self) -> None:
        poll = select.poll()
        for each in (self._socket.fileno(), self._stop_reader):
            poll.register(each, select.POLLIN)
        while self._stop_reader not in dict(poll.poll()):
            with self._lock:
                data = self._socket.recv(_CHUNK)
                self._commits.append(Commit(time.monotonic_ns(), _process_name(data)))


def _process_name(data: bytes) -> str:
    size = _HEADER.unpack_from(data)[0]
    begin, end = attributes(data, _HEADER.size + _NFGENMSG_SIZE, size)[_PROCESS_NAME]
    return data[begin:end].rstrip(b"\0").decode()
