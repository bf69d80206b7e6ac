"""The health of this node's proxy, and the pages `/healthz` and `/livez`.

The proxy is healthy if every IP family has been synced and no change has been waiting for longer than twice
`syncPeriod`. Load balancers use `/healthz` to decide whether to send new connections to this node. Therefore,
`/healthz` also requires that the Node exists and is not being deleted (KEP-3836).

`/livez` decides whether the kubelet restarts the proxy. This would not help a proxy that is still programming a large
change, so `/livez` also succeeds while a sync makes progress.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus

from msgspec import Struct

from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family, Node
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, json, routes

NANO = 10**9
ZERO_TIME = "0001-01-01T00:00:00Z"
"""The text that Go prints for a time that was never set."""


class FamilyHealth(Struct, frozen=True):
    """The health of one IP family.

    `last_success` is in nanoseconds since the epoch, or 0 if no sync has succeeded. `progressing` is true if a sync has
    recently made progress. `quarantined` is the number of Services whose rules the kernel rejects.
    """

    healthy: bool
    last_success: int
    progressing: bool = False
    quarantined: int = 0


class Health:
    """Records two times for each IP family: when its oldest waiting change was queued, and when a sync last succeeded.

    The reconciler's thread updates the times; any thread may read them and call `on_progress`. `now` is the time on the
    reconciler's monotonic clock, in seconds. `wall` returns nanoseconds since the epoch, which are only displayed.
    `timeout` is the maximum number of seconds that a change may wait.
    """

    def __init__(self, families: Iterable[Family], timeout: float, *, wall: Callable[[], int]) -> None:
        self._timeout = timeout
        self._wall = wall
        self._pending: dict[Family, float] = {}
        self._succeeded: dict[Family, int] = dict.fromkeys(families, 0)
        self._progress: dict[Family, float] = {}
        self._quarantined: dict[Family, int] = {}
        self._lock = threading.Lock()

    def on_queue(self, family: Family, now: float) -> None:
        """Record that an IP family has a change that is waiting for a sync."""
        with self._lock:
            self._pending.setdefault(family, now)

    def on_sync(self, report: SyncReport) -> None:
        """Record the outcome of a sync. If the sync failed, its changes are still waiting."""
        with self._lock:
            self._progress.pop(report.family, None)
            if report.result is not None:
                self._quarantined[report.family] = report.result.counts.quarantined
            if report.result is None:
                self._pending.setdefault(report.family, report.started)
            else:
                self._pending.pop(report.family, None)
                self._succeeded[report.family] = self._wall()

    def on_progress(self, family: Family, now: float) -> None:
        """Record that the running sync of a family has made progress: the kernel has accepted a part of it."""
        with self._lock:
            self._progress[family] = now

    def families(self, now: float) -> dict[Family, FamilyHealth]:
        """Return the health of every IP family."""
        with self._lock:
            return {
                family: FamilyHealth(
                    bool(success) and now - self._pending.get(family, now) <= self._timeout,
                    success,
                    family in self._progress and now - self._progress[family] <= self._timeout,
                    self._quarantined.get(family, 0),
                )
                for family, success in self._succeeded.items()
            }

    def is_healthy(self, now: float) -> bool:
        """Return whether every IP family is healthy."""
        return all(family.healthy for family in self.families(now).values())


def is_eligible(node: Node | None) -> bool:
    """Return whether load balancers may send new connections to a Node: the Node exists and is not being deleted."""
    return node is not None and not node.being_deleted


class HealthPages:
    """The pages `/healthz` and `/livez`, in the format of kube-proxy.

    `node` returns this Node, or None if it is unknown. `clock` returns the time of the reconciler's monotonic clock in
    seconds; `wall` returns nanoseconds since the epoch. For each response, `on_probe` is called with the page
    ("healthz" or "livez") and the HTTP status. `reason` returns the problem with this Node, or "" if there is none.
    `/healthz` shows the problem in the field `reason`, which kube-proxy does not have. If Services of a family are
    quarantined, both pages show their number in `quarantinedServices`; this does not make the proxy unhealthy.
    `sources` returns further fields for both pages, about the sources of the objects. They do not affect the status:
    while the API server is away, a node must keep serving with the objects that it has.
    """

    def __init__(
        self,
        health: Health,
        node: Callable[[], Node | None],
        *,
        clock: Callable[[], float],
        wall: Callable[[], int],
        on_probe: Callable[[str, int], None],
        reason: Callable[[], str] = lambda: "",
        sources: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        self._health = health
        self._sources = sources
        self._reason = reason
        self._node = node
        self._clock = clock
        self._wall = wall
        self._on_probe = on_probe

    @property
    def handler(self) -> Handler:
        """The handler for requests to `healthzBindAddress`."""
        return routes({"/healthz": self.healthz, "/livez": self.livez})

    def healthz(self, _: HttpRequest) -> HttpResponse:
        """Respond with 200 if this node should receive new connections, and with 503 otherwise."""
        return self._answer("healthz", eligible=is_eligible(self._node()), reason=self._reason())

    def livez(self, _: HttpRequest) -> HttpResponse:
        """Respond with 200 if every family is healthy or makes progress, and with 503 otherwise.

        The state of the Node does not matter.
        """
        return self._answer("livez", eligible=None)

    def _answer(self, page: str, eligible: bool | None, reason: str = "") -> HttpResponse:
        families = self._health.families(self._clock())
        is_livez = eligible is None
        states = {family: each.healthy or (is_livez and each.progressing) for family, each in families.items()}
        healthy = all(states.values())
        ok = healthy and eligible is not False
        now = self._wall()
        # As in kube-proxy, `lastUpdated` of a 200 response is the current time, even if nothing has changed for days.
        updated = now if ok else max((family.last_success for family in families.values()), default=0)
        status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
        self._on_probe(page, status)
        return json(
            status,
            {
                "lastUpdated": rfc3339(updated),
                "currentTime": rfc3339(now),
                **({} if eligible is None else {"nodeEligible": eligible}),
                "healthy": healthy,
                "status": {
                    family.value: {
                        "lastUpdated": rfc3339(health.last_success),
                        "healthy": states[family],
                        **({"quarantinedServices": health.quarantined} if health.quarantined else {}),
                    }
                    for family, health in families.items()
                },
                **({"reason": reason} if reason else {}),
                **self._sources(),
            },
        )


def rfc3339(nanoseconds: int) -> str:
    """Format nanoseconds since the epoch in Go's `RFC3339Nano` format: UTC, without trailing zeros in the fraction.

    0 stands for a time that was never set.
    """
    if not nanoseconds:
        return ZERO_TIME
    seconds, remainder = divmod(nanoseconds, NANO)
    fraction = f".{remainder:09}".rstrip("0") if remainder else ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"
