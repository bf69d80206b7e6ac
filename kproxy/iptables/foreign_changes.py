"""Find out whether other processes have changed rules, without reading the rules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol


class CommitCount:
    """Counts the transactions that this process has sent to the kernel."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield input for `iptables-restore` unchanged, and count its transactions."""
        for text in texts:
            self.count += text.count("COMMIT\n")
            yield text


class ForeignChanges(Protocol):
    """Tells apart changes to rules by this process and changes by other processes.

    If the state of the kernel cannot be read, `now` and `latest` raise `OSError`, and a change by this process counts
    as a change by another one.
    """

    def own_changes(self) -> AbstractContextManager[CommitCount]:
        """Return a context in which this process changes rules. The number of transactions must be counted in it."""

    def now(self) -> int | None:
        """Return a number that differs from earlier ones if another process has changed rules since.

        Return None while this process is changing rules.
        """

    def latest(self) -> int:
        """Return the number as of the latest time at which this process was not changing rules."""


class GenerationCounter:
    """Notices nf_tables transactions of other processes in this network namespace.

    Each transaction increments the generation ID, which all tables and families share. Transactions of this process
    that run at the same time cannot be told apart. Therefore, the generation ID is compared when none is running: it
    must have grown by the number of transactions that this process has sent. If some of them changed nothing or failed,
    this looks like a change by another process, which costs no more than a comparison.
    """

    def __init__(self, read_generation: Callable[[], int]) -> None:
        self._read_generation = read_generation
        self._lock = threading.Lock()
        self._running = 0
        self._expected = 0
        self._changes = 0

    @contextmanager
    def own_changes(self) -> Iterator[CommitCount]:
        """See `ForeignChanges`."""
        with self._lock:
            with suppress(OSError):
                self._update()
            self._running += 1
        commits = CommitCount()
        try:
            yield commits
        finally:
            with self._lock:
                self._running -= 1
                self._expected += commits.count
                with suppress(OSError):
                    self._update()

    def now(self) -> int | None:
        """See `ForeignChanges`."""
        with self._lock:
            self._update()
            return None if self._running else self._changes

    def latest(self) -> int:
        """See `ForeignChanges`."""
        with self._lock:
            self._update()
            return self._changes

    def _update(self) -> None:
        if self._running:
            return
        generation = self._read_generation()
        if generation != self._expected:
            self._expected = generation
            self._changes += 1


class LayoutObserver:
    """Notices changes by other processes to tables of iptables-legacy, if they change the tables' layout.

    A change is also noticed if it happened before a change by this process, but not if it happened during one.
    """

    def __init__(self, read_layout: Callable[[], Hashable]) -> None:
        """`read_layout` returns a value that changes with the number and the sizes of the rules."""
        self._read_layout = read_layout
        self._lock = threading.Lock()
        self._running = False
        self._layout: Hashable = None
        self._changes = 0

    @contextmanager
    def own_changes(self) -> Iterator[CommitCount]:
        """See `ForeignChanges`."""
        with self._lock:
            with suppress(OSError):
                self._update()
            self._running = True
        try:
            yield CommitCount()
        finally:
            with self._lock:
                self._running = False
                with suppress(OSError):
                    self._layout = self._read_layout()

    def now(self) -> int | None:
        """See `ForeignChanges`."""
        with self._lock:
            self._update()
            return None if self._running else self._changes

    def latest(self) -> int:
        """See `ForeignChanges`."""
        with self._lock:
            self._update()
            return self._changes

    def _update(self) -> None:
        if self._running:
            return
        layout = self._read_layout()
        if layout != self._layout:
            self._layout = layout
            self._changes += 1
