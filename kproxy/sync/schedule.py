"""When to sync. Pure: every moment is passed in, in seconds of any clock that never goes back."""

from __future__ import annotations

FIRST_RETRY_SECONDS = 0.5
"""How soon a failed sync is tried again for the first time; the wait doubles with each further failure."""


class Schedule:
    """Decides when pending changes are programmed.

    The first change after a quiet time goes at once; after that, syncs start at least `min_interval` seconds apart and
    take along whatever has gathered. A failed sync is retried after a wait that grows up to `max_retry` seconds, or
    sooner when another change comes, which may be what was needed.
    """

    def __init__(self, *, min_interval: float, max_retry: float) -> None:
        self._min_interval = min_interval
        self._max_retry = max_retry
        self._pending = False
        self._not_before = float("-inf")
        self._retry_at = float("-inf")
        self._retry = FIRST_RETRY_SECONDS

    def request(self) -> None:
        """Note that something is to be programmed."""
        self._pending = True
        self._retry_at = float("-inf")

    def wait(self, now: float) -> float | None:
        """Return in how many seconds the next sync is due (0.0: now), or None if nothing is pending."""
        return max(0.0, self._not_before - now, self._retry_at - now) if self._pending else None

    def started(self, now: float) -> None:
        """Note that a sync starts with everything that was requested so far."""
        self._pending = False
        self._not_before = now + self._min_interval

    def succeeded(self) -> None:
        """Note that the sync's changes are in the kernel."""
        self._retry = FIRST_RETRY_SECONDS

    def failed(self, now: float) -> None:
        """Note that the sync's changes are still to be made."""
        pause = min(self._retry, self._max_retry)
        self._retry = 2 * pause
        self._pending = True
        self._retry_at = now + pause
