"""Logging that a program takes long: after some seconds, and then at growing intervals until it ends."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

FIRST_SECONDS = 5.0
"""How long a program may go without progress before that is logged; each later line waits twice as long."""

_LOCKS = Path("/proc/locks")
_LOCK_FILE = "/run/xtables.lock"


class Patience:
    """What is logged about one program that is slow. Moments are seconds of any clock that never goes back."""

    def __init__(self, program: str, pid: int, now: float) -> None:
        self._program = program
        self._pid = pid
        self._began = now
        self._logged = False
        self._interval = FIRST_SECONDS
        self.progressed(now)

    def progressed(self, now: float) -> None:
        """Put the next line off: the program got somewhere, such as reading more of its input."""
        self.due = now + self._interval

    def look(self, now: float) -> None:
        """Log that the program still runs if that is `due`."""
        if now < self.due:
            return
        self._interval *= 2
        self.progressed(now)
        self._logged = True
        seconds = now - self._began
        log.warning("%s is still running after %.0f s (pid %d)%s", self._program, seconds, self._pid, self._obstacle())

    def ended(self, now: float, code: int) -> None:
        """Log that the program has ended, if it was logged that it still ran. `code` is as in `subprocess`."""
        if not self._logged:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        log.info("%s %s after %.0f s (pid %d)", self._program, how, now - self._began, self._pid)

    def _obstacle(self) -> str:
        """Return what an iptables program may be waiting for, to be appended to a message, or ""."""
        if "tables" not in os.path.basename(self._program):
            return ""
        path = os.environ.get("XTABLES_LOCKFILE", _LOCK_FILE)
        holder = lock_holder(path)
        # A program is the leader of a process group that what it starts belongs to: see `run.py`.
        if not holder or _group(holder) == self._pid:
            return ""
        return f"; the xtables lock {path} is held by {_name(holder)} (pid {holder})"


def lock_holder(path: str) -> int:
    """Return the pid of the process that holds an flock(2) on a file, 0 if there is none to be seen (proc(5)).

    Processes of other PID namespaces cannot be seen.
    """
    try:
        status = os.stat(path)
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return 0
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        # A line with an arrow in the second place is about somebody who waits.
        _, kind, *rest = line.split()
        if kind == "FLOCK" and len(rest) > 3 and rest[3] == place:
            return int(rest[2])
    return 0


def _group(pid: int) -> int:
    with suppress(OSError):
        return os.getpgid(pid)
    return 0


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "a program that has ended"
