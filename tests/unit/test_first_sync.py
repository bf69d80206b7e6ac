"""Steps after the first sync: a removal that hangs or fails delays neither the other family nor later syncs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from kproxy.app import first_sync
from kproxy.app.daemon import Daemon
from kproxy.app.first_sync import FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS, RETRY_FACTOR, FirstSyncSteps
from kproxy.cli.log_format import RecentLines
from kproxy.config import Config
from kproxy.host.commands import CommandError
from kproxy.model.types import Family
from tests.clock import Clock
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.reports import succeeded

V4, V6 = Family.IPV4, Family.IPV6


class Removals:
    """The removals of a node in iptables mode: of a family's table, or of leftovers of ipvs mode ("ipvs").

    Each takes `seconds`, waits for its event in `hangs`, and fails if it is in `failing`.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.failing: set[str] = set()
        self.seconds = 0.0
        self.calls: list[str] = []
        self.hangs: dict[str, threading.Event] = {}

    def remove_table(self, family: Family) -> bool:
        return self._remove(family.value)

    def remove_ipvs(self, _: object) -> str:
        self._remove("ipvs")
        return ""

    def _remove(self, name: str) -> bool:
        self.calls.append(name)
        if name in self.hangs:
            assert self.hangs[name].wait(HANG_GUARD)
        self.clock.advance(self.seconds)
        if name in self.failing:
            raise CommandError("no")
        return False


@pytest.fixture
def removals(monkeypatch: pytest.MonkeyPatch) -> Removals:
    removals = Removals(Clock())
    monkeypatch.setattr(first_sync, "remove_table", removals.remove_table)
    monkeypatch.setattr(first_sync, "remove_ipvs", removals.remove_ipvs)
    monkeypatch.setattr(first_sync, "prepare_localhost_node_ports", lambda _: None)
    return removals


@pytest.fixture
def steps(removals: Removals) -> FirstSyncSteps:
    return FirstSyncSteps(Config(mode="iptables"), list(Family), clock=removals.clock)


def start(step: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    return thread


def test_removal_that_hangs_does_not_delay_the_other_family(steps: FirstSyncSteps, removals: Removals) -> None:
    removals.hangs["IPv4"] = threading.Event()
    thread = start(partial(steps.run, succeeded(V4)))
    wait_until(lambda: removals.calls, "the removal of IPv4 to begin")
    for _ in range(3):
        steps.run(succeeded(V6))
    assert removals.calls == ["IPv4", "IPv6"]
    removals.hangs["IPv4"].set()
    thread.join(HANG_GUARD)
    assert removals.calls == ["IPv4", "IPv6", "ipvs"]


def test_removal_of_ipvs_leftovers_that_hangs_delays_only_one_family(steps: FirstSyncSteps, removals: Removals) -> None:
    removals.hangs["ipvs"] = threading.Event()
    steps.run(succeeded(V4))
    thread = start(partial(steps.run, succeeded(V6)))
    wait_until(lambda: "ipvs" in removals.calls, "the removal of leftovers to begin")
    steps.run(succeeded(V4))
    removals.hangs["ipvs"].set()
    thread.join(HANG_GUARD)
    steps.run(succeeded(V4))
    assert removals.calls == ["IPv4", "IPv6", "ipvs"]


def attempts(steps: FirstSyncSteps, removals: Removals, name: str, seconds: float) -> list[float]:
    """Sync IPv4 every second for so many seconds. Return the times between the attempts to remove something."""
    begun: list[float] = []
    end = removals.clock.now + seconds
    while removals.clock.now < end:
        now, calls = removals.clock.now, removals.calls.count(name)
        steps.run(succeeded(V4))
        begun += [now] * (removals.calls.count(name) - calls)
        removals.clock.advance(1.0)
    return [later - earlier for earlier, later in pairwise(begun)]


@pytest.mark.parametrize("name", ["IPv4", "ipvs"])
def test_failed_removal_is_retried_with_growing_pauses(
    steps: FirstSyncSteps, removals: Removals, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    removals.failing = {name}
    steps.run(succeeded(V6))
    pauses = attempts(steps, removals, name, 3000)
    assert pauses == [min(FIRST_RETRY_SECONDS * 2**number, MAX_RETRY_SECONDS) for number in range(len(pauses))]
    assert MAX_RETRY_SECONDS in pauses
    assert len(caplog.records) == 1
    removals.failing.clear()
    attempts(steps, removals, name, MAX_RETRY_SECONDS + 2)
    removals.calls.clear()
    assert attempts(steps, removals, name, 2 * MAX_RETRY_SECONDS) == []
    assert removals.calls == []


def test_pause_after_a_removal_that_took_long_is_long(steps: FirstSyncSteps, removals: Removals) -> None:
    """The removal runs in the thread that programs the family."""
    removals.failing = {"IPv4"}
    removals.seconds = 30.0
    assert attempts(steps, removals, "IPv4", 600)[0] == (1 + RETRY_FACTOR) * 30.0


def test_stop_kills_a_removal_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ip6tables", "ip6tables-save"):
        script = f"""#!/bin/sh
            case "$*" in
            --version) echo "ip6tables v1.8.9 (nf_tables)" ;;
            *) echo $$ >{tmp_path}/new; /bin/mv {tmp_path}/new {tmp_path}/pid; exec /bin/sleep 1000 ;;
            esac
        """
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # no other program may run
    steps = FirstSyncSteps(Config(mode="nftables"), [V6])
    thread = start(partial(steps.run, succeeded(V6)))
    wait_until((tmp_path / "pid").exists, "the program to start")
    pid = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{pid}").exists()
    steps.stop()
    thread.join(HANG_GUARD)
    assert not Path(f"/proc/{pid}").exists()
    steps.run(succeeded(V6))
    assert caplog.text == ""


def test_daemon_that_stops_kills_the_removal() -> None:
    daemon = Daemon(Config(mode="nftables"), None, None, None, own_log=RecentLines())
    daemon._first_sync = steps = FirstSyncSteps(Config(mode="nftables"), [V6])
    ended = threading.Thread(target=lambda: None)
    ended.start()
    daemon._stop(ended)
    assert steps._stopped
