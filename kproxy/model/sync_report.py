"""The outcome of one sync, and the callbacks that are notified of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.delta import Kind
from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.plan import ServicePortPlan
from kproxy.model.store import StoreChange
from kproxy.model.types import Family, ServiceKey


class Plans(Protocol):
    """The plans of the Services that one sync covers, made one Service at a time.

    All plans of a large cluster at once would take more memory than everything else that kproxy keeps about it, so
    nothing holds them: a backend plans, renders and forgets each Service in turn.
    """

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        """Plan each Service of the sync once. A Service that was deleted, or is not served, has no plans."""

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        """Plan one Service again."""


class SyncError(Exception):
    """The kernel rejected a change; the message is one line and says why."""


class DriftError(SyncError):
    """Another process changed kproxy's rules: a sync of all Services is needed, and likely to succeed."""


class ApplyResult(Struct, frozen=True):
    """What a backend's sync did: the rules it wrote, and the rules that kproxy has in the kernel now, by table.

    `conflicts` are all current frontend conflicts, not only those of the Services that the sync covered.
    """

    written_rules: Mapping[str, int]
    total_rules: Mapping[str, int]
    conflicts: tuple[FrontendConflict, ...] = ()


class ServiceCounts(Struct, frozen=True):
    """The number of Services of a family in each condition.

    `without_endpoints`: a port has no endpoint anywhere. `dropped`: a port has endpoints, but none on this node, and
    its traffic policy is Local. `in_conflict`: another Service owns one of its frontends. `invalid`: the object cannot
    be used. `ignored`: headless and ExternalName Services, and those of another proxy; only files contain these, since
    kproxy asks the API server not to send them.
    """

    without_endpoints: int = 0
    dropped: int = 0
    in_conflict: int = 0
    invalid: int = 0
    ignored: int = 0


ConditionReason: TypeAlias = Literal[
    "NoEndpoints", "EndpointsAvailable", "SourceRangesIgnored", "FrontendConflict", "ConflictResolved"
]


class ConditionTransition(Struct, frozen=True):
    """A change in the condition of a Service. `reason` and `message` are those of the event about it."""

    service: ServiceKey
    reason: ConditionReason
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether an operator may have to act."""
        return self.reason not in {"EndpointsAvailable", "ConflictResolved"}


class SyncResult(Struct, frozen=True):
    """What a successful sync of one family programmed.

    `services` is the number of Services covered: all of them if `complete`, otherwise those that may have changed.
    `plans` holds the plans that matter beyond the rules (`ServicePortPlan.outlives_sync`). If the sync is `complete`,
    Services without such plans are absent; otherwise every Service covered is present, with no plans if it has none
    that matter. `last_changes` are the start times, in seconds since the epoch, of the endpoint changes that are now in
    the kernel (annotation `endpoints.kubernetes.io/last-change-trigger-time`). `transitions` are the changes of
    condition that this sync brought.
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

    `result` is None if the attempt failed; `error` then says why, on one line. `started` and `finished` are seconds of
    the reconciler's monotonic clock.
    """

    family: Family
    started: float
    finished: float
    result: SyncResult | None
    error: str = ""


QueueListener: TypeAlias = Callable[[Family, float], None]
"""Called when changes of a family start to wait for a sync, with the time of the reconciler's clock."""
ChangeListener: TypeAlias = Callable[[Kind, StoreChange], None]
"""Called with the kind of object that a delta was about and what the delta changed."""
SyncListener: TypeAlias = Callable[[SyncReport], None]
"""Called after each attempt to sync a family.

Listeners run in the reconciler's thread and must not block. An exception is logged and stops nothing.
"""
AfterSyncStep: TypeAlias = Callable[[SyncReport], None]
"""Work that follows an attempt to sync a family, and may block the reconciler's thread for seconds.

Steps run once all listeners have been notified. An exception is logged and stops nothing.
"""
