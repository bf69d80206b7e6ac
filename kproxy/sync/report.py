"""What a sync did, for those who watch: metrics, health, conntrack, service health ports."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from kproxy.model.condition import Tally
from kproxy.model.context import Context
from kproxy.model.delta import Kind
from kproxy.model.outcome import Plans, Written
from kproxy.model.store import Changed
from kproxy.model.types import Family
from kproxy.sync.conditions import Notice


class SyncReport(Struct, frozen=True):
    """One attempt to bring one family's kernel state to the desired state.

    `plans` are those of the `services` Services that were looked at: if `complete`, of all Services, but only those
    with a plan of `lasting_interest`; else of those that may have changed. `error` is "" if the kernel accepted
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
    written: Written | None
    error: str = ""
    services: int = 0
    last_changes: tuple[float, ...] = ()
    tally: Tally = Tally()
    notices: tuple[Notice, ...] = ()


class Observer(Protocol):
    """Told of syncs, in the reconciler's thread: must neither block nor raise."""

    def queued(self, family: Family, now: float) -> None:
        """Note that changes of a family wait to be programmed, at `now` of the reconciler's clock."""

    def changed(self, kind: Kind, changed: Changed) -> None:
        """Note what one delta about a kind of objects changed."""

    def synced(self, report: SyncReport) -> None:
        """Take in how a sync ended, well or not."""
