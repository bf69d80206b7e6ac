"""Watch a file, or a directory of files with API objects, and read it again whenever it changes."""

from __future__ import annotations

import logging
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

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
from kproxy.model.log_throttle import LogThrottle
from kproxy.model.restarts import Restarts

SUFFIXES = (".json", ".yaml", ".yml")
"""In a directory, files with these suffixes are object files: files that contain API objects."""
SETTLE_TIMEOUT = 1.0
"""Maximum number of seconds to wait for other processes to finish writing the files.

After that, the files are read as they are.
"""
FIRST_RETRY, LONGEST_RETRY = 1.0, 10.0
"""Seconds before a path that cannot be read is read again. Each delay is twice as long, up to the longest one."""
log = logging.getLogger(__name__)


class PathSnapshot(Struct, frozen=True):
    """The result of reading a path: the content of each file, or why that file cannot be read.

    If no file was found or the path cannot be read, `files` is empty and `problem` gives the reason. Otherwise
    `problem` is None.
    """

    files: Mapping[str, bytes | FileProblem]
    problem: FileProblem | None = None

    @property
    def unreadable(self) -> FileProblem | None:
        """The first problem, or None if everything was read."""
        problems = (content for content in self.files.values() if isinstance(content, FileProblem))
        return self.problem or next(problems, None)


def read_path(path: str) -> PathSnapshot:
    """Read a file, or the files of a directory whose names have one of the `SUFFIXES`.

    As in `kubectl apply -f`, subdirectories are ignored. Hidden files are ignored, too: in a mounted ConfigMap, the
    hidden entries refer to the same files as the visible entries.
    """
    try:
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                return PathSnapshot({path: file.read()})
        contents = {name: _read_file(name) for name in _object_files(path)}
    except OSError as error:
        return PathSnapshot({}, FileProblem(path, _reason(error)))
    files = {name: content for name, content in contents.items() if content is not None}
    if not files:
        patterns = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        return PathSnapshot({}, FileProblem(path, f"directory contains no object files ({patterns})"))
    return PathSnapshot(files)


def _object_files(directory: str) -> list[str]:
    return sorted(os.path.join(directory, name) for name in os.listdir(directory) if _is_object_file(name))


def _is_object_file(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _read_file(path: str) -> bytes | FileProblem | None:
    """Return the content of a file, or the reason why it cannot be read.

    Return None if the path is not a regular file, or if the file was deleted in the meantime.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return FileProblem(path, "dangling symbolic link") if os.path.islink(path) else None
    except OSError as error:
        return FileProblem(path, _reason(error))


def _reason(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


class WatchedPaths(Struct, frozen=True):
    """The directories to watch for a path, and the relevant entries in them.

    `files` contains the path itself, the files to read, and the targets of the files that are symbolic links.
    `directory` is the path if it is a directory, otherwise "". `parent` is the path's nearest existing ancestor
    directory. In `parent`, only changes to the entry `awaited` are relevant. If `awaited` is "", changes to any entry
    of `parent` are relevant.
    """

    directories: tuple[str, ...]
    files: frozenset[str]
    directory: str
    parent: str
    awaited: str

    def is_object_file(self, event: InotifyEvent) -> bool:
        """Return whether an event is about an object file."""
        return os.path.join(event.directory, event.name) in self.files or (
            event.directory == self.directory and _is_object_file(event.name)
        )

    def requires_read(self, event: InotifyEvent) -> bool:
        """Return whether an event is a reason to read the path again."""
        if not event.name:  # a watched directory is gone, or events were lost
            return True
        if event.mask & (IN_ATTRIB | IN_MODIFY | IN_CLOSE_WRITE):
            return self.is_object_file(event)
        return event.directory != self.parent or self.awaited in {"", event.name}


def find_watched_paths(path: str) -> WatchedPaths:
    """Return which directories to watch to detect changes to a path's object files. The path need not exist."""
    full = os.path.abspath(path)
    parent = os.path.dirname(full)
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
    directory = full if os.path.isdir(full) else ""
    try:
        files = _object_files(full) if directory else [full]
    except OSError:
        files = []
    targets = [os.path.realpath(file) for file in files if os.path.islink(file)]
    directories = [parent, *([directory] if directory else []), *map(os.path.dirname, targets)]
    # A symbolic link may refer to another link in its directory: in a ConfigMap volume, files link to `..data/file`.
    is_linked_file = not directory and os.path.islink(full)
    return WatchedPaths(
        directories=tuple(dict.fromkeys(directories)),
        files=frozenset((full, *files, *targets)),
        directory=directory,
        parent=parent,
        awaited="" if is_linked_file else os.path.relpath(full, parent).split(os.sep)[0],
    )


class SettledReader:
    """Reads a path when, according to inotify, no process is writing to its object files.

    `read` and `wait` stop waiting when the file descriptor `wake` becomes readable. The constructor and `read` may
    raise `InotifyError`.
    """

    def __init__(self, path: str, inotify: Inotify, wake: int) -> None:
        self._path = path
        self._inotify = inotify
        self._poll = select.poll()
        self._poll.register(inotify.fileno(), select.POLLIN)
        self._poll.register(wake, select.POLLIN)
        self._being_written: set[tuple[str, str]] = set()
        self._watched = find_watched_paths(path)
        inotify.watch(self._watched.directories)

    def read(self) -> PathSnapshot:
        """Read the path repeatedly, until neither its files nor the directories to watch change during a read.

        Return the result of the last read. After `SETTLE_TIMEOUT` seconds, return it even if files are still changing.
        """
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while True:
            snapshot = read_path(self._path)
            self._watched = find_watched_paths(self._path)
            changed = self._inotify.watch(self._watched.directories)
            changed |= self._process_events()
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not (changed or self._being_written):
                break
            if not changed and self._wait_for_events(remaining):
                break
        self._being_written.clear()
        return snapshot

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the path should be read again or `wake` is readable, at most `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        settling = False
        while not self._wait_for_events(None if deadline is None else max(0.0, deadline - time.monotonic())):
            if self._process_events():
                return
            if self._being_written and not settling:
                settling = True
                settled = time.monotonic() + SETTLE_TIMEOUT
                deadline = settled if deadline is None else min(deadline, settled)

    def _wait_for_events(self, seconds: float | None) -> bool:
        """Wait for inotify events for at most `seconds`; None means no timeout.

        Return False if events arrived. Return True if `wake` is readable or the wait timed out.
        """
        ready = self._poll.poll(None if seconds is None else seconds * 1000)
        return [descriptor for descriptor, _ in ready] != [self._inotify.fileno()]

    def _process_events(self) -> bool:
        """Track which files are being written. Return whether an event is a reason to read the path again."""
        changed = False
        for event in self._inotify.read():
            file = (event.directory, event.name)
            if event.mask & IN_MODIFY or _is_being_created(event):
                if self._watched.is_object_file(event):
                    self._being_written.add(file)
            elif self._watched.requires_read(event):
                self._being_written.discard(file)
                changed = True
        return changed


def _is_being_created(event: InotifyEvent) -> bool:
    """Return whether an event reports a new regular file, whose content has yet to be written.

    Another event follows once the file has been written. No other event follows for links and directories: they are
    complete as soon as they exist.
    """
    if not event.mask & IN_CREATE or event.mask & IN_ISDIR:
        return False
    try:
        status = os.lstat(os.path.join(event.directory, event.name))
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


class PathWatcher:
    """Calls `callback` with a snapshot of `path` (see `read_path`) at the start and after each change.

    `callback` runs in a thread called `name`. Watching ends when `callback` returns False. While inotify does not work,
    the path is read every `poll_period` seconds instead.

    Nothing is lost if the system runs out of resources: while a file cannot be read, it is read again at intervals of 1
    to 10 s, even if it does not change. If `callback` or the watcher raises an exception, the exception is logged, and
    the watcher starts over after a pause.
    """

    def __init__(self, path: str, callback: Callable[[PathSnapshot], bool], *, name: str, poll_period: float) -> None:
        self._path, self._callback = path, callback
        self._name, self._poll_period = name, poll_period
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
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except BaseException:  # for example, there are too many threads
            os.close(self._wake)
            raise
        self._thread = thread

    def stop(self, timeout: float) -> None:
        """Stop the thread. Afterwards, `callback` is not called again.

        If `callback` is running, wait at most `timeout` seconds for it to return.
        """
        if self._thread is None:
            return
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout)
        if not self._thread.is_alive():
            os.close(self._wake)
        self._thread = None

    def _run(self) -> None:
        restarts = Restarts(f"{self._name}: {self._path}")
        polling = LogThrottle()
        while not self.stopping:
            try:
                try:
                    if not self._watch(polling):
                        return
                except InotifyError as error:
                    if polling.is_due(time.monotonic()):
                        log.warning(
                            "%s: cannot watch for changes (%s), polling every %g s instead",
                            self._path,
                            error.strerror,
                            self._poll_period,
                        )
                    if not self._deliver(read_path(self._path)):
                        return
                    self._stopping.wait(self._poll_period)
            except Exception as error:  # no error may stop the updates
                delay, text = restarts.failed(error, time.monotonic())
                with suppress(MemoryError):
                    log.log(logging.ERROR if text else logging.DEBUG, "%s", text or error)
                    log.debug("%s", self._path, exc_info=error)
                self._stopping.wait(delay)

    def _watch(self, polling: LogThrottle) -> bool:
        """Read the path at the start and after each change, until `callback` or `stop` ends this. Return False then.

        Raises `InotifyError`.
        """
        with Inotify() as inotify:
            reader = SettledReader(self._path, inotify, self._wake)
            polling.reset()
            delay = FIRST_RETRY
            while True:
                snapshot = reader.read()
                if not self._deliver(snapshot):
                    return False
                if snapshot.unreadable is None:
                    delay = FIRST_RETRY
                    reader.wait()
                else:
                    reader.wait(delay)
                    delay = min(2 * delay, LONGEST_RETRY)

    def _deliver(self, snapshot: PathSnapshot) -> bool:
        """Call `callback`. Return whether to continue watching."""
        return not self.stopping and self._callback(snapshot) and not self.stopping
