"""What has come of a load so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class Tally:
    """How many requests were answered, and what was wrong with the others. One thread adds, any may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers = 0
        self._failures: list[str] = []

    @property
    def answers(self) -> int:
        """How many requests have been answered so far."""
        with self._lock:
            return self._answers

    def failures(self) -> Sequence[str]:
        """Return what was wrong with each request that failed so far, with its time."""
        with self._lock:
            return list(self._failures)

    def answered(self) -> None:
        """Count an answer."""
        with self._lock:
            self._answers += 1

    def failed(self, what: str) -> None:
        """Note what was wrong."""
        with self._lock:
            self._failures.append(what)
