"""The measured daemon: start it, wait until it is idle, read its CPU time and memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Self

from tests.bench.cluster import CLUSTER_CIDR
from tests.bench.commit_monitor import Commit, CommitMonitor
from tests.bench.usage import cpu_seconds, has_children, memory_megabytes, own_cpu_seconds
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.topology import NODE

SYNC_PERIOD = 1.0
"""The default of `minSyncPeriod`: changes within this time after a sync wait for the next sync."""

IDLE_TIME = SYNC_PERIOD + 0.15
"""Seconds without a commit after which a daemon that uses no CPU is idle."""

POLL_INTERVAL = 0.05
IDLE_LOAD = 0.1
"""Share of a CPU below which the daemon counts as using none."""

HANG_GUARD = 3600.0


class MeasuredDaemon:
    """`kproxy run` in a network namespace, connected to an API server. Use it as a context manager."""

    def __init__(self, namespace: Namespace, monitor: CommitMonitor, mode: str, url: str, log: Path) -> None:
        self._namespace = namespace
        self._monitor = monitor
        self._log = log
        self._command = [
            KPROXY,
            "run",
            f"--master={url}",
            f"--proxy-mode={mode}",
            f"--hostname-override={NODE}",
            f"--cluster-cidr={CLUSTER_CIDR}",
            "--conntrack-max-per-core=0",  # this limit is not per network namespace
            "--conntrack-min=0",
        ]
        self.started = 0
        self._process: subprocess.Popen[str]

    def __enter__(self) -> Self:
        with self._log.open("w") as output:
            self.started = time.monotonic_ns()
            self._process = self._namespace.popen(self._command, output)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(HANG_GUARD)
        finally:
            self._process.kill()

    @property
    def cpu(self) -> float:
        """CPU seconds used so far by the daemon and the child processes it has waited for."""
        return cpu_seconds(self._process.pid)

    @property
    def memory(self) -> tuple[float, float]:
        """Current and peak resident memory in MB."""
        return memory_megabytes(self._process.pid)

    def wait_until_idle(self, since: int, *, commits: int = 1) -> list[Commit]:
        """Wait until the daemon is idle and has made at least `commits` commits after `since`; return these commits.

        Raises:
            RuntimeError: the daemon exited; the message has the last line of its log.
            TimeoutError: the daemon did not become idle.

        """
        called = time.monotonic_ns()
        deadline = time.monotonic() + HANG_GUARD
        while time.monotonic() < deadline:
            busy = self._is_busy()
            found = self._monitor.since(since)
            last = max(found[-1].time if found else 0, called, since)
            if not busy and len(found) >= commits and time.monotonic_ns() - last > IDLE_TIME * 1e9:
                return found
        raise TimeoutError(f"kproxy did not become idle; {len(found)} of {commits} expected commits")

    def check(self) -> None:
        """Raise `RuntimeError` with the last line of the log if the daemon has exited."""
        if self._process.poll() is not None:
            lines = self._log.read_text().strip().splitlines() or ["(no output)"]
            raise RuntimeError(f"kproxy exited with code {self._process.returncode}: {lines[-1]}")

    def _is_busy(self) -> bool:
        self.check()
        pid = self._process.pid
        before, children = own_cpu_seconds(pid), has_children(pid)
        time.sleep(POLL_INTERVAL)
        return children or has_children(pid) or own_cpu_seconds(pid) - before > IDLE_LOAD * POLL_INTERVAL
