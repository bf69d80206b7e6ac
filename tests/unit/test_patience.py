"""A program that takes long is logged at growing intervals, with what it may be waiting for."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
from pathlib import Path

import pytest

from kproxy.host.commands import SLOW_SECONDS, SlowCommandLog, lock_holder


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def logged_moments(slow_log: SlowCommandLog, caplog: pytest.LogCaptureFixture, until: int) -> list[int]:
    """Look every second, as somebody would who does not know when that is due."""
    found = []
    for second in range(1, until + 1):
        caplog.clear()
        slow_log.check(second)
        found += [second] * len(caplog.records)
    return found


def test_the_first_line_comes_after_seconds_and_each_other_waits_twice_as_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert logged_moments(SlowCommandLog("nft", 77, 0), caplog, 900) == [5, 15, 35, 75, 155, 315, 635]


def test_the_line_names_program_age_and_pid(caplog: pytest.LogCaptureFixture) -> None:
    slow_log = SlowCommandLog("ip6tables-restore", 77, 1000.0)
    slow_log.check(1000.0 + SLOW_SECONDS - 0.1)
    assert lines(caplog) == []
    slow_log.check(1005.4)
    slow_log.log_exit(1034.0, 0)
    assert lines(caplog) == [
        "WARNING ip6tables-restore is still running after 5 s (pid 77)",
        "INFO ip6tables-restore exited with status 0 after 34 s (pid 77)",
    ]


def test_a_program_that_goes_on_reading_its_input_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    slow_log = SlowCommandLog("iptables-restore", 77, 0)
    for second in range(1, 60):
        slow_log.check(second)
        slow_log.postpone(second)
    slow_log.log_exit(60, 0)
    assert lines(caplog) == []


def test_a_program_that_was_killed_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    slow_log = SlowCommandLog("nft", 77, 0)
    slow_log.check(5)
    slow_log.log_exit(900, -9)
    assert lines(caplog)[1:] == ["INFO nft was killed by signal 9 after 900 s (pid 77)"]


def test_a_program_that_was_never_slow_ends_without_a_line(caplog: pytest.LogCaptureFixture) -> None:
    SlowCommandLog("nft", 77, 0).log_exit(4, 1)
    assert lines(caplog) == []


def test_who_holds_a_lock_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert lock_holder(str(path)) == 0
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(str(path)) == os.getpid()
    assert lock_holder(str(path)) == 0
    assert lock_holder(str(tmp_path / "none")) == 0


@pytest.mark.parametrize(("program", "named"), [("/usr/sbin/iptables-restore", True), ("nft", False)])
def test_the_holder_of_the_xtables_lock_is_named_for_programs_that_take_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, named: bool
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    name = Path("/proc/self/comm").read_text().strip()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        SlowCommandLog(program, 77, 0).check(5)
    obstacle = f"; xtables lock {path} is held by {name} (pid {os.getpid()})" if named else ""
    assert lines(caplog) == [f"WARNING {program} is still running after 5 s (pid 77){obstacle}"]


def test_a_program_does_not_wait_for_a_lock_that_it_holds_itself(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    holding = "flock $0 sh -c 'echo held; cat'; :"
    with subprocess.Popen(
        ["sh", "-c", holding, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        SlowCommandLog("iptables", process.pid, 0).check(5)
        assert process.stdin is not None
        process.stdin.close()
    assert lines(caplog) == [f"WARNING iptables is still running after 5 s (pid {process.pid})"]
