"""CPU time and memory of a process, read from /proc and process clocks."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of the child processes it has waited for.

    Its own time has nanosecond resolution, that of the children a tick of 10 ms: average over several changes.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = (int(fields[13]) + int(fields[14])) / _TICK  # cutime and cstime of proc_pid_stat(5)
    return own_cpu_seconds(pid) + children


def own_cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, without its children.

    The clock ID is encoded as described in clock_getcpuclockid(3); Linux guarantees the encoding.
    """
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


def has_children(pid: int) -> bool:
    """Return whether any thread of a process has a child that has not been waited for."""
    return any(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))


def descendants(pid: int) -> list[int]:
    """Return the processes that descend from a process, without the process itself."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has exited
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def memory_megabytes(pid: int) -> tuple[float, float]:
    """Return the current and the peak resident memory of a process without its children, in units of 10^6 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(sizes["VmRSS"]) * 1024 / 1e6, int(sizes["VmHWM"]) * 1024 / 1e6


def self_cpu_seconds() -> float:
    """Return the CPU time of this process and of the child processes it has waited for."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
