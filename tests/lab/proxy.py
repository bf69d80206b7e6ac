"""The installed `kproxy` command, run on a node of the lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Self

from kproxy.model.types import Family
from tests.lab.topology import NODE, Lab
from tests.lab.waiting import HANG_GUARD, wait_until

KPROXY = str(Path(sys.executable).with_name("kproxy"))
CLUSTER_CIDR = "10.244.0.0/16,fd00:10:244::/48"
FLAGS = (
    f"--hostname-override={NODE}",
    f"--cluster-cidr={CLUSTER_CIDR}",
    "--proxy-mode=iptables",
    "--conntrack-max-per-core=0",  # a setting of the whole machine, not of a namespace
    "--conntrack-min=0",
)


def apply(lab: Lab, objects: Path, *flags: str) -> None:
    """Program the objects on the lab's node. Raises `RuntimeError` with the output of kproxy if it fails."""
    lab.node.namespace.run([KPROXY, "apply", f"--objects={objects}", *FLAGS, *flags])


class Daemon:
    """`kproxy run` on the lab's node, in a `with` block. It dies with the test process."""

    def __init__(self, lab: Lab, objects: Path, log: Path, *flags: str) -> None:
        self._lab = lab
        self._log = log
        self._command = [KPROXY, "run", f"--objects={objects}", *FLAGS, *flags]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with self._log.open("w") as output:
            self._process = self._lab.node.namespace.popen(self._command, output)
        return self

    def __exit__(self, *exc: object) -> None:
        process = self._running()
        process.terminate()
        try:
            process.wait(HANG_GUARD)
        finally:
            process.kill()

    @property
    def command(self) -> str:
        """The command line, to be shown to people."""
        return " ".join(["kproxy", *self._command[1:]])

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._running().pid

    def is_up(self) -> bool:
        """Return True while the daemon runs. Raises `RuntimeError` with its last log line if it has exited."""
        code = self._running().poll()
        if code is not None:
            lines = self._log.read_text().strip().splitlines() or ["(no output)"]
            raise RuntimeError(f"kproxy exited with code {code}: {lines[-1]}")
        return True

    def wait_until_synced(self) -> None:
        """Return once the daemon has logged a sync of each family. Raises `RuntimeError` if it exits before."""
        wait_until(lambda: self.is_up() and self._has_synced(), "kproxy logs a sync of each family")

    def kill(self) -> None:
        """Kill the daemon as `kill -9` does."""
        self._running().kill()
        self._running().wait(HANG_GUARD)

    def terminate(self) -> int:
        """Stop the daemon as a service manager does; return its exit status."""
        self._running().terminate()
        return self._running().wait(HANG_GUARD)

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def _has_synced(self) -> bool:
        lines = [line for line in self._log.read_text().splitlines() if ": synced " in line]
        return all(any(f" {family.value}: " in line for line in lines) for family in Family)
