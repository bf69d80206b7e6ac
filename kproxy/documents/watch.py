"""Read a file or directory, and again whenever it changes."""

from __future__ import annotations

import logging
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Mapping

from msgspec import Struct

from kproxy.documents.document import FileProblem
from kproxy.host.inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_ISDIR,
    IN_MODIFY,
    Inotify,
    InotifyError,
    InotifyEvent,
)

SUFFIXES = (".json", ".yaml", ".yml")
"""The ends of the names of object files in a folder."""
PATIENCE = 1.0
"""Seconds to wait for files that are being written or keep changing, before they are read as they are."""


class PathSnapshot(Struct, frozen=True):
    """What was found on the disk: each file's bytes, or why it cannot be read.

    `trouble` says why there is no file at all, and is None otherwise.
    """

    files: Mapping[str, bytes | FileProblem]
    trouble: FileProblem | None = None


def read_files(path: str) -> PathSnapshot:
    """Read a file, or those files of a folder (not of folders in it) whose names end as `SUFFIXES` say.

    Hidden files are passed over, as `kubectl -f` does and mounted ConfigMaps need it.
    """
    try:
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                return PathSnapshot({path: file.read()})
        found = {name: _read(name) for name in _object_files(path)}
    except OSError as error:
        return PathSnapshot({}, FileProblem(path, _reason(error)))
    files = {name: text for name, text in found.items() if text is not None}
    if not files:
        return PathSnapshot({}, FileProblem(path, f"no object files here ({', '.join('*' + end for end in SUFFIXES)})"))
    return PathSnapshot(files)


def _object_files(folder: str) -> list[str]:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if _is_object_file(name))


def _is_object_file(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _read(path: str) -> bytes | FileProblem | None:
    """Return a file's bytes, why they cannot be had, or None for what is no file or has just gone."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return FileProblem(path, "leads nowhere (symbolic link)") if os.path.islink(path) else None
    except OSError as error:
        return FileProblem(path, _reason(error))


def _reason(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


class WatchedPaths(Struct, frozen=True):
    """Where changes may change what `read_files` finds.

    `files` are those whose content counts, with PATH itself; `folder` is PATH if it is one. In `parent`, the
    directory that PATH is in or is to be in, only the entry `awaited` counts (any, if that is "").
    """

    directories: tuple[str, ...]
    files: frozenset[str]
    folder: str
    parent: str
    awaited: str

    def hold(self, event: InotifyEvent) -> bool:
        """Tell whether a change of content is one of an object file."""
        return os.path.join(event.directory, event.name) in self.files or (
            event.directory == self.folder and _is_object_file(event.name)
        )

    def concern(self, event: InotifyEvent) -> bool:
        """Tell whether something that happened is a reason to read again."""
        if not event.name:  # a directory itself is gone, or notices are lost
            return True
        if event.mask & (IN_ATTRIB | IN_MODIFY | IN_CLOSE_WRITE):
            return self.hold(event)
        return event.directory != self.parent or self.awaited in {"", event.name}


def places_of(path: str) -> WatchedPaths:
    """Look up where to look out for changes of the object files of a path, which need not exist."""
    full = os.path.abspath(path)
    parent = os.path.dirname(full)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    folder = full if os.path.isdir(full) else ""
    try:
        files = _object_files(full) if folder else [full]
    except OSError:
        files = []
    targets = [os.path.realpath(file) for file in files if os.path.islink(file)]
    directories = [parent, *([folder] if folder else []), *map(os.path.dirname, targets)]
    through_link = not folder and os.path.islink(full)  # by way of other entries, as in a mounted ConfigMap
    return WatchedPaths(
        directories=tuple(dict.fromkeys(directories)),
        files=frozenset((full, *files, *targets)),
        folder=folder,
        parent=parent,
        awaited="" if through_link else os.path.relpath(full, parent).split(os.sep)[0],
    )


class SettledReader:
    """Reads object files at moments when nobody writes to them, told by `notices`.

    `wake` is a descriptor that ends every wait once it is readable. Raises `InotifyError`.
    """

    def __init__(self, path: str, notices: Inotify, wake: int) -> None:
        self._path = path
        self._notices = notices
        self._poll = select.poll()
        self._poll.register(notices.fileno(), select.POLLIN)
        self._poll.register(wake, select.POLLIN)
        self._unfinished: set[tuple[str, str]] = set()
        self._places = places_of(path)
        notices.watch(self._places.directories)

    def read(self) -> PathSnapshot:
        """Read until nothing changed meanwhile, the set of directories to watch included."""
        deadline = time.monotonic() + PATIENCE
        while True:
            reading = read_files(self._path)
            self._places = places_of(self._path)
            again = self._notices.watch(self._places.directories)
            again |= self._take_in_notices()
            left = deadline - time.monotonic()
            if left <= 0 or not (again or self._unfinished):
                break
            if not again and self._is_over(left):
                break
        self._unfinished.clear()
        return reading

    def wait(self) -> None:
        """Return once the files should be read again, or on `wake`."""
        deadline = None
        while not self._is_over(deadline and max(0.0, deadline - time.monotonic())):
            if self._take_in_notices():
                return
            if self._unfinished and deadline is None:
                deadline = time.monotonic() + PATIENCE

    def _is_over(self, seconds: float | None) -> bool:
        """Wait for notices; tell whether the wait is over for another reason: `wake`, or no more patience."""
        ready = self._poll.poll(None if seconds is None else seconds * 1000)
        return [descriptor for descriptor, _ in ready] != [self._notices.fileno()]

    def _take_in_notices(self) -> bool:
        """Remember which files are being written; tell whether there is a reason to read again."""
        news = False
        for event in self._notices.read():
            file = (event.directory, event.name)
            if event.mask & IN_MODIFY or _is_being_made(event):
                if self._places.hold(event):
                    self._unfinished.add(file)
            elif self._places.concern(event):
                self._unfinished.discard(file)
                news = True
        return news


def _is_being_made(event: InotifyEvent) -> bool:
    """Tell whether another notice will follow when the file is written: not for links and folders."""
    if not event.mask & IN_CREATE or event.mask & IN_ISDIR:
        return False
    try:
        made = os.lstat(os.path.join(event.directory, event.name))
    except OSError:
        return False
    return stat.S_ISREG(made.st_mode) and made.st_nlink == 1


log = logging.getLogger(__name__)


class PathWatcher:
    """Hands readings of `path` (see `read_files`) to `take`: one at the start, and one after each change.

    `take` is called from a thread called `name` and must not raise; once it returns False, following is over. Where the
    kernel gives no notices of changes, the path is read every `period` seconds instead.
    """

    def __init__(self, path: str, take: Callable[[PathSnapshot], bool], *, name: str, period: float) -> None:
        self._path, self._take = path, take
        self._name, self._period = name, period
        self._stopping = threading.Event()
        self._wake = -1
        self._thread: threading.Thread | None = None

    @property
    def stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start the thread."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name=self._name, daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread; wait at most `timeout` seconds for a call of `take` that is under way, and make no other."""
        if self._thread is None:
            return
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout)
        if not self._thread.is_alive():
            os.close(self._wake)
        self._thread = None

    def _follow(self) -> None:
        try:
            with Inotify() as notices:
                reader = SettledReader(self._path, notices, self._wake)
                while self._go_on(reader.read()):
                    reader.wait()
        except InotifyError as error:
            log.warning(
                "%s: the kernel gives no notice of changes (%s): reading every %g s instead",
                self._path,
                error.strerror,
                self._period,
            )
            while self._go_on(read_files(self._path)):
                self._stopping.wait(self._period)

    def _go_on(self, reading: PathSnapshot) -> bool:
        return not self.stopping and self._take(reading) and not self.stopping
