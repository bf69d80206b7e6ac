"""Reading and writing kernel parameters: sysctls under /proc/sys, and those of modules under /sys/module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path("/")
"""Where this machine's parameters are; in a container, where its file systems are mounted may be somewhere else."""

ROUTE_LOCALNET = "proc/sys/net/ipv4/conf/all/route_localnet"


def read_parameters(paths: Iterable[str], root: Path = ROOT) -> dict[str, int]:
    """Return those of the numeric parameters that can be read, by their path below `root`."""
    found = {}
    for path in paths:
        try:
            found[path] = int((root / path).read_text())
        except (OSError, ValueError):
            continue
    return found


def write_parameters(wanted: Mapping[str, int], root: Path = ROOT) -> list[str]:
    """Set numeric parameters by their path below `root`. Return one line for each that cannot be set."""
    problems = []
    for path, value in wanted.items():
        try:
            _write(root / path, value)
        except OSError as error:
            problems.append(f"cannot set /{path} to {value}: {error.strerror}")
    return problems


def ensure_route_localnet(root: Path = ROOT) -> list[str]:
    """Let packets to 127.0.0.0/8 leave the loopback interface, as NodePorts on localhost need (ip-sysctl.rst).

    Return one line if that cannot be set. Without a rule that drops what neighbours send to 127.0.0.0/8, it
    opens this machine's localhost to them.
    """
    if read_parameters([ROUTE_LOCALNET], root) == {ROUTE_LOCALNET: 1}:
        return []
    return write_parameters({ROUTE_LOCALNET: 1}, root)


def _write(path: Path, value: int) -> None:
    # Not to be created where there is no such parameter.
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)
