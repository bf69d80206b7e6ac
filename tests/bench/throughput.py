"""Throughput of an established TCP connection, measured by iperf3."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from tests.lab.namespace import Namespace

IPERF = "iperf3"


class _Received(Struct, frozen=True):
    bits_per_second: float = 0.0


class _End(Struct, frozen=True):
    sum_received: _Received = _Received()


class _Report(Struct, frozen=True):
    """The parts of the JSON output that are used. `error` is "" if the transfer succeeded."""

    end: _End = _End()
    error: str = ""


def missing() -> str:
    """Return what to install, in one line, or "" if iperf3 is installed."""
    return "" if shutil.which(IPERF) else "iperf3 not found: install it with `apt-get install iperf3` (as root)"


def measure_throughput(
    client: Namespace, server: Namespace, port: int, targets: Sequence[tuple[str, int]], *, count: int, size: int
) -> list[float]:
    """Transfer `size` bytes to the targets in turn, `count` times, and return the bits per second of each transfer.

    `port` is the port of the server on all of its addresses; no other program may listen on it. Client and server each
    stay on one CPU. Raises `RuntimeError` if a transfer fails.
    """
    return [_transfer(client, server, port, targets[turn % len(targets)], size) for turn in range(count)]


def _transfer(client: Namespace, server: Namespace, port: int, target: tuple[str, int], size: int) -> float:
    cpus = os.sched_getaffinity(0)
    accept = ["setpriv", "--pdeathsig", "KILL", IPERF, "--server", "--one-off", "--forceflush", f"--port={port}"]
    address, target_port = target
    send = [IPERF, f"--client={address}", f"--port={target_port}", f"--bytes={size}", "--json"]
    send.append(f"--affinity={min(cpus)},{max(cpus)}")
    pipe = subprocess.PIPE
    process = server.call(lambda: subprocess.Popen(accept, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    with process:
        try:
            assert process.stdout is not None
            output = ""
            while "listening" not in output:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"{IPERF} does not listen on port {port}: {output.strip() or 'no output'}")
                output += line
            done = client.call(lambda: subprocess.run(send, capture_output=True, text=True, check=False))
        finally:
            process.kill()
    return _bits_per_second(done.stdout, target)


def _bits_per_second(output: str, target: tuple[str, int]) -> float:
    try:
        report = msgspec.json.decode(output, type=_Report)
    except msgspec.DecodeError as error:
        report = _Report(error=f"invalid output: {error}")
    if report.error or not report.end.sum_received.bits_per_second:
        reason = report.error or "nothing was received"
        raise RuntimeError(f"{IPERF} to {target[0]}:{target[1]} failed: {reason}")
    return report.end.sum_received.bits_per_second
