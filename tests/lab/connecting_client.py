"""A client in a process of its own, that connects all the time: `caller.py <per second> <targets>`.

The targets are JSON: `[address, port, [addresses that may answer]]` of each. A line of JSON is printed after every so
many connections: how many there were, and what was wrong with which. Ends when it is killed.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from itertools import cycle

AT_ONCE = 50
"""Connections between two lines."""

PATIENCE = 5.0
RESET = struct.pack("ii", 1, 0)
"""`struct linger` that closes by a reset: no port stays in TIME_WAIT, so there are always enough of them."""

TOTAL_RETRANSMISSIONS = struct.Struct("=100xI")
"""`tcpi_total_retrans` of `struct tcp_info` (linux/tcp.h)."""

Target = tuple[str, int, list[str]]


def call(targets: list[Target], rate: float) -> None:
    """Connect to the targets in turn, for ever."""
    failed: list[str] = []
    turn = time.monotonic()
    for number, (address, port, allowed) in enumerate(cycle(targets), 1):
        complaint = connect(address, port, allowed)
        if complaint:
            failed.append(f"{time.time():.3f} {address} port {port}: {complaint}")
        if number % AT_ONCE == 0:
            print(json.dumps([AT_ONCE, failed]), flush=True)  # noqa: T201 - this is the result
            failed = []
        turn = max(turn + 1 / rate, time.monotonic() - AT_ONCE / rate)
        time.sleep(max(0.0, turn - time.monotonic()))


def connect(address: str, port: int, allowed: list[str]) -> str:
    """Make one connection; return what was wrong with it, or nothing."""
    try:
        with socket.create_connection((address, port), PATIENCE) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANSMISSIONS.size)
            (lost,) = TOTAL_RETRANSMISSIONS.unpack(info)
            answer = connection.recv(100).decode().strip()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    except OSError as error:
        return str(error)
    if lost:
        return f"TCP had to send its first packet {lost + 1} times"
    return "" if answer in allowed else f"answered by {answer or 'nobody'}"


if __name__ == "__main__":
    call([tuple(target) for target in json.loads(sys.argv[2])], float(sys.argv[1]))
