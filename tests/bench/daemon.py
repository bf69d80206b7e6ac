"""The daemon that is measured: started, watched from outside until it rests, and stopped."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Self

from tests.bench.cluster import CLUSTER_CIDR
from tests.bench.commit_monitor import Notice, Notices
from tests.bench.usage import cpu_seconds, has_children, memory_megabytes, own_cpu_seconds
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.topology import NODE

SYNC_PERIOD = 1.0
"""`minSyncPeriod` as it is by default: changes within this time after a sync wait for the next one."""

REST = SYNC_PERIOD + 0.15
"""Seconds without a commit after which a daemon that does nothing either has nothing left to do."""

LOOK = 0.05
RESTING_LOAD = 0.1
"""Share of a CPU below which a daemon does nothing."""

HANG_GUARD = 3600.0


class Subject:
    """`kproxy run` in a namespace, following an API server. Use it in a `with`."""

    def __init__(self, namespace: Namespace, notices: Notices, mode: str, url: str, log: Path) -> None:
        self._namespace = namespace
        self._notices = notices
        self._log = log
        self._command = [
            KPROXY,
            "run",
            f"--master={url}",
            f"--proxy-mode={mode}",
            f"--hostname-override={NODE}",
            f"--cluster-cidr={CLUSTER_CIDR}",
            "--conntrack-max-per-core=0",  # a setting of the whole machine
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
        """The CPU seconds that it and its children have used so far."""
        return cpu_seconds(self._process.pid)

    @property
    def memory(self) -> tuple[float, float]:
        """Its resident memory now and at its peak, in MB."""
        return memory_megabytes(self._process.pid)

    def settle(self, since: int, *, commits: int = 1) -> list[Notice]:
        """Wait until it rests and at least so many commits have come after a moment; return all of these.

        Raises `RuntimeError` with its last words if it ends, `TimeoutError` if it never rests.
        """
        asked = time.monotonic_ns()
        deadline = time.monotonic() + HANG_GUARD
        while time.monotonic() < deadline:
            works = self._works()
            found = self._notices.since(since)
            last = max(found[-1].moment if found else 0, asked, since)
            if not works and len(found) >= commits and time.monotonic_ns() - last > REST * 1e9:
                return found
        raise TimeoutError(f"kproxy never rests; {len(found)} of {commits} commits")

    def check(self) -> None:
        """Raise `RuntimeError` with its last words if it has ended."""
        if self._process.poll() is not None:
            words = self._log.read_text().strip().splitlines() or ["(it said nothing)"]
            raise RuntimeError(f"kproxy ended with exit code {self._process.returncode}: {words[-1]}")

    def _works(self) -> bool:
        self.check()
        pid = self._process.pid
        before, busy = own_cpu_seconds(pid), has_children(pid)
        time.sleep(LOOK)
        return busy or has_children(pid) or own_cpu_seconds(pid) - before > RESTING_LOAD * LOOK
