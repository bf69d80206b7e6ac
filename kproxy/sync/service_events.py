"""Telling of Services whose condition changed: log lines and events."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

from kproxy.model.delta import Kind
from kproxy.model.store import StoreChange
from kproxy.model.sync_report import ConditionTransition, SyncReport
from kproxy.model.types import Family, ServiceKey

log = logging.getLogger(__name__)
LINES_PER_SYNC = 10
"""How many Services one sync names for each kind of notice: when a node or a deployment fails, it may be thousands."""


class ServiceEventListener:
    """An `Observer` that logs what syncs changed in the condition of Services, and records events of it.

    `event` is told the Service, the reason and the sentence of each warning, and must neither block nor raise.
    """

    def __init__(self, event: Callable[[ServiceKey, str, str], None]) -> None:
        self._event = event

    def queued(self, family: Family, now: float) -> None:
        """Do nothing: what is not in the kernel yet is no news."""

    def changed(self, kind: Kind, changed: StoreChange) -> None:
        """Do nothing: what is not in the kernel yet is no news."""

    def synced(self, report: SyncReport) -> None:
        """Tell of a sync's notices."""
        by_kind: dict[str, list[ConditionTransition]] = defaultdict(list)
        for notice in report.notices:
            by_kind[notice.kind].append(notice)
            if notice.is_warning:
                self._event(notice.service, notice.kind, notice.text)
        for kind, notices in by_kind.items():
            level = logging.WARNING if notices[0].is_warning else logging.INFO
            for notice in notices[:LINES_PER_SYNC]:
                log.log(level, "%s", notice.text)
            if len(notices) > LINES_PER_SYNC:
                more = len(notices) - LINES_PER_SYNC
                log.log(level, "%s: %d more Services with reason %s not listed", report.family.value, more, kind)
