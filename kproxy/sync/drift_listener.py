"""Log messages and Kubernetes Events about rules that other processes changed and kproxy restored."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from kproxy.model.drift import Part
from kproxy.model.sync_report import RepairReport
from kproxy.model.types import Family
from kproxy.sync.log_summary import counted

log = logging.getLogger(__name__)
LISTED_PARTS = 5
"""Maximum number of parts to name in one message."""


class DriftListener:
    """Logs each repair and each new finding, and records events about them.

    `event` is called with the reason and the message. It must neither block nor raise.
    """

    def __init__(self, event: Callable[[str, str], None]) -> None:
        self._event = event
        self._findings: dict[Family, frozenset[str]] = {}

    def findings(self, family: Family) -> Collection[str]:
        """Return what was found last about rules of other programs. Any thread may call this."""
        return self._findings.get(family, frozenset())

    def on_repair(self, report: RepairReport) -> None:
        """Log what was restored and what was found."""
        family, result = report.family.value, report.result
        delays = f"; {_delay_text(report.delayed.values())}" if report.delayed else ""
        if result.needs_full_sync:
            text = f"{family}: {_processes(report.by)} changed kproxy's rules; restoring them{delays}"
            self._warn("RulesChanged", text)
        if result.repaired:
            text = f"{family}: restored {_listed(result.repaired)}, which {_processes(report.by)} had changed{delays}"
            self._warn("RulesRestored", text)
        self._report_findings(report)

    def _report_findings(self, report: RepairReport) -> None:
        """Report new findings, and those that had ended: they are forgotten when a check no longer finds them."""
        known = self._findings.get(report.family, frozenset())
        for finding in dict.fromkeys(report.result.findings):
            if finding not in known:
                self._warn("ForeignRule", f"{report.family.value}: {finding}")
        remaining = (finding for finding in known if not _has_checked(report, finding))
        self._findings[report.family] = frozenset((*remaining, *report.result.findings))

    def _warn(self, reason: str, text: str) -> None:
        log.warning("%s", text)
        self._event(reason, text)


def _has_checked(report: RepairReport, finding: str) -> bool:
    """Return whether a check would have found this again."""
    if report.result.needs_full_sync:  # the check ended early
        return False
    if report.checked is None:
        return True
    names = (part.text for part in report.checked)
    return any(name in finding and re.search(rf"\b{re.escape(name)}(?![\w-])", finding) for name in names)


def _listed(parts: Collection[Part]) -> str:
    counts = Counter(part.text for part in parts)
    texts = [
        text if number == 1 else text.replace("element of", f"{number:,} elements of")
        for text, number in counts.items()
    ]
    more = len(texts) - LISTED_PARTS
    return ", ".join(texts[:LISTED_PARTS]) + (f" and {counted(more, 'other part')}" if more > 0 else "")


def _processes(names: Collection[str]) -> str:
    return " or ".join(names) if names else "another process"


def _delay_text(delays: Iterable[float]) -> str:
    return f"this happens often, so the next check is in {max(delays):.0f} s"
