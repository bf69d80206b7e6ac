"""Log lines about syncs: one line per sync, or a summary once a minute. Pure.

Callers pass the current monotonic time in seconds.
"""

from __future__ import annotations

from kproxy.model.sync_report import ServiceCounts
from kproxy.model.types import Family

PERIOD = 60.0
"""The minimum number of seconds between two summaries."""


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `1 service`, `1,000 services`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """Format a duration in seconds: `4 ms`, `1.2 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def counts_text(counts: ServiceCounts) -> str:
    """Format the nonzero counts as ` (2 without endpoints, ...)`. Return "" if all counts are zero."""
    parts = (
        (counts.without_endpoints, "without endpoints"),
        (counts.dropped, "dropped by policy Local"),
        (counts.in_conflict, "in conflict"),
        (counts.quarantined, "quarantined"),
        (counts.invalid, "invalid"),
        (counts.ignored, "ignored"),
    )
    text = ", ".join(f"{number:,} {condition}" for number, condition in parts if number)
    return f" ({text})" if text else ""


def synced_text(family: Family, services: int, seconds: float, counts: ServiceCounts, *, complete: bool) -> str:
    """Format the log line about one sync."""
    what = counted(services, "service" if complete else "changed service")
    return f"{family.value}: synced {what} in {seconds_text(seconds)}{counts_text(counts)}"


class Summary:
    """Aggregates the successful syncs of one family until a summary is due."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._since = 0.0
        self._counts = ServiceCounts()
        self._reset()

    def _reset(self) -> None:
        self._syncs = self._full_syncs = self._changed_services = self._all_services = 0
        self._longest = 0.0

    def add(self, now: float, services: int, seconds: float, counts: ServiceCounts, *, complete: bool) -> None:
        """Add a sync that ended at `now` and took `seconds`.

        The sync covered all Services if `complete`, otherwise only Services that may have changed.
        """
        if not self._syncs:
            self._since = now
        self._syncs += 1
        if complete:
            self._full_syncs += 1
            self._all_services = services
        else:
            self._changed_services += services
        self._longest = max(self._longest, seconds)
        self._counts = counts

    def wait(self, now: float) -> float | None:
        """Return the seconds until the next summary is due, or None if there is nothing to summarize."""
        return max(0.0, self._since + PERIOD - now) if self._syncs else None

    def flush(self, now: float) -> str:
        """If the summary is due, return it and start the next one. Otherwise return ""."""
        if self.wait(now) != 0.0:
            return ""
        parts = []
        if self._syncs > self._full_syncs:
            parts.append(counted(self._changed_services, "changed service"))
        if self._full_syncs:
            parts.append(f"{self._full_syncs:,} of all {counted(self._all_services, 'service')}")
        text = (
            f"{self._family.value}: {counted(self._syncs, 'sync')} in the last {now - self._since:.0f} s: "
            f"{', '.join(parts)}, the longest took {seconds_text(self._longest)}{counts_text(self._counts)}"
        )
        self._reset()
        return text
