"""Log messages and Kubernetes Events about Services whose condition changed."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

from kproxy.model.sync_report import ConditionTransition, SyncReport
from kproxy.model.types import ServiceKey

log = logging.getLogger(__name__)
LINES_PER_SYNC = 10
"""Maximum number of Services to log per sync and reason. A failing node can affect thousands of Services."""


class ServiceEventListener:
    """Logs the condition transitions of Services, and records an event about each warning.

    `event` is called with the Service, the reason and the message. It must neither block nor raise.
    """

    def __init__(self, event: Callable[[ServiceKey, str, str], None]) -> None:
        self._event = event

    def on_sync(self, report: SyncReport) -> None:
        """Log the transitions of a sync, and record an event about each transition that is a warning."""
        by_reason: dict[str, list[ConditionTransition]] = defaultdict(list)
        for transition in report.result.transitions if report.result else ():
            by_reason[transition.reason].append(transition)
            if transition.is_warning:
                self._event(transition.service, transition.reason, transition.message)
        for reason, transitions in by_reason.items():
            level = logging.WARNING if transitions[0].is_warning else logging.INFO
            for transition in transitions[:LINES_PER_SYNC]:
                log.log(level, "%s", transition.message)
            if len(transitions) > LINES_PER_SYNC:
                more = len(transitions) - LINES_PER_SYNC
                log.log(level, "%s: %d more Services with reason %s not listed", report.family.value, more, reason)
