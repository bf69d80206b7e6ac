"""A server in a process of its own, fast enough for thousands of connections a second: `greeter.py <port>`.

It tells everybody which of its machine's addresses they have reached, and closes. Prints a line when it listens.
"""

from __future__ import annotations

import select
import socket
import sys

BACKLOG = 4096


def serve(port: int) -> None:
    """Answer on this port of all addresses, for ever."""
    with socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True) as listening:
        listening.setblocking(False)
        print("listening", flush=True)  # noqa: T201 - this is how the test knows
        while True:
            select.select([listening], [], [])
            greet_all(listening)


def greet_all(listening: socket.socket) -> None:
    """Answer everybody who is waiting."""
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
