"""Reading a file or folder again whenever it changes, in a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from kproxy.host.inotify import Inotify, InotifyError
from kproxy.kube.file_reading import Reading, SettledReader, read_files

log = logging.getLogger(__name__)


class PathFollower:
    """Hands readings of `path` (see `read_files`) to `take`: one at the start, and one after each change.

    `take` is called from a thread called `name` and must not raise; once it returns False, following is over. Where the
    kernel gives no notices of changes, the path is read every `period` seconds instead. `patience` is how many seconds
    `stop` waits for a `take` that is under way.
    """

    def __init__(
        self, path: str, take: Callable[[Reading], bool], *, name: str, period: float, patience: float
    ) -> None:
        self._path, self._take = path, take
        self._name, self._period, self._patience = name, period, patience
        self._stopping = threading.Event()
        self._wake = -1
        self._thread: threading.Thread | None = None

    @property
    def stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start the thread. It is a daemon: a process may end without `stop`."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. `take` is not called any more afterwards, unless it is under way."""
        if self._thread is None:
            return
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(self._patience)
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

    def _go_on(self, reading: Reading) -> bool:
        return not self.stopping and self._take(reading) and not self.stopping
