"""Continuous requests in the background, while a test changes something."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from tests.lab.client import Answered, Outcome
from tests.lab.waiting import HANG_GUARD

WORKERS = 4
PAUSE = 0.004
"""Seconds between two requests of a worker: steady traffic that leaves CPU time to other processes."""


class ContinuousRequests:
    """Sends requests from several threads while in its `with` block."""

    def __init__(self, request: Callable[[], Outcome]) -> None:
        self._request = request
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._outcomes: list[Outcome] = []
        self._begun = [0] * WORKERS
        self._ended = [0] * WORKERS
        self._workers = [
            threading.Thread(target=self._work, args=(number,), name=f"flow-{number}", daemon=True)
            for number in range(WORKERS)
        ]

    def __enter__(self) -> ContinuousRequests:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        for worker in self._workers:
            worker.join()

    def settle(self) -> None:
        """Return once every request that was in flight at the time of the call has ended."""
        with self._changed:
            begun = list(self._begun)
            self._wait(lambda: all(ended >= start for ended, start in zip(self._ended, begun, strict=True)))

    def take(self, count: int) -> Counter[str]:
        """Wait for `count` further outcomes; return the number of answers of each pod."""
        with self._changed:
            first = len(self._outcomes)
            self._wait(lambda: len(self._outcomes) >= first + count)
            return count_by_pod(self._outcomes[first : first + count])

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of all requests so far, in the order in which they ended."""
        with self._changed:
            return list(self._outcomes)

    def _wait(self, condition: Callable[[], bool]) -> None:
        if not self._changed.wait_for(condition, HANG_GUARD):
            raise TimeoutError(
                f"requests do not end within {HANG_GUARD:.0f} s: {self._ended} of {self._begun} have ended"
            )

    def _work(self, number: int) -> None:
        while not self._stopped.wait(PAUSE):
            with self._changed:
                self._begun[number] += 1
            outcome = self._request()
            with self._changed:
                self._outcomes.append(outcome)
                self._ended[number] += 1
                self._changed.notify_all()


def count_by_pod(outcomes: list[Outcome]) -> Counter[str]:
    """Return the number of answers of each pod."""
    return Counter(outcome.pod for outcome in outcomes if isinstance(outcome, Answered))


def failures(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes that are not answers."""
    return [outcome for outcome in outcomes if not isinstance(outcome, Answered)]
