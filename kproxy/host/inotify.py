"""The kernel's notices of changed directories (inotify(7)), by way of libc."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from msgspec import Struct

# linux/inotify.h
IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_Q_OVERFLOW = 0x4000
IN_ONLYDIR = 0x1000000
IN_ISDIR = 0x40000000
_CHANGES = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
_CHANGES |= IN_DELETE_SELF | IN_MOVE_SELF
_EVENT = struct.Struct("iIII")
_BUFFER = 65536
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP}


class InotifyEvent(Struct, frozen=True):
    """Something changed. `directory` is "" where the kernel lost notices; `name` is "" for the directory itself."""

    directory: str
    name: str
    mask: int


class InotifyError(OSError):
    """The kernel gives no notices, most often because a limit (`fs.inotify`) is reached."""


class Inotify:
    """One inotify instance, a context manager. Has `fileno`, readable when `read` would return something.

    Raises `InotifyError` where the limit of instances (`fs.inotify.max_user_instances`) is reached.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise self._error()
        self._watched: dict[int, str] = {}

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return int(self._fd)

    def watch(self, directories: Iterable[str]) -> bool:
        """Watch these directories and no others; tell whether one of them was not watched before.

        A directory that was deleted and made again counts as another one. Those that do not exist are left
        out; one given by two names goes by the first of them. Raises `InotifyError` where the limit of
        watches is reached.
        """
        before = self._watched
        self._watched = {}
        for directory in directories:
            number = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _CHANGES | IN_ONLYDIR)
            if number >= 0:
                self._watched.setdefault(number, directory)
            elif ctypes.get_errno() not in _NOT_THERE:
                raise self._error()
        for number in before.keys() - self._watched.keys():
            self._libc.inotify_rm_watch(self._fd, number)  # fails if the kernel has done it, with the directory
        return not self._watched.keys() <= before.keys()

    def read(self) -> list[InotifyEvent]:
        """Return the changes since the last call, without waiting for one."""
        events: list[InotifyEvent] = []
        while True:
            try:
                data = os.read(self._fd, _BUFFER)
            except BlockingIOError:
                return events
            events.extend(self._parse(data))

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse(self, data: bytes) -> list[InotifyEvent]:
        events = []
        offset = 0
        while offset < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            if number in self._watched or mask & IN_Q_OVERFLOW:
                events.append(InotifyEvent(self._watched.get(number, ""), name, mask))
        return events

    @staticmethod
    def _error() -> InotifyError:
        number = ctypes.get_errno()
        return InotifyError(number, os.strerror(number))
