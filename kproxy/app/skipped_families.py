"""A thread that notices when an IP family that was skipped at startup works after all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from kproxy.host.commands import CommandError
from kproxy.model.restarts import Restarts
from kproxy.model.types import Family
from kproxy.nftables.probe import NftablesUnsupportedError

FIRST_PROBE_SECONDS = 5.0
MAX_PROBE_SECONDS = 600.0
"""Seconds from startup to the first probe, and the limit of the interval, which doubles after each probe.

Most causes last: IPv6 is disabled, or the kernel lacks a table. Others pass: a program failed because the node was
short of memory or descriptors, or a kernel module was loaded later.
"""

log = logging.getLogger(__name__)


class SkippedFamilies:
    """Probes the families that were skipped at startup, until one works."""

    def __init__(
        self,
        families: Collection[Family],
        probe: Callable[[Family], object],
        on_works: Callable[[Family], object],
        *,
        first_probe: float = FIRST_PROBE_SECONDS,
    ) -> None:
        """Create the component, but do not start its thread yet.

        `probe` raises `CommandError` (or its subclass `InconclusiveError`), `NftablesUnsupportedError` or `OSError` if
        the family does not work. `on_works` is called at most once, in the thread of this component.
        """
        self._families = tuple(families)
        self._probe, self._on_works, self._first_probe = probe, on_works, first_probe
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skipped-families", daemon=True)

    def start(self) -> None:
        """Start the thread, if a family was skipped."""
        if self._families:
            self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread, and wait at most `timeout` seconds for it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        restarts = Restarts("probes of skipped IP families")
        interval = self._first_probe
        while not self._stopping.wait(interval):
            interval = min(2 * interval, MAX_PROBE_SECONDS)
            try:
                works = next(filter(self._works, self._families), None)
            except Exception as error:  # noqa: BLE001 - for example, there is not enough memory
                _, message = restarts.failed(error, time.monotonic())
                if message:
                    with suppress(MemoryError):
                        log.error("%s", message)
                continue
            if works is not None:
                self._on_works(works)
                return

    def _works(self, family: Family) -> bool:
        try:
            self._probe(family)
        except (CommandError, NftablesUnsupportedError, OSError):
            return False
        return True
