"""Wait for a condition by polling."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_GUARD = 30.0
"""Seconds after which waiting fails. Far longer than any condition takes."""

POLL_INTERVAL = 0.01


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once the condition is true. Raises `TimeoutError` with `what` after `HANG_GUARD` seconds."""
    deadline = time.monotonic() + HANG_GUARD
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true after {HANG_GUARD:.0f} s: {what}")
        time.sleep(POLL_INTERVAL)
