"""The report of `make kernels`: a line for each kernel and check, and a table of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kernels.checks import CHECKS, Check


@dataclass(frozen=True)
class Result:
    """The outcome of a test, "passed", "failed" or "skipped", with the reason in one line, and its duration in
    seconds."""

    node_id: str
    outcome: str
    reason: str
    seconds: float


class Report:
    """The checks of one kernel, from the lines that the guest writes. Each line of text is complete."""

    def __init__(self, suite: str, release: str) -> None:
        self.suite = suite
        self.release = release
        self.verdicts: dict[str, str] = {}
        self._collected: list[str] = []
        self._results: dict[str, Result] = {}

    @property
    def passed(self) -> bool:
        """Whether no check has failed."""
        return "FAILED" not in self.verdicts.values()

    def add(self, line: Mapping[str, Any]) -> list[str]:
        """Add a line of the guest: the names of all tests, or the result of one. Return the text of ended checks."""
        if "collected" in line:
            self._collected = line["collected"]
            return []
        result = Result(line["test"], line["outcome"], line["reason"], line["seconds"])
        self._results[result.node_id] = result
        return [self._end(check) for check in self._pending() if self._has_ended(check)]

    def finish(self) -> list[str]:
        """Return the text of the checks that have not ended, which have failed."""
        return [self._end(check) for check in self._pending()]

    def _pending(self) -> list[Check]:
        return [check for check in CHECKS if check.name not in self.verdicts]

    def _tests(self, check: Check) -> list[str]:
        return [node_id for node_id in self._collected if check.includes(node_id)]

    def _has_ended(self, check: Check) -> bool:
        own = self._tests(check)
        return bool(own) and all(node_id in self._results for node_id in own)

    def _end(self, check: Check) -> str:
        self.verdicts[check.name], detail = verdict(check, self._tests(check), self._results)
        return f"{self.suite} {self.release}: {check.name}: {self.verdicts[check.name]}{detail}"


def verdict(check: Check, collected: Sequence[str], results: Mapping[str, Result]) -> tuple[str, str]:
    """Return "ok", "skipped" or "FAILED", and what to add to it: the number of tests, or the first reason.

    `collected` are the tests of the check, and `results` those that have ended, by their names.
    """
    if not collected:
        return "FAILED", ": the guest did not start the tests"
    if missing := [node_id for node_id in collected if node_id not in results]:
        return "FAILED", f": the guest stopped before the end of {_short(missing[0])}"
    found = [results[node_id] for node_id in collected]
    failed = [each for each in found if each.outcome == "failed"]
    skipped = [each for each in found if each.outcome == "skipped"]
    lacking = [each for each in skipped if not check.may_lack or check.may_lack not in each.reason]
    if wrong := failed or lacking:
        first = f"{_short(wrong[0].node_id)}: {'' if failed else 'skipped: '}{wrong[0].reason}"
        return "FAILED", f", {len(wrong)} of {len(found)} tests; the first one is {first}"
    if skipped:
        return "skipped", f", {len(skipped)} of {len(found)} tests: {skipped[0].reason}"
    return "ok", f", {len(found)} tests, {sum(each.seconds for each in found):.0f} s"


def table(reports: Iterable[Report]) -> list[str]:
    """Return a table in Markdown: a row for each kernel, a column for each check."""
    names = [check.name for check in CHECKS]
    rows = [[f"{each.release} ({each.suite})", *(each.verdicts[name] for name in names)] for each in reports]
    return [_row(["Kernel", *names]), _row(["---"] * (len(names) + 1)), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(node_id: str) -> str:
    return node_id.rpartition("/")[2]
