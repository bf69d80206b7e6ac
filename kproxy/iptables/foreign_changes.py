"""Find out whether other processes have changed rules, without reading the rules."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from time import monotonic, thread_time
from typing import Protocol

CONTENT_CPU_SHARE = 0.005
"""The share of a CPU that reading all rules of one family of iptables-legacy may take."""
CONTENT_RETRY_SECONDS = 60.0
"""Seconds until the next attempt to read the rules of iptables-legacy after a failure."""
QUICK_CONTENT_SECONDS = 0.002
"""If reading all rules takes less CPU time than this, they are read after each change by this process."""


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
    must have grown by the number of transactions that this process has sent. If some of them changed nothing, this
    looks like a change by another process, which costs no more than a comparison. A failure always counts as such a
    change: nobody knows how many transactions the kernel has accepted.
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
        succeeded = False
        try:
            yield commits
            succeeded = True
        finally:
            with self._lock:
                self._running -= 1
                self._expected += commits.count
                self._changes += not succeeded
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


class TableObserver:
    """Notices changes by other processes to tables of iptables-legacy.

    A change of the tables' layout is noticed at once. A change of the rules that leaves the layout as it was is noticed
    within a time that depends on how much CPU time it takes to read the rules: `CONTENT_CPU_SHARE` is not exceeded.

    A change is also noticed if it happened before a change by this process, but not if it happened during one. If the
    rules are too many to read them after each change by this process, other processes' changes of the content are
    noticed only from the next look at the content on.
    """

    def __init__(self, read_layout: Callable[[], Hashable], read_content: Callable[[], Hashable]) -> None:
        """Create an observer.

        `read_layout` returns a value that changes with the number and the sizes of the rules. `read_content` returns a
        value that changes with any rule, or None if the rules are too many to read them.
        """
        self._read_layout = read_layout
        self._read_content = read_content
        self._lock = threading.Lock()
        self._running = False
        self._layout: Hashable = None
        self._content: Hashable = None
        self._content_cost = 0.0
        self._next_content_at = -math.inf
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
                    self._record_content()

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
            self._record_content()
        elif monotonic() >= self._next_content_at:
            content = self._measured_content()
            if content is None:
                return
            if self._content is not None and content != self._content:
                self._changes += 1
            self._content = content

    def _record_content(self) -> None:
        """Record the current content if it can be read quickly. Otherwise, `_update` records it later."""
        self._content = None
        if self._content_cost <= QUICK_CONTENT_SECONDS:
            self._content = self._measured_content()

    def _measured_content(self) -> Hashable:
        began = thread_time()
        try:
            content = self._read_content()
        except (OSError, MemoryError):
            self._next_content_at = monotonic() + CONTENT_RETRY_SECONDS
            return None
        self._content_cost = thread_time() - began
        self._next_content_at = monotonic() + self._content_cost / CONTENT_CPU_SHARE
        return content
