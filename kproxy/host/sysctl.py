"""Read and write kernel parameters: sysctls (/proc/sys) and module parameters (/sys/module)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path("/")
"""The directory that contains proc/ and sys/. In a container, they may be mounted in a different directory."""
ROUTE_LOCALNET = "proc/sys/net/ipv4/conf/all/route_localnet"
_SYSCTLS = "proc/sys/"

log = logging.getLogger(__name__)


def read_parameters(paths: Iterable[str], root: Path = ROOT) -> dict[str, int]:
    """Return the values of numeric parameters, keyed by path relative to `root`.

    Parameters that cannot be read or whose values are not numbers are omitted.
    """
    values = {}
    for path in paths:
        try:
            values[path] = int((root / path).read_text())
        except (OSError, ValueError):
            continue
    return values


def write_parameters(values: Mapping[str, int], root: Path = ROOT) -> list[str]:
    """Set numeric parameters, which are keyed by path relative to `root`.

    Return a one-line message for each parameter that cannot be set. Log the old and the new value of each parameter
    that is set.
    """
    problems = []
    previous = read_parameters(values, root)
    for path, value in values.items():
        try:
            _write(root / path, value)
        except OSError as error:
            problems.append(f"cannot set /{path} to {value}: {error.strerror}")
        else:
            log.info("set %s: %s -> %d", _name(path), previous.get(path, "unknown"), value)
    return problems


def ensure_route_localnet(root: Path = ROOT) -> list[str]:
    """Set the sysctl `route_localnet` for all interfaces. NodePorts on 127.0.0.1 require it (ip-sysctl.rst).

    Return a list with a one-line message if the sysctl cannot be set. The sysctl exposes programs that listen on
    127.0.0.1 to other hosts on the same network, unless a rule drops packets from these hosts to 127.0.0.0/8
    (CVE-2020-8558).
    """
    if read_parameters([ROUTE_LOCALNET], root) == {ROUTE_LOCALNET: 1}:
        return []
    return write_parameters({ROUTE_LOCALNET: 1}, root)


def _name(path: str) -> str:
    """Return `sysctl NAME` for a sysctl, with its name as in sysctl(8), or the absolute path of any other parameter."""
    below = path.removeprefix(_SYSCTLS)
    return f"/{path}" if below == path else f"sysctl {below.replace('/', '.')}"


def _write(path: Path, value: int) -> None:
    # O_CREAT is not set, so that a parameter that does not exist is an error.
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)
