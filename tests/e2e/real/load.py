"""Requests without end from a pod, of which none gets lost on the way to the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from tests.e2e.real.execution import Execution, ExecutionError
from tests.e2e.real.scripts import failure

SLOW = 1.0
"""Seconds to connect in which TCP has repeated its first packet: one was lost, even if curl succeeds (RFC 6298)."""


class Tally:
    """What the lines of `scripts.LOAD` add up to. Its lines come from one thread, questions from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers = 0
        self._seen = 0
        self._failures: list[str] = []
        self.ended = False
        """Whether the script said that it ended, and how many requests it had made."""

    @property
    def answers(self) -> int:
        """How many requests were answered."""
        with self._lock:
            return self._answers

    def failures(self) -> Sequence[str]:
        """Return what was wrong."""
        with self._lock:
            return list(self._failures)

    def add(self, line: str) -> None:
        """Take a line."""
        with self._lock:
            if line.startswith("end "):
                self.ended = True
                if line != f"end {self._seen}":
                    self._complain(f"{line.removeprefix('end ')} requests were made, and {self._seen} are known")
            else:
                self._add_request(*line.split("\t"))

    def complain(self, what: str) -> None:
        """Note what is wrong with the load itself."""
        with self._lock:
            self._complain(what)

    def _add_request(self, turn: str, code: str, said: str, complaint: str) -> None:
        self._seen += 1
        if int(turn) != self._seen:
            self._complain(f"request {turn} is told as the {self._seen}th")
        words = said.split()
        if code != "0" or len(words) != 2:
            self._complain(f"request {turn}: {failure(int(code), said, complaint)}")
        elif float(words[1]) >= SLOW:
            self._complain(f"request {turn}: {words[1]} s to connect, so a packet was lost")
        else:
            self._answers += 1

    def _complain(self, what: str) -> None:
        self._failures.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")


class RealLoad:
    """A script that sends requests in a pod, from `__enter__` until `__exit__` has seen its last line."""

    def __init__(self, start: Callable[[], Execution], stop: Callable[[], object]) -> None:
        """`start` begins the script, `stop` lets it end by itself."""
        self._start, self._stop = start, stop
        self._tally = Tally()
        self._reader = threading.Thread(target=self._read, name="load")

    def __enter__(self) -> Tally:
        self._execution = self._start()
        self._reader.start()
        return self._tally

    def __exit__(self, *_: object) -> None:
        try:
            self._stop()
        finally:
            self._reader.join()

    def _read(self) -> None:
        began = time.monotonic()
        try:
            for line in self._execution.lines():
                self._tally.add(line)
        except (ExecutionError, TimeoutError, ValueError) as error:
            self._tally.complain(f"the load broke off after {time.monotonic() - began:.1f} s: {error}")
        if not self._tally.ended:
            self._tally.complain("the load did not say how many requests it made")
