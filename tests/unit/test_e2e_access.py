"""The ways into a real cluster: requests to a real HTTP server, commands over a real WebSocket."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes.client import Configuration

from tests.apiserver import ApiServer, NotFoundError
from tests.apiserver.handler import Handler
from tests.apiserver.resources import find_path
from tests.e2e.manifests import endpoint, endpoint_slice, service
from tests.e2e.real.api import NAMESPACES, NODES, Api, ApiError, object_path
from tests.e2e.real.execution import ExecutionError, Executor
from tests.e2e.real.load import RealLoad
from tests.e2e.real.objects import namespace

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
SUCCESS = json.dumps({"status": "Success"})


class Patching(Handler):
    """Server-side apply and merge patches of the top fields: as much as it takes to see what is sent."""

    def do_PATCH(self) -> None:  # noqa: N802 - the base class calls it that
        parts = urlsplit(self.path)
        found = find_path(parts.path)
        assert found is not None
        resource, own, name = found
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = f"{own}/{name}"
        if self.headers["Content-Type"] == "application/apply-patch+yaml":
            assert parse_qs(parts.query) == {"fieldManager": ["kproxy-e2e"], "force": ["true"]}
        try:
            kept = self.api.store.update(self.api.store.get(resource, key) | sent)
        except NotFoundError:
            kept = self.api.store.create(sent)
        self._answer(200, kept)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with ApiServer(tokens=["secret"]) as server:
        server.handler = Patching
        server.stop()
        server.start()
        yield Api(str(server.kubeconfig(tmp_path / "kubeconfig")))


def in_namespace(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"metadata": manifest["metadata"] | {"namespace": "test"}}


def test_objects_are_made_changed_listed_and_deleted(api: Api) -> None:
    assert api.create(NAMESPACES, namespace("test"))["metadata"]["name"] == "test"
    path = object_path("Service", "test", "web")
    assert api.find(path) is None
    for port in (80, 81):
        kept = api.apply(path, in_namespace(service("web", "IPv4", ports=[{"port": port}])))
        assert kept["spec"]["ports"] == [{"port": port}]
    by_hand = endpoint_slice("web", "IPv4", [endpoint("10.244.0.9", "worker")])
    api.apply(object_path("EndpointSlice", "test", "web-by-hand"), in_namespace(by_hand))
    assert [each["metadata"]["name"] for each in api.items(object_path("Service", "test"))] == ["web"]
    chosen = api.items(object_path("EndpointSlice", "test"), labelSelector="kubernetes.io/service-name=web")
    assert [each["metadata"]["name"] for each in chosen] == ["web-by-hand"]
    assert api.items(object_path("EndpointSlice", "test"), labelSelector="kubernetes.io/service-name=other") == []
    api.delete(path)
    api.delete(path, grace=1)
    assert api.find(path) is None


def test_what_the_server_says_of_an_error_is_told(api: Api) -> None:
    with pytest.raises(ApiError, match=r'GET /api/v1/nodes/nobody: 404 nodes "nobody" not found') as raised:
        api.get(f"{NODES}/nobody")
    assert raised.value.status == 404
    api.create(NAMESPACES, namespace("test"))
    with pytest.raises(ApiError, match="already exists"):
        api.create(NAMESPACES, namespace("test"))


class Kubelet:
    """A server of one WebSocket after the other, which says what the test wants said (RFC 6455)."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        self._threads: list[threading.Thread] = []

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def serve(self, talk: Callable[[Command], None]) -> None:
        thread = threading.Thread(target=self._serve, args=(talk,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, talk: Callable[[Command], None]) -> None:
        connection, _ = self._listener.accept()
        with connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            lines = head.decode().splitlines()
            self.requests.append(lines[0])
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            key = hashlib.sha1(headers["sec-websocket-key"].encode() + GUID).digest()
            answer = (
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Accept: {base64.b64encode(key).decode()}\r\n"
                "Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
            )
            connection.sendall(answer.encode())
            talk(Command(connection))


class Command:
    """A command's end of the WebSocket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def say(self, text: str, channel: int = 1) -> None:
        payload = bytes([channel]) + text.encode()
        self._connection.sendall(b"\x82" + bytes([126]) + struct.pack(">H", len(payload)) + payload)

    def end(self, status: str = SUCCESS) -> None:
        self.say(status, 3)
        self._connection.sendall(b"\x88\x02" + struct.pack(">H", 1000))

    def hear(self) -> str:
        """Return what comes on standard input: one masked frame of less than 126 bytes."""
        size = self._take(2)[1] & 0x7F
        mask = self._take(4)
        sent = bytes(byte ^ mask[number % 4] for number, byte in enumerate(self._take(size)))
        assert sent[0] == 0
        return sent[1:].decode()

    def _take(self, size: int) -> bytes:
        taken = b""
        while len(taken) < size:
            taken += self._connection.recv(size - len(taken))
        return taken


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    kubelet = Kubelet()
    yield kubelet
    kubelet.close()


@pytest.fixture
def executor(kubelet: Kubelet) -> Executor:
    configuration = Configuration()
    configuration.host = kubelet.url
    return Executor(configuration)


def test_a_script_is_run_in_bash_and_its_lines_come_back(kubelet: Kubelet, executor: Executor) -> None:
    def talk(command: Command) -> None:
        command.say("one\ntw")
        command.say("a complaint", 2)
        command.say("o\nlast")
        command.end()

    kubelet.serve(talk)
    assert executor.lines("test", "client", "echo $1", "word", 7) == ["one", "two", "last"]
    (request,) = kubelet.requests
    parts = urlsplit(request.split()[1])
    assert parts.path == "/api/v1/namespaces/test/pods/client/exec"
    assert parse_qs(parts.query)["command"] == ["bash", "-c", "echo $1", "bash", "word", "7"]


def test_a_script_that_fails_is_told_with_what_it_complained_of(kubelet: Kubelet, executor: Executor) -> None:
    def talk(command: Command) -> None:
        command.say("half")
        command.say("no such file", 2)
        command.end(json.dumps({"status": "Failure", "message": "exit code 1"}))

    kubelet.serve(talk)
    with pytest.raises(ExecutionError, match=r"test/client: cat x.*exit code 1; no such file"):
        executor.lines("test", "client", "cat x")


def test_a_script_that_is_cut_off_is_an_error_and_no_end(kubelet: Kubelet, executor: Executor) -> None:
    kubelet.serve(lambda command: command.say("one\n"))
    with pytest.raises(ExecutionError):
        executor.lines("test", "client", "cat")


def test_a_script_reads_what_is_written_to_it(kubelet: Kubelet, executor: Executor) -> None:
    def talk(command: Command) -> None:
        for _ in range(2):
            command.say(f"heard {command.hear()}")
        command.end()

    kubelet.serve(talk)
    execution = executor.start("test", "client", "cat", stdin=True)
    for word in ("one\n", "two\n"):
        execution.write(word)
        assert execution.line() == f"heard {word.strip()}"
    assert execution.line() is None


def test_a_load_is_over_when_its_script_has_told_all(kubelet: Kubelet, executor: Executor) -> None:
    stopped = threading.Event()

    def talk(command: Command) -> None:
        command.say("1\t0\tweb-0 0.001 \t\n")
        stopped.wait()
        command.say("2\t7\t\tfailed: Connection refused\nend 2\n")
        command.end()

    kubelet.serve(talk)
    with RealLoad(lambda: executor.start("test", "client", "cat"), stopped.set) as load:
        pass
    assert load.answers == 1
    (told,) = load.failures()
    assert "request 2" in told
    assert "refused" in told


def test_a_load_that_is_cut_off_has_failed(kubelet: Kubelet, executor: Executor) -> None:
    kubelet.serve(lambda command: command.say("1\t0\tweb-0 0.001 \t\n"))
    with RealLoad(lambda: executor.start("test", "client", "cat"), lambda: None) as load:
        pass
    told = " ".join(load.failures())
    assert "the load failed" in told
    assert "did not report its number" in told
