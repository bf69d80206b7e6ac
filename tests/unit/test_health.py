"""`/healthz` and `/livez`: the health of the proxy and of the node, in the format of kube-proxy."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from msgspec.structs import replace

from kproxy.model.sync_report import ServiceCounts
from kproxy.model.types import Family, Node
from kproxy.serve.health import NANO, Health, HealthPages, rfc3339
from kproxy.serve.http import HttpRequest, encode
from tests.recordings import GOLDEN, SCENARIOS
from tests.reports import failed, succeeded

V4, V6 = Family.IPV4, Family.IPV6
TIMEOUT = 60.0
REQUEST = HttpRequest("GET", "/", {}, persistent=True)
EPOCH = 1795218460 * NANO
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{0,8}[1-9])?Z")


class FakeProxy:
    """A dual-stack proxy with its node and two clocks: `now` is monotonic, `wall` is not."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wall = EPOCH
        self.node: Node | None = Node("node-1")
        self.reason = ""
        self.sources: dict[str, object] = {}
        self.probed: list[tuple[str, int]] = []
        self.health = Health((V4, V6), TIMEOUT, wall=lambda: self.wall)
        self.pages = HealthPages(
            self.health,
            lambda: self.node,
            clock=lambda: self.now,
            wall=lambda: self.wall,
            on_probe=lambda page, status: self.probed.append((page, status)),
            reason=lambda: self.reason,
            sources=lambda: self.sources,
        )

    def succeed(self, *families: Family) -> None:
        for family in families or (V4, V6):
            self.health.on_sync(succeeded(family, started=self.now, finished=self.now))

    def fail(self, family: Family) -> None:
        self.health.on_sync(failed(family, started=self.now, finished=self.now))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.wall += int(seconds * NANO)

    @property
    def statuses(self) -> tuple[int, int]:
        return self.pages.healthz(REQUEST).status, self.pages.livez(REQUEST).status

    def body(self, page: str = "healthz") -> dict[str, Any]:
        response = self.pages.healthz(REQUEST) if page == "healthz" else self.pages.livez(REQUEST)
        fields: dict[str, Any] = json.loads(response.body)
        return fields


@pytest.fixture
def proxy() -> FakeProxy:
    return FakeProxy()


def without_times(text: str) -> str:
    lines = text.split("\r\n") if "\r\n" in text else text.split("\n")
    kept = [line for line in lines if not line.startswith(("Date: ", "Content-Length: "))]
    return "\n".join(TIME.sub("TIME", line) for line in kept)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_healthz_response_matches_kube_proxy(proxy: FakeProxy, scenario: str) -> None:
    proxy.succeed()
    response = encode(proxy.pages.healthz(REQUEST), 0.0, head_only=False, close=False)
    recorded = (GOLDEN / scenario / "healthz.txt").read_text()
    assert without_times(response.decode()) == without_times(recorded)
    assert recorded.count("TIME") < without_times(recorded).count("TIME") == 4


def test_unhealthy_until_the_first_successful_sync_of_every_family(proxy: FakeProxy) -> None:
    assert proxy.statuses == (503, 503)
    proxy.succeed(V4)
    assert proxy.statuses == (503, 503)
    assert proxy.body()["status"] == {
        "IPv4": {"lastUpdated": "2026-11-20T23:47:40Z", "healthy": True},
        "IPv6": {"lastUpdated": "0001-01-01T00:00:00Z", "healthy": False},
    }
    proxy.succeed(V6)
    assert proxy.statuses == (200, 200)


def test_idle_proxy_stays_healthy(proxy: FakeProxy) -> None:
    proxy.succeed()
    proxy.advance(1_000_000)
    assert proxy.statuses == (200, 200)


def test_changes_pending_for_too_long_are_unhealthy(proxy: FakeProxy) -> None:
    proxy.succeed()
    proxy.advance(1000)
    proxy.health.on_queue(V6, proxy.now)
    proxy.advance(TIMEOUT)
    proxy.health.on_queue(V6, proxy.now)  # later changes do not reset the age of the first one
    assert proxy.statuses == (200, 200)
    proxy.advance(1)
    assert proxy.statuses == (503, 503)
    assert proxy.body()["status"]["IPv4"]["healthy"]
    assert not proxy.body()["status"]["IPv6"]["healthy"]
    proxy.succeed(V4)
    assert proxy.statuses == (503, 503)
    proxy.succeed(V6)
    assert proxy.statuses == (200, 200)


def test_failed_sync_leaves_its_changes_pending(proxy: FakeProxy) -> None:
    proxy.succeed()
    proxy.advance(5)
    proxy.fail(V4)
    proxy.advance(TIMEOUT)
    proxy.fail(V4)
    assert proxy.statuses == (200, 200)
    proxy.advance(1)
    assert proxy.statuses == (503, 503)


def test_sync_that_makes_progress_keeps_livez_at_200(proxy: FakeProxy) -> None:
    proxy.succeed(V6)
    proxy.health.on_queue(V4, proxy.now)
    assert proxy.statuses == (503, 503)
    for _ in range(5):
        proxy.advance(TIMEOUT / 2)
        proxy.health.on_progress(V4, proxy.now)
        assert proxy.statuses == (503, 200)
        assert proxy.body("livez")["healthy"] is True
        assert proxy.body("healthz")["status"]["IPv4"]["healthy"] is False
    proxy.advance(TIMEOUT + 1)
    assert proxy.statuses == (503, 503)


def test_progress_of_a_sync_that_failed_does_not_count(proxy: FakeProxy) -> None:
    proxy.succeed()
    proxy.health.on_queue(V4, proxy.now)
    proxy.advance(TIMEOUT + 1)
    proxy.health.on_progress(V4, proxy.now)
    proxy.fail(V4)
    assert proxy.statuses == (503, 503)


def test_progress_of_one_family_does_not_hide_that_the_other_hangs(proxy: FakeProxy) -> None:
    proxy.succeed()
    for family in (V4, V6):
        proxy.health.on_queue(family, proxy.now)
    proxy.advance(TIMEOUT + 1)
    proxy.health.on_progress(V4, proxy.now)
    assert proxy.statuses == (503, 503)


def test_quarantined_services_are_shown_but_healthy(proxy: FakeProxy) -> None:
    proxy.succeed()
    report = succeeded(V4, started=proxy.now, finished=proxy.now)
    assert report.result is not None
    result = replace(report.result, counts=ServiceCounts(quarantined=2))
    proxy.health.on_sync(replace(report, result=result))
    assert proxy.statuses == (200, 200)
    assert proxy.body()["status"]["IPv4"]["quarantinedServices"] == 2
    assert "quarantinedServices" not in proxy.body()["status"]["IPv6"]
    proxy.succeed()
    assert "quarantinedServices" not in proxy.body()["status"]["IPv4"]


def test_wall_clock_does_not_affect_health(proxy: FakeProxy) -> None:
    proxy.succeed()
    proxy.health.on_queue(V4, proxy.now)
    proxy.wall += 10_000 * NANO
    assert proxy.statuses == (200, 200)
    proxy.wall -= 20_000 * NANO
    proxy.now += TIMEOUT + 1
    assert proxy.statuses == (503, 503)


@pytest.mark.parametrize("node", [None, Node("node-1", being_deleted=True)])
def test_node_being_deleted_fails_healthz_but_not_livez(proxy: FakeProxy, node: Node | None) -> None:
    proxy.succeed()
    proxy.node = node
    assert proxy.statuses == (503, 200)
    assert proxy.body()["nodeEligible"] is False
    assert proxy.body()["healthy"] is True
    assert "nodeEligible" not in proxy.body("livez")
    assert list(proxy.body("livez")) == ["lastUpdated", "currentTime", "healthy", "status"]


def test_reason_follows_the_fields_of_kube_proxy(proxy: FakeProxy) -> None:
    proxy.succeed()
    fields = list(proxy.body())
    proxy.node, proxy.reason = None, 'Node "node-1" not found'
    assert proxy.statuses == (503, 200)
    assert list(proxy.body()) == [*fields, "reason"]
    assert proxy.body()["reason"] == proxy.reason
    assert "reason" not in proxy.body("livez")


def test_outdated_objects_are_shown_but_do_not_change_the_status(proxy: FakeProxy) -> None:
    proxy.succeed()
    proxy.sources = {"apiStaleSeconds": 600}
    assert proxy.statuses == (200, 200)
    for page in ("healthz", "livez"):
        assert proxy.body(page)["apiStaleSeconds"] == 600
        assert proxy.body(page)["healthy"] is True


def test_reported_times(proxy: FakeProxy) -> None:
    proxy.succeed(V4)
    proxy.advance(1.5)
    proxy.succeed(V6)
    proxy.advance(10)
    healthy = proxy.body()
    assert healthy["lastUpdated"] == healthy["currentTime"] == "2026-11-20T23:47:51.5Z"
    assert healthy["status"]["IPv4"]["lastUpdated"] == "2026-11-20T23:47:40Z"
    proxy.node = None
    assert proxy.body()["lastUpdated"] == healthy["status"]["IPv6"]["lastUpdated"] == "2026-11-20T23:47:41.5Z"
    assert FakeProxy().body()["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_probes_are_counted(proxy: FakeProxy) -> None:
    assert proxy.statuses == (503, 503)
    proxy.succeed()
    assert proxy.statuses == (200, 200)
    assert proxy.probed == [("healthz", 503), ("livez", 503), ("healthz", 200), ("livez", 200)]


@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/livez", 200), ("/", 404), ("/healthz/", 404)])
def test_port_serves_two_pages(proxy: FakeProxy, path: str, status: int) -> None:
    proxy.succeed()
    assert proxy.pages.handler(HttpRequest("GET", path, {}, persistent=True)).status == status


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0001-01-01T00:00:00Z"),
        (EPOCH, "2026-11-20T23:47:40Z"),
        (EPOCH + 1, "2026-11-20T23:47:40.000000001Z"),
        (EPOCH + 937819500, "2026-11-20T23:47:40.9378195Z"),
        (EPOCH + 100000000, "2026-11-20T23:47:40.1Z"),
    ],
)
def test_times_are_formatted_as_in_go(nanoseconds: int, text: str) -> None:
    assert rfc3339(nanoseconds) == text
