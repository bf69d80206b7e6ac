"""Requests without end from a pod, of which none gets lost on the way to the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from tests.e2e.real.execution import Execution, ExecutionError
from tests.e2e.real.scripts import failure
from tests.e2e.tally import Tally

SLOW = 1.0
"""Seconds to connect in which TCP has repeated its first packet: one was lost, even if curl succeeds (RFC 6298)."""


class ScriptTally(Tally):
    """What the lines of `scripts.LOAD` add up to."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0
        self.ended = False
        """Whether the script said that it ended, and how many requests it had made."""

    def add(self, line: str) -> None:
        """Take a line."""
        if line.startswith("end "):
            self.ended = True
            if line != f"end {self._seen}":
                self.failed(f"{line.removeprefix('end ')} requests were made, and {self._seen} are known")
        else:
            self._add_request(*line.split("\t"))

    def failed(self, what: str) -> None:
        """Note what is wrong with a request, or with the load itself, and when it was seen."""
        super().failed(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")

    def _add_request(self, turn: str, code: str, said: str, complaint: str) -> None:
        self._seen += 1
        if int(turn) != self._seen:
            self.failed(f"request {turn} is told as the {self._seen}th")
        words = said.split()
        if code != "0" or len(words) != 2:
            self.failed(f"request {turn}: {failure(int(code), said, complaint)}")
        elif float(words[1]) >= SLOW:
            self.failed(f"request {turn}: {words[1]} s to connect, so a packet was lost")
        else:
            self.answered()


class RealLoad:
    """A script that sends requests in a pod, from `__enter__` until `__exit__` has seen its last line."""

    def __init__(self, start: Callable[[], Execution], stop: Callable[[], object]) -> None:
        """`start` begins the script, `stop` lets it end by itself."""
        self._start, self._stop = start, stop
        self._tally = ScriptTally()
        self._reader = threading.Thread(target=self._read, name="load")

    def __enter__(self) -> ScriptTally:
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
            self._tally.failed(f"the load broke off after {time.monotonic() - began:.1f} s: {error}")
        if not self._tally.ended:
            self._tally.failed("the load did not say how many requests it made")
