"""Log levels, and the intervals at which a lasting problem is logged again. Pure."""

from __future__ import annotations

import math

V2 = 15
"""The level that `--v=2` enables: messages in steady state, such as a line per sync. INFO is 20, DEBUG (`--v=4`) 10."""
FIRST_PAUSE = 60.0
"""Seconds between the first line about a problem and the second; each further interval is twice as long."""
LONGEST_PAUSE = 3600.0
"""The longest interval, in seconds."""


class LogThrottle:
    """Decides when to log a lasting problem: at once, then after 1, 2, 4 ... minutes, at least once an hour.

    Times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over, because the problem is gone or a different one."""
        self._next = -math.inf
        self._interval = FIRST_PAUSE

    def is_due(self, now: float) -> bool:
        """Return whether to log the problem now; if so, the next interval starts."""
        if now < self._next:
            return False
        self._next = now + self._interval
        self._interval = min(2 * self._interval, LONGEST_PAUSE)
        return True

    def wait(self, now: float) -> float:
        """Return the seconds until the problem is due again."""
        return max(0.0, self._next - now)
