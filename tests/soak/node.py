"""The node of the soak test: kproxy, the programs that it runs, and what it uses of the machine."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.usage import memory_megabytes
from tests.lab.iptables import programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import FLAGS, KPROXY
from tests.lab.waiting import HANG_GUARD, wait_until

SAMPLE_INTERVAL = 0.25
START_SECONDS = 4.0
"""Seconds after the first sync of a process in which it still grows."""

INJECTED = "injected failure"
"""What a program prints that fails on purpose."""
FAMILY_WORKS = " works on this node now: exiting to restart with it"
BAD_WORDS = ("Traceback", "unexpected")
MIN_SYNC_PERIOD = "--iptables-min-sync-period=200ms"

WRAPPER = """#!/bin/sh
case $(cat {fault} 2>/dev/null) in
fail) echo "{name}: {injected}" >&2; exit 4;;
hang) sleep 3;;
esac
exec {real} "$@"
"""


@dataclass(frozen=True)
class Sample:
    """What the process used at one time. Memory is in MB."""

    time: float
    pid: int
    memory: float
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Growth:
    """Medians of one figure in the second and in the last tenth of the life of a process."""

    name: str
    early: float
    late: float
    tolerance: float

    @property
    def is_flat(self) -> bool:
        """Whether the figure has not grown by more than the tolerance."""
        return self.late - self.early <= self.tolerance

    @property
    def text(self) -> str:
        """One line for the summary."""
        return f"{self.name}: {self.early:.1f} in the second tenth, {self.late:.1f} in the last tenth"


class Proxy:
    """`kproxy run` on a node, connected to an API server. Use it as a context manager."""

    def __init__(self, node: Namespace, url: str, folder: Path, variant: str) -> None:
        self._node, self._url, self.log = node, url, folder / "kproxy.log"
        self._programs, self._fault = folder / "programs", folder / "fault"
        self._programs.mkdir()
        for name, real in (programs_of(variant) | {"nft": "nft"}).items():
            wrapper = self._programs / name
            wrapper.write_text(WRAPPER.format(injected=INJECTED, name=name, real=shutil.which(real), fault=self._fault))
            wrapper.chmod(0o755)
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample_all, name="usage", daemon=True)
        self.samples: list[Sample] = []
        self.starts = 0
        self._log_begin = 0
        self.mode = ""

    def __enter__(self) -> Proxy:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._sampler.join()
        if self._process is not None:
            self._process.kill()
            self._process.wait(HANG_GUARD)

    def start(self, mode: str) -> None:
        """Start kproxy in a mode. The process is not running yet, or has exited."""
        self.mode = mode
        self.starts += 1
        self._log_begin = self._log_size()
        command = [KPROXY, "run", f"--master={self._url}", *FLAGS, f"--proxy-mode={mode}", MIN_SYNC_PERIOD]
        lock = f"XTABLES_LOCKFILE={self._programs.parent / 'lock'}"
        with self.log.open("a") as output:
            path = f"PATH={self._programs}:{os.environ['PATH']}"
            self._process = self._node.popen(["env", path, lock, *command], output)

    def kill(self) -> None:
        """Kill kproxy as `kill -9` does."""
        self._running().kill()
        self._running().wait(HANG_GUARD)

    def terminate(self) -> int:
        """Stop kproxy as a service manager does; return its exit status."""
        self._running().terminate()
        return self._running().wait(HANG_GUARD)

    def check(self) -> None:
        """Raise `RuntimeError` if kproxy has exited on its own."""
        if (code := self._running().poll()) is not None:
            raise RuntimeError(f"kproxy exited with code {code}; see {self.log}")

    def restart_if_exited(self) -> int | None:
        """If kproxy has exited on its own, start it again.

        Return its exit status, or None if it had to exit: while the programs fail, no mode that needs them works, and
        when they work again, kproxy restarts to program a family that it had skipped.
        """
        code = self._running().poll()
        if code is None:
            return None
        lines = self.log.read_bytes()[self._log_begin :].decode(errors="replace").splitlines()
        self.start(self.mode)
        last = lines[-1] if lines else ""
        cannot_start = "does not work on this node" in last and INJECTED in last
        return None if cannot_start or last.endswith(FAMILY_WORKS) else code

    def wait_until_synced(self) -> None:
        """Return once the process has synced each family."""
        wait_until(self.has_synced, "kproxy logs a sync of each family")

    def has_synced(self) -> bool:
        """Return whether the process has synced each family. Raises `RuntimeError` if it has exited on its own."""
        self.check()
        return self._log_has_syncs()

    def _log_has_syncs(self) -> bool:
        text = self.log.read_bytes()[self._log_begin :].decode()
        return all(f" {family}: synced " in text for family in ("IPv4", "IPv6"))

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def set_fault(self, kind: str) -> None:
        """Let the programs that kproxy runs `fail` or `hang` from now on; with "", let them work."""
        self._fault.write_text(kind)

    def exhaust_descriptors(self) -> None:
        """Let kproxy open no further descriptors."""
        pid = self._running().pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), hard))

    def restore_descriptors(self) -> None:
        """Let kproxy open as many descriptors as it may."""
        if self._running().poll() is None:
            _, hard = resource.prlimit(self._running().pid, resource.RLIMIT_NOFILE)
            resource.prlimit(self._running().pid, resource.RLIMIT_NOFILE, (hard, hard))

    def growths(self) -> list[Growth]:
        """Return how memory, descriptors and threads of the current process have grown, if it runs long enough."""
        own = [each for each in self.samples if each.pid == self._running().pid]
        own = [each for each in own if each.time >= own[0].time + START_SECONDS]
        tenth = len(own) // 10
        if not tenth:
            return []
        early, late = own[tenth : 2 * tenth], own[-tenth:]

        def growth(name: str, attribute: str, share: float, least: float) -> Growth:
            before, after = (statistics.median(getattr(each, attribute) for each in part) for part in (early, late))
            return Growth(name, before, after, max(least, share * before))

        return [
            growth("memory (MB)", "memory", 0.1, 6.0),
            growth("descriptors", "descriptors", 0.0, 6.0),
            growth("threads", "threads", 0.0, 3.0),
        ]

    def bad_lines(self) -> list[str]:
        """Return the lines of the log that must not be there."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in BAD_WORDS)]

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def _sample_all(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL):
            if self._process is not None and self._process.poll() is None and self._log_has_syncs():
                try:
                    self.samples.append(_sample(self._process.pid))
                except (OSError, KeyError):
                    continue  # it has just exited


def _sample(pid: int) -> Sample:
    descriptors, threads = (len(os.listdir(f"/proc/{pid}/{kind}")) for kind in ("fd", "task"))
    return Sample(time.monotonic(), pid, memory_megabytes(pid)[0], descriptors, threads)
