"""When to check the parts of the rules that other processes touched. Pure.

Callers pass the current monotonic time in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from kproxy.model.drift import Part, Touched

BURST = 20
"""Number of repairs of a part that may follow each other without a delay."""
REFILL_SECONDS = 2.0
"""For each period of this many seconds without a repair, one more repair of a part needs no delay, up to `BURST`."""
FIRST_DELAY_SECONDS = 1.0
"""Seconds until the next check of a part, after the first repair beyond `BURST`. They double with each further one."""
MAX_DELAY_SECONDS = 60.0
"""Maximum number of seconds between two repairs of a part."""


class PartHistory(Struct, frozen=True):
    """The repairs of a part.

    `allowance` is the number of repairs without a delay that were left after the last repair, which was made at
    `repaired_at`. `delay` is the number of seconds to wait before the next check.
    """

    allowance: float
    repaired_at: float
    delay: float

    def allowance_at(self, now: float) -> float:
        """Return how many repairs may follow each other without a delay."""
        return min(BURST, self.allowance + (now - self.repaired_at) / REFILL_SECONDS)


class RepairSchedule:
    """The touched parts of one family's rules, and when to check each of them.

    A part is checked at once, unless it was repaired many times recently: if another program keeps changing the part,
    the interval between the repairs grows, so that the two programs do not keep the node busy.
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
        """Record that parts had to be repaired. Return those whose next repair is delayed, with the delays."""
        self._history = {part: each for part, each in self._history.items() if each.allowance_at(now) < BURST}
        delayed = {}
        for part in parts:
            before = self._history.get(part, PartHistory(BURST, now, 0.0))
            allowance = before.allowance_at(now)
            if allowance >= 1.0:
                self._history[part] = PartHistory(allowance - 1.0, now, 0.0)
            else:
                delay = min(max(FIRST_DELAY_SECONDS, 2 * before.delay), MAX_DELAY_SECONDS)
                self._history[part] = PartHistory(allowance, now, delay)
                delayed[part] = delay
        return delayed
