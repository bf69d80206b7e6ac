"""Log levels, and how often a lasting problem is logged. Pure."""

from __future__ import annotations

import math

V2 = 15
"""Shown from `--v=2`: steady-state messages, such as one line per sync. Below INFO (20), above DEBUG (10, `--v=4`)."""
FIRST_PAUSE = 60.0
"""Seconds between the first line about a problem and the second; each further pause is twice as long."""
LONGEST_PAUSE = 3600.0
"""Seconds: no pause is longer."""


class LogThrottle:
    """Decides when to log one problem: at once, and again after 1, 2, 4 ... minutes, at most an hour apart.

    Moments are seconds of any clock that never goes back.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over: the problem is gone, or another one has taken its place."""
        self._next = -math.inf
        self._pause = FIRST_PAUSE

    def is_due(self, now: float) -> bool:
        """Return whether to log the problem now; if so, the next pause begins."""
        if now < self._next:
            return False
        self._next = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True

    def wait(self, now: float) -> float:
        """Return the seconds until it is due."""
        return max(0.0, self._next - now)
