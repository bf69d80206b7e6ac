"""New TCP connections, one after the other: how long each takes until it stands, and how many there are in a second.

Client and server are processes of their own in their own namespaces, this file is their program.
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

from tests.bench.child_process import ROOT, Companion
from tests.lab.namespace import Namespace

BACKLOG = 4096
PATIENCE = 5.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER that ends a connection by a reset: nothing of it stays behind and takes up a port."""


class Round(Struct, frozen=True):
    """One round of connections: median and 99th percentile of the time each took, in seconds, and their rate."""

    median: float
    p99: float
    rate: float


class Server(Companion):
    """Accepts connections to one port of a namespace and closes them. Use it in a `with`."""

    def __init__(self, namespace: Namespace, port: int) -> None:
        super().__init__(namespace, "tests.bench.connections", "serve", str(port))

    def __enter__(self) -> Self:
        super().__enter__()
        self.answer()  # it listens
        return self


def measure(
    origin: Namespace, targets: Sequence[Sequence[tuple[str, int]]], *, rounds: int, count: int
) -> list[list[Round]]:
    """Connect from a namespace and return the rounds of each group of targets, which take turns round by round.

    Raises `RuntimeError` if a connection cannot be made.
    """
    order = json.dumps({"targets": targets, "rounds": rounds, "count": count})
    done = origin.call(
        lambda: subprocess.run(
            [sys.executable, "-m", "tests.bench.connections", "connect", order],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    )
    if done.returncode:
        raise RuntimeError(f"connecting to {targets}: {done.stderr.strip().splitlines()[-1]}")
    return msgspec.json.decode(done.stdout, type=list[list[Round]])


def one_round(targets: Sequence[tuple[str, int]], count: int) -> Round:
    """Make so many connections to the targets in turn."""
    times = []
    began = time.perf_counter()
    for target in islice(cycle(targets), count):
        with socket.socket() as connection:
            connection.settimeout(PATIENCE)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            start = time.perf_counter()
            connection.connect(target)
            times.append(time.perf_counter() - start)
    rate = count / (time.perf_counter() - began)
    return Round(statistics.median(times), percentile(times, 99), rate)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` percent of the values do not exceed (nearest rank)."""
    place = -(-len(values) * share // 100)
    return sorted(values)[max(int(place), 1) - 1]


def serve(port: int) -> None:
    """Accept connections for ever."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with socket.create_server(("0.0.0.0", port), backlog=BACKLOG) as listener:
        print("listening", flush=True)
        while True:
            listener.accept()[0].close()


def connect(order: str) -> None:
    """Carry out what `measure` asks for and print the result.

    Client and server each keep to a CPU: whether they share one makes connections twice as fast or slow.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = json.loads(order)
    groups = [[(address, port) for address, port in group] for group in found["targets"]]
    for group in groups:
        one_round(group, len(group))  # neighbours and routes are looked up for the first time
    rounds = [[one_round(group, found["count"]) for group in groups] for _ in range(found["rounds"])]
    sys.stdout.write(msgspec.json.encode([list(each) for each in zip(*rounds, strict=True)]).decode())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        connect(sys.argv[2])
