"""The state of the daemon, as the control socket reports it. Pure."""

from __future__ import annotations

from msgspec import Struct

from kproxy.model.types import ServiceKey

CONTROL_NAME = "\0kproxy/control/v1"
"""The name of the control socket: an abstract Unix socket (unix(7)), one for each network namespace.

It needs no writable directory and leaves nothing behind. Its last part is the version of the protocol.
"""
MAX_NAMES = 100
"""The maximum number of Services or repairs that each list of a status names."""


class StatusPart(Struct, frozen=True, kw_only=True, rename="camel"):
    """A value in a status. Field names are in camelCase in JSON."""


class NamedService(StatusPart, frozen=True, kw_only=True):
    """A Service with a problem, and the problem on one line."""

    service: ServiceKey
    problem: str


class ServiceSummary(StatusPart, frozen=True, kw_only=True):
    """The number of Services of a family in each condition, as of its last successful sync.

    `programmed` counts all Services that have rules. The other counts are those of
    `kproxy.model.sync_report.ServiceCounts`.
    """

    programmed: int = 0
    without_endpoints: int = 0
    dropped_by_local_policy: int = 0
    in_conflict: int = 0
    quarantined: int = 0
    invalid: int = 0
    ignored: int = 0


class RepairSummary(StatusPart, frozen=True, kw_only=True):
    """One repair of rules that other processes changed: how long ago, what was repaired, and who changed it.

    `by` is empty if the processes are unknown.
    """

    seconds_ago: float
    parts: tuple[str, ...]
    by: tuple[str, ...] = ()


class FamilyStatus(StatusPart, frozen=True, kw_only=True):
    """The state of one IP family.

    `last_success_seconds_ago` is None if no sync has succeeded. `pending` is the number of Services with changes that
    have not been programmed, and `waiting_seconds` the age of the oldest of these changes. `failure` is the reason why
    the last sync failed, or "".
    """

    family: str
    healthy: bool
    last_success_seconds_ago: float | None
    last_sync_seconds: float = 0.0
    pending: int = 0
    waiting_seconds: float = 0.0
    failures: int = 0
    failure: str = ""
    services: ServiceSummary = ServiceSummary()
    problems: tuple[NamedService, ...] = ()
    repairs: int = 0
    last_repairs: tuple[RepairSummary, ...] = ()
    findings: tuple[str, ...] = ()


class SourceStatus(StatusPart, frozen=True, kw_only=True):
    """Where the objects come from.

    `contact_seconds_ago` is the age of the last message from the API server, by kind of object. `problem` is why
    objects may be outdated, or "". `complete` is false until all kinds of objects have been received.
    """

    source: str
    complete: bool
    contact_seconds_ago: dict[str, float] = {}
    problem: str = ""


class DaemonStatus(StatusPart, frozen=True, kw_only=True):
    """The state of the daemon. `memory_bytes` is its resident memory."""

    version: str
    pid: int
    mode: str
    node: str
    node_problem: str = ""
    up_seconds: float
    verbosity: int
    memory_bytes: int = 0
    objects: SourceStatus
    families: tuple[FamilyStatus, ...]
