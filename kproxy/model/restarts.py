"""How a thread starts its work again after an unexpected error: with growing pauses and few log messages. Pure."""

from __future__ import annotations

from kproxy.model.log_throttle import LogThrottle

FIRST_DELAY = 0.5
"""Seconds before the first restart. Each further delay is twice as long."""
LONGEST_DELAY = 30.0
"""The longest delay, in seconds. After twice this time without an error, the delays start over."""


class Restarts:
    """Decides how long a thread waits before each restart, and which errors it logs.

    `subject` names the thread or its work in the messages. Times are in seconds, from a monotonic clock.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._delay = FIRST_DELAY
        self._last = float("-inf")
        self._problem = ""
        self._throttle = LogThrottle()

    def failed(self, error: BaseException, now: float) -> tuple[float, str]:
        """Return the seconds to wait after an error, and the message to log, or "" if the error was logged recently.

        Without enough memory for the message, return only the longest delay.
        """
        try:
            return self._failed(error, now)
        except MemoryError:
            return LONGEST_DELAY, ""

    def _failed(self, error: BaseException, now: float) -> tuple[float, str]:
        if now - self._last > 2 * LONGEST_DELAY:
            self._delay = FIRST_DELAY
        problem = " ".join(f"unexpected {error!r}".split())
        if problem != self._problem:
            self._problem = problem
            self._throttle.reset()
        delay, self._delay = self._delay, min(2 * self._delay, LONGEST_DELAY)
        self._last = now + delay
        return delay, f"{self._subject}: {problem}; trying again" if self._throttle.is_due(now) else ""
