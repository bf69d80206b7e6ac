"""`kproxy doctor` asks the API server: what it answers, and what happens if it does not."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kproxy.diagnose import api_facts
from kproxy.diagnose.api_facts import ApiInquiry
from kproxy.diagnose.facts import ApiFacts, NodeObject
from tests.api.conftest import Cluster
from tests.apiserver import ApiServer
from tests.lab.objects import service


def ask_server(kubeconfig: str | None, server: str | None = None) -> ApiFacts:
    """Ask about `node-1`, which is a machine with two addresses."""
    inquiry = ApiInquiry(kubeconfig, server, "node-1", ("192.0.2.11", "127.0.0.1"))
    inquiry.start()
    return inquiry.result()


def node(name: str, *addresses: str) -> dict[str, Any]:
    found = [{"type": "InternalIP", "address": address} for address in addresses]
    found.append({"type": "ExternalIP", "address": "198.51.100.1"})
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": found},
    }


@pytest.fixture
def ask(server: ApiServer, tmp_path: Path) -> Any:
    """Ask the test server about `node-1`."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    return lambda: ask_server(str(kubeconfig))


def test_facts_of_a_sound_cluster(cluster: Cluster, tmp_path: Path) -> None:
    cluster.create(node("node-1", "192.0.2.11"))
    if isinstance(cluster, ApiServer):  # a real server maintains this Service itself
        cluster.create(service("kubernetes", "10.96.0.1", namespace="default"))
    kubeconfig = str(cluster.kubeconfig(tmp_path / "kubeconfig"))
    facts = ask_server(kubeconfig)
    assert (facts.source, facts.answered, facts.problem, facts.denied, facts.failed) == (kubeconfig, True, "", (), ())
    assert facts.host == "127.0.0.1"
    assert facts.server.endswith(f"127.0.0.1:{cluster.address[1]}")
    assert facts.clock_offset is not None
    assert abs(facts.clock_offset) < 60
    assert facts.node == NodeObject(name="node-1", addresses=("192.0.2.11",), pod_cidrs=("10.244.1.0/24",))
    assert facts.kubernetes_ips


def test_missing_node_is_searched_by_its_address(server: ApiServer, ask: Any) -> None:
    server.create(node("node-1.example.com", "192.0.2.11"))
    server.create(node("node-2.example.com", "192.0.2.12"))
    facts = ask()
    assert facts.node_missing
    assert facts.node is None
    assert facts.similar == ("node-1.example.com",)


def test_rejected_credentials(server: ApiServer, tmp_path: Path) -> None:
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig", token="wrong")
    facts = ask_server(str(kubeconfig))
    assert facts.answered
    assert facts.denied == ("list nodes: 401", "list services: 401", "list endpointslices.discovery.k8s.io: 401")
    assert facts.node is None
    assert not facts.node_missing


def test_forbidden_resource(server: ApiServer, ask: Any) -> None:
    server.create(node("node-1", "192.0.2.11"))
    server.fail_requests(403, matches=lambda path, _: "endpointslices" in path)
    assert ask().denied == ("list endpointslices.discovery.k8s.io: 403",)


def test_failing_server(server: ApiServer, ask: Any) -> None:
    server.fail_requests(500, times=10)
    facts = ask()
    assert facts.answered
    assert facts.failed[0] == "list nodes: 500"


def test_refused_connection(server: ApiServer, ask: Any) -> None:
    server.stop()
    facts = ask()
    assert (facts.answered, facts.problem) == (False, "Connection refused")


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections but never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_silent_server_costs_at_most_the_deadline(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_facts, "DEADLINE_SECONDS", 0.2)
    facts = ask_server(None, f"http://127.0.0.1:{silent}")
    assert (facts.answered, facts.problem, facts.slow) == (False, "no answer within 0.2 s", True)


def test_broken_kubeconfig(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps({"clusters": 5}))
    facts = ask_server(str(path))
    assert not facts.answered
    assert facts.problem.startswith(str(path))


def test_nothing_is_asked_without_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert ask_server(None) == ApiFacts()


def test_environment_of_a_pod_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    facts = ask_server(None)
    assert facts.in_cluster
    assert "service account" in facts.source
    assert facts.host == "10.96.0.1"
    assert facts.problem  # there is no token here


def test_unexpected_answers_are_a_problem_of_the_server(server: ApiServer, ask: Any) -> None:
    server.create(node("node-1") | {"status": {"addresses": 5}})
    facts = ask()
    assert not facts.answered
    assert facts.problem.startswith("unexpected answer: ")
