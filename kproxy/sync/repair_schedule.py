"""When to check the parts of the rules that other processes touched. Pure.

Callers pass the current monotonic time in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.drift import Part, Touched

BURST = 20
"""Number of repairs of a part that may follow each other without a delay."""
FULL_SYNC_COST = 4
"""A full sync that the damage of a table makes necessary counts as this many repairs of the table."""
REFILL_SECONDS = 2.0
"""For each period of this many seconds without a repair, one more repair of a part needs no delay, up to `BURST`.

Each such period also halves the delays that follow. It begins when the part may be checked again: the time that a
damaged part waits for its repair does not count as calm.
"""
FIRST_DELAY_SECONDS = 1.0
"""Seconds until the next check of a part, after the first repair beyond `BURST`. They double with each further one."""
MAX_DELAY_SECONDS = 60.0
"""Maximum number of seconds between two repairs of a part."""


INTACT_SECONDS = 0.25
"""Minimum number of seconds between a check that found a part intact and the next check of the part.

Other tools may change a chain many times a second in which kproxy's rules stay intact, such as POSTROUTING.
"""


class RepairHistory(Struct, frozen=True):
    """The repairs of a part, as of the last one.

    The part may be checked again at `next_check`. At that time, `allowance` is the number of repairs without a delay
    that are left, and `delay` is the last delay in seconds, or 0.0.
    """

    next_check: float
    allowance: float = BURST
    delay: float = 0.0

    def at(self, now: float) -> RepairHistory:
        """Return the history after a calm time until now."""
        periods = max(0.0, now - self.next_check) / REFILL_SECONDS
        allowance = min(BURST, self.allowance + periods)
        return RepairHistory(max(now, self.next_check), allowance, self.delay * 0.5 ** int(periods))

    def repaired(self, now: float, cost: int) -> RepairHistory:
        """Return the history after a repair now, which counts as `cost` repairs."""
        calm = self.at(now)
        if calm.allowance >= cost:
            return RepairHistory(now, calm.allowance - cost, calm.delay)
        delay = min(max(FIRST_DELAY_SECONDS, 2 * calm.delay), MAX_DELAY_SECONDS)
        return RepairHistory(now + delay, calm.allowance, delay)


class Waiting(NamedTuple):
    """A touched part: when it must be checked, and the names of the processes that touched it."""

    due: float
    by: frozenset[str]


class RepairSchedule:
    """The touched parts of one family's rules, and when to check each of them.

    A part is checked at once, unless it was repaired many times recently: if another program keeps changing the part,
    the interval between the repairs grows, so that the two programs do not keep the node busy. In the same way, the
    interval between full syncs grows if another program keeps damaging a table so much that only a full sync restores
    it; meanwhile, all parts of the table wait.
    """

    def __init__(self) -> None:
        self._waiting: dict[Part, Waiting] = {}
        self._repairs: dict[Part, RepairHistory] = {}
        self._full_syncs: dict[str, RepairHistory] = {}
        self._checked: dict[Part, float] = {}
        """The parts that were checked a moment ago and not repaired since, with the times of the checks."""
        self._unfinished: dict[str, float] = {}
        """The tables that the next full sync restores, with the delays that follow."""

    def touch(self, tables: Mapping[str, Touched], now: float) -> None:
        """Record what other processes touched in each table."""
        for table, touched in tables.items():
            by = frozenset(touched.by)
            for part in touched.parts(table):
                before = self._waiting.get(part)
                if before is None:
                    self._waiting[part] = Waiting(self._due(part, now), by)
                elif not by <= before.by:
                    self._waiting[part] = before._replace(by=before.by | by)

    def _due(self, part: Part, now: float) -> float:
        histories = (self._repairs.get(part), self._full_syncs.get(part.table))
        due = max((each.next_check for each in histories if each is not None), default=now)
        return max(due, self._checked[part] + INTACT_SECONDS) if part in self._checked else due

    def wait(self, now: float) -> float | None:
        """Return the seconds until a part must be checked, or None if no part was touched."""
        return max(0.0, min(each.due for each in self._waiting.values()) - now) if self._waiting else None

    def take(self, now: float) -> dict[str, Touched]:
        """Return the parts that must be checked now, by table, and forget that they were touched."""
        taken: dict[str, Touched] = {}
        self._checked = {part: at for part, at in self._checked.items() if now - at < INTACT_SECONDS}
        for part, waiting in [(part, each) for part, each in self._waiting.items() if each.due <= now]:
            del self._waiting[part]
            self._checked[part] = now
            touched = taken.setdefault(part.table, Touched())
            touched.add_part(part)
            touched.by |= waiting.by
        return taken

    def repaired(self, parts: Iterable[Part], now: float) -> dict[Part, float]:
        """Record that parts had to be repaired. Return those whose next repair is delayed, with the delays."""
        self._repairs = {part: each for part, each in self._repairs.items() if each.at(now).allowance < BURST}
        delayed = {}
        for part in parts:
            self._checked.pop(part, None)
            history = self._repairs[part] = self._repairs.get(part, RepairHistory(now)).repaired(now, 1)
            if history.next_check > now:
                delayed[part] = history.delay
        return delayed

    def full_sync_needed(self, tables: Iterable[str], now: float) -> dict[Part, float]:
        """Record that a full sync must restore tables. Return those whose next check is delayed, with the delays.

        The delay begins when that sync ends.
        """
        delayed = {}
        for table in tables:
            history = self._full_syncs.get(table, RepairHistory(now)).repaired(now, FULL_SYNC_COST)
            self._full_syncs[table] = history
            self._unfinished[table] = history.next_check - now
            if history.next_check > now:
                delayed[Part(table, "table")] = history.delay
        return delayed

    def full_sync_ended(self, now: float) -> None:
        """Record that a full sync has restored all rules: the delays of its tables begin."""
        for table, delay in self._unfinished.items():
            self._full_syncs[table] = replace(self._full_syncs[table], next_check=now + delay)
        for part, waiting in self._waiting.items() if self._unfinished else ():
            if part.table in self._unfinished:  # touched during the sync
                self._waiting[part] = waiting._replace(due=max(waiting.due, self._due(part, now)))
        self._unfinished.clear()
