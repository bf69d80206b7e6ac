"""The connections of the soak test: their targets, their failures, and the intervals in which failures are expected."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.lab.namespace import Namespace
from tests.lab.topology import Host
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.soak import client, pod_server

EVERY = ""
"""Stands for all Services in `Window.service`."""


@dataclass(frozen=True)
class Target:
    """One frontend of a Service, and the pod addresses that may answer. `label` is the class of the Service."""

    label: str
    service: str
    address: str
    port: int
    protocol: str
    pods: tuple[str, ...]
    long_lived: bool = False

    def as_json(self) -> dict[str, object]:
        """Return the target as the client process reads it."""
        found = asdict(self)
        return {"class": found.pop("label"), **found}


@dataclass(frozen=True)
class Failure:
    """A connection that failed. `began` and `ended` are times of `time.monotonic`."""

    label: str
    service: str
    address: str
    port: int
    began: float
    ended: float
    error: str

    def text(self, start: float) -> str:
        """One line, with the time relative to the start of the run."""
        return f"{self.began - start:8.3f} s  {self.service} at {self.address} port {self.port}: {self.error}"


@dataclass
class Window:
    """An interval in which connections to a Service may fail, because another program has damaged its rules."""

    service: str
    cause: str
    began: float
    ended: float = float("inf")

    def explains(self, failure: Failure) -> bool:
        """Return whether the failed connection overlaps with this interval."""
        return self.service in {EVERY, failure.service} and failure.ended >= self.began and failure.began <= self.ended


@dataclass
class Windows:
    """All intervals of a run."""

    all: list[Window] = field(default_factory=list)

    @contextmanager
    def open(self, service: str, cause: str) -> Iterator[Window]:
        """Add an interval that lasts as long as the `with` block."""
        window = Window(service, cause, time.monotonic())
        self.all.append(window)
        try:
            yield window
        finally:
            window.ended = time.monotonic()

    def explanation(self, failure: Failure) -> Window | None:
        """Return the interval that explains a failure, if any."""
        return next((each for each in self.all if each.explains(failure)), None)


class PodServers:
    """The servers of all pods of some nodes; each exits with its namespace."""

    def __init__(self, folder: Path, machines: Sequence[tuple[Namespace, Sequence[str]]], port: int) -> None:
        for number, (machine, addresses) in enumerate(machines):
            log = folder / f"pods-{number}.log"
            with log.open("w") as output:
                machine.popen([sys.executable, pod_server.__file__, str(port), ",".join(addresses)], output)
            wait_until(lambda: log.read_text().endswith("listening\n"), f"{log} says that the pods listen")  # noqa: B023


class Traffic:
    """Connections from several clients, each in a process of its own, while in its `with` block."""

    def __init__(self, folder: Path, clients: Sequence[tuple[Host, float, Sequence[Target]]]) -> None:
        """`clients` are hosts, their connections per second, and the targets."""
        self._clients = clients
        self._logs = [folder / f"client-{number}.log" for number in range(len(clients))]
        self._processes: list[subprocess.Popen[str]] = []
        self._read = [0] * len(self._logs)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.failures: list[Failure] = []

    def __enter__(self) -> Traffic:
        for (host, rate, targets), log in zip(self._clients, self._logs, strict=True):
            argv = [sys.executable, client.__file__, str(rate), json.dumps([each.as_json() for each in targets])]
            with log.open("w") as output:
                self._processes.append(host.namespace.popen(argv, output))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait(HANG_GUARD)

    def settle(self) -> None:
        """Return once every connection that was open at the time of the call has been reported."""
        time.sleep(client.TIMEOUT)  # a connection takes at most as long
        expected = [log.read_bytes().count(b"\n") + 2 for log in self._logs]
        wait_until(
            lambda: all(
                log.read_bytes().count(b"\n") >= count for log, count in zip(self._logs, expected, strict=True)
            ),
            "every client reports",
        )

    def read(self) -> None:
        """Read what the clients have reported into `counts` and `failures`. Raises `RuntimeError` if one has exited."""
        with self._lock:
            for number, log in enumerate(self._logs):
                if self._processes[number].poll() is not None:
                    raise RuntimeError(f"a client has exited; see {log}")
                data = log.read_bytes()
                whole = data.rfind(b"\n") + 1
                for line in data[self._read[number] : whole].splitlines():
                    counts, failed = json.loads(line)
                    self.counts.update(counts)
                    self.failures += [Failure(*each) for each in failed]
                self._read[number] = whole
