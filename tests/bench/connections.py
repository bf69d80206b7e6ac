"""New TCP connections, one after the other: the time each takes to establish, and the number per second.

Client and server are separate processes in separate network namespaces. This module is the program of both.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Self

import msgspec
from msgspec import Struct

from tests.bench.child_process import ROOT, ChildProcess
from tests.lab.namespace import Namespace

BACKLOG = 4096
TIMEOUT = 5.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER that closes a connection with a reset, so that it does not keep its port in TIME-WAIT."""


class Round(Struct, frozen=True):
    """One round of connections: median and 99th percentile of the seconds to connect, and connections per second."""

    median: float
    p99: float
    rate: float


class Server(ChildProcess):
    """Accepts connections to one port in a network namespace and closes them. Use it as a context manager."""

    def __init__(self, namespace: Namespace, port: int) -> None:
        super().__init__(namespace, "tests.bench.connections", "serve", str(port))

    def __enter__(self) -> Self:
        super().__enter__()
        self.read_line()  # sent once the server listens
        return self


def measure(
    client: Namespace, targets: Sequence[Sequence[tuple[str, int]]], *, rounds: int, count: int
) -> list[list[Round]]:
    """Connect from a namespace to groups of targets, `count` times per round, and return the rounds of each group.

    The groups take turns, round by round. Raises `RuntimeError` if a connection fails.
    """
    order = json.dumps({"targets": targets, "rounds": rounds, "count": count})
    done = client.call(
        lambda: subprocess.run(
            [sys.executable, "-m", "tests.bench.connections", "connect", order],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    )
    if done.returncode:
        raise RuntimeError(f"failed to connect to {targets}: {done.stderr.strip().splitlines()[-1]}")
    return msgspec.json.decode(done.stdout, type=list[list[Round]])


def one_round(targets: Sequence[tuple[str, int]], count: int) -> Round:
    """Make `count` connections to the targets in turn."""
    times = []
    begin = time.perf_counter()
    for target in islice(cycle(targets), count):
        with socket.socket() as connection:
            connection.settimeout(TIMEOUT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            start = time.perf_counter()
            connection.connect(target)
            times.append(time.perf_counter() - start)
    rate = count / (time.perf_counter() - begin)
    return Round(statistics.median(times), percentile(times, 99), rate)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is greater than or equal to `share` percent of the values (nearest rank)."""
    rank = -(-len(values) * share // 100)
    return sorted(values)[max(int(rank), 1) - 1]


def serve(port: int) -> None:
    """Accept connections forever."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with socket.create_server(("0.0.0.0", port), backlog=BACKLOG) as listener:
        print("listening", flush=True)
        while True:
            listener.accept()[0].close()


def connect(order: str) -> None:
    """Make the connections that `measure` describes, and print the result as JSON.

    Client and server each stay on one CPU: whether they share a CPU changes the time to connect by a factor of two.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    parameters = json.loads(order)
    groups = [[(address, port) for address, port in group] for group in parameters["targets"]]
    for group in groups:
        one_round(group, len(group))  # fills the neighbor and route caches
    rounds = [[one_round(group, parameters["count"]) for group in groups] for _ in range(parameters["rounds"])]
    sys.stdout.write(msgspec.json.encode([list(each) for each in zip(*rounds, strict=True)]).decode())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        connect(sys.argv[2])
