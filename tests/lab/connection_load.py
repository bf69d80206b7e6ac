"""Hundreds of connections a second from separate processes, and a counter of packets that were not translated."""

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
"""Maximum connections per second of one process."""

COUNTERS = """
table inet lab-untranslated {
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
class LoadTarget:
    """One frontend of a TCP Service, the client that connects to it, and the pod addresses allowed to answer."""

    origin: Host
    address: str
    port: int
    pods: tuple[str, ...]


class AddressServers:
    """Servers on one port of all addresses of some namespaces; each exits with its namespace."""

    def __init__(self, folder: Path, machines: Sequence[Namespace], port: int) -> None:
        for number, machine in enumerate(machines):
            log = folder / f"address-server-{number}.log"
            with log.open("w") as output:
                machine.popen([sys.executable, str(address_server.__file__), str(port)], output)
            _wait_for_line(log)


class ConnectionLoad:
    """Connects to all targets in turn, from one process per client, while in its `with` block."""

    def __init__(self, targets: Sequence[LoadTarget], folder: Path) -> None:
        self._origins = list({id(target.origin): target.origin for target in targets}.values())
        self._targets = targets
        self._logs = [folder / f"client-{number}.log" for number in range(len(self._origins))]
        self._processes: list[subprocess.Popen[str]] = []
        self._read = [0] * len(self._logs)
        self._total = 0
        self._failed: list[str] = []
        self._began = 0.0

    def __enter__(self) -> ConnectionLoad:
        self._began = time.monotonic()
        for origin, log in zip(self._origins, self._logs, strict=True):
            targets = [
                (target.address, target.port, target.pods) for target in self._targets if target.origin is origin
            ]
            argv = [sys.executable, str(connecting_client.__file__), str(RATE), json.dumps(targets)]
            with log.open("w") as output:
                self._processes.append(origin.namespace.popen(argv, output))
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait(HANG_GUARD)

    def wait_for(self, total: int) -> None:
        """Return once `total` connections have ended since the start."""
        wait_until(lambda: self._read_logs() >= total, f"{total} connections end")

    def settle(self) -> None:
        """Return once every connection that was open at the time of the call has ended."""
        # The next line of a process may report only connections that had ended before the call.
        expected = [_lines(log) + 2 for log in self._logs]
        wait_until(
            lambda: all(_lines(log) >= count for log, count in zip(self._logs, expected, strict=True)),
            "every client reports more connections",
        )

    @property
    def total(self) -> int:
        """The number of connections that have ended."""
        return self._read_logs()

    @property
    def rate(self) -> float:
        """Connections ended per second, for log messages."""
        return self._read_logs() / (time.monotonic() - self._began)

    def failures(self) -> list[str]:
        """Return one message for each connection that failed."""
        self._read_logs()
        return list(self._failed)

    def _read_logs(self) -> int:
        for number, log in enumerate(self._logs):
            data = log.read_bytes()
            whole = data.rfind(b"\n") + 1
            for line in data[self._read[number] : whole].splitlines():
                count, failed = json.loads(line)
                self._total += count
                self._failed += failed
            self._read[number] = whole
        return self._total


class UntranslatedPackets:
    """Counts packets that pass a node untranslated: to Service addresses on the way out, to NodePorts on the way in."""

    def __init__(self, node: Namespace, addresses: Sequence[str], node_ports: Sequence[int]) -> None:
        self._node = node
        outgoing = [f"ip{'6' if ':' in each else ''} daddr {each} counter" for each in addresses]
        incoming = [f"tcp dport {each} counter" for each in node_ports]
        node.run(["nft", "-f", "-"], COUNTERS % ("\n".join(outgoing), "\n".join(incoming)))

    def seen(self) -> list[str]:
        """Return the rules that have counted packets."""
        listed = self._node.run(["nft", "list", "table", "inet", "lab-untranslated"]).stdout
        lines = [line.strip() for line in listed.splitlines() if " counter " in line]
        return [line for line in lines if "packets 0 " not in line]


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n")


def _wait_for_line(log: Path) -> None:
    wait_until(lambda: log.read_text().endswith("\n"), f"{log.stem} listens")
