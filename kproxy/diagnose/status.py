"""The report of `kproxy status`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from kproxy.diagnose.finding import Finding
from kproxy.diagnose.report import Report, ReportPart
from kproxy.model.daemon_status import DaemonStatus, FamilyStatus

STALE_SECONDS = 600.0
"""Without any message about a kind of object for this time, the objects may be outdated. Watches end after 5 to 10
minutes at most, and the API server sends bookmarks about once a minute.
"""
SLOW_SECONDS = 60.0
"""Changes that wait for longer than this are a problem, even if `/healthz` still succeeds."""


class ConntrackUse(ReportPart, frozen=True, kw_only=True):
    """How many entries the conntrack table of this network namespace has, and how many it may have."""

    entries: int
    maximum: int


class StatusProblem(ReportPart, frozen=True, kw_only=True):
    """A problem: a stable reason code, whether it makes the proxy unhealthy, and what is wrong on one line."""

    reason: str
    unhealthy: bool
    text: str


class Status(Report, frozen=True, kw_only=True):
    """The state of a node's proxy. `problems` are in order of importance; without any, `health` is Healthy.

    `host` are the errors and warnings of `kproxy doctor`.
    """

    health: Literal["Healthy", "Degraded", "Unhealthy"]
    problems: tuple[StatusProblem, ...]
    daemon: DaemonStatus
    conntrack: ConntrackUse | None = None
    host: tuple[Finding, ...] = ()


def make_status(daemon: DaemonStatus, conntrack: ConntrackUse | None, host: tuple[Finding, ...] = ()) -> Status:
    """Judge the state of a daemon.

    `host` are the findings of `kproxy doctor`. Errors and warnings among them are shown, but do not affect `health`.
    """
    problems = sorted(_problems(daemon, conntrack), key=lambda each: not each.unhealthy)
    health: Literal["Healthy", "Degraded", "Unhealthy"] = "Degraded" if problems else "Healthy"
    if any(each.unhealthy for each in problems):
        health = "Unhealthy"
    shown = tuple(each for each in host if each.severity in {"error", "warning"})
    return Status(health=health, problems=tuple(problems), daemon=daemon, conntrack=conntrack, host=shown)


def _problems(daemon: DaemonStatus, conntrack: ConntrackUse | None) -> Iterator[StatusProblem]:
    if not daemon.objects.complete:
        missing = f"not all objects have arrived yet from {daemon.objects.source}"
        yield StatusProblem(reason="ObjectsIncomplete", unhealthy=True, text=missing)
    for family in daemon.families:
        yield from _family_problems(family, complete=daemon.objects.complete)
    if daemon.node_problem:
        yield StatusProblem(reason="NodeProblem", unhealthy=True, text=daemon.node_problem)
    stale = {kind: age for kind, age in daemon.objects.contact_seconds_ago.items() if age > STALE_SECONDS}
    if stale:
        kind, age = max(stale.items(), key=lambda item: item[1])
        text = f"no message about {kind} for {age:.0f} s: rules may be outdated"
        yield StatusProblem(reason="ApiSilent", unhealthy=False, text=text)
    elif daemon.objects.problem:
        yield StatusProblem(reason="ObjectsProblem", unhealthy=False, text=daemon.objects.problem)
    if conntrack is not None and conntrack.maximum and conntrack.entries > 0.9 * conntrack.maximum:
        share = 100 * conntrack.entries / conntrack.maximum
        text = f"the conntrack table is {share:.0f} % full: new connections may soon be dropped"
        yield StatusProblem(reason="ConntrackNearlyFull", unhealthy=False, text=text)


def _family_problems(family: FamilyStatus, *, complete: bool) -> Iterator[StatusProblem]:
    name, services = family.family, family.services
    if family.failure:
        text = f"{name}: the last sync failed: {family.failure}"
        yield StatusProblem(reason="SyncFails", unhealthy=not family.healthy, text=text)
    elif family.last_success_seconds_ago is None and complete:
        yield StatusProblem(reason="NotSyncedYet", unhealthy=True, text=f"{name}: no sync has succeeded yet")
    elif family.waiting_seconds > SLOW_SECONDS:
        text = f"{name}: a change has been waiting for {family.waiting_seconds:.0f} s"
        yield StatusProblem(reason="ChangesWait", unhealthy=not family.healthy, text=text)
    if services.quarantined:
        text = f"{name}: the kernel rejects the rules of {services.quarantined} Services"
        yield StatusProblem(reason="Quarantined", unhealthy=False, text=text)
    if services.in_conflict:
        text = f"{name}: {services.in_conflict} Services lose an address and port to another Service"
        yield StatusProblem(reason="FrontendConflict", unhealthy=False, text=text)
    for finding in family.findings:
        yield StatusProblem(reason="ForeignRule", unhealthy=False, text=f"{name}: {finding}")
