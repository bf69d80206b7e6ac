"""Noticing that the configuration file is not any more what was loaded."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable

from kproxy.host.inotify import Inotify, InotifyError
from kproxy.kube.file_reading import Reading, SettledReader, read_files

RELOAD_PERIOD = 10.0
"""Seconds between looks at the file where the kernel gives no notice of changes."""

STOP_TIMEOUT = 1.0
"""Seconds that `ConfigWatch.stop` waits for its thread, which takes longer only while `changed` does."""

log = logging.getLogger(__name__)


class ConfigWatch:
    """Calls `changed` once, as soon as the content of a file differs from `loaded`; then it is over.

    `changed` is called from a thread of its own and must not raise. However the file is replaced counts: written in
    place, renamed into place, or by another target of a link on the way, as in a mounted ConfigMap. While it cannot be
    read, because it was deleted for example, nothing happens: what was loaded is better than nothing. What is no
    file, such as a pipe, can be read only once and is not followed.
    """

    def __init__(self, path: str, loaded: bytes, changed: Callable[[], None]) -> None:
        self._path, self._loaded, self._changed = path, loaded, changed
        self._missed = False
        self._stopping = threading.Event()
        self._wake = -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread that follows the file. It is a daemon: a process may end without `stop`."""
        if _is_stream(self._path):
            log.info("%s: is no file; changes are not followed", self._path)
            return
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name="config-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. `changed` is not called any more afterwards, unless it is under way."""
        if self._thread is None:
            return
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(STOP_TIMEOUT)
        if not self._thread.is_alive():
            os.close(self._wake)
        self._thread = None

    def _follow(self) -> None:
        try:
            with Inotify() as notices:
                reader = SettledReader(self._path, notices, self._wake)
                while not self._is_over(reader.read()):
                    reader.wait()
        except InotifyError as error:
            log.warning(
                "%s: the kernel gives no notice of changes (%s): looking every %g s instead",
                self._path,
                error.strerror,
                RELOAD_PERIOD,
            )
            while not self._is_over(read_files(self._path)):
                self._stopping.wait(RELOAD_PERIOD)

    def _is_over(self, reading: Reading) -> bool:
        """Take in what was read; tell whether there is nothing left to wait for."""
        if self._stopping.is_set():
            return True
        content = reading.files.get(self._path)
        if not isinstance(content, bytes):
            if not self._missed:
                log.warning("%s: cannot be read any more; what was loaded stays in force", self._path)
            self._missed = True
            return False
        if content == self._loaded:
            if self._missed:
                log.info("%s: is there again, unchanged", self._path)
            self._missed = False
            return False
        log.info("%s: has changed", self._path)
        self._changed()
        return True


def _is_stream(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False  # it may come back
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
