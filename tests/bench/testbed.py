"""The environment of a measurement: a node for the daemon, an API server, a client pod and a server pod."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from msgspec import Struct

from tests.bench.api_server import BenchApiServer
from tests.bench.cluster import PORT, TARGET_PORT, Cluster, Object
from tests.bench.commit_monitor import Commit, CommitMonitor
from tests.bench.connections import Server
from tests.bench.daemon import POLL_INTERVAL, SYNC_PERIOD, MeasuredDaemon, kproxy_command
from tests.bench.kernel_objects import flush
from tests.bench.real_api_server import RealApiServer
from tests.bench.watchlog import WatchTraffic
from tests.lab.namespace import Namespace
from tests.lab.topology import Lab

MAX_SERVICE_ENDPOINTS = 1000
SERVER_ADDRESSES = (
    *(f"10.244.1.{host}" for host in range(11, 21)),
    *(f"10.244.{16 + (number >> 8)}.{number & 255}" for number in range(10, MAX_SERVICE_ENDPOINTS)),
)
"""The addresses of the server pod, which accepts connections."""


def server_addresses(endpoints: int) -> tuple[str, ...]:
    """Return the addresses of the server pod for Services with so many endpoints; at least 10."""
    return SERVER_ADDRESSES[: max(10, endpoints)]


class Effect(Struct, frozen=True):
    """What a change caused.

    seconds, lag: from the first and from the last watch event to the last commit; negative without a commit.
    cpu: CPU seconds of the daemon and its children.
    syncs: groups of commits that are separated by a pause.
    """

    seconds: float
    lag: float
    cpu: float
    syncs: int
    commits: int
    traffic: WatchTraffic


class Testbed:
    """Everything except the daemon. Use it as a context manager."""

    def __init__(
        self,
        mode: str,
        cluster: Cluster,
        folder: Path,
        api_server: Callable[[Namespace], BenchApiServer | RealApiServer] = BenchApiServer,
    ) -> None:
        """`api_server` creates the API server, given the network namespace of the node."""
        self.mode, self.cluster = mode, cluster
        self._new_api_server = api_server
        self.folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            lab = stack.enter_context(Lab())
            self.node = lab.node.namespace
            self.client = lab.add_pod("client", "10.244.1.250").namespace
            addresses = self.cluster.server_addresses
            self.server = lab.add_pod("server", *addresses).namespace
            self._accepting = stack.enter_context(ExitStack())
            self._accepting.enter_context(Server(self.server, TARGET_PORT))
            self.monitor = stack.enter_context(CommitMonitor(self.node))
            self.api_server = self._new_api_server(self.node)
            stack.enter_context(self.api_server)
            self.api_server.load(self.cluster)
            self.api_server.drain_traffic()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def daemon(self) -> MeasuredDaemon:
        """Return a daemon that has not been started."""
        command = kproxy_command(self.mode, self.api_server.url)
        return MeasuredDaemon(self.node, self.monitor, command, self.folder / "kproxy.log")

    @property
    def vips(self) -> list[tuple[str, int]]:
        """The frontends that the client connects to."""
        return [(self.api_server.cluster_ip(number), PORT) for number in self.cluster.connected]

    @contextmanager
    def without_server(self) -> Iterator[None]:
        """Stop the program that accepts connections while the context is active."""
        self._accepting.close()
        yield
        self._accepting.enter_context(Server(self.server, TARGET_PORT))

    def flush_rules(self) -> None:
        """Remove all rules from the node."""
        self.node.call(flush)

    def wait_for_start(self, daemon: MeasuredDaemon, *, commits: int = 1) -> list[Commit]:
        """Wait until a new daemon has received every object and is idle; return all of its commits."""
        # Each Service and its slices, the Node, and in nftables mode the ServiceCIDR; iptables mode does not watch it.
        cluster = self.cluster
        expected = cluster.services * (1 + cluster.slices) + (2 if self.mode == "nftables" else 1)
        sent = 0
        while sent < expected:
            daemon.check()
            time.sleep(POLL_INTERVAL)
            sent += self.api_server.drain_traffic().events
        return daemon.wait_until_idle(daemon.started, commits=commits)

    def effect(self, daemon: MeasuredDaemon, change: Callable[[], None], *, commits: int = 1) -> Effect:
        """Make a change and wait until the daemon is idle again. The daemon must be idle before."""
        self.api_server.drain_traffic()
        self.monitor.clear()
        cpu, start = daemon.cpu, time.monotonic_ns()
        change()
        times = [each.time for each in daemon.wait_until_idle(start, commits=commits)]
        traffic = self.api_server.drain_traffic()
        last = times[-1] if times else 0
        return Effect(
            (last - traffic.first) / 1e9,
            (last - traffic.last) / 1e9,
            daemon.cpu - cpu,
            count_syncs(times),
            len(times),
            traffic,
        )

    def change(
        self, daemon: MeasuredDaemon, *, put: Sequence[Object] = (), delete: Sequence[Object] = (), commits: int = 1
    ) -> Effect:
        """Change some objects at once, and wait as `effect` does."""
        return self.effect(daemon, lambda: self.api_server.change(put=put, delete=delete), commits=commits)


def count_syncs(times: Sequence[int]) -> int:
    """Return the number of syncs behind some commits, given by ascending times in nanoseconds.

    One sync may make several commits in quick succession; a longer pause separates syncs.
    """
    pause = SYNC_PERIOD / 4 * 1e9
    return sum(not before or now - before > pause for before, now in zip((0, *times), times, strict=False))
