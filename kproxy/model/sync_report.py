"""The outcome of one sync, and the callbacks that receive it. Pure."""

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
    """The plans of the Services that one sync covers, computed one Service at a time.

    All plans of a large cluster together would take more memory than all other state, so they never exist at the same
    time: a backend plans, renders and discards one Service after the other.
    """

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        """Plan each Service of the sync once. A Service that was deleted or that kproxy ignores has no plans."""

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        """Plan one Service again."""


class SyncError(Exception):
    """The kernel rejected a change. The message gives the reason on one line."""


class DriftError(SyncError):
    """Another process changed kproxy's rules. A full sync is required, and likely to succeed."""


class ApplyResult(Struct, frozen=True):
    """The result of a backend's sync: the number of rules written, and of all kproxy rules in the kernel, by table.

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
    """A change in the condition of a Service. `reason` and `message` are also those of the Kubernetes Event."""

    service: ServiceKey
    reason: ConditionReason
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether an operator may need to act."""
        return self.reason not in {"EndpointsAvailable", "ConflictResolved"}


class SyncResult(Struct, frozen=True):
    """What a successful sync of one family programmed.

    `services` is the number of Services covered: all of them if `complete`, otherwise those that may have changed.
    `plans` contains the plans that are needed after the sync (`ServicePortPlan.outlives_sync`). If the sync is
    `complete`, Services without such plans are absent; otherwise every covered Service is present, possibly with no
    plans. `last_changes` are the times, in seconds since the epoch, at which the endpoint changes that are now in the
    kernel were triggered (annotation `endpoints.kubernetes.io/last-change-trigger-time`). `transitions` are the
    condition changes to report.
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
"""Called when a family has new changes to sync, with the time of the reconciler's clock in seconds."""
ChangeListener: TypeAlias = Callable[[Kind, StoreChange], None]
"""Called with the kind of object in a delta and what the delta changed."""
SyncListener: TypeAlias = Callable[[SyncReport], None]
"""Called after each attempt to sync a family.

Listeners run in the reconciler's thread and must not block. Exceptions are logged and otherwise ignored.
"""
AfterSyncStep: TypeAlias = Callable[[SyncReport], None]
"""A step that runs after an attempt to sync a family, and may block the reconciler's thread for seconds.

Steps run once all listeners have been notified. Exceptions are logged and otherwise ignored.
"""
