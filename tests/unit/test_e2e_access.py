"""The access of the end-to-end tests to a cluster: API requests over HTTP and commands over a WebSocket."""

from __future__ import annotations

import json
import socket
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
from tests.unit.websocket import CLOSE, STATUS, STDERR, STDOUT, SUCCESS, frame, handshake_headers, read_stdin


class PatchHandler(Handler):
    """A handler that also supports server-side apply and merge patches, but only of top-level fields."""

    def do_PATCH(self) -> None:  # noqa: N802 - the base class calls it that
        parts = urlsplit(self.path)
        parsed = find_path(parts.path)
        assert parsed is not None
        resource, own, name = parsed
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = f"{own}/{name}"
        if self.headers["Content-Type"] == "application/apply-patch+yaml":
            assert parse_qs(parts.query) == {"fieldManager": ["kproxy-e2e"], "force": ["true"]}
        try:
            stored = self.api.store.update(self.api.store.get(resource, key) | patch)
        except NotFoundError:
            stored = self.api.store.create(patch)
        self._answer(200, stored)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with ApiServer(tokens=["secret"]) as server:
        server.handler = PatchHandler
        server.stop()
        server.start()
        yield Api(str(server.kubeconfig(tmp_path / "kubeconfig")))


def in_namespace(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"metadata": manifest["metadata"] | {"namespace": "test"}}


def test_objects_are_created_changed_listed_and_deleted(api: Api) -> None:
    assert api.create(NAMESPACES, namespace("test"))["metadata"]["name"] == "test"
    path = object_path("Service", "test", "web")
    assert api.find(path) is None
    for port in (80, 81):
        stored = api.apply(path, in_namespace(service("web", "IPv4", ports=[{"port": port}])))
        assert stored["spec"]["ports"] == [{"port": port}]
    manifest = endpoint_slice("web", "IPv4", [endpoint("10.244.0.9", "worker")])
    api.apply(object_path("EndpointSlice", "test", "web-by-hand"), in_namespace(manifest))
    assert [item["metadata"]["name"] for item in api.items(object_path("Service", "test"))] == ["web"]
    selected = api.items(object_path("EndpointSlice", "test"), labelSelector="kubernetes.io/service-name=web")
    assert [item["metadata"]["name"] for item in selected] == ["web-by-hand"]
    assert api.items(object_path("EndpointSlice", "test"), labelSelector="kubernetes.io/service-name=other") == []
    api.delete(path)
    api.delete(path, grace=1)
    assert api.find(path) is None


def test_api_error_has_the_message_of_the_server(api: Api) -> None:
    with pytest.raises(ApiError, match=r'GET /api/v1/nodes/nobody: 404 nodes "nobody" not found') as raised:
        api.get(f"{NODES}/nobody")
    assert raised.value.status == 404
    api.create(NAMESPACES, namespace("test"))
    with pytest.raises(ApiError, match="already exists"):
        api.create(NAMESPACES, namespace("test"))


class Kubelet:
    """A WebSocket server for commands. Tests provide a function that plays the command."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        self._threads: list[threading.Thread] = []

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def serve(self, command: Callable[[Command], None]) -> None:
        """Accept one connection, in a thread, and run `command` on it."""
        thread = threading.Thread(target=self._serve, args=(command,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, command: Callable[[Command], None]) -> None:
        connection, _ = self._listener.accept()
        with connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            lines = head.decode().splitlines()
            self.requests.append(lines[0])
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            response = handshake_headers(headers["sec-websocket-key"])
            lines = ["HTTP/1.1 101 Switching Protocols", *(f"{name}: {value}" for name, value in response.items())]
            connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
            command(Command(connection))


class Command:
    """The command's side of a connection: its standard input, output and error, and its exit status."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, text: str, channel: int = STDOUT) -> None:
        self._connection.sendall(frame(channel, text.encode()))

    def exit(self, status: str = SUCCESS) -> None:
        self.write(status, STATUS)
        self._connection.sendall(CLOSE)

    def read(self) -> str:
        """Return the next input from the client."""
        data = read_stdin(self._receive)
        assert data is not None
        return data.decode()

    def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            received += self._connection.recv(size - len(received))
        return received


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


def test_script_is_run_in_bash_and_its_output_returned_by_line(kubelet: Kubelet, executor: Executor) -> None:
    def script(command: Command) -> None:
        command.write("one\ntw")
        command.write("a warning", STDERR)
        command.write("o\nlast")
        command.exit()

    kubelet.serve(script)
    assert executor.lines("test", "client", "echo $1", "word", 7) == ["one", "two", "last"]
    (request,) = kubelet.requests
    parts = urlsplit(request.split()[1])
    assert parts.path == "/api/v1/namespaces/test/pods/client/exec"
    assert parse_qs(parts.query)["command"] == ["bash", "-c", "echo $1", "bash", "word", "7"]


def test_failed_script_is_reported_with_its_stderr(kubelet: Kubelet, executor: Executor) -> None:
    def script(command: Command) -> None:
        command.write("half")
        command.write("no such file", STDERR)
        command.exit(json.dumps({"status": "Failure", "message": "exit code 1"}))

    kubelet.serve(script)
    with pytest.raises(ExecutionError, match=r"test/client: cat x.*exit code 1; no such file"):
        executor.lines("test", "client", "cat x")


def test_closed_connection_without_a_status_is_an_error(kubelet: Kubelet, executor: Executor) -> None:
    kubelet.serve(lambda command: command.write("one\n"))
    with pytest.raises(ExecutionError):
        executor.lines("test", "client", "cat")


def test_script_reads_standard_input(kubelet: Kubelet, executor: Executor) -> None:
    def script(command: Command) -> None:
        for _ in range(2):
            command.write(f"read {command.read()}")
        command.exit()

    kubelet.serve(script)
    execution = executor.start("test", "client", "cat", stdin=True)
    for word in ("one\n", "two\n"):
        execution.write(word)
        assert execution.line() == f"read {word.strip()}"
    assert execution.line() is None


def test_load_ends_with_the_last_line_of_its_script(kubelet: Kubelet, executor: Executor) -> None:
    stopped = threading.Event()

    def script(command: Command) -> None:
        command.write("1\t0\tweb-0 0.001 \t\n")
        stopped.wait()
        command.write("2\t7\t\tfailed: Connection refused\nend 2\n")
        command.exit()

    kubelet.serve(script)
    with RealLoad(lambda: executor.start("test", "client", "cat"), stopped.set) as load:
        pass
    assert load.answers == 1
    (failure,) = load.failures()
    assert "request 2" in failure
    assert "refused" in failure


def test_load_with_a_lost_connection_has_failed(kubelet: Kubelet, executor: Executor) -> None:
    kubelet.serve(lambda command: command.write("1\t0\tweb-0 0.001 \t\n"))
    with RealLoad(lambda: executor.start("test", "client", "cat"), lambda: None) as load:
        pass
    failures = " ".join(load.failures())
    assert "the load failed after" in failures
    assert "did not report its number of requests" in failures
