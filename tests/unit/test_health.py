"""`/healthz` and `/livez`: the truth about the proxy and the node, in kube-proxy's words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

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


class Scene:
    """A proxy of two families, its node and its clocks: `now` never goes back, `wall` may."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wall = EPOCH
        self.node: Node | None = Node("node-1")
        self.reason = ""
        self.probed: list[tuple[str, int]] = []
        self.health = Health((V4, V6), TIMEOUT, wall=lambda: self.wall)
        self.pages = HealthPages(
            self.health,
            lambda: self.node,
            clock=lambda: self.now,
            wall=lambda: self.wall,
            on_probe=lambda page, status: self.probed.append((page, status)),
            reason=lambda: self.reason,
        )

    def succeed(self, *families: Family) -> None:
        for family in families or (V4, V6):
            self.health.on_sync(succeeded(family, started=self.now, finished=self.now))

    def fail(self, family: Family) -> None:
        self.health.on_sync(failed(family, started=self.now, finished=self.now))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.wall += int(seconds * NANO)

    @property
    def statuses(self) -> tuple[int, int]:
        return self.pages.healthz(REQUEST).status, self.pages.livez(REQUEST).status

    def body(self, page: str = "healthz") -> dict[str, Any]:
        response = self.pages.healthz(REQUEST) if page == "healthz" else self.pages.livez(REQUEST)
        found: dict[str, Any] = json.loads(response.body)
        return found


@pytest.fixture
def scene() -> Scene:
    return Scene()


def without_times(text: str) -> str:
    lines = text.split("\r\n") if "\r\n" in text else text.split("\n")
    kept = [line for line in lines if not line.startswith(("Date: ", "Content-Length: "))]
    return "\n".join(TIME.sub("TIME", line) for line in kept)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_healthz_is_what_kube_proxy_answers(scene: Scene, scenario: str) -> None:
    scene.succeed()
    answer = encode(scene.pages.healthz(REQUEST), 0.0, head_only=False, close=False)
    recorded = (GOLDEN / scenario / "healthz.txt").read_text()
    assert without_times(answer.decode()) == without_times(recorded)
    assert recorded.count("TIME") < without_times(recorded).count("TIME") == 4


def test_nothing_is_healthy_before_the_first_success_of_every_family(scene: Scene) -> None:
    assert scene.statuses == (503, 503)
    scene.succeed(V4)
    assert scene.statuses == (503, 503)
    assert scene.body()["status"] == {
        "IPv4": {"lastUpdated": "2026-11-20T23:47:40Z", "healthy": True},
        "IPv6": {"lastUpdated": "0001-01-01T00:00:00Z", "healthy": False},
    }
    scene.succeed(V6)
    assert scene.statuses == (200, 200)


def test_nothing_to_do_is_healthy_however_long_it_lasts(scene: Scene) -> None:
    scene.succeed()
    scene.pass_time(1_000_000)
    assert scene.statuses == (200, 200)


def test_changes_that_wait_too_long_are_unhealthy(scene: Scene) -> None:
    scene.succeed()
    scene.pass_time(1000)
    scene.health.on_queue(V6, scene.now)
    scene.pass_time(TIMEOUT)
    scene.health.on_queue(V6, scene.now)  # later changes do not make the first younger
    assert scene.statuses == (200, 200)
    scene.pass_time(1)
    assert scene.statuses == (503, 503)
    assert scene.body()["status"]["IPv4"]["healthy"]
    assert not scene.body()["status"]["IPv6"]["healthy"]
    scene.succeed(V4)
    assert scene.statuses == (503, 503)
    scene.succeed(V6)
    assert scene.statuses == (200, 200)


def test_a_failed_sync_leaves_its_changes_waiting(scene: Scene) -> None:
    scene.succeed()
    scene.pass_time(5)
    scene.fail(V4)
    scene.pass_time(TIMEOUT)
    scene.fail(V4)
    assert scene.statuses == (200, 200)
    scene.pass_time(1)
    assert scene.statuses == (503, 503)


def test_the_time_of_day_decides_nothing(scene: Scene) -> None:
    scene.succeed()
    scene.health.on_queue(V4, scene.now)
    scene.wall += 10_000 * NANO
    assert scene.statuses == (200, 200)
    scene.wall -= 20_000 * NANO
    scene.now += TIMEOUT + 1
    assert scene.statuses == (503, 503)


@pytest.mark.parametrize("node", [None, Node("node-1", being_deleted=True)])
def test_a_node_that_goes_gets_no_new_traffic_but_its_proxy_lives(scene: Scene, node: Node | None) -> None:
    scene.succeed()
    scene.node = node
    assert scene.statuses == (503, 200)
    assert scene.body()["nodeEligible"] is False
    assert scene.body()["healthy"] is True
    assert "nodeEligible" not in scene.body("livez")
    assert list(scene.body("livez")) == ["lastUpdated", "currentTime", "healthy", "status"]


def test_what_is_wrong_with_the_node_is_told_beside_kube_proxys_fields(scene: Scene) -> None:
    scene.succeed()
    fields = list(scene.body())
    scene.node, scene.reason = None, 'Node "node-1" not found'
    assert scene.statuses == (503, 200)
    assert list(scene.body()) == [*fields, "reason"]
    assert scene.body()["reason"] == scene.reason
    assert "reason" not in scene.body("livez")


def test_times_that_are_told(scene: Scene) -> None:
    scene.succeed(V4)
    scene.pass_time(1.5)
    scene.succeed(V6)
    scene.pass_time(10)
    healthy = scene.body()
    assert healthy["lastUpdated"] == healthy["currentTime"] == "2026-11-20T23:47:51.5Z"
    assert healthy["status"]["IPv4"]["lastUpdated"] == "2026-11-20T23:47:40Z"
    scene.node = None
    assert scene.body()["lastUpdated"] == healthy["status"]["IPv6"]["lastUpdated"] == "2026-11-20T23:47:41.5Z"
    assert Scene().body()["lastUpdated"] == "0001-01-01T00:00:00Z"


def test_probes_are_counted(scene: Scene) -> None:
    assert scene.statuses == (503, 503)
    scene.succeed()
    assert scene.statuses == (200, 200)
    assert scene.probed == [("healthz", 503), ("livez", 503), ("healthz", 200), ("livez", 200)]


@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/livez", 200), ("/", 404), ("/healthz/", 404)])
def test_the_port_has_two_pages(scene: Scene, path: str, status: int) -> None:
    scene.succeed()
    assert scene.pages.handler(HttpRequest("GET", path, {}, persistent=True)).status == status


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
def test_times_are_written_as_go_writes_them(nanoseconds: int, text: str) -> None:
    assert rfc3339(nanoseconds) == text
