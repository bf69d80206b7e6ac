"""Whether this node's proxy is healthy: `/healthz`, `/livez`, and what the Services' health check ports ask.

Healthy means that every family has been programmed, and that no change of it has been waiting for longer than twice
`syncPeriod`. `/healthz`, which load balancers ask about new connections, also wants a Node that stays (KEP-3836).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http import HTTPStatus

from msgspec import Struct

from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family, Node
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, json, routes

NANO = 10**9
NEVER = "0001-01-01T00:00:00Z"
"""How Go writes a time that was never set."""


class FamilyHealth(Struct, frozen=True):
    """The health of one family; `last_success` is in nanoseconds since the epoch, 0 if there was none."""

    healthy: bool
    last_success: int


class Health:
    """When each family's changes arrived, and when they were last in the kernel.

    Fed by the reconciler's thread and asked by others. Moments are seconds of the reconciler's clock, which never
    goes back; `wall` gives nanoseconds since the epoch and only dates what is told. `timeout` is in seconds.
    """

    def __init__(self, families: Iterable[Family], timeout: float, *, wall: Callable[[], int]) -> None:
        self._timeout = timeout
        self._wall = wall
        self._pending: dict[Family, float] = {}
        self._succeeded: dict[Family, int] = dict.fromkeys(families, 0)
        self._lock = threading.Lock()

    def on_queue(self, family: Family, now: float) -> None:
        """Record that a change of a family waits for a sync."""
        with self._lock:
            self._pending.setdefault(family, now)

    def on_sync(self, report: SyncReport) -> None:
        """Record the outcome of a sync. The changes of one that failed are still waiting."""
        with self._lock:
            if report.result is None:
                self._pending.setdefault(report.family, report.started)
            else:
                self._pending.pop(report.family, None)
                self._succeeded[report.family] = self._wall()

    def families(self, now: float) -> dict[Family, FamilyHealth]:
        """Return the health of every family."""
        with self._lock:
            return {
                family: FamilyHealth(bool(success) and now - self._pending.get(family, now) <= self._timeout, success)
                for family, success in self._succeeded.items()
            }

    def is_healthy(self, now: float) -> bool:
        """Return whether every family is healthy."""
        return all(family.healthy for family in self.families(now).values())


def is_eligible(node: Node | None) -> bool:
    """Return whether load balancers may send new connections to a Node: it exists and is not about to go."""
    return node is not None and not node.being_deleted


class HealthPages:
    """`/healthz` and `/livez`, as kube-proxy answers them.

    `node` returns this Node as far as it is known, `clock` is the reconciler's, `wall` gives nanoseconds since
    the epoch, and `probed` is told the page and status of each answer. `reason` returns what is wrong with this Node,
    "" if nothing is: `/healthz` shows it in a field that kube-proxy does not have.
    """

    def __init__(
        self,
        health: Health,
        node: Callable[[], Node | None],
        *,
        clock: Callable[[], float],
        wall: Callable[[], int],
        probed: Callable[[str, int], None],
        reason: Callable[[], str] = lambda: "",
    ) -> None:
        self._health = health
        self._reason = reason
        self._node = node
        self._clock = clock
        self._wall = wall
        self._probed = probed

    @property
    def handler(self) -> Handler:
        """What answers on the port of `healthzBindAddress`."""
        return routes({"/healthz": self.healthz, "/livez": self.livez})

    def healthz(self, _: HttpRequest) -> HttpResponse:
        """Answer whether this node should get traffic."""
        return self._answer("healthz", eligible=is_eligible(self._node()), reason=self._reason())

    def livez(self, _: HttpRequest) -> HttpResponse:
        """Answer whether this process works, whatever becomes of the node."""
        return self._answer("livez", eligible=None)

    def _answer(self, page: str, eligible: bool | None, reason: str = "") -> HttpResponse:
        families = self._health.families(self._clock())
        healthy = all(family.healthy for family in families.values())
        good = healthy and eligible is not False
        now = self._wall()
        # A healthy proxy counts as updated just now, though nothing may have changed for days: kube-proxy says so.
        updated = now if good else max((family.last_success for family in families.values()), default=0)
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        self._probed(page, status)
        return json(
            status,
            {
                "lastUpdated": rfc3339(updated),
                "currentTime": rfc3339(now),
                **({} if eligible is None else {"nodeEligible": eligible}),
                "healthy": healthy,
                "status": {
                    family.value: {"lastUpdated": rfc3339(found.last_success), "healthy": found.healthy}
                    for family, found in families.items()
                },
                **({"reason": reason} if reason else {}),
            },
        )


def rfc3339(nanoseconds: int) -> str:
    """Return nanoseconds since the epoch as Go's `RFC3339Nano` writes them, in UTC: without trailing zeros."""
    if not nanoseconds:
        return NEVER
    seconds, rest = divmod(nanoseconds, NANO)
    fraction = f".{rest:09}".rstrip("0") if rest else ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"
