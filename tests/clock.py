"""A clock for code that takes its time source as a parameter."""

from __future__ import annotations

from tests.lab.waiting import wait_until


class Clock:
    """A clock that stands still until a test advances it. Call it to read the seconds, as `time.monotonic`."""

    def __init__(self, now: float = 0.0, *, wall: int = 0) -> None:
        """Start at `now` seconds; `wall` is the wall clock in nanoseconds since the epoch."""
        self.now = now
        self.wall_time = wall
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def wall(self) -> int:
        """Read the wall clock, as `time.time_ns`. Each call returns a later time, so that no two are equal."""
        self.wall_time += 1
        return self.wall_time

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def advance_and_wait(self, seconds: float) -> None:
        """Let time pass, and wait until another thread has read the new time."""
        self.advance(seconds)
        # A read that was under way may have returned the time before.
        reads = self.reads + 2
        wait_until(lambda: self.reads > reads, "a read of the clock")
