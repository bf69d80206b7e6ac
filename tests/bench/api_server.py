"""The API server of the benchmark: the tests' API server, in a child process.

The process reads commands from standard input, one line of JSON each, and replies to each with a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias

import msgspec
from msgspec import Struct

from tests.apiserver import ApiServer
from tests.apiserver.handler import Handler
from tests.apiserver.resources import ENDPOINT_SLICES, NODES, SERVICES
from tests.apiserver.selectors import Stored
from tests.apiserver.writing import ProtobufWriter
from tests.bench.child_process import ChildProcess
from tests.bench.cluster import Cluster, Object, cluster_ip
from tests.bench.watchlog import LoggedSocket, WatchLog, WatchTraffic
from tests.lab.namespace import Namespace
from tests.lab.topology import NODE

WATCHED = (SERVICES, ENDPOINT_SLICES, NODES)

Encoding: TypeAlias = Literal["JSON", "protobuf"]


class Load(Struct, tag=True):
    """Create all objects of a cluster."""

    cluster: Cluster


class Change(Struct, tag=True):
    """Create or replace some objects and delete others; watches see all changes at once."""

    put: Sequence[Object] = ()
    delete: Sequence[Object] = ()


class SetEncoding(Struct, tag=True):
    """From now on, serve JSON only, or protobuf to clients that accept it."""

    encoding: Encoding


class DrainTraffic(Struct, tag=True):
    """Reply with the watch traffic since the last time."""


Command: TypeAlias = Load | Change | SetEncoding | DrainTraffic


class BenchApiServer(ChildProcess):
    """An API server without authentication in a network namespace. Use it as a context manager."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace, "tests.bench.api_server")
        self.url = ""

    def __enter__(self) -> Self:
        super().__enter__()
        self.url = msgspec.json.decode(self.read_line(), type=str)
        return self

    @property
    def node_name(self) -> str:
        """The name of the Node that the proxy runs on."""
        return NODE

    def kubeconfig(self) -> dict[str, Any]:
        """Return the content of a kubeconfig for this server."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": {"server": self.url}}],
            "users": [{"name": "bench", "user": {}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
            "current-context": "bench",
        }

    def cluster_ip(self, number: int) -> str:
        """Return the cluster IP of a Service."""
        return cluster_ip(number)

    def load(self, cluster: Cluster) -> None:
        """Create all objects of a cluster."""
        self._send(Load(cluster))

    def change(self, *, put: Sequence[Object] = (), delete: Sequence[Object] = ()) -> None:
        """Create or replace objects, then delete others. Watches receive the events after this returns."""
        self._send(Change(put, delete))

    def set_encoding(self, encoding: Encoding) -> None:
        """From now on, serve JSON only, or protobuf to clients that accept it."""
        self._send(SetEncoding(encoding))

    def drain_traffic(self) -> WatchTraffic:
        """Return the watch traffic since the last call."""
        return msgspec.json.decode(self._send(DrainTraffic()), type=WatchTraffic)

    def _send(self, command: Command) -> bytes:
        self.write_line(msgspec.json.encode(command))
        return self.read_line()


def execute(server: ApiServer, log: WatchLog, command: Command) -> WatchTraffic | None:
    """Execute one command and return the reply."""
    if isinstance(command, Load):
        for each in command.cluster.objects():
            server.create(each)
        _encode_all(server)
    elif isinstance(command, Change):
        with server.store.changed:
            version = server.store.version
            for each in command.put:
                server.apply(each)
            for each in command.delete:
                server.delete(each)
            _encode_since(server, version)
    elif isinstance(command, SetEncoding):
        server.faults.protobuf = "supported" if command.encoding == "protobuf" else "ignored"
    else:
        return log.drain()
    return None


def _encode_all(server: ApiServer) -> None:
    """Encode all objects as protobuf in advance, so that the daemon does not wait for a server written in Python."""
    writer = ProtobufWriter()
    for resource in WATCHED:
        for each in server.store.snapshot(resource, _any)[1]:
            writer.stored("ADDED", resource, each)


def _encode_since(server: ApiServer, version: int) -> None:
    """Encode all events since a resourceVersion as protobuf in advance."""
    writer = ProtobufWriter()
    for resource in WATCHED:
        for change in server.store.changes_after(resource, version)[1]:
            if event := change.event_for(_any):
                writer.stored(event[0], resource, event[1])


def _any(_: Stored) -> bool:
    return True


def main() -> None:
    """Serve until standard input is closed."""
    log = WatchLog()

    class LoggedHandler(Handler):
        def setup(self) -> None:
            self.request = LoggedSocket(self.request, log)
            super().setup()

    decoder = msgspec.json.Decoder(Command)
    server = ApiServer()
    server.handler = LoggedHandler
    with server:
        _reply(server.url)
        for line in sys.stdin.buffer:
            _reply(execute(server, log, decoder.decode(line)))


def _reply(reply: str | WatchTraffic | None) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
