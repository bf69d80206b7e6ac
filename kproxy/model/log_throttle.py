"""Log levels, and the intervals at which a persistent problem is logged again. Pure."""

from __future__ import annotations

import math

V2 = 15
"""The log level of steady-state messages, such as one message per sync. `--v=2` enables it.

For comparison: INFO is 20, and DEBUG, which `--v=4` enables, is 10.
"""
FIRST_PAUSE = 60.0
"""Seconds between the first and the second message about a problem. Each further interval is twice as long."""
LONGEST_PAUSE = 3600.0
"""The longest interval, in seconds."""


class LogThrottle:
    """Decides when to log a persistent problem: at once, then at intervals of 1, 2, 4 ... minutes, up to one hour.

    Times are in seconds, from a monotonic clock.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over, because the problem was solved or has changed."""
        self._next = -math.inf
        self._interval = FIRST_PAUSE

    def is_due(self, now: float) -> bool:
        """Return whether to log the problem now. If the result is true, the next interval starts."""
        if now < self._next:
            return False
        self._next = now + self._interval
        self._interval = min(2 * self._interval, LONGEST_PAUSE)
        return True

    def wait(self, now: float) -> float:
        """Return the number of seconds until the problem should be logged again."""
        return max(0.0, self._next - now)
