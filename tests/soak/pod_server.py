"""The pods of one node, as a separate process: `pod_server.py <port> <addresses>`.

Over TCP, each connection is answered with the address that it reached, and everything it sends is sent back. Over UDP,
each datagram is answered with the address. Prints a line as soon as it listens.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any, cast

BACKLOG = 4096


class Stream(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(f"{transport.get_extra_info('sockname')[0].removeprefix('::ffff:')}\n".encode())

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, address: str) -> None:
        self._answer = f"{address}\n".encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._transport.sendto(self._answer, addr)


async def serve(port: int, addresses: list[str]) -> None:
    """Serve forever."""
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    server = await loop.create_server(Stream, sock=listening, backlog=BACKLOG)
    # Each address has a socket of its own, because an answer must come from the address that was asked.
    for address in addresses:
        await loop.create_datagram_endpoint(lambda address=address: Datagrams(address), local_addr=(address, port))  # type: ignore[misc]
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2].split(",")))
