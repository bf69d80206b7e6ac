"""Read the size and the content of an iptables-legacy table (linux/netfilter_ipv4/ip_tables.h)."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import socket
import struct
from functools import cache

from msgspec import Struct

from kproxy.model.types import Family

_NAME_SIZE = 32
"""XT_TABLE_MAXNAMELEN."""
_INFO = struct.Struct("=32sI5I5III")
"""`struct ipt_getinfo`: name, hooks, entry of each hook, underflow of each hook, number of entries, size in bytes."""
_ENTRIES = struct.Struct("=32sI4x")
"""`struct ipt_get_entries`: name, size in bytes. The entries follow."""
_COUNTERS_SIZE = 16
"""The size of `struct xt_counters`: the numbers of packets and bytes, as 64-bit integers."""
_NEXT_OFFSET = struct.Struct("=H")
_MAX_ATTEMPTS = 5
"""Maximum number of attempts to read a table that other processes resize meanwhile."""


class _EntryFormat(Struct, frozen=True):
    """How to read the tables of one family.

    `next_offset` and `counters` are the positions of two fields in `struct ipt_entry` or `struct ip6t_entry`: the size
    of the entry with its matches and its target, and its counters.
    """

    address_family: int
    level: int
    get_info: int
    get_entries: int
    next_offset: int
    counters: int


_COUNTERS_ALIGNMENT = ctypes.alignment(ctypes.c_uint64)
_FORMATS = {
    Family.IPV4: _EntryFormat(socket.AF_INET, socket.IPPROTO_IP, 64, 65, 90, 96),
    # On most architectures, 4 bytes of padding precede the counters.
    Family.IPV6: _EntryFormat(
        socket.AF_INET6, socket.IPPROTO_IPV6, 64, 65, 142, -(-148 // _COUNTERS_ALIGNMENT) * _COUNTERS_ALIGNMENT
    ),
}


class TableInfoSocket:
    """A socket that asks for the layout and the content of iptables-legacy tables."""

    def __init__(self, family: Family) -> None:
        """Open a socket. Raises `OSError`."""
        self._format = _FORMATS[family]
        self._socket = socket.socket(self._format.address_family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def layout(self, table: str) -> bytes:
        """Return a value that changes when the number or the size of the rules before, in or after a hook changes.

        It does not change if rules are replaced by rules of the same size. The kernel creates a table that does not
        exist. It takes 3 µs, whatever the size of the table. Raises `OSError`.
        """
        return self._info(table)[_NAME_SIZE:]

    def content(self, table: str, max_size: int) -> bytes | None:
        """Return a value that changes when any rule changes. It does not depend on packet counters.

        Return None if the table is larger than `max_size` bytes. The kernel creates a table that does not exist.
        Raises `OSError`.
        """
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            size: int = _INFO.unpack(self._info(table))[-1]
            if size > max_size:
                return None
            entries = bytearray(_ENTRIES.size + size)
            _ENTRIES.pack_into(entries, 0, table.encode(), size)
            try:
                self._get(self._format.get_entries, entries)
            except OSError as error:
                if error.errno != errno.EAGAIN or attempt == _MAX_ATTEMPTS:
                    raise
                continue  # the table has another size now
            break
        self._clear_counters(entries)
        return hashlib.blake2b(entries, digest_size=16).digest()

    def _clear_counters(self, entries: bytearray) -> None:
        next_offset, counters, zero = self._format.next_offset, self._format.counters, bytes(_COUNTERS_SIZE)
        size_of = _NEXT_OFFSET.unpack_from
        begin, end = _ENTRIES.size, len(entries)
        while begin < end:
            entries[begin + counters : begin + counters + _COUNTERS_SIZE] = zero
            (size,) = size_of(entries, begin + next_offset)
            if not size:
                raise OSError(errno.EBADMSG, "malformed table: an entry without a size")
            begin += size

    def _info(self, table: str) -> bytes:
        info = bytearray(_INFO.size)
        info[: len(table)] = table.encode()
        self._get(self._format.get_info, info)
        return bytes(info)

    def _get(self, option: int, buffer: bytearray) -> None:
        # socket.getsockopt() cannot pass the name of the table to the kernel.
        size = ctypes.c_uint(len(buffer))
        memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        if _libc().getsockopt(self._socket.fileno(), self._format.level, option, memory, ctypes.byref(size)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
