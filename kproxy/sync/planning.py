"""Plan all Services of one IP family at once, for commands that compare instead of programming. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.plan import ServicePortPlan
from kproxy.model.store import Store
from kproxy.model.sync_report import ApplyResult, Plans
from kproxy.model.types import Node, ServiceKey
from kproxy.sync.family_sync import LARGE_CLUSTER_ENDPOINTS, FamilySync


class PlannedFamily(Struct, frozen=True):
    """The desired state of one family: its context, and the plans of each Service that has a ClusterIP of the family.

    `problems` are the conditions that a sync would report, such as frontends that two Services claim, one line each.
    """

    context: Context
    plans: Mapping[ServiceKey, Sequence[ServicePortPlan]]
    problems: tuple[str, ...] = ()


def plan_family(
    store: Store,
    make_context: Callable[[Node | None], Context],
    *,
    large_cluster_endpoints: float = LARGE_CLUSTER_ENDPOINTS,
) -> PlannedFamily:
    """Plan the Services of a store exactly as the first sync of a daemon does.

    For the arguments, see `FamilySync`. Raises `SyncError` if `make_context` raises it.
    """
    collector = _PlanCollector()
    result = FamilySync(collector, make_context, large_cluster_endpoints=large_cluster_endpoints).sync(store)
    problems = tuple(each.message for each in result.transitions if each.is_warning)
    return PlannedFamily(result.context, collector.plans, problems)


class _PlanCollector:
    """A backend that keeps the plans instead of programming them (implements `kproxy.sync.family_sync.Backend`)."""

    needs_full_sync = True

    def __init__(self) -> None:
        self.plans: dict[ServiceKey, Sequence[ServicePortPlan]] = {}

    def sync(self, plans: Plans, context: Context) -> ApplyResult:  # noqa: ARG002
        self.plans = {key: ports for key, ports in plans.by_service() if ports}
        return ApplyResult({}, {})

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:  # noqa: ARG002
        return RepairResult()

    def compare_next(self, plans: Plans, context: Context) -> None:  # noqa: ARG002
        return None

    def forget(self) -> None:
        pass
