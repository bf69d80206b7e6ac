"""The scripts that the end-to-end tests run in pods, run here in bash against a server on loopback."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.cluster import Answer, Failure
from tests.e2e.manifests import url
from tests.e2e.real import outside, scripts
from tests.e2e.real.load import ScriptResults

LOOPBACK = {"IPv4": "127.0.0.1", "IPv6": "::1"}


class Netexec:
    """A server that answers like `agnhost netexec` in a pod named `web-0`. Over UDP it answers while `answers_udp`."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = type("Server", (ThreadingHTTPServer,), {"address_family": family, "daemon_threads": True})
        self._http = server((address, 0), Handler)
        self.port: int = self._http.server_address[1]
        self.answers_udp = threading.Event()
        self.answers_udp.set()
        self.udp = socket.socket(family, socket.SOCK_DGRAM)
        self.udp.bind((address, 0))
        self.udp_port: int = self.udp.getsockname()[1]
        self.clients: list[int] = []
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self._echo = threading.Thread(target=self._answer_datagrams, daemon=True)
        self._echo.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.udp.sendto(b"end", self.udp.getsockname())
        self._echo.join()
        self.udp.close()

    def _answer_datagrams(self) -> None:
        while (received := self.udp.recvfrom(2048))[0] != b"end":
            command, client = received
            self.clients.append(client[1])
            host = f"[{client[0]}]" if ":" in client[0] else client[0]
            answer = b"web-0" if command == b"hostname" else f"{host}:{client[1]}".encode()
            if self.answers_udp.is_set():
                self.udp.sendto(answer, client)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host = f"[{self.client_address[0]}]" if ":" in self.client_address[0] else self.client_address[0]
        answer = "web-0" if self.path == "/hostname" else f"{host}:{self.client_address[1]}"
        self.send_response(503 if self.path == "/unhealthy" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it that
        pass


@pytest.fixture(autouse=True)
def _tools() -> None:
    missing = [name for name in ("bash", "curl", "dd", "timeout") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found")


@pytest.fixture(params=["IPv4", "IPv6"])
def address(request: pytest.FixtureRequest) -> str:
    return LOOPBACK[request.param]


@pytest.fixture
def pod(address: str) -> Iterator[Netexec]:
    pod = Netexec(address)
    yield pod
    pod.close()


def run(script: str, *arguments: object) -> list[str]:
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def closed_port(address: str, kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as bound:
        bound.bind((address, 0))
        return int(bound.getsockname()[1])


def test_tcp_answer_has_the_pod_and_the_client_address(address: str, pod: Netexec) -> None:
    lines = run(scripts.REQUEST_TCP, url(address, pod.port, ""), 3)
    assert [scripts.outcome(line) for line in lines] == [Answer("web-0", address)] * 3


def test_refused_connection_is_recognized(address: str) -> None:
    port = closed_port(address, socket.SOCK_STREAM)
    (line,) = run(scripts.REQUEST_TCP, url(address, port, ""), 1)
    outcome = scripts.outcome(line)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "refused"


def test_answer_over_two_connections_is_a_failure(address: str) -> None:
    """The second connection may reach another pod, so the client address and the name may be of different pods."""
    outcome = scripts.outcome(f"0\tweb-0 1 {address}:4000 1 \t")
    assert isinstance(outcome, Failure)
    assert outcome.kind == "other"


def test_udp_requests_use_different_source_ports(address: str, pod: Netexec) -> None:
    lines = run(scripts.REQUEST_UDP, address, pod.udp_port, 3)
    assert [scripts.outcome(line) for line in lines] == [Answer("web-0", address)] * 3
    assert len(pod.clients) == 6
    assert len(set(pod.clients)) > 1


def test_rejected_datagram_is_recognized(address: str) -> None:
    (line,) = run(scripts.REQUEST_UDP, address, closed_port(address, socket.SOCK_DGRAM), 1)
    outcome = scripts.outcome(line)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "refused"


def test_unanswered_datagram_is_recognized(pod: Netexec, address: str) -> None:
    pod.answers_udp.clear()
    (line,) = run(scripts.REQUEST_UDP, address, pod.udp_port, 1)
    outcome = scripts.outcome(line)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "no answer"


def test_requests_from_one_socket_use_one_source_port(address: str, pod: Netexec) -> None:
    command = ["bash", "-c", scripts.REQUEST_FROM_ONE_SOCKET, "bash", address, str(pod.udp_port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            process.stdin.write("again\n")
            process.stdin.flush()
            assert scripts.outcome(process.stdout.readline().rstrip("\n")) == Answer("web-0", address)
        process.stdin.close()
    assert len(pod.clients) == 6
    assert len(set(pod.clients)) == 1


@pytest.mark.parametrize("code", ["124", "143"])
def test_exit_codes_are_classified(code: str) -> None:
    assert scripts.failure(int(code), "", "").kind == "no answer"
    assert scripts.failure(28, "", "").kind == "no answer"
    assert scripts.failure(7, "", "failed: No route to host").kind == "other"
    assert scripts.failure(7, "", "").kind == "refused"


def test_load_counts_every_request_until_its_stop_file_exists(address: str, pod: Netexec, tmp_path: Path) -> None:
    end = tmp_path / "end"
    tally = ScriptResults()
    command = ["bash", "-c", scripts.LOAD, "bash", url(address, pod.port, ""), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tally.add(line.rstrip("\n"))
            if tally.answers == 5:
                end.touch()
    assert tally.ended
    assert tally.answers >= 5
    assert tally.failures() == []


def test_load_reports_failures(address: str, tmp_path: Path) -> None:
    end, tally = tmp_path / "end", ScriptResults()
    command = ["bash", "-c", scripts.LOAD, "bash", url(address, closed_port(address, socket.SOCK_STREAM), ""), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tally.add(line.rstrip("\n"))
            end.touch()
    assert tally.ended
    assert tally.answers == 0
    assert "refused" in tally.failures()[0]


def test_missing_lines_and_lost_packets_are_failures() -> None:
    tally = ScriptResults()
    for line in ("1\t0\tweb-0 0.001 \t", "3\t0\tweb-0 0.001 \t", "4\t0\tweb-0 1.02 \t", "end 4"):
        tally.add(line)
    failures = tally.failures()
    assert len(failures) == 4
    assert "result 2 is for request 3" in failures[0]
    assert "packet was lost" in failures[2]
    assert "4 requests were sent, but 3 results were received" in failures[3]


def test_get_returns_status_and_body_or_raises_connection_error(address: str, pod: Netexec) -> None:
    for path, expected in (("/hostname", (200, "web-0")), ("/unhealthy", 503)):
        command = ["bash", "-c", scripts.GET, "bash", url(address, pod.port, path)]
        printed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
        received = scripts.status_and_body(printed)
        assert received == expected if isinstance(expected, tuple) else received[0] == expected
    with pytest.raises(ConnectionError):
        scripts.status_and_body("\n000")


def test_requests_from_outside_have_the_same_outcomes(address: str, pod: Netexec) -> None:
    assert outside.send_request(address, pod.port, "TCP") == Answer("web-0", address)
    assert outside.send_request(address, pod.udp_port, "UDP") == Answer("web-0", address)
    for kind, protocol in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
        outcome = outside.send_request(address, closed_port(address, kind), protocol)
        assert isinstance(outcome, Failure)
        assert outcome.kind == "refused"


def kill_in(groups: dict[int, str], container: str) -> list[str]:
    """Run the kill script with a /proc that has only the control groups of some processes; return what it killed."""
    files = "; ".join(f"mkdir /proc/{pid}; echo '0::{group}' >/proc/{pid}/cgroup" for pid, group in groups.items())
    script = f"mount -t tmpfs none /proc; {files}; {scripts.KILL}"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", container], check=False, capture_output=True, text=True
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip(f"cannot create a mount namespace: {done.stderr.strip()}")
    return done.stdout.split()


def test_only_processes_of_the_container_are_killed() -> None:
    container = "0123456789abcdef"
    with subprocess.Popen(["sleep", "inf"]) as inside, subprocess.Popen(["sleep", "inf"]) as other:
        try:
            groups = {
                inside.pid: f"/kubepods.slice/cri-containerd-{container}.scope",
                other.pid: "/kubepods.slice/cri-containerd-fedcba9876543210.scope",
            }
            assert kill_in(groups, container) == [str(inside.pid)]
            assert inside.wait() == -signal.SIGKILL
            assert other.poll() is None
            assert kill_in({other.pid: groups[other.pid]}, container) == []
        finally:
            inside.kill()
            other.kill()


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [("10.0.0.1:80", "10.0.0.1"), ("[fd00::1]:80", "fd00::1"), ("[::ffff:10.0.0.1]:80", "10.0.0.1")],
)
def test_host_of_an_endpoint(endpoint: str, host: str) -> None:
    assert scripts.host_of(endpoint) == host
