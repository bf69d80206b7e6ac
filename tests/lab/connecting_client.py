"""Connect to targets all the time, as a separate process: `connecting_client.py <connections per second> <targets>`.

`targets` is a JSON list of `[address, port, [addresses allowed to answer]]`. After every `CONNECTIONS_PER_LINE`
connections, the process prints one line of JSON: the number of connections and one message for each that failed. It
runs until it is killed.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from itertools import cycle

CONNECTIONS_PER_LINE = 50
"""Connections reported by one line of output."""

TIMEOUT = 5.0
RESET = struct.pack("ii", 1, 0)
"""`struct linger` that closes with a reset: no port stays in TIME_WAIT, so the client never runs out of ports."""

TOTAL_RETRANSMISSIONS = struct.Struct("=100xI")
"""`tcpi_total_retrans` of `struct tcp_info` (linux/tcp.h)."""

Target = tuple[str, int, list[str]]


def connect_all(targets: list[Target], rate: float) -> None:
    """Connect to the targets in turn, forever."""
    failed: list[str] = []
    turn = time.monotonic()
    for number, (address, port, allowed) in enumerate(cycle(targets), 1):
        error = connect(address, port, allowed)
        if error:
            failed.append(f"{time.time():.3f} {address} port {port}: {error}")
        if number % CONNECTIONS_PER_LINE == 0:
            print(json.dumps([CONNECTIONS_PER_LINE, failed]), flush=True)  # noqa: T201 - this is the result
            failed = []
        turn = max(turn + 1 / rate, time.monotonic() - CONNECTIONS_PER_LINE / rate)
        time.sleep(max(0.0, turn - time.monotonic()))


def connect(address: str, port: int, allowed: list[str]) -> str:
    """Make one connection; return an error message, or "" if it succeeded."""
    try:
        with socket.create_connection((address, port), TIMEOUT) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANSMISSIONS.size)
            (lost,) = TOTAL_RETRANSMISSIONS.unpack(info)
            answer = connection.recv(100).decode().strip()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    except OSError as error:
        return str(error)
    if lost:
        return f"needed {lost} TCP retransmissions"
    return "" if answer in allowed else f"unexpected answer from {answer or 'no address'}"


if __name__ == "__main__":
    connect_all([tuple(target) for target in json.loads(sys.argv[2])], float(sys.argv[1]))
