"""File system notifications for directories (inotify(7)), through libc."""

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
"""`struct inotify_event`: watch descriptor, mask, cookie and length of the name that follows."""
_READ_SIZE = 65536
_NO_SUCH_DIRECTORY = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP}


class InotifyEvent(Struct, frozen=True):
    """One change in a watched directory. `mask` contains IN_* bits.

    `name` is the name of the changed file in the directory, or "" if the directory itself changed. If the event queue
    overflowed, `directory` is "".
    """

    directory: str
    name: str
    mask: int


class InotifyError(OSError):
    """inotify is not available, usually because one of the limits `fs.inotify.*` is exceeded."""


class Inotify:
    """An inotify instance and its watches. A context manager.

    Raises `InotifyError` if the user has too many instances (`fs.inotify.max_user_instances`).
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise self._error()
        self._watches: dict[int, str] = {}

    def fileno(self) -> int:
        """Return the file descriptor. It is readable when `read` would return events."""
        return int(self._fd)

    def watch(self, directories: Iterable[str]) -> bool:
        """Watch these directories instead of the current ones; return whether any of them is new.

        A directory that was deleted and created again is new. Directories that do not exist or cannot be accessed are
        skipped. If `directories` contains two names of the same directory, its events have the first name. Raises
        `InotifyError` if the user has too many watches (`fs.inotify.max_user_watches`).
        """
        previous = self._watches
        self._watches = {}
        for directory in directories:
            descriptor = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _CHANGES | IN_ONLYDIR)
            if descriptor >= 0:
                self._watches.setdefault(descriptor, directory)
            elif ctypes.get_errno() not in _NO_SUCH_DIRECTORY:
                raise self._error()
        for descriptor in previous.keys() - self._watches.keys():
            self._libc.inotify_rm_watch(self._fd, descriptor)  # fails if the watch was deleted with its directory
        return not self._watches.keys() <= previous.keys()

    def read(self) -> list[InotifyEvent]:
        """Return all pending events without blocking."""
        events: list[InotifyEvent] = []
        while True:
            try:
                data = os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return events
            events.extend(self._parse(data))

    def close(self) -> None:
        """Close the file descriptor, which ends all watches."""
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
            descriptor, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            if descriptor in self._watches or mask & IN_Q_OVERFLOW:
                events.append(InotifyEvent(self._watches.get(descriptor, ""), name, mask))
        return events

    @staticmethod
    def _error() -> InotifyError:
        code = ctypes.get_errno()
        return InotifyError(code, os.strerror(code))
