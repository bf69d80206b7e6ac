"""The outcome of one sync, and the callbacks that receive it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.delta import Kind
from kproxy.model.drift import Part, RepairResult
from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.plan import ServicePortPlan
from kproxy.model.store import StoreChange
from kproxy.model.types import Family, ServiceKey


class Plans(Protocol):
    """The plans of the Services that one sync covers, computed one Service at a time.

    In a large cluster, all plans together would take more memory than all other state. A backend therefore plans,
    renders and discards one Service after another.
    """

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        """Yield each Service that the sync covers, with its plans.

        A Service that was deleted or that kproxy ignores has no plans.
        """

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        """Return the plans of one Service. They are computed again on each call."""


class SyncError(Exception):
    """A sync failed, for example because the kernel rejected a change. The message gives the reason on one line."""


class DriftError(SyncError):
    """Another process changed kproxy's rules. A full sync is required and is likely to succeed."""


class ApplyResult(Struct, frozen=True):
    """The result of a backend's sync.

    `written_rules` is the number of rules that the sync wrote, keyed by table. `total_rules` is the number of all
    kproxy rules in the kernel, keyed by table. `conflicts` are all current frontend conflicts, not only those of the
    Services that the sync covered. `rejected` maps each Service whose rules the kernel rejected to the reason, on one
    line. The rules that the kernel accepted last for such a Service stay active; all other Services are programmed.
    If `compare_soon` is true, a comparison of all rules prepares the backend to find later damage quickly.
    """

    written_rules: Mapping[str, int]
    total_rules: Mapping[str, int]
    conflicts: tuple[FrontendConflict, ...] = ()
    rejected: Mapping[ServiceKey, str] = {}
    compare_soon: bool = False


class ServiceCounts(Struct, frozen=True):
    """The number of Services of a family in each condition.

    `without_endpoints`: at least one port has no usable endpoint in the cluster. `dropped`: at least one port has
    usable endpoints, but none on this node, and a traffic policy is Local. `in_conflict`: another Service owns a
    frontend that the Service claims. `quarantined`: the kernel rejected the rules of the Service. `invalid`: the object
    cannot be used. `ignored`: the Service is headless, has type ExternalName, or is handled by another proxy. Ignored
    Services usually come from files, because kproxy asks the API server not to send them.
    """

    without_endpoints: int = 0
    dropped: int = 0
    in_conflict: int = 0
    quarantined: int = 0
    invalid: int = 0
    ignored: int = 0


ConditionReason: TypeAlias = Literal[
    "NoEndpoints",
    "EndpointsAvailable",
    "SourceRangesIgnored",
    "FrontendConflict",
    "ConflictResolved",
    "Quarantined",
    "QuarantineEnded",
]


class ConditionTransition(Struct, frozen=True):
    """A change to the condition of a Service.

    If `is_warning` is true, kproxy records a Kubernetes Event with the same `reason` and `message`.
    """

    service: ServiceKey
    reason: ConditionReason
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether an operator may need to act."""
        return self.reason not in {"EndpointsAvailable", "ConflictResolved", "QuarantineEnded"}


class SyncResult(Struct, frozen=True):
    """What a successful sync of one family programmed.

    `services` is the number of Services covered: all of them if `complete`, otherwise those that may have changed.
    `plans` maps a Service to all of its plans if `ServicePortPlan.outlives_sync` is true for at least one of them. If
    the sync is `complete`, all other Services are absent. Otherwise, all other covered Services map to an empty
    sequence.

    `last_changes` contains the trigger times of the endpoint changes that this sync programmed, in seconds since the
    epoch (annotation `endpoints.kubernetes.io/last-change-trigger-time`). `transitions` are the condition changes to
    report.
    """

    services: int
    complete: bool
    plans: Mapping[ServiceKey, Sequence[ServicePortPlan]]
    context: Context
    applied: ApplyResult
    counts: ServiceCounts = ServiceCounts()
    transitions: tuple[ConditionTransition, ...] = ()
    last_changes: tuple[float, ...] = ()


class SyncReport(Struct, frozen=True):
    """One attempt to sync one family.

    If the attempt failed, `result` is None and `error` gives the reason on one line. `started` and `finished` are times
    of the reconciler's monotonic clock, in seconds.
    """

    family: Family
    started: float
    finished: float
    result: SyncResult | None
    error: str = ""


class RepairReport(Struct, frozen=True):
    """One check of parts of a family's rules.

    `by` are the names of the processes that touched the parts, sorted; it is empty if they are unknown. `delayed`
    contains the parts that are repaired so often that their next check waits, with the number of seconds. `checked` are
    the parts that were checked completely, so that all findings about them are in the result; None means all parts.
    """

    family: Family
    result: RepairResult
    by: tuple[str, ...] = ()
    delayed: Mapping[Part, float] = {}
    checked: frozenset[Part] | None = None


QueueListener: TypeAlias = Callable[[Family, float], None]
"""Called when a family has new changes to sync, with the current time of the reconciler's clock in seconds."""
ChangeListener: TypeAlias = Callable[[Kind, StoreChange], None]
"""Called after a delta has changed the desired state, with the kind of the object and what changed."""
SyncListener: TypeAlias = Callable[[SyncReport], None]
"""Called after each attempt to sync a family.

Listeners run in the reconciler's thread and must not block. Exceptions are logged and otherwise ignored.
"""
RepairListener: TypeAlias = Callable[[RepairReport], None]
"""Called after each check of parts of a family's rules, even if all of them were intact."""
AfterSyncStep: TypeAlias = Callable[[SyncReport], None]
"""A step that runs after an attempt to sync a family, before the next one begins. It may block for several seconds.

Steps run after all listeners have been notified, in the thread that syncs the family. Those of one family may run at
the same time as those of the other. Exceptions are logged and otherwise ignored.
"""
