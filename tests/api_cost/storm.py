"""Simulate how the watches of many nodes reconnect after their API server was unreachable. Pure: a virtual clock.

Every client is the state machine of kproxy. The server accepts each resourceVersion that it has sent, as kube-apiserver
does after a restart.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Literal, TypeAlias

from msgspec import Struct

from kproxy.kube.codec.watch_events import Bookmark
from kproxy.kube.listwatch.protocol import ListWatch, ListWatchRequest, ListWatchStep
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node, ServiceCIDR)
"""What each node watches, in nftables mode. In iptables mode, it does not watch ServiceCIDRs."""

BOOKMARK_INTERVAL = 60.0
WATCH_AGE = 300.0
"""Before the outage starts, each node has been running for a random part of this time, in seconds."""

Outage: TypeAlias = Literal["refused", "overloaded"]
"""How the API server responds during an outage: it refuses connections, or answers 503 with Retry-After."""


class Scenario(Struct, frozen=True):
    """An outage of `seconds`, at whose start all connections end.

    clean: the server ends each watch as a timeout does. Otherwise, the connections break.
    retry_after: seconds that an overloaded server asks clients to wait.
    """

    name: str
    seconds: float
    outage: Outage = "refused"
    clean: bool = False
    retry_after: int = 0


SCENARIOS = (
    Scenario("connections break, another API server accepts them at once", 0.0),
    Scenario("restart of 30 s: connections are refused", 30.0),
    Scenario("restart of 30 s: watches end cleanly, then connections are refused", 30.0, clean=True),
    Scenario("5 s of 503 with Retry-After: 10", 5.0, "overloaded", retry_after=10),
)


class Storm(Struct):
    """The requests of all clients from the start of the outage until every client watches again.

    requests: by full second, including those that fail.
    accepted: by full second, only those that the server answers with 200.
    lists: requests for complete lists, in pages or as a watch.
    recovered: seconds from the start of the outage until the last client watches again.
    """

    clients: int
    requests: Counter[int]
    accepted: Counter[int]
    lists: int = 0
    recovered: float = 0.0

    @property
    def peak(self) -> int:
        """The number of requests that the server accepts in the busiest full second."""
        return max(self.accepted.values(), default=0)

    @property
    def share(self) -> float:
        """The share of all accepted requests that arrives in the busiest full second, from 0 to 1."""
        return self.peak / sum(self.accepted.values())


class _Client:
    """One watch of one node."""

    def __init__(self, machine: ListWatch) -> None:
        self.machine = machine
        self.opened = 0.0
        self.connection = 0
        """Number of the current connection; timers of earlier connections are ignored."""
        self.watching = False


class _Simulation:
    def __init__(
        self, nodes: int, scenario: Scenario, random: Callable[[], float], ages: Random, kinds: Sequence[Kind]
    ) -> None:
        self._scenario, self._ages = scenario, ages
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now = 0.0
        self._clients = [
            _Client(ListWatch(kind, f"node-{number}", random)) for number in range(nodes) for kind in kinds
        ]
        self._missing = 0
        self.storm = Storm(len(self._clients), Counter(), Counter())

    def run(self) -> Storm:
        """Run until every client watches again."""
        for client in self._clients:
            self._at(-WATCH_AGE * self._ages.random(), lambda client=client: self._request(client))  # type: ignore[misc]
        self._advance(lambda: bool(self._queue) and self._queue[0][0] < 0.0)
        self._now = 0.0
        self._missing = len(self._clients)
        for client in self._clients:
            self._end(client)
        self._advance(lambda: self._missing > 0)
        self.storm.recovered = self._now
        return self.storm

    def _advance(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            self._now, _, action = heapq.heappop(self._queue)
            action()

    def _at(self, time: float, action: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (time, self._number, action))

    def _end(self, client: _Client) -> None:
        """End the client's connection at the start of the outage."""
        client.connection += 1
        client.watching = False
        duration = self._now - client.opened
        machine = client.machine
        step = (
            machine.handle_close(duration)
            if self._scenario.clean
            else machine.handle_failure("connection reset by peer", duration)
        )
        self._continue(client, step)

    def _continue(self, client: _Client, step: ListWatchStep) -> None:
        assert step.reconnect_after is not None
        self._at(self._now + step.reconnect_after, lambda: self._request(client))

    def _request(self, client: _Client) -> None:
        request, during = client.machine.next_request(), self._now >= 0.0
        second = int(self._now)
        if during:
            self.storm.requests[second] += 1
        if 0.0 <= self._now < self._scenario.seconds:
            self._continue(client, self._refuse(client.machine))
            return
        if during:
            self.storm.accepted[second] += 1
            self.storm.lists += "resourceVersion" not in request.params
        self._open(client, request)

    def _refuse(self, machine: ListWatch) -> ListWatchStep:
        if self._scenario.outage == "refused":
            return machine.handle_failure("connection refused")
        return machine.handle_status(503, {"Retry-After": str(self._scenario.retry_after)}, b"")

    def _open(self, client: _Client, request: ListWatchRequest) -> None:
        client.opened = self._now
        client.connection += 1
        client.machine.handle_open()
        if "resourceVersion" not in request.params:
            client.machine.handle_event(Bookmark("1", initial_events_end=True))
        if not client.watching:
            client.watching = True
            self._missing -= 1
        connection, end = client.connection, self._now + float(request.params["timeoutSeconds"])
        self._at(self._now + BOOKMARK_INTERVAL, lambda: self._bookmark(client, connection))
        self._at(end, lambda: self._time_out(client, connection))

    def _bookmark(self, client: _Client, connection: int) -> None:
        if client.connection == connection:
            client.machine.handle_event(Bookmark("1", initial_events_end=False))
            self._at(self._now + BOOKMARK_INTERVAL, lambda: self._bookmark(client, connection))

    def _time_out(self, client: _Client, connection: int) -> None:
        if client.connection == connection:
            self._continue(client, client.machine.handle_close(self._now - client.opened))


def simulate(
    scenario: Scenario,
    *,
    nodes: int,
    seed: int = 0,
    kinds: Sequence[Kind] = KINDS,
    random: Callable[[], float] | None = None,
) -> Storm:
    """Simulate a scenario with the watches of `nodes` nodes. `random` replaces the random numbers of the clients."""
    ages = Random(seed)
    return _Simulation(nodes, scenario, random or ages.random, ages, kinds).run()


def histogram(storm: Storm, width: int = 50) -> Iterator[str]:
    """Yield one line for each second with requests: the second, the requests, the accepted ones, and a bar.

    The bar shows all requests; its `#` part those that were accepted.
    """
    highest = max(storm.requests.values())
    for second in sorted(storm.requests):
        total, accepted = storm.requests[second], storm.accepted[second]
        bar = "#" * round(width * accepted / highest)
        yield f"{second:4} s {total:7,} {accepted:7,}  {bar.ljust(round(width * total / highest), '.')}"
