"""When to check the parts of the rules that other processes touched. Pure.

Callers pass the current monotonic time in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from kproxy.model.drift import Part, Touched

FIRST_DELAY_SECONDS = 0.25
"""Seconds between the first and the second repair of a part. The interval doubles with each further repair."""
MAX_DELAY_SECONDS = 60.0
"""Maximum number of seconds between two repairs of a part."""
CALM_SECONDS = 120.0
"""If a part did not need a repair for this number of seconds, its next repair counts as the first one."""


class PartHistory(Struct, frozen=True):
    """The repairs of a part: when the last one was made, and the delay until the next check."""

    repaired_at: float
    delay: float

    def is_calm(self, now: float) -> bool:
        """Return whether the part has not needed a repair for a long time."""
        return now - self.repaired_at > CALM_SECONDS


class RepairSchedule:
    """The touched parts of one family's rules, and when to check each of them.

    A part is checked at once, unless it was repaired recently: if another program keeps changing the part, the interval
    between the repairs grows, so that the two programs do not keep the node busy.
    """

    def __init__(self) -> None:
        self._waiting: dict[Part, float] = {}
        self._by: set[str] = set()
        self._history: dict[Part, PartHistory] = {}

    def touch(self, tables: Mapping[str, Touched], now: float) -> None:
        """Record what other processes touched in each table."""
        for table, touched in tables.items():
            self._by |= touched.by
            for part in touched.parts(table):
                history = self._history.get(part)
                due = now if history is None else max(now, history.repaired_at + history.delay)
                self._waiting.setdefault(part, due)

    def wait(self, now: float) -> float | None:
        """Return the seconds until a part must be checked, or None if no part was touched."""
        return max(0.0, min(self._waiting.values()) - now) if self._waiting else None

    def take(self, now: float) -> dict[str, Touched]:
        """Return the parts that must be checked now, by table, and forget that they were touched."""
        taken: dict[str, Touched] = {}
        for part in [part for part, due in self._waiting.items() if due <= now]:
            del self._waiting[part]
            taken.setdefault(part.table, Touched(by=set(self._by))).add_part(part)
        if not self._waiting:
            self._by.clear()
        return taken

    def repaired(self, parts: Iterable[Part], now: float) -> dict[Part, float]:
        """Record that parts had to be repaired. Return those that were repaired repeatedly, with their new delays."""
        self._history = {part: each for part, each in self._history.items() if not each.is_calm(now)}
        repeated = {}
        for part in parts:
            before = self._history.get(part)
            delay = FIRST_DELAY_SECONDS if before is None else min(2 * before.delay, MAX_DELAY_SECONDS)
            self._history[part] = PartHistory(now, delay)
            if before is not None:
                repeated[part] = delay
        return repeated
