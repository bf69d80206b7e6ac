"""What passes between those who want kernel state and the backends that make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from kproxy.model.claims import Conflict
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import ServiceKey

Plans = Mapping[ServiceKey, Sequence[ServicePortPlan]]
"""The plans of Services by port; none for a Service that is gone, or has nothing in the family."""


class SyncError(Exception):
    """The kernel did not accept a change; the message says why on one line."""


class StateLostError(SyncError):
    """Somebody else has changed what the kernel held: a sync of everything is needed, and likely to succeed."""


class Written(Struct, frozen=True):
    """What a backend's sync amounted to, by table: rules it wrote, and rules of ours that are now there.

    `conflicts` are all that there are now, not only those of the Services that this sync looked at.
    """

    rules: Mapping[str, int]
    total_rules: Mapping[str, int]
    conflicts: tuple[Conflict, ...] = ()
