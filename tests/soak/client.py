"""Traffic to Services, as a separate process: `client.py <connections per second> <targets>`.

`targets` is a JSON list of targets (see `tests.soak.traffic.Target`). The process makes new connections to the targets
in turn, and keeps a connection to some of them open and exchanges data on it twice a second. Every second, it prints a
line of JSON: the numbers of connections by class, and the failures. It runs until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import time
from collections import Counter
from itertools import cycle
from typing import Any

TIMEOUT = 5.0
PAUSE = 0.5
"""Seconds between two exchanges on an open connection."""

FIRST_PORT, PORTS = 8_000, 57_000
"""Each connection has a source port of its own, so that connection tracking never takes it for an earlier one."""

RESET = struct.pack("ii", 1, 0)  # struct linger: close with a reset
TOTAL_RETRANSMISSIONS = struct.Struct("=100xI")  # tcpi_total_retrans of struct tcp_info (linux/tcp.h)

Target = dict[str, Any]


class Client:
    """Makes the connections and counts them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[list[Any]] = []
        self._number = 0

    async def connect_all(self, targets: list[Target], rate: float) -> None:
        """Connect to the targets in turn, forever."""
        turn = time.monotonic()
        running: set[asyncio.Task[None]] = set()
        for target in cycle(targets):
            task = asyncio.create_task(self._attempt(target))
            running.add(task)
            task.add_done_callback(running.discard)
            turn = max(turn + 1 / rate, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, turn - time.monotonic()))

    async def keep_open(self, target: Target) -> None:
        """Keep a connection open and exchange data on it. Connect again after a failure."""
        label = f"{target['class']}, long-lived"
        while True:
            began = time.monotonic()
            try:
                with self._socket(target) as connection:
                    await _within(self._greeting(connection, target))
                    while True:
                        self.counts[label] += 1
                        await asyncio.sleep(PAUSE)
                        began = time.monotonic()
                        await _within(_echo(connection))
            except (OSError, ValueError) as error:
                self._fail(label, target, began, error)
                await asyncio.sleep(PAUSE)

    async def _attempt(self, target: Target) -> None:
        began = time.monotonic()
        try:
            with self._socket(target) as connection:
                await _within(self._exchange(connection, target))
        except (OSError, ValueError) as error:
            self._fail(target["class"], target, began, error)
        self.counts[target["class"]] += 1

    def _fail(self, label: str, target: Target, began: float, error: Exception) -> None:
        text = str(error) or type(error).__name__
        self.failures.append(
            [label, target["service"], target["address"], target["port"], began, time.monotonic(), text]
        )

    def _socket(self, target: Target) -> socket.socket:
        family = socket.AF_INET6 if ":" in target["address"] else socket.AF_INET
        kind = socket.SOCK_DGRAM if target["protocol"] == "UDP" else socket.SOCK_STREAM
        found = socket.socket(family, kind)
        found.setblocking(False)
        while True:
            self._number += 1
            try:
                found.bind(("", FIRST_PORT + self._number % PORTS))
            except OSError:
                continue  # a long-lived connection uses the port
            return found

    async def _exchange(self, connection: socket.socket, target: Target) -> None:
        if target["protocol"] == "UDP":
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (target["address"], target["port"]))
            await loop.sock_sendall(connection, b"?")
            _check(await loop.sock_recv(connection, 100), target)
            return
        await self._greeting(connection, target)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async def _greeting(self, connection: socket.socket, target: Target) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (target["address"], target["port"]))
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TOTAL_RETRANSMISSIONS.size)
        (lost,) = TOTAL_RETRANSMISSIONS.unpack(info)
        _check(await loop.sock_recv(connection, 100), target)
        if lost:
            raise ValueError(f"needed {lost} TCP retransmissions")


async def _within(work: Any) -> None:
    async with asyncio.timeout(TIMEOUT):
        await work


async def _echo(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, b"x")
    if await loop.sock_recv(connection, 100) != b"x":
        raise ConnectionError("the connection was closed")


def _check(answer: bytes, target: Target) -> None:
    address = answer.decode().strip()
    if address not in target["pods"]:
        raise ValueError(f"unexpected answer from {address or 'no address'}")


async def report(client: Client) -> None:
    """Print the results of each second."""
    while True:
        await asyncio.sleep(1.0)
        print(json.dumps([client.counts, client.failures]), flush=True)
        client.counts.clear()
        client.failures.clear()


async def main(rate: float, targets: list[Target]) -> None:
    client = Client()
    open_ones = [client.keep_open(target) for target in targets if target["long_lived"]]
    await asyncio.gather(client.connect_all(targets, rate), report(client), *open_ones)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), json.loads(sys.argv[2])))
