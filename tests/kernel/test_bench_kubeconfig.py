"""`--kubeconfig` of the benchmark: its objects are created in a real API server, and deleted at the end.

The tests' API server stands in for the real one. It requires a token, runs outside of the benchmark's network
namespaces, and allocates cluster IPs.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.apiserver import ApiServer
from tests.apiserver.resources import ENDPOINT_SLICES, NODES, RESOURCES
from tests.apiserver.store import Store
from tests.bench.figures import Results
from tests.bench.throughput import missing

CHECKOUT = Path(__file__).parents[2]


class AllocatingStore(Store):
    """Allocates cluster IPs."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = count(1)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        body = copy.deepcopy(body)
        if body["kind"] == "Service":
            assert "clusterIP" not in body["spec"]
            number = next(self._numbers)
            body["spec"] |= {"clusterIP": f"10.96.{number >> 8}.{number & 255}"}
            body["spec"]["clusterIPs"] = [body["spec"]["clusterIP"]]
        return super().create(body)

    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["kind"] != "Service"
        return super().update(body)


@pytest.fixture
def server(kernel: None) -> Iterator[ApiServer]:
    """An API server in the network namespace of this process."""
    if reason := missing():
        pytest.skip(reason)
    server = ApiServer(tokens=["secret"])
    server.store = AllocatingStore()
    with server:
        yield server


def run(folder: Path, kubeconfig: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = [f"--json={folder / 'bench.json'}", f"--chart={folder / 'bench.svg'}"]
    argv = [sys.executable, "-m", "tests.bench", "--size=tiny", "--modes=nftables", *files, *arguments]
    return subprocess.run(
        [*argv, f"--kubeconfig={kubeconfig}"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )


def remaining(server: ApiServer) -> list[str]:
    return [key for resource in RESOURCES if resource.kind != "Event" for key in server.store.keys(resource)]


def test_objects_of_a_real_server_are_created_changed_and_deleted(server: ApiServer, tmp_path: Path) -> None:
    done = run(tmp_path, server.kubeconfig(tmp_path / "kubeconfig"))
    assert done.returncode == 0, done.stdout + done.stderr
    results = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=Results)
    names = {figure.name: figure for figure in results.runs[-1].figures}
    assert {"first sync", "one endpoint", "new Service", "RSS at peak", "throughput to a VIP"} <= names.keys()
    assert "burst" not in names
    assert all(figure.measured.value > 0 for figure in names.values())
    assert remaining(server) == []
    written = [request for request in server.requests.all() if request.method in {"POST", "PUT"}]
    paths = {request.path.split("/kproxy-bench-")[0] for request in written if "events" not in request.path}
    assert paths == {
        "/api/v1/namespaces",  # the Namespace, and Services in it
        NODES.path,
        f"{ENDPOINT_SLICES.root}/namespaces",
    }


def test_rejected_object_is_an_error_in_one_line_and_leaves_nothing(server: ApiServer, tmp_path: Path) -> None:
    server.fail_requests(403, matches=lambda path, query: path.endswith("/endpointslices") and "watch" not in query)
    done = run(tmp_path, server.kubeconfig(tmp_path / "kubeconfig"))
    assert done.returncode == 1
    assert done.stderr.startswith("--kubeconfig: POST /apis/discovery.k8s.io/v1/namespaces/kproxy-bench-")
    assert "the API server returned 403" in done.stderr
    assert done.stderr.count("\n") == 1
    assert remaining(server) == []


def test_missing_kubeconfig_is_an_error_in_one_line(kernel: None, tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path / "missing")
    assert done.returncode == 1
    assert done.stderr.startswith("--kubeconfig: ")
    assert done.stderr.count("\n") == 1
