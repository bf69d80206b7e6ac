"""One measurement's surroundings: a node with the daemon, the API server, a client, and a pod that answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from msgspec import Struct

from tests.bench.api_server import Feed
from tests.bench.cluster import TARGET_PORT, Cluster, Object
from tests.bench.commit_monitor import Notice, Notices
from tests.bench.connections import Server
from tests.bench.daemon import LOOK, SYNC_PERIOD, Subject
from tests.bench.kernel_objects import flush
from tests.bench.watchlog import Written
from tests.lab.topology import Lab

SERVED = tuple(f"10.244.1.{host}" for host in range(11, 21))
"""The addresses of the pod that answers."""


class Effect(Struct, frozen=True):
    """What came of a change: seconds from its first and its last event to the last commit, CPU seconds, and more.

    `syncs` is the number of groups of `commits` with a pause between them; without any commit the times are negative.
    """

    seconds: float
    lag: float
    cpu: float
    syncs: int
    commits: int
    written: Written


class Scene:
    """Everything but the daemon. Use it in a `with`."""

    def __init__(self, mode: str, cluster: Cluster, folder: Path) -> None:
        self.mode, self.cluster = mode, cluster
        self._log = folder / "kproxy.log"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            lab = stack.enter_context(Lab())
            self.node = lab.node.namespace
            self.client = lab.add_pod("client", "10.244.1.250").namespace
            pod = lab.add_pod("server", *SERVED)
            stack.enter_context(Server(pod.namespace, TARGET_PORT))
            self.notices = stack.enter_context(Notices(self.node))
            self.feed = stack.enter_context(Feed(self.node))
            self.feed.load(self.cluster)
            self.feed.take()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def subject(self) -> Subject:
        """Return the daemon, not yet started."""
        return Subject(self.node, self.notices, self.mode, self.feed.url, self._log)

    def empty(self) -> None:
        """Remove all rules from the node."""
        self.node.call(flush)

    def settle_start(self, subject: Subject, *, commits: int = 1) -> list[Notice]:
        """Wait until a daemon that was just started has been sent every object and rests; return all commits."""
        kinds = 2 * self.cluster.services + (2 if self.mode == "nftables" else 1)  # iptables mode has no ServiceCIDRs
        sent = 0
        while sent < kinds:
            subject.check()
            time.sleep(LOOK)
            sent += self.feed.take().events
        return subject.settle(subject.started, commits=commits)

    def effect(self, subject: Subject, change: Callable[[], None], *, commits: int = 1) -> Effect:
        """Make a change and wait until the daemon rests again; it must rest when this is called."""
        self.feed.take()
        self.notices.forget()
        cpu, began = subject.cpu, time.monotonic_ns()
        change()
        moments = [each.moment for each in subject.settle(began, commits=commits)]
        written = self.feed.take()
        last = moments[-1] if moments else 0
        return Effect(
            (last - written.first) / 1e9,
            (last - written.last) / 1e9,
            subject.cpu - cpu,
            count_groups(moments),
            len(moments),
            written,
        )

    def change(
        self, subject: Subject, *, put: Sequence[Object] = (), delete: Sequence[Object] = (), commits: int = 1
    ) -> Effect:
        """Let some objects change at once, and wait; see `effect`."""
        return self.effect(subject, lambda: self.feed.change(put=put, delete=delete), commits=commits)


def count_groups(moments: Sequence[int]) -> int:
    """Return how many groups moments (nanoseconds, ascending) fall into: syncs are apart, their commits are not."""
    apart = SYNC_PERIOD / 4 * 1e9
    return sum(not before or now - before > apart for before, now in zip((0, *moments), moments, strict=False))
