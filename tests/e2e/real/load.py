"""Continuous requests from a pod, with a check that no result is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from tests.e2e.real.execution import Execution, ExecutionError
from tests.e2e.real.scripts import failure
from tests.e2e.request_counter import RequestCounter

SLOW = 1.0
"""A connect that takes this many seconds includes a retransmitted SYN (RFC 6298): a packet was lost."""


class ScriptResults(RequestCounter):
    """The results in the output of `scripts.LOAD`."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0
        self.ended = False
        """Whether the script printed its last line, with the number of requests."""

    def add(self, line: str) -> None:
        """Add a line of output."""
        if line.startswith("end "):
            self.ended = True
            if line != f"end {self._seen}":
                self.add_failure(
                    f"{line.removeprefix('end ')} requests were sent, but {self._seen} results were received"
                )
        else:
            self._add_request(*line.split("\t"))

    def add_failure(self, message: str) -> None:
        """Add a time-stamped message about a failed request, or about the load itself."""
        super().add_failure(f"{datetime.now(UTC):%H:%M:%S.%f} {message}")

    def _add_request(self, turn: str, code: str, answer: str, error: str) -> None:
        self._seen += 1
        if int(turn) != self._seen:
            self.add_failure(f"result {self._seen} is for request {turn}")
        words = answer.split()
        if code != "0" or len(words) != 2:
            self.add_failure(f"request {turn}: {failure(int(code), answer, error)}")
        elif float(words[1]) >= SLOW:
            self.add_failure(f"request {turn}: took {words[1]} s to connect: a packet was lost")
        else:
            self.count_answer()


class RealLoad:
    """A script that sends requests in a pod during a `with` block. The end of the block waits for its last line."""

    def __init__(self, start: Callable[[], Execution], stop: Callable[[], object]) -> None:
        """`start` starts the script; `stop` makes it exit."""
        self._start, self._stop = start, stop
        self._results = ScriptResults()
        self._reader = threading.Thread(target=self._read, name="load")

    def __enter__(self) -> ScriptResults:
        self._execution = self._start()
        self._reader.start()
        return self._results

    def __exit__(self, *_: object) -> None:
        try:
            self._stop()
        finally:
            self._reader.join()

    def _read(self) -> None:
        began = time.monotonic()
        try:
            for line in self._execution.lines():
                self._results.add(line)
        except (ExecutionError, TimeoutError, ValueError) as error:
            self._results.add_failure(f"the load failed after {time.monotonic() - began:.1f} s: {error}")
        if not self._results.ended:
            self._results.add_failure("the load did not report its number of requests")
