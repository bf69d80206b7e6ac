"""The end-to-end tests' cluster on a fake API server, which stores objects and runs commands as local processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.e2e.cluster import Answer
from tests.e2e.manifests import labels, service, url
from tests.e2e.real import RealClusters
from tests.e2e.real.cluster import RealCluster
from tests.unit.test_e2e_scripts import Netexec
from tests.unit.websocket import CLOSE, STATUS, STDOUT, SUCCESS, frame, handshake_headers, read_stdin

CORE = "/api/v1/namespaces"
READY = [{"type": "Ready", "status": "True"}]


class Server(ThreadingHTTPServer):
    """An API server with objects by path. Pods are ready at once, with a loopback address; commands run locally."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        addresses = [{"type": "InternalIP", "address": "127.0.0.1"}]
        node = {"metadata": {"name": "worker"}, "spec": {}, "status": {"conditions": READY, "addresses": addresses}}
        self.objects: dict[str, Any] = {
            "/api/v1/nodes/worker": node,
            "/apis/apps/v1/namespaces/kube-system/daemonsets/kproxy": {
                "spec": {"selector": {"matchLabels": {"app": "kproxy"}}}
            },
        }
        self.requests: list[tuple[str, str]] = []

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        name = body["metadata"]["name"]
        self.objects[f"{path}/{name}"] = body
        if path == CORE:
            self.objects[f"{CORE}/{name}/serviceaccounts/default"] = {}
        if body["kind"] == "Pod":
            body["status"] = {"conditions": READY, "podIPs": [{"ip": "127.0.0.1"}]}
        return body

    def below(self, path: str) -> list[dict[str, Any]]:
        return [item for key, item in list(self.objects.items()) if key.rpartition("/")[0] == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it that
        pass

    def do_GET(self) -> None:
        path, query = self._record_request()
        if self.headers.get("Upgrade"):
            self._execute(query["command"])
        elif path in self.server.objects:
            self._answer(200, self.server.objects[path])
        elif path.rpartition("/")[2] in {"nodes", "pods", "services", "endpointslices", "events"}:
            self._answer(200, {"items": self.server.below(path)})
        else:
            self._answer(404, {"message": f"no {path}"})

    def do_POST(self) -> None:
        path, query = self._record_request()
        body = self._body()
        if "dryRun" in query:
            self._answer(201, body | {"spec": {"ipFamilies": ["IPv4"]}})
        else:
            self._answer(201, self.server.create(path, body))

    def do_PATCH(self) -> None:
        path, _ = self._record_request()
        body = self._body()
        stored = self.server.objects.setdefault(path.removesuffix("/status"), {})
        stored |= body
        self._answer(200, stored)

    def do_DELETE(self) -> None:
        path, _ = self._record_request()
        for key in list(self.server.objects):
            if key == path or key.startswith(f"{path}/"):
                del self.server.objects[key]
        self._answer(200, {})

    def _record_request(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        self.server.requests.append((self.command, parts.path))
        return parts.path, parse_qs(parts.query)

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return body

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _execute(self, command: list[str]) -> None:
        self.send_response(101)
        for name, value in handshake_headers(self.headers["Sec-WebSocket-Key"]).items():
            self.send_header(name, value)
        self.end_headers()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            reader = threading.Thread(target=self._feed, args=(process,), daemon=True)
            reader.start()
            for line in process.stdout:
                self.wfile.write(frame(STDOUT, line))
        self.wfile.write(frame(STATUS, SUCCESS.encode()) + CLOSE)
        reader.join()
        self.close_connection = True

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        """Pass standard input to the process until the client closes the connection."""
        stdin = process.stdin
        assert stdin is not None
        while (data := read_stdin(self.rfile.read)) is not None:
            stdin.write(data)
            stdin.flush()
        if process.poll() is None:
            process.terminate()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Iterator[RealCluster]:
    """The cluster of one test. Checks at the end that the test has deleted all its objects."""
    before = set(server.objects)
    address = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "clusters": [{"name": "test", "cluster": address}],
                "users": [{"name": "test", "user": {}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "current-context": "test",
            }
        )
    )
    with RealClusters(str(kubeconfig), "image", "kproxy") as clusters, clusters.test("name") as cluster:
        yield cluster
    assert set(server.objects) == before


@pytest.fixture
def netexec() -> Iterator[Netexec]:
    if shutil.which("curl") is None:
        pytest.skip("curl not found")
    pod = Netexec("127.0.0.1")
    yield pod
    pod.close()


def test_capabilities_of_the_cluster(cluster: RealCluster) -> None:
    assert cluster.families == ["IPv4"]
    assert [node.name for node in cluster.nodes] == ["worker"]
    assert cluster.lacks("IPv4") == ""
    assert cluster.lacks("IPv6") == "Services get no IPv6 addresses, only IPv4"
    assert cluster.lacks("outside over IPv6") == cluster.lacks("IPv6")
    assert cluster.lacks("two nodes") == "worker is the only schedulable node"
    assert cluster.lacks("outside").startswith("node worker: ")
    assert "k8s-app=kube-dns" in cluster.lacks("DNS")
    assert "no DaemonSet kube-system/kube-proxy" in cluster.lacks("kube-proxy")
    assert cluster.lacks("load balancer address") == ""
    assert cluster.lacks("SCTP") != ""


def test_requests_of_each_kind(cluster: RealCluster, netexec: Netexec) -> None:
    client = cluster.pod("client", "worker")
    answer = Answer("web-0", "127.0.0.1")
    assert cluster.request(client, "127.0.0.1", netexec.port, times=2) == [answer] * 2
    assert cluster.request(client, "127.0.0.1", netexec.udp_port, "UDP") == [answer]
    assert cluster.request_from_outside("127.0.0.1", netexec.port) == [answer]
    netexec.clients.clear()
    for _ in range(2):
        assert cluster.request_from_one_socket(client, "127.0.0.1", netexec.udp_port, times=2) == [answer] * 2
    assert len(netexec.clients) == 8
    assert len(set(netexec.clients)) == 1
    assert cluster.get_from_pod(client, url("127.0.0.1", netexec.port, "/hostname")) == (200, "web-0")
    assert cluster.get_from_node("worker", url("127.0.0.1", netexec.port, "/unhealthy"))[0] == 503


def test_objects_are_created_in_the_namespace_of_the_test(cluster: RealCluster, server: Server) -> None:
    created = cluster.apply(service("web", "IPv4", type="LoadBalancer"))
    namespace = created["metadata"]["namespace"]
    assert f"{CORE}/{namespace}/services/web" in server.objects
    cluster.set_load_balancer_ip("web", "203.0.113.1", "Proxy")
    (ingress,) = cluster.get("Service", "web")["status"]["loadBalancer"]["ingress"]
    assert ingress == {"ip": "203.0.113.1", "ipMode": "Proxy"}
    assert ("PATCH", f"{CORE}/{namespace}/services/web/status") in server.requests
    pods = cluster.pods("web", "worker", labels("web"), 2)
    assert [pod.name for pod in pods] == ["web-0", "web-1"]
    diagnosis = cluster.diagnose()
    assert "web-1 on worker" in diagnosis
    assert "203.0.113.1" in diagnosis
    cluster.delete_pod(pods[0])
    cluster.delete("Service", "web")
    assert f"{CORE}/{namespace}/pods/web-0" not in server.objects
    assert f"{CORE}/{namespace}/services/web" not in server.objects


def test_load_runs_until_its_block_ends(cluster: RealCluster, netexec: Netexec) -> None:
    client = cluster.pod("client", "worker")
    with cluster.load(client, "127.0.0.1", netexec.port) as load:
        while load.answers < 10 and not load.failures():
            pass
    assert load.answers >= 10
    assert load.failures() == []
