"""A daemon that is ended on purpose, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

from tests.lab.proxy import Daemon
from tests.lab.topology import Lab
from tests.lab.waiting import HANG_GUARD, wait_until

FAMILIES = ("IPv4", "IPv6")


class MortalDaemon(Daemon):
    """`kproxy run` that can be ended in every way while the test goes on."""

    def __init__(self, lab: Lab, objects: Path, log: Path, *flags: str) -> None:
        super().__init__(lab, objects, log, *flags)
        self._said = log

    def __enter__(self) -> MortalDaemon:
        super().__enter__()
        return self

    def wait_in_force(self) -> None:
        """Return once it says that the kernel has accepted a sync of each family; raise if it ends before."""
        wait_until(lambda: self.is_up() and self._in_force(), "kproxy says that it has synced")

    def kill(self) -> None:
        """End it as `kill -9` does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(HANG_GUARD)

    def terminate(self) -> int:
        """End it as a service manager does; return its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(HANG_GUARD)

    def _in_force(self) -> bool:
        said = [line for line in self._said.read_text().splitlines() if ": synced " in line]
        return all(any(f" {family}: " in line for line in said) for family in FAMILIES)
