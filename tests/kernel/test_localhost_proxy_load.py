"""NodePorts on loopback addresses under load: restarts, endpoint changes, thousands of connections, slow clients."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.test_localhost_node_ports import LOOPBACK, RANGES, Daemons, web
from tests.lab.client import Failed, Refused, TimedOut
from tests.lab.connection_stream import Attempt, ConnectionStream, Target
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.lab.web_service import NODE_PORT

AT_ONCE = 1_000
IN_A_ROW = 10_000
MEGABYTE = 1 << 20
FLOW_SIZE = 64 * MEGABYTE


@pytest.fixture
def daemons(lab: Lab, tmp_path: Path, nft: None) -> Daemons:
    return Daemons(lab, tmp_path)


@pytest.fixture
def pods(lab: Lab, servers: Servers) -> list[Host]:
    found = []
    for number in (1, 2):
        pod = lab.add_pod(f"pod-{number}", f"10.244.1.{number}", f"fd00:10:244:1::{number}")
        found.append(replace(pod, name=f"demo/web/{number}"))
        servers.serve(found[-1], 8080)
    return found


def stream_to(lab: Lab) -> ConnectionStream:
    targets = [Target("demo/web", lab.node, address, NODE_PORT) for address in LOOPBACK.values()]
    return ConnectionStream(targets, timeout=HANG_GUARD)


def lost(failures: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that failed, except those that the client's kernel repeated and that succeeded then."""
    return [
        each
        for each in failures
        if not (isinstance(each.outcome, Failed) and each.outcome.reason.endswith("TCP retransmissions"))
    ]


def test_endpoint_changes_lose_no_connection(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web(pods[:1]))
    with daemons.run(RANGES, "--iptables-min-sync-period=50ms") as daemon:
        daemon.wait_until_synced()
        with stream_to(lab) as stream:
            for number in range(6):
                new = pods[1 - number % 2 :][:1]
                daemons.write(web(new))
                stream.mark(f"the change to {new[0].name}")
                wait_until(lambda new=new: set(stream.take()) == {new[0].name}, "only the new pod answers")  # type: ignore[misc]
            assert stream.failure_report() == ""


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_restarts_refuse_no_connection(lab: Lab, pods: list[Host], daemons: Daemons, version: int) -> None:
    daemons.write(web(pods))
    target = Target("demo/web", lab.node, LOOPBACK[version], NODE_PORT)
    with ExitStack() as stack:
        daemon = stack.enter_context(daemons.run(RANGES))
        daemon.wait_until_synced()
        stream = stack.enter_context(ConnectionStream([target], timeout=HANG_GUARD))
        for number in range(3):
            stream.take(50)
            stream.mark(f"restart {number}")
            assert daemon.terminate() == 0
            daemon = stack.enter_context(daemons.run(RANGES))
            daemon.wait_until_synced()
        stream.take(50)
        assert stream.describe(lost(stream.failures())) == ""


def test_killed_process_loses_only_connections_that_it_had_accepted(
    lab: Lab, pods: list[Host], daemons: Daemons
) -> None:
    daemons.write(web(pods))
    with ExitStack() as stack:
        daemon = stack.enter_context(daemons.run(RANGES))
        daemon.wait_until_synced()
        stream = stack.enter_context(stream_to(lab))
        stream.take(50)
        stream.mark("the kill")
        daemon.kill()
        killed = time.monotonic()
        daemon = stack.enter_context(daemons.run(RANGES))
        daemon.wait_until_synced()
        stream.take(50)
        failed = lost(stream.failures())
        assert all(each.began < killed and not isinstance(each.outcome, Refused | TimedOut) for each in failed), (
            stream.describe(failed)
        )


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class HoldingServer:
    """Accepts connections in a pod, in one thread, and does with each what `use` does."""

    def __init__(self, pod: Host, use: Callable[[socket.socket], None]) -> None:
        self._listener = pod.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((pod.address(), 8080))
        self._listener.listen(4096)
        self._listener.settimeout(HANG_GUARD)
        self._use = use
        self.open: list[socket.socket] = []

    def accept(self, count: int) -> None:
        """Accept connections."""
        for _ in range(count):
            connection, _ = self._listener.accept()
            connection.settimeout(HANG_GUARD)
            self._use(connection)
            self.open.append(connection)

    def close(self) -> None:
        """Close all connections and the listener."""
        for each in (*self.open, self._listener):
            each.close()
        self.open.clear()


@pytest.fixture
def pod(lab: Lab) -> Host:
    return lab.add_pod("pod", "10.244.1.1", "fd00:10:244:1::1")


def connect(lab: Lab) -> socket.socket:
    client = lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(HANG_GUARD)
    client.connect(("127.0.0.1", NODE_PORT))
    return client


def test_a_thousand_connections_at_once(lab: Lab, pod: Host, daemons: Daemons) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * AT_ONCE), hard))
    server = HoldingServer(pod, lambda connection: connection.sendall(b"hello"))
    daemons.write(web([pod]))
    try:
        with daemons.run(RANGES) as daemon:
            daemon.wait_until_synced()
            before, memory = descriptors(daemon.pid), resident(daemon.pid)
            clients = []
            for _ in range(AT_ONCE // 50):
                clients += [connect(lab) for _ in range(50)]
                server.accept(50)
            assert all(each.recv(5, socket.MSG_WAITALL) == b"hello" for each in clients)
            assert descriptors(daemon.pid) > 2 * AT_ONCE
            assert resident(daemon.pid) < memory + 16 * MEGABYTE
            for each in clients:
                each.close()
            assert all(each.recv(1) == b"" for each in server.open)
            server.close()
            wait_until(lambda: descriptors(daemon.pid) <= before, "all descriptors are closed")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_connections_in_a_row(lab: Lab, pod: Host, daemons: Daemons) -> None:
    server = HoldingServer(pod, lambda connection: connection.sendall(b"hello"))
    daemons.write(web([pod]))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()

        def exchange(count: int) -> None:
            for _ in range(count):
                with connect(lab) as client:
                    server.accept(1)
                    assert client.recv(5, socket.MSG_WAITALL) == b"hello"
                server.open.pop().close()

        before = descriptors(daemon.pid)
        exchange(IN_A_ROW // 10)
        memory = resident(daemon.pid)
        exchange(IN_A_ROW - IN_A_ROW // 10)
        wait_until(lambda: descriptors(daemon.pid) <= before, "all descriptors are closed")
        assert resident(daemon.pid) < memory + 4 * MEGABYTE
    server.close()


def test_client_that_never_reads_costs_bounded_memory(lab: Lab, pod: Host, daemons: Daemons) -> None:
    def fill(connection: socket.socket) -> None:
        connection.setblocking(False)

    server = HoldingServer(pod, fill)
    daemons.write(web([pod]))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        memory = resident(daemon.pid)
        clients = [connect(lab) for _ in range(20)]
        server.accept(len(clients))
        sent = [send_all_that_fits(each) for each in server.open]
        assert all(0 < each < FLOW_SIZE for each in sent)
        assert resident(daemon.pid) < memory + 8 * MEGABYTE
        # The data is complete once the client reads.
        clients[0].settimeout(HANG_GUARD)
        received = 0
        while received < sent[0]:
            received += len(clients[0].recv(MEGABYTE))
        assert received == sent[0]
        for each in clients:
            each.close()
    server.close()


def send_all_that_fits(connection: socket.socket) -> int:
    """Send until nothing has been accepted for a while. Return the number of bytes."""
    sent, chunk = 0, bytes(MEGABYTE // 4)
    idle_since = time.monotonic()
    while sent < FLOW_SIZE and time.monotonic() - idle_since < 0.2:
        try:
            sent += connection.send(chunk)
            idle_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    return sent


def test_established_connections_may_finish_when_kproxy_stops(lab: Lab, pod: Host, daemons: Daemons) -> None:
    server = HoldingServer(pod, lambda connection: connection.sendall(b"hello"))
    daemons.write(web([pod]))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        client = connect(lab)
        server.accept(1)
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"
        os.kill(daemon.pid, 15)
        wait_until(lambda: "stopping" in daemons.log.read_text(), "kproxy stops")
        client.sendall(b"more")
        assert server.open[0].recv(4, socket.MSG_WAITALL) == b"more"
        server.open[0].close()
        assert client.recv(1) == b""
        client.close()
        assert daemon.terminate() == 0
    server.close()


def test_many_clients_that_arrive_while_kproxy_stops_are_served(lab: Lab, pod: Host, daemons: Daemons) -> None:
    """Clients in the backlog of a listener are established connections: closing it would reset them."""
    server = HoldingServer(pod, lambda connection: connection.sendall(b"hello"))
    daemons.write(web([pod]))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        os.kill(daemon.pid, 19)  # SIGSTOP: the clients wait in the backlog
        clients = [connect(lab) for _ in range(100)]
        os.kill(daemon.pid, 15)
        os.kill(daemon.pid, 18)
        server.accept(len(clients))
        assert all(each.recv(5, socket.MSG_WAITALL) == b"hello" for each in clients)
        for each in clients:
            each.close()
        assert daemon.terminate() == 0
    server.close()
