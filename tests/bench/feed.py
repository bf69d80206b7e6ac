"""The API server of the benchmark: the tests' own, in a process of its own, so that its work is not the daemon's.

The process takes commands on its standard input, one line of JSON each, and answers each with a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, Self, TypeAlias

import msgspec
from msgspec import Struct

from tests.apiserver import ApiServer
from tests.apiserver.handler import Handler
from tests.apiserver.resources import ENDPOINT_SLICES, NODES, SERVICES
from tests.apiserver.selectors import Stored
from tests.apiserver.writing import ProtobufWriter
from tests.bench.cluster import Cluster, Object
from tests.bench.companion import Companion
from tests.bench.watchlog import LoggedSocket, WatchLog, Written
from tests.lab.namespace import Namespace

FOLLOWED = (SERVICES, ENDPOINT_SLICES, NODES)

Content: TypeAlias = Literal["JSON", "protobuf"]


class Load(Struct, tag=True):
    """Create all objects of a cluster."""

    cluster: Cluster


class Change(Struct, tag=True):
    """Create or replace some objects and delete others, so that a watch sees all of it at once."""

    put: Sequence[Object] = ()
    delete: Sequence[Object] = ()


class Speak(Struct, tag=True):
    """Answer requests from now on in protobuf, where it is asked for, or in JSON whatever is asked for."""

    content: Content


class Take(Struct, tag=True):
    """Answer with what was written to watches since the last time."""


Command: TypeAlias = Load | Change | Speak | Take


class Feed(Companion):
    """An API server without authentication inside a namespace. Use it in a `with`."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace, "tests.bench.feed")
        self.url = ""

    def __enter__(self) -> Self:
        super().__enter__()
        self.url = msgspec.json.decode(self.answer(), type=str)
        return self

    def load(self, cluster: Cluster) -> None:
        """Create all objects of a cluster."""
        self._command(Load(cluster))

    def change(self, *, put: Sequence[Object] = (), delete: Sequence[Object] = ()) -> None:
        """Create or replace objects, then delete others. Watches are written to after this returns."""
        self._command(Change(put, delete))

    def speak(self, content: Content) -> None:
        """Answer requests from now on in protobuf, where it is asked for, or in JSON whatever is asked for."""
        self._command(Speak(content))

    def take(self) -> Written:
        """Return what was written to watches since the last call."""
        return msgspec.json.decode(self._command(Take()), type=Written)

    def _command(self, command: Command) -> bytes:
        self.send(msgspec.json.encode(command))
        return self.answer()


def obey(server: ApiServer, log: WatchLog, command: Command) -> Written | None:
    """Carry out one command and return the answer."""
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
    elif isinstance(command, Speak):
        server.faults.protobuf = "supported" if command.content == "protobuf" else "ignored"
    else:
        return log.take()
    return None


def _encode_all(server: ApiServer) -> None:
    """Work out the protobuf of all objects beforehand: the daemon is to be waited for, not a server in Python."""
    writer = ProtobufWriter()
    for resource in FOLLOWED:
        for each in server.store.snapshot(resource, _any)[1]:
            writer.stored("ADDED", resource, each)


def _encode_since(server: ApiServer, version: int) -> None:
    """Work out the protobuf of all events since a resourceVersion, for the same reason."""
    writer = ProtobufWriter()
    for resource in FOLLOWED:
        for change in server.store.changes_after(resource, version)[1]:
            if event := change.event_for(_any):
                writer.stored(event[0], resource, event[1])


def _any(_: Stored) -> bool:
    return True


def main() -> None:
    """Serve until the standard input ends."""
    log = WatchLog()

    class Logged(Handler):
        def setup(self) -> None:
            self.request = LoggedSocket(self.request, log)
            super().setup()

    decoder = msgspec.json.Decoder(Command)
    server = ApiServer()
    server.handler = Logged
    with server:
        answer: str | Written | None = server.url
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.flush()
        for line in sys.stdin.buffer:
            answer = obey(server, log, decoder.decode(line))
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
