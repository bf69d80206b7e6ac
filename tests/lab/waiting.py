"""Wait for a condition by polling."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_GUARD = 30.0
"""Seconds after which waiting fails. Far longer than any condition takes."""

POLL_INTERVAL = 0.01


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = HANG_GUARD) -> None:
    """Return once the condition is true. Raises `TimeoutError` with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true after {seconds:.0f} s: {what}")
        time.sleep(POLL_INTERVAL)
