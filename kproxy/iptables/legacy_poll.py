"""A thread that notices when other processes change the tables of iptables-legacy.

The kernel sends no notifications about these tables.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from kproxy.host.commands import CommandError
from kproxy.iptables.save_restore import TABLES
from kproxy.model.drift import RulesChanged, Touched
from kproxy.model.restarts import Restarts
from kproxy.model.types import Family

POLL_SECONDS = 1.0
"""Seconds between two polls.

A poll that reads only the layout of the tables takes about 30 µs per family, whatever the number of rules.
"""

log = logging.getLogger(__name__)


class PolledTables(Protocol):
    """The tables of one family. `kproxy.iptables.runner.IptablesRunner` implements it."""

    def foreign_changes(self) -> int | None:
        """Return a number that differs from earlier ones if another process has changed a table.

        Return None while this process is changing rules. Raises `OSError` or `CommandError`.
        """


class LegacyPoll:
    """Reports changes by other processes: at once if they change the number or the size of a table's rules.

    Rules that are replaced by rules of the same size are found later (`kproxy.iptables.foreign_changes.TableObserver`),
    and in large tables only by the periodic comparison.
    """

    def __init__(
        self,
        families: Mapping[Family, PolledTables],
        on_change: Callable[[RulesChanged], None],
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Create the poll, but do not start its thread yet. `on_change` must not block."""
        self._families = families
        self._on_change = on_change
        self._poll_seconds = poll_seconds
        self._known: dict[Family, int] = {}
        self._failed = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rules-poll", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        with suppress(MemoryError):  # the first poll of the thread then records the current state
            self.poll()
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread, and wait at most `timeout` seconds for it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        restarts = Restarts("polls of the iptables-legacy tables")
        delay = self._poll_seconds
        while not self._stopping.wait(delay):
            delay = self._poll_seconds
            try:
                self.poll()
            except Exception as error:  # noqa: BLE001 - for example, there is not enough memory
                delay, message = restarts.failed(error, time.monotonic())
                if message:
                    with suppress(MemoryError):
                        log.error("%s", message)

    def poll(self) -> None:
        """Report what has changed since the previous poll. The first poll only records the current state."""
        for family, tables in self._families.items():
            try:
                changes = tables.foreign_changes()
            except (OSError, CommandError) as error:
                if not self._failed:  # the periodic comparison finds what the poll misses
                    log.warning("%s: cannot check whether the iptables-legacy tables changed: %s", family.value, error)
                self._failed = True
                continue
            if changes is None:
                continue
            if changes != self._known.setdefault(family, changes):
                everything = Touched(everything=True)
                self._on_change(RulesChanged({(family, table): everything for table in TABLES}))
                self._known[family] = changes  # afterwards, because there may not be enough memory for the report
