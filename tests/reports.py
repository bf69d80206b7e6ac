"""Reports of syncs as the reconciler makes them, and plans to give to a backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import ApplyResult, SyncReport, SyncResult
from kproxy.model.types import Family, ServiceKey

PlansByService = Mapping[ServiceKey, Sequence[ServicePortPlan]]


def succeeded(
    family: Family,
    plans: PlansByService | None = None,
    *,
    complete: bool = True,
    context: Context | None = None,
    applied: ApplyResult | None = None,
    started: float = 0.0,
    finished: float = 1.0,
    **more: Any,
) -> SyncReport:
    """The report of a sync that succeeded; `more` are further fields of its result."""
    found = plans or {}
    context = context or Context(family, "node-1")
    result = SyncResult(len(found), complete, found, context, applied or ApplyResult({}, {}), **more)
    return SyncReport(family, started, finished, result)


def failed(family: Family, *, started: float = 0.0, finished: float = 1.0, error: str = "rejected") -> SyncReport:
    """The report of a sync that failed."""
    return SyncReport(family, started, finished, None, error)


class FixedPlans:
    """Plans that were made before (`kproxy.model.sync_report.Plans`)."""

    def __init__(self, plans: PlansByService) -> None:
        self._plans = plans

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        return iter(self._plans.items())

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        return self._plans[key]
