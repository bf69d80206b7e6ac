"""Answer each connection with the address that it reached, as a separate process: `address_server.py <port>`.

Fast enough for thousands of connections a second. Prints a line as soon as it listens.
"""

from __future__ import annotations

import select
import socket
import sys

BACKLOG = 4096


def serve(port: int) -> None:
    """Answer on this port of all addresses, forever."""
    with socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True) as listening:
        listening.setblocking(False)
        print("listening", flush=True)  # noqa: T201 - this is how the test knows
        while True:
            select.select([listening], [], [])
            answer_all(listening)


def answer_all(listening: socket.socket) -> None:
    """Answer all connections in the backlog."""
    while True:
        try:
            connection, _ = listening.accept()
        except BlockingIOError:
            return
        except ConnectionError:
            continue
        with connection:
            try:
                connection.sendall(f"{connection.getsockname()[0].removeprefix('::ffff:')}\n".encode())
            except ConnectionError:
                continue


if __name__ == "__main__":
    serve(int(sys.argv[1]))
