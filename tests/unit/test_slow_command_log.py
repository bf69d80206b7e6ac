"""Warnings about slow programs: when they are logged, and which lock holder they name."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
from pathlib import Path

import pytest

from kproxy.host.commands import SLOW_SECONDS, SlowCommandLog, lock_holder


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]


def warning_times(slow_log: SlowCommandLog, caplog: pytest.LogCaptureFixture, until: int) -> list[int]:
    """Check once a second; return the seconds at which a line was logged."""
    logged = []
    for second in range(1, until + 1):
        caplog.clear()
        slow_log.check(second)
        logged += [second] * len(caplog.records)
    return logged


def test_first_warning_after_5_seconds_and_then_with_doubled_intervals(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert warning_times(SlowCommandLog("nft", 77, 0), caplog, 900) == [5, 15, 35, 75, 155, 315, 635]


def test_warning_names_program_duration_and_pid(caplog: pytest.LogCaptureFixture) -> None:
    slow_log = SlowCommandLog("ip6tables-restore", 77, 1000.0)
    slow_log.check(1000.0 + SLOW_SECONDS - 0.1)
    assert lines(caplog) == []
    slow_log.check(1005.4)
    slow_log.log_exit(1034.0, 0)
    assert lines(caplog) == [
        "WARNING ip6tables-restore is still running after 5 s (pid 77)",
        "INFO ip6tables-restore exited with status 0 after 34 s (pid 77)",
    ]


def test_program_that_keeps_reading_its_input_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    slow_log = SlowCommandLog("iptables-restore", 77, 0)
    for second in range(1, 60):
        slow_log.check(second)
        slow_log.postpone(second)
    slow_log.log_exit(60, 0)
    assert lines(caplog) == []


def test_killing_signal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    slow_log = SlowCommandLog("nft", 77, 0)
    slow_log.check(5)
    slow_log.log_exit(900, -9)
    assert lines(caplog)[1:] == ["INFO nft was killed by signal 9 after 900 s (pid 77)"]


def test_exit_of_a_fast_program_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    SlowCommandLog("nft", 77, 0).log_exit(4, 1)
    assert lines(caplog) == []


def test_lock_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert lock_holder(str(path)) == 0
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(str(path)) == os.getpid()
    assert lock_holder(str(path)) == 0
    assert lock_holder(str(tmp_path / "none")) == 0


@pytest.mark.parametrize(("program", "takes_lock"), [("/usr/sbin/iptables-restore", True), ("nft", False)])
def test_xtables_lock_holder_is_named_only_for_programs_that_take_the_lock(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, takes_lock: bool
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    name = Path("/proc/self/comm").read_text().strip()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        SlowCommandLog(program, 77, 0).check(5)
    holder = f"; xtables lock {path} is held by {name} (pid {os.getpid()})" if takes_lock else ""
    assert lines(caplog) == [f"WARNING {program} is still running after 5 s (pid 77){holder}"]


def test_lock_held_by_the_program_itself_is_not_named(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    command = "flock $0 sh -c 'echo held; cat'; :"
    with subprocess.Popen(
        ["sh", "-c", command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        SlowCommandLog("iptables", process.pid, 0).check(5)
        assert process.stdin is not None
        process.stdin.close()
    assert lines(caplog) == [f"WARNING iptables is still running after 5 s (pid {process.pid})"]
