"""What is said of syncs: of one on a line, and of many together once a minute. Pure: moments are passed in."""

from __future__ import annotations

from kproxy.model.sync_report import ServiceCounts
from kproxy.model.types import Family

PERIOD = 60.0
"""Seconds between two summaries, at least."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 service`, `1,000 services`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """Return a duration for people: `4 ms`, `1.2 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def tally_text(tally: ServiceCounts) -> str:
    """Return ` (2 without endpoints, ...)`, naming only conditions that some Service is in; "" if none is."""
    parts = (
        (tally.without_endpoints, "without endpoints"),
        (tally.dropped, "dropped by policy Local"),
        (tally.in_conflict, "in conflict"),
        (tally.invalid, "invalid"),
        (tally.ignored, "ignored"),
    )
    said = ", ".join(f"{number:,} {what}" for number, what in parts if number)
    return f" ({said})" if said else ""


def synced_text(family: Family, services: int, seconds: float, tally: ServiceCounts, *, complete: bool) -> str:
    """Return the line about one sync."""
    what = counted(services, "service" if complete else "changed service")
    return f"{family.value}: synced {what} in {seconds_text(seconds)}{tally_text(tally)}"


class Summary:
    """Adds up the syncs of one family until it is time to tell of them."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._since = 0.0
        self._tally = ServiceCounts()
        self._begin()

    def _begin(self) -> None:
        self._syncs = self._complete = self._changed = self._all = 0
        self._longest = 0.0

    def add(self, now: float, services: int, seconds: float, tally: ServiceCounts, *, complete: bool) -> None:
        """Note a sync that succeeded just now, of all Services if `complete`, else of some that may have changed."""
        if not self._syncs:
            self._since = now
        self._syncs += 1
        if complete:
            self._complete += 1
            self._all = services
        else:
            self._changed += services
        self._longest = max(self._longest, seconds)
        self._tally = tally

    def wait(self, now: float) -> float | None:
        """Return in how many seconds the next summary is due, None if there is nothing to tell."""
        return max(0.0, self._since + PERIOD - now) if self._syncs else None

    def take(self, now: float) -> str:
        """Return the summary if it is due, else "", and begin anew after it."""
        if self.wait(now) != 0.0:
            return ""
        parts = []
        if self._syncs > self._complete:
            parts.append(counted(self._changed, "changed service"))
        if self._complete:
            parts.append(f"{self._complete:,} of all {counted(self._all, 'service')}")
        text = (
            f"{self._family.value}: {counted(self._syncs, 'sync')} in the last {now - self._since:.0f} s: "
            f"{', '.join(parts)}, the longest took {seconds_text(self._longest)}{tally_text(self._tally)}"
        )
        self._begin()
        return text
