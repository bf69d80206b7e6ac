"""Waiting for a condition of the outside world that nobody announces."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_GUARD = 30.0
"""Seconds after which a condition counts as one that never comes; far beyond what any of them takes."""

BETWEEN_LOOKS = 0.01


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once the condition holds; raise `TimeoutError`, saying `what` was awaited, when it never does."""
    deadline = time.monotonic() + HANG_GUARD
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {HANG_GUARD:.0f} s in vain: {what}")
        time.sleep(BETWEEN_LOOKS)
