"""Many connections a second, from processes of their own, and a watch on packets that nobody translated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import address_server, connecting_client
from tests.lab.namespace import Namespace
from tests.lab.topology import Host
from tests.lab.waiting import HANG_GUARD, wait_until

RATE = 300
"""Connections per second of one process, at most."""

WATCH = """
table inet lab-watch {
    chain out {
        type filter hook postrouting priority 300
        %s
    }
    chain in {
        type filter hook input priority 300
        %s
    }
}
"""


@dataclass(frozen=True)
class Way:
    """One way to reach a Service over TCP, from where, and the addresses of its pods."""

    origin: Host
    address: str
    port: int
    pods: tuple[str, ...]


class Greeters:
    """Servers that answer on a port of all addresses of some machines; they end with their machine."""

    def __init__(self, folder: Path, machines: Sequence[Namespace], port: int) -> None:
        for number, machine in enumerate(machines):
            log = folder / f"greeter-{number}.log"
            with log.open("w") as output:
                machine.popen([sys.executable, str(address_server.__file__), str(port)], output)
            _wait_for_line(log)


class Rush:
    """Connects all ways in turn, from one process for each origin, until it is left (use it in a `with`)."""

    def __init__(self, ways: Sequence[Way], folder: Path) -> None:
        self._origins = list({id(way.origin): way.origin for way in ways}.values())
        self._ways = ways
        self._logs = [folder / f"caller-{number}.log" for number in range(len(self._origins))]
        self._processes: list[subprocess.Popen[str]] = []
        self._read = [0] * len(self._logs)
        self._total = 0
        self._failed: list[str] = []
        self._began = 0.0

    def __enter__(self) -> Rush:
        self._began = time.monotonic()
        for origin, log in zip(self._origins, self._logs, strict=True):
            targets = [(way.address, way.port, way.pods) for way in self._ways if way.origin is origin]
            argv = [sys.executable, str(connecting_client.__file__), str(RATE), json.dumps(targets)]
            with log.open("w") as output:
                self._processes.append(origin.namespace.popen(argv, output))
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait(HANG_GUARD)

    def wait_for(self, total: int) -> None:
        """Return once so many connections have ended since the start."""
        wait_until(lambda: self._look() >= total, f"{total} connections end")

    def settle(self) -> None:
        """Return once every connection has ended that was under way when this was called, of each process."""
        # The first line from now on may tell of connections that all ended before.
        wanted = [_lines(log) + 2 for log in self._logs]
        wait_until(
            lambda: all(_lines(log) >= count for log, count in zip(self._logs, wanted, strict=True)),
            "every client tells of more connections",
        )

    @property
    def total(self) -> int:
        """How many connections have ended."""
        return self._look()

    @property
    def rate(self) -> float:
        """How many connections ended each second, for humans."""
        return self._look() / (time.monotonic() - self._began)

    def failures(self) -> list[str]:
        """Return what was wrong with those that failed."""
        self._look()
        return list(self._failed)

    def _look(self) -> int:
        for number, log in enumerate(self._logs):
            data = log.read_bytes()
            whole = data.rfind(b"\n") + 1
            for line in data[self._read[number] : whole].splitlines():
                count, failed = json.loads(line)
                self._total += count
                self._failed += failed
            self._read[number] = whole
        return self._total


class Watch:
    """Counts packets on a node that leave for addresses which only Services have, or reach NodePorts on it."""

    def __init__(self, node: Namespace, addresses: Sequence[str], node_ports: Sequence[int]) -> None:
        self._node = node
        leaving = [f"ip{'6' if ':' in each else ''} daddr {each} counter" for each in addresses]
        staying = [f"tcp dport {each} counter" for each in node_ports]
        node.run(["nft", "-f", "-"], WATCH % ("\n".join(leaving), "\n".join(staying)))

    def seen(self) -> list[str]:
        """Return the rules that have counted anything."""
        listed = self._node.run(["nft", "list", "table", "inet", "lab-watch"]).stdout
        lines = [line.strip() for line in listed.splitlines() if " counter " in line]
        return [line for line in lines if "packets 0 " not in line]


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n")


def _wait_for_line(log: Path) -> None:
    wait_until(lambda: log.read_text().endswith("\n"), f"{log.stem} listens")
