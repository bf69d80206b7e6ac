"""Inside the guest: run the tests of all checks in one pytest, and write each result to the host as it is known."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.checks import SELECTED

RESULTS = Path("/run/results")
LINES = "results.jsonl"


class Reporter:
    """A pytest plugin that appends lines of JSON to a file: first the names of all tests, then each result."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds = 0.0
        self._outcome, self._reason = "passed", ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"collected": [item.nodeid for item in session.items]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.outcome != "passed" and self._outcome != "failed":
            self._outcome, self._reason = report.outcome, _reason(report)
        if report.when == "teardown":
            self._write(
                {
                    "test": report.nodeid,
                    "outcome": self._outcome,
                    "reason": self._reason,
                    "seconds": round(self._seconds, 2),
                }
            )
            self._seconds, self._outcome, self._reason = 0.0, "passed", ""

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _reason(report: pytest.TestReport) -> str:
    """Return why a test failed or was skipped, in one line."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ").splitlines()[0]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return next((line for line in text.splitlines() if line.strip()), "no message").strip()


def main() -> int:
    """Run the tests; return the exit status of pytest."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--durations=25", *sys.argv[1:]]
    return int(pytest.main([*options, *SELECTED], plugins=[Reporter(RESULTS / LINES)]))


if __name__ == "__main__":
    sys.exit(main())
