"""kproxy without a mode uses iptables, and says that the default will change (KEP-5343)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import ApiServer
from tests.apiserver.resources import EVENTS
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN

OBJECTS = f"--objects={GOLDEN}/clusterip"
FLAGS = ("--hostname-override=node-1", "--conntrack-max-per-core=0", "--conntrack-min=0")
WARNING = (
    "mode is not set: using iptables; the default becomes nftables in Kubernetes 1.40 (KEP-5343): "
    "set mode (--proxy-mode) to iptables to keep it, or to nftables"
)


@pytest.fixture
def server(node: Namespace) -> Iterator[ApiServer]:
    """An API server with a Node, in the network namespace of the node."""
    found = node.call(lambda: ApiServer(tokens=["secret"]).__enter__())
    status = {"addresses": [{"type": "InternalIP", "address": "10.99.0.2"}]}
    found.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}, "status": status})
    yield found
    found.stop()


@pytest.mark.parametrize(
    ("text", "flags", "warned"),
    [("", (), True), ('mode: ""', (), True), ("mode: iptables", (), False), ("", ("--proxy-mode=iptables",), False)],
    ids=["absent", "empty", "in the file", "flag"],
)
def test_daemon_without_a_mode_warns_once_and_records_one_event(
    node: Namespace, server: ApiServer, tmp_path: Path, *, text: str, flags: tuple[str, ...], warned: bool
) -> None:
    config, log = tmp_path / "config.yaml", tmp_path / "log"
    config.write_text(f"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{text}\n")
    kubeconfig = f"--kubeconfig={server.kubeconfig(tmp_path / 'kubeconfig')}"
    with log.open("w") as output:
        process = node.popen([KPROXY, "run", f"--config={config}", kubeconfig, *FLAGS, *flags], output)
    try:
        expected = ["Starting", "ProxyModeNotSet"] if warned else ["Starting"]
        wait_until(
            lambda: process.poll() is None and len(events(server)) >= len(expected) and has_synced(log),
            "kproxy has synced and recorded its events",
        )
        mode = node.run(["curl", "--silent", "--fail", "http://127.0.0.1:10249/proxyMode"]).stdout
    finally:
        process.terminate()
        process.wait(HANG_GUARD)
    found = events(server)
    assert sorted(each["reason"] for each in found) == sorted(expected)
    assert [each["note"] for each in found if each["reason"] == "ProxyModeNotSet"] == [WARNING] * warned
    assert all(each["regarding"]["kind"] == "Node" for each in found)
    assert [line.partition("] ")[2] for line in log.read_text().splitlines() if line.startswith("W")].count(
        WARNING
    ) == warned
    assert mode == "iptables"
    assert "KUBE-SERVICES" in node.run(["iptables-save"]).stdout


def test_apply_without_a_mode_warns(node: Namespace) -> None:
    done = node.run([KPROXY, "apply", OBJECTS, *FLAGS])
    assert done.stderr.count(WARNING) == 1
    assert "KUBE-SERVICES" in node.run(["iptables-save"]).stdout
    assert WARNING not in node.run([KPROXY, "apply", OBJECTS, "--proxy-mode=iptables", *FLAGS]).stderr


def events(server: ApiServer) -> list[dict[str, Any]]:
    """Return the Events that kproxy has created."""
    return [server.store.get(EVENTS, key) for key in server.store.keys(EVENTS)]


def has_synced(log: Path) -> bool:
    return " synced " in log.read_text()
