"""Bytes and requests of kproxy's lists and watches, measured with the real client and the tests' API server.

HTTP without TLS on loopback: bytes include HTTP headers, but not TCP, TLS and what they add.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from kproxy.kube.client.client import ApiClient
from kproxy.kube.codec.streams import read_events
from kproxy.kube.codec.watch_events import Event
from kproxy.kube.listwatch.protocol import INACTIVITY, ListWatch
from kproxy.model.delta import Kind, Replace
from tests.api_cost.storm import KINDS
from tests.apiserver import ApiServer
from tests.apiserver.handler import Handler
from tests.bench.cluster import Cluster, Object
from tests.bench.cluster import node as small_node
from tests.lab.topology import NODE

LONGEST_TIMEOUT = 0.999
"""The random number of the state machines; it selects the longest watch."""

_IMAGES = 50  # the kubelet's default for nodeStatusMaxImages


class Start(Struct, frozen=True):
    """The lists of all kinds at the start of kproxy: requests, and bytes sent by the server."""

    requests: int
    bytes: int


class Costs(Struct, frozen=True):
    """What each thing costs, in bytes sent by the server unless stated otherwise.

    watch_list, pages: the start, with lists as watches and in pages.
    reconnect: one request for a watch and the headers of its response, in both directions.
    bookmarks: one bookmark for each kind.
    service, endpoint_slice, node: one event of this kind.
    """

    encoding: str
    watch_list: Start
    pages: Start
    reconnect: float
    bookmarks: int
    service: int
    endpoint_slice: int
    node: int


class Traffic:
    """The sizes of everything that the server sends, in order, and the number of bytes that it receives."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent: list[int] = []
        self.received = 0

    @property
    def total_sent(self) -> int:
        """The number of bytes sent so far."""
        with self.lock:
            return sum(self.sent)


class _CountedSocket(socket.socket):
    """A connection that counts what it sends and receives."""

    def __init__(self, connection: socket.socket, traffic: Traffic) -> None:
        super().__init__(fileno=connection.detach())
        self._traffic = traffic

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        with self._traffic.lock:
            self._traffic.sent.append(len(data))
        super().sendall(data, flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        size = super().recv_into(buffer, nbytes, flags)
        with self._traffic.lock:
            self._traffic.received += size
        return size


@contextmanager
def _counted_server(cluster: Cluster) -> Iterator[tuple[ApiServer, Traffic]]:
    traffic = Traffic()

    class CountedHandler(Handler):
        def setup(self) -> None:
            self.request = _CountedSocket(self.request, traffic)
            super().setup()

    server = ApiServer()
    server.handler = CountedHandler
    for each in cluster.objects():
        if each["kind"] != "Node":
            server.create(each)
    server.create(node(0))
    with server:
        yield server, traffic


class _Watcher:
    """One kind's list and watch, step by step."""

    def __init__(self, client: ApiClient, kind: Kind) -> None:
        self._client, self._kind = client, kind
        self.machine = ListWatch(kind, NODE, lambda: LONGEST_TIMEOUT)
        self.requests = 0
        self.events: Iterator[Event] = iter(())

    def list(self) -> None:
        """List all objects; return once the list is complete."""
        while not self._list_once():
            pass

    def watch(self) -> None:
        """Send the request for a watch; return once the headers of the response have arrived."""
        request = self.machine.next_request()
        self.requests += 1
        response = self._client.get(request.path, request.params, INACTIVITY, request.accept)
        self.machine.handle_open()
        self.events = read_events(self._kind, response)

    def next_event(self) -> Event:
        """Return the next event of the watch."""
        event = next(self.events)
        self.machine.handle_event(event)
        return event

    def _list_once(self) -> bool:
        request = self.machine.next_request()
        self.requests += 1
        response = self._client.get(request.path, request.params, INACTIVITY, request.accept)
        if response.status != 200:
            self.machine.handle_status(response.status, response.headers, response.read())
            return False
        if not request.watch:
            step = self.machine.handle_page(response.read())
            return any(isinstance(message, Replace) for message in step.messages)
        self.events = read_events(self._kind, response)
        self.machine.handle_open()
        for event in self.events:
            step = self.machine.handle_event(event)
            if any(isinstance(message, Replace) for message in step.messages):
                return True
        raise RuntimeError("the watch ended before the end of the initial events")


def node(heartbeat: int) -> Object:
    """Return a Node as large as a kubelet's with 50 images, which changes with each `heartbeat`."""
    body = small_node()
    reasons = {"MemoryPressure": "KubeletHasSufficientMemory", "DiskPressure": "KubeletHasNoDiskPressure"}
    reasons |= {"PIDPressure": "KubeletHasSufficientPID", "Ready": "KubeletReady"}
    conditions = [
        {
            "type": name,
            "status": "True" if name == "Ready" else "False",
            "lastHeartbeatTime": f"2026-01-01T00:{heartbeat % 60:02}:00Z",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "reason": reason,
            "message": f"kubelet: {reason}",
        }
        for name, reason in reasons.items()
    ]
    images = [
        {
            "names": [
                f"registry.example/team/app-{number}@sha256:{number:064x}",
                f"registry.example/team/app-{number}:1.0",
            ],
            "sizeBytes": 100_000_000 + number,
        }
        for number in range(_IMAGES)
    ]
    resources = {"cpu": "64", "memory": "263866904Ki", "pods": "110", "ephemeral-storage": "203056560Ki"}
    body["status"] |= {"conditions": conditions, "images": images, "capacity": resources, "allocatable": resources}
    return body


def measure(cluster: Cluster, encoding: str) -> Costs:
    """Measure all costs for one cluster. `encoding` is that of watches, "protobuf" or "JSON"."""
    with _counted_server(cluster) as (server, traffic):
        server.faults.protobuf = "supported" if encoding == "protobuf" else "ignored"
        client = ApiClient.from_config(server=server.url)
        server.set_watch_list("forbidden")
        pages, _ = _start(client, traffic)
        server.set_watch_list("supported")
        watch_list, watchers = _start(client, traffic)
        by_kind = {watcher.machine.resource: watcher for watcher in watchers}
        changes = (
            ("services", cluster.service(cluster.services)),
            ("endpointslices.discovery.k8s.io", cluster.endpoint_slice(0, variant=1)),
            ("nodes", node(1)),
        )
        service, endpoint_slice, of_node = (
            _event(server, traffic, by_kind[resource], body) for resource, body in changes
        )
        reconnect = _reconnect(traffic, watchers)
        server.bookmark_interval = 0.0
        bookmarks = sum(_bookmark(traffic, watcher) for watcher in watchers)
        client.close()
    return Costs(encoding, watch_list, pages, reconnect, bookmarks, service, endpoint_slice, of_node)


def _start(client: ApiClient, traffic: Traffic) -> tuple[Start, list[_Watcher]]:
    before = traffic.total_sent
    watchers = [_Watcher(client, kind) for kind in KINDS]
    for watcher in watchers:
        watcher.list()
    return Start(sum(watcher.requests for watcher in watchers), traffic.total_sent - before), watchers


def _event(server: ApiServer, traffic: Traffic, watcher: _Watcher, body: Object) -> int:
    """Return the size of the event that a change causes."""
    before = len(traffic.sent)
    server.apply(body)
    watcher.next_event()
    return traffic.sent[before]


def _reconnect(traffic: Traffic, watchers: Sequence[_Watcher]) -> float:
    """Return the mean bytes of a request for a watch and of its response's headers."""
    before = traffic.total_sent + traffic.received
    for watcher in watchers:
        watcher.watch()
    return (traffic.total_sent + traffic.received - before) / len(watchers)


def _bookmark(traffic: Traffic, watcher: _Watcher) -> int:
    """Return the size of a bookmark."""
    before = len(traffic.sent)
    watcher.watch()
    watcher.next_event()
    return traffic.sent[before + 1]  # after the headers
