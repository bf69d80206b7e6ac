"""The results of a load so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class RequestCounter:
    """The number of answers and the messages of failed requests. One thread writes, any thread may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers = 0
        self._failures: list[str] = []

    @property
    def answers(self) -> int:
        """The number of answered requests so far."""
        with self._lock:
            return self._answers

    def failures(self) -> Sequence[str]:
        """Return one message with time stamp for each failed request so far."""
        with self._lock:
            return list(self._failures)

    def count_answer(self) -> None:
        """Count an answer."""
        with self._lock:
            self._answers += 1

    def add_failure(self, message: str) -> None:
        """Add the message of a failed request."""
        with self._lock:
            self._failures.append(message)
