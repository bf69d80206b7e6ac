"""The outcome of one sync, and the listeners that are notified of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.delta import Kind
from kproxy.model.frontend_conflicts import FrontendConflict
from kproxy.model.plan import ServicePortPlan
from kproxy.model.store import StoreChange
from kproxy.model.types import Family, ServiceKey


class ServiceCounts(Struct, frozen=True):
    """How many Services of a family are in a condition, or in none because they are not served.

    `without_endpoints` have a port without any endpoint, `dropped` one without an endpoint on this node under policy
    Local, `in_conflict` lose a frontend to another Service. `refused` are objects that could not be used, `ignored` are
    headless or ExternalName Services, or those of another proxy, as far as files have them: the API server is asked not
    to send them.
    """

    without_endpoints: int = 0
    dropped: int = 0
    in_conflict: int = 0
    refused: int = 0
    ignored: int = 0


NoticeKind = Literal["NoEndpoints", "EndpointsAvailable", "SourceRangesIgnored", "FrontendConflict", "ConflictResolved"]


class ConditionTransition(Struct, frozen=True):
    """Something that became true of a Service, as a sentence; `kind` is the reason of the event about it."""

    service: ServiceKey
    kind: NoticeKind
    text: str

    @property
    def is_warning(self) -> bool:
        """Whether somebody may have to do something about it."""
        return self.kind not in {"EndpointsAvailable", "ConflictResolved"}


Plans = Mapping[ServiceKey, Sequence[ServicePortPlan]]
"""The plans of Services by port; none for a Service that is gone, or has nothing in the family."""


class SyncError(Exception):
    """The kernel did not accept a change; the message says why on one line."""


class DriftError(SyncError):
    """Somebody else has changed what the kernel held: a sync of everything is needed, and likely to succeed."""


class ApplyResult(Struct, frozen=True):
    """What a backend's sync amounted to, by table: rules it wrote, and rules of ours that are now there.

    `conflicts` are all that there are now, not only those of the Services that this sync looked at.
    """

    rules: Mapping[str, int]
    total_rules: Mapping[str, int]
    conflicts: tuple[FrontendConflict, ...] = ()


class SyncReport(Struct, frozen=True):
    """One attempt to bring one family's kernel state to the desired state.

    `plans` are those of the `services` Services that were looked at: if `complete`, of all Services, but only those
    with a plan of `outlives_sync`; else of those that may have changed. `error` is "" if the kernel accepted
    everything; `written` is None if it did not. `began` and `ended` are in seconds of the reconciler's monotonic clock.
    `last_changes` are the moments, in seconds since the epoch, at which the endpoint changes began that are now in the
    kernel (annotation `endpoints.kubernetes.io/last-change-trigger-time`). `tally` counts the Services in a condition,
    and `notices` say what this sync changed of that.
    """

    family: Family
    began: float
    ended: float
    complete: bool
    plans: Plans
    context: Context | None
    written: ApplyResult | None
    error: str = ""
    services: int = 0
    last_changes: tuple[float, ...] = ()
    tally: ServiceCounts = ServiceCounts()
    notices: tuple[ConditionTransition, ...] = ()


class SyncListener(Protocol):
    """Told of syncs, in the reconciler's thread: must neither block nor raise."""

    def queued(self, family: Family, now: float) -> None:
        """Note that changes of a family wait to be programmed, at `now` of the reconciler's clock."""

    def changed(self, kind: Kind, changed: StoreChange) -> None:
        """Note what one delta about a kind of objects changed."""

    def synced(self, report: SyncReport) -> None:
        """Take in how a sync ended, well or not."""
