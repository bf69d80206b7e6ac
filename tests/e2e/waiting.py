"""Waiting for what a cluster does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

HANG_GUARD = 180.0
"""Seconds after which a condition counts as one that never comes: many times what a busy cluster takes."""

BETWEEN_LOOKS = 0.05

T = TypeVar("T")


def until(
    look: Callable[[], T], what: str, *, guard: float = HANG_GUARD, between: float = BETWEEN_LOOKS, seen: str = ""
) -> T:
    """Look again and again, `between` seconds apart, and return the first thing seen that is true.

    Raises `TimeoutError` after `guard` seconds, with `what` was awaited and, if `seen` names it, the last thing seen.
    """
    deadline = time.monotonic() + guard
    while not (found := look()):
        if time.monotonic() > deadline:
            last = f"; {seen}: {found}" if seen else ""
            raise TimeoutError(f"waited {guard:.0f} s in vain: {what}{last}")
        time.sleep(between)
    return found
