"""Reading and writing kernel parameters: sysctls under /proc/sys, and those of modules under /sys/module."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path("/")
"""Where this machine's parameters are; in a container, where its file systems are mounted may be somewhere else."""
_SYSCTLS = "proc/sys/"
log = logging.getLogger(__name__)
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
    """Set numeric parameters by their path below `root`. Return one line for each that cannot be set.

    Each that is set is logged with its old and its new value.
    """
    problems = []
    before = read_parameters(wanted, root)
    for path, value in wanted.items():
        try:
            _write(root / path, value)
        except OSError as error:
            problems.append(f"cannot set /{path} to {value}: {error.strerror}")
        else:
            log.info("sysctl %s: %s -> %d", _name(path), before.get(path, "unknown"), value)
    return problems


def ensure_route_localnet(root: Path = ROOT) -> list[str]:
    """Let packets to 127.0.0.0/8 leave the loopback interface, as NodePorts on localhost need (ip-sysctl.rst).

    Return one line if that cannot be set. Without a rule that drops what neighbours send to 127.0.0.0/8, it
    opens this machine's localhost to them.
    """
    if read_parameters([ROUTE_LOCALNET], root) == {ROUTE_LOCALNET: 1}:
        return []
    return write_parameters({ROUTE_LOCALNET: 1}, root)


def _name(path: str) -> str:
    """Return a parameter's name as sysctl(8) has it, or its whole path if it is none of that program's."""
    below = path.removeprefix(_SYSCTLS)
    return f"/{path}" if below == path else below.replace("/", ".")


def _write(path: Path, value: int) -> None:
    # Not to be created where there is no such parameter.
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)
