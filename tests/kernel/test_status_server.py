"""The status server on the recorded node: its addresses and ports, and the kernel's counters."""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

import pytest

from kproxy.app.family_contexts import make_context
from kproxy.config.load import load_config
from kproxy.config.types import Config
from kproxy.host.nfacct import ensure_counters, read_counter
from kproxy.model.plan import plan_service
from kproxy.model.types import Family
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED
from kproxy.serve.status_server import StatusServer
from tests.lab.namespace import HANG_GUARD, Namespace
from tests.lab.waiting import wait_until
from tests.recordings import GOLDEN, store
from tests.reports import succeeded

ADDRESSES = ("10.99.0.2", "fd00:99::2", "127.0.0.1", "::1")
RECORDED = sorted(GOLDEN.glob("*/healthcheck-*.txt"))


def configured(scenario: str) -> Config:
    path = GOLDEN / scenario / "config.json"
    return load_config(path.read_bytes(), str(path))[0]


class Daemon:
    """The status server of a daemon on the node after the first sync of a recorded cluster."""

    def __init__(self, node: Namespace, scenario: str, **options: Any) -> None:
        self._node = node
        config, cluster = configured(scenario), store(scenario)
        self.failures: list[tuple[str, int, str]] = []
        self.serving = StatusServer(
            Family,
            **{
                "mode": config.mode,
                "configuration": {},
                "healthz_address": config.healthz_bind_address,
                "metrics_address": config.metrics_bind_address,
                "hard_fail": True,
                "health_timeout": 2 * config.backend.sync_period,
                "node": lambda: cluster.node,
                "counters": {},
                "on_port_failed": lambda *failure: self.failures.append(failure),
                "clock": monotonic,
                "wall": time_ns,
                **options,
            },
        )
        node.call(self.serving.start)  # its thread and sockets stay in the namespace
        services = [service for key in cluster.service_keys() if (service := cluster.service(key))]
        for family in Family:
            context = make_context(
                config, family, "node-1", cluster.node, ADDRESSES, accounting=True, random_fully=True
            )
            plans = {each.key: plan_service(each, cluster.slices(each.key), context) for each in services}
            report = succeeded(family, plans, context=context, started=monotonic(), finished=monotonic())
            for listener in self.serving.on_sync:
                listener(report)

    def get(self, host: str, port: int, path: str = "/") -> tuple[HTTPResponse, bytes]:
        client = self._node.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(HANG_GUARD)
        connection = HTTPConnection(host, port)
        try:
            client.connect((host, port))
            connection.sock = client
            connection.request("GET", path)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()
            client.close()

    def answers(self, port: int) -> set[str]:
        """Return the node's addresses on which the port is open."""
        found = set()
        for host in ADDRESSES:
            try:
                self.get(host, port)
            except ConnectionRefusedError:
                continue
            found.add(host)
        return found


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_health_check_ports_answer_like_kube_proxy(node: Namespace, path: Path) -> None:
    daemon = Daemon(node, path.parent.name)
    port = int(path.stem.rpartition("-")[2])
    wait_until(lambda: "10.99.0.2" in daemon.answers(port), "an open port")
    response, body = daemon.get("10.99.0.2", port)
    head, _, recorded_body = path.read_bytes().decode().replace("\r\n", "\n").partition("\n\n")
    status, *headers = head.split("\n")
    assert body.decode() == recorded_body
    assert f"HTTP/1.1 {response.status} {response.reason}" == status
    recorded = [header for header in headers if not header.startswith("Date:")]
    assert [f"{name}: {value}" for name, value in response.getheaders() if name != "Date"] == recorded
    assert daemon.failures == []
    daemon.serving.stop(HANG_GUARD)


@pytest.mark.parametrize(
    ("scenario", "port", "hosts"),
    [
        ("loadbalancer-local-healthcheck", 32100, set(ADDRESSES)),
        ("config-nodeport-addresses", 32101, {"10.99.0.2"}),
        ("config-nodeport-primary", 32101, {"10.99.0.2"}),
    ],
)
def test_health_check_ports_listen_on_node_port_addresses(
    node: Namespace, scenario: str, port: int, hosts: set[str]
) -> None:
    daemon = Daemon(node, scenario)
    wait_until(lambda: daemon.answers(port), "an open port")
    assert daemon.answers(port) == hosts
    daemon.serving.stop(HANG_GUARD)


def test_healthz_and_metrics_ports(node: Namespace) -> None:
    daemon = Daemon(node, "clusterip")
    assert daemon.answers(10256) == set(ADDRESSES)
    assert daemon.answers(10249) == {"127.0.0.1"}
    response, body = daemon.get("fd00:99::2", 10256, "/healthz")
    assert (response.status, json.loads(body)["nodeEligible"]) == (200, True)
    assert daemon.get("127.0.0.1", 10249, "/metrics")[1].count(b'kubeproxy_proxy_healthz_total{code="200"} 1.0') == 1
    daemon.serving.stop(HANG_GUARD)
    assert daemon.answers(10256) == daemon.answers(10249) == set()


def test_kernel_counters_are_exported(node: Namespace) -> None:
    assert node.call(lambda: read_counter("dropped")) is None
    node.call(lambda: ensure_counters(("dropped", "dropped-too")))
    node.run(["iptables", "-A", "OUTPUT", "-p", "udp", "-m", "nfacct", "--nfacct-name", "dropped"])
    counters = {INVALID_DROPPED: lambda: read_counter("dropped"), LOCALHOST_ACCEPTED: lambda: read_counter("none")}
    daemon = Daemon(node, "clusterip", counters=counters)
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(3):
            client.sendto(b"x", ("127.0.0.1", 9))
    page = daemon.get("127.0.0.1", 10249, "/metrics")[1].decode()
    assert f"\n{INVALID_DROPPED[0]} 3.0\n" in page
    assert LOCALHOST_ACCEPTED[0] not in page
    assert node.call(lambda: read_counter("dropped-too")) == 0
    daemon.serving.stop(HANG_GUARD)
