"""Wait for a cluster by polling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

HANG_GUARD = 180.0
"""Seconds after which waiting fails. Many times what a busy cluster takes."""

POLL_INTERVAL = 0.05

T = TypeVar("T")


def until(
    poll: Callable[[], T], what: str, *, guard: float = HANG_GUARD, interval: float = POLL_INTERVAL, label: str = ""
) -> T:
    """Poll every `interval` seconds; return the first true result.

    Raises `TimeoutError` after `guard` seconds, with `what` and, if `label` names it, the last result.
    """
    deadline = time.monotonic() + guard
    while not (found := poll()):
        if time.monotonic() > deadline:
            last = f"; {label}: {found}" if label else ""
            raise TimeoutError(f"not true after {guard:.0f} s: {what}{last}")
        time.sleep(interval)
    return found
