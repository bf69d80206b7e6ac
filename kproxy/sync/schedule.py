"""When to sync a family: minimum intervals, and retries with exponential backoff. Pure.

Callers pass the current monotonic time in seconds.
"""

from __future__ import annotations

FIRST_RETRY_SECONDS = 0.5
"""Seconds before the first retry of a failed sync. The delay doubles with each further failure."""


class Schedule:
    """Decides when pending changes are programmed.

    The first change after a quiet period is programmed at once. After that, syncs start at least `min_interval` seconds
    apart, and each sync programs all changes that are pending when it starts. A failed sync is retried after a delay,
    which doubles with each further failure up to `max_retry` seconds. If another change arrives during the delay, the
    retry waits only for `min_interval`, because the change may fix the problem.
    """

    def __init__(self, *, min_interval: float, max_retry: float) -> None:
        self._min_interval = min_interval
        self._max_retry = max_retry
        self._pending = False
        self._not_before = float("-inf")
        self._retry_at = float("-inf")
        self._retry_delay = FIRST_RETRY_SECONDS

    def request(self) -> None:
        """Request a sync."""
        self._pending = True
        self._retry_at = float("-inf")

    def wait(self, now: float) -> float | None:
        """Return the seconds until the next sync is due, 0.0 if it is already due, or None if no sync is pending."""
        return max(0.0, self._not_before - now, self._retry_at - now) if self._pending else None

    def started(self, now: float) -> None:
        """Record that a sync starts. It covers all requests that were made so far."""
        self._pending = False
        self._not_before = now + self._min_interval

    def succeeded(self) -> None:
        """Record that the sync succeeded."""
        self._retry_delay = FIRST_RETRY_SECONDS

    def failed(self, now: float) -> None:
        """Record that the sync failed. Its changes are still pending."""
        delay = min(self._retry_delay, self._max_retry)
        self._retry_delay = 2 * delay
        self._pending = True
        self._retry_at = now + delay
