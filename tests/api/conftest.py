"""Fixtures. `cluster` is the test server, and a real kube-apiserver where one is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.listwatch.reflector import ApiSource
from kproxy.model.delta import BASIC_KINDS, Delete, Delta, Kind, Object, Replace, Upsert
from kproxy.model.types import Node, ServiceCIDR
from tests.apiserver import ApiServer, Relay
from tests.kubeapiserver import KubeApiServer, unavailable
from tests.lab.requirements import missing_commands, missing_privilege
from tests.lab.waiting import HANG_GUARD

if TYPE_CHECKING:
    from tests.api.node import NodeDaemon


class Cluster(Protocol):
    """The interface of both servers."""

    @property
    def address(self) -> tuple[str, int]: ...
    def create(self, body: dict[str, Any]) -> dict[str, Any]: ...
    def update(self, body: dict[str, Any]) -> dict[str, Any]: ...
    def apply(self, body: dict[str, Any]) -> dict[str, Any]: ...
    def delete(self, body: dict[str, Any]) -> None: ...
    def compact(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kubeconfig(self, path: Path, *, port: int | None = None, token: str | None = None) -> Path: ...


class Received:
    """A sink of deltas, and the objects that result from them."""

    def __init__(self, kinds: Iterable[Kind] = BASIC_KINDS) -> None:
        self.put: Callable[[Delta], None]
        self.deltas: list[Delta] = []
        self.objects: dict[Kind, dict[str, Object]] = {kind: {} for kind in kinds}
        self._queue: SimpleQueue[Delta] = SimpleQueue()
        self.put = self._queue.put

    def until(self, done: Callable[[Received], bool], timeout: float = HANG_GUARD) -> None:
        """Apply received deltas until a condition is true."""
        deadline = monotonic() + timeout
        while not done(self):
            try:
                self._apply(self._queue.get(timeout=max(0.0, deadline - monotonic())))
            except Empty:
                raise TimeoutError(f"not true after {timeout} s: {self.objects}") from None

    def until_listed(self, times: int = 1) -> None:
        """Apply received deltas until each kind was listed `times` times."""
        self.until(lambda _: all(self.lists(kind) >= times for kind in self.objects))

    def lists(self, kind: Kind) -> int:
        return sum(isinstance(delta, Replace) and delta.kind is kind for delta in self.deltas)

    def names(self, kind: Kind) -> set[str]:
        """Return the names of the objects, except the cluster's own."""
        return {key.split("/")[-1] for key in self.objects[kind]} - {"kubernetes"}

    def is_empty(self) -> bool:
        return self._queue.empty()

    def _apply(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if isinstance(delta, Upsert):
            self.objects[type(delta.object)][_key(delta.object)] = delta.object
        elif isinstance(delta, Delete):
            self.objects[delta.kind].pop(f"{delta.namespace}/{delta.name}", None)
        elif isinstance(delta, Replace):
            known = self.objects[delta.kind]
            kept = {key: known[key] for key in map("/".join, delta.unreadable) if key in known}
            self.objects[delta.kind] = kept | {_key(item): item for item in delta.objects}


def _key(item: Object) -> str:
    return f"{'' if isinstance(item, Node | ServiceCIDR) else item.namespace}/{item.name}"


@pytest.fixture(scope="session")
def kube_apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiServer]:
    if reason := unavailable():
        pytest.skip(reason)
    with KubeApiServer(tmp_path_factory.mktemp("kube-apiserver")) as server:
        yield server


@pytest.fixture(params=["fake", "kube-apiserver"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param == "fake":
        with ApiServer(tokens=["secret"]) as server:
            yield server
        return
    real: KubeApiServer = request.getfixturevalue("kube_apiserver")
    real.clear()
    yield real


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """The test server, for tests of faults that only it can cause."""
    with ApiServer(tokens=["secret"]) as server:
        yield server


@pytest.fixture
def relay(cluster: Cluster) -> Iterator[Relay]:
    with Relay(cluster.address) as relay:
        yield relay


@pytest.fixture
def received() -> Received:
    return Received()


StartSource = Callable[..., ApiSource]


@pytest.fixture
def start_source(received: Received, tmp_path: Path) -> Iterator[StartSource]:
    """Start an `ApiSource` of a cluster, optionally through the port of a relay."""
    sources: list[ApiSource] = []

    def start(cluster: Cluster, *, port: int | None = None, **options: Any) -> ApiSource:
        kubeconfig = cluster.kubeconfig(tmp_path / "kubeconfig", port=port)
        source = ApiSource(ApiClient.from_config(str(kubeconfig)), "node-1", received.put, **options)
        sources.append(source)
        source.start()
        return source

    yield start
    for source in sources:
        source.stop(1.0)


@pytest.fixture
def daemon(cluster: Cluster, tmp_path: Path) -> Iterator[NodeDaemon]:
    """A node for the daemon; `start` starts it."""
    from tests.api.node import NodeDaemon

    if reason := missing_commands() or missing_privilege():
        pytest.skip(reason)
    daemon = NodeDaemon(cluster, tmp_path)
    yield daemon
    daemon.close()
