"""The measured daemon: start it, wait until it is idle, read its CPU time and memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
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


def kproxy_command(mode: str, url: str) -> list[str]:
    """Return the command of `kproxy run` with default settings, for the API server at `url`."""
    return [
        KPROXY,
        "run",
        f"--master={url}",
        f"--proxy-mode={mode}",
        f"--hostname-override={NODE}",
        f"--cluster-cidr={CLUSTER_CIDR}",
        "--conntrack-max-per-core=0",  # this limit is not per network namespace
        "--conntrack-min=0",
    ]


class MeasuredDaemon:
    """A service proxy in a network namespace, connected to an API server. Use it as a context manager.

    `name` is its name in error messages. `patience` is the number of seconds without a commit and without CPU use after
    which commits that are still missing count as an error.
    """

    def __init__(
        self,
        namespace: Namespace,
        monitor: CommitMonitor,
        command: Sequence[str],
        log: Path,
        *,
        name: str = "kproxy",
        patience: float = HANG_GUARD,
    ) -> None:
        self.name = name
        self._namespace = namespace
        self._monitor = monitor
        self._log = log
        self._command = list(command)
        self._patience = patience
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
            RuntimeError: the daemon exited, or is idle without the commits; the message has the last line of its log.
            TimeoutError: the daemon did not become idle.

        """
        active = called = time.monotonic_ns()
        deadline = time.monotonic() + HANG_GUARD
        while time.monotonic() < deadline:
            busy = self._is_busy()
            found = self._monitor.since(since)
            last, now = max(found[-1].time if found else 0, called, since), time.monotonic_ns()
            if not busy and len(found) >= commits and now - last > IDLE_TIME * 1e9:
                return found
            active = now if busy else max(active, last)
            if now - active > self._patience * 1e9:
                raise self.idle_error(f"has made {len(found)} of {commits} expected commits")
        raise TimeoutError(f"{self.name} did not become idle; {len(found)} of {commits} expected commits")

    def idle_error(self, problem: str) -> RuntimeError:
        """Return the error for a daemon that has been idle for `patience` seconds, with the last line of its log."""
        return RuntimeError(f"{self.name} {problem} and has been idle for {self._patience:g} s: {self._last_line()}")

    def check(self) -> None:
        """Raise `RuntimeError` with the last line of the log if the daemon has exited."""
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} exited with code {self._process.returncode}: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["(no output)"]
        return lines[-1]

    def _is_busy(self) -> bool:
        self.check()
        pid = self._process.pid
        before, children = own_cpu_seconds(pid), has_children(pid)
        time.sleep(POLL_INTERVAL)
        return children or has_children(pid) or own_cpu_seconds(pid) - before > IDLE_LOAD * POLL_INTERVAL
