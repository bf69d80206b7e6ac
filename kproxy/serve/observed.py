"""What the serving side needs to know of syncs: the fields of a sync's report that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kproxy.model.context import Context
from kproxy.model.sync_report import ApplyResult, Plans, ServiceCounts
from kproxy.model.types import Family


class Sync(Protocol):
    """One attempt to bring one family's kernel state to the desired state.

    `plans` are those of all Services if `complete`, else of those that may have changed. `error` is "" on success;
    `context` and `written` are None without. `began` and `ended` are seconds of a clock that never goes back,
    `last_changes` seconds since the epoch.
    """

    @property
    def family(self) -> Family:
        """The family that was synced."""

    @property
    def began(self) -> float:
        """When the attempt began."""

    @property
    def ended(self) -> float:
        """When it ended."""

    @property
    def complete(self) -> bool:
        """Whether all Services were looked at."""

    @property
    def plans(self) -> Plans:
        """The plans of the Services that were looked at; none for a Service that is gone."""

    @property
    def context(self) -> Context | None:
        """What all Services of the family share."""

    @property
    def written(self) -> ApplyResult | None:
        """What the attempt amounted to."""

    @property
    def tally(self) -> ServiceCounts:
        """How many Services are in which condition."""

    @property
    def error(self) -> str:
        """Why it failed."""

    @property
    def last_changes(self) -> Sequence[float]:
        """When the endpoint changes began that are now in the kernel."""
