"""Switching a node between kproxy's modes: no connection fails, and no rule of the previous mode remains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.cluster import SERVICES, LabCluster
from tests.lab.connection_stream import ConnectionStream
from tests.lab.modes import mode_flag, no_rules_of_other_mode, rules_of
from tests.lab.proxy import Daemon
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until

PODS = 5
OTHER = {"iptables": "nftables", "nftables": "iptables"}
FIREWALL = "KUBE-FIREWALL"
ROUNDS = 2

pytestmark = pytest.mark.usefixtures("nft")


@pytest.mark.parametrize("first", OTHER)
def test_no_connection_fails_during_mode_switches(lab: Lab, servers: Servers, tmp_path: Path, first: str) -> None:
    cluster = LabCluster(lab, servers, tmp_path / "objects", pods=PODS)
    for service in range(SERVICES):
        for number in range(PODS):
            cluster.start(service, number)
        cluster.write(service, range(PODS))
    node = lab.node.namespace
    modes = [first, OTHER[first]] * ROUNDS
    first_rules: dict[str, str] = {}

    def daemon(mode: str) -> Daemon:
        return Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag(mode))

    with daemon(first) as running:
        running.wait_until_synced()
    with ConnectionStream(cluster.targets()) as stream:
        stream.take()
        for mode in modes:
            stream.mark(f"start in {mode} mode")
            with daemon(mode) as running:
                running.wait_until_synced()
                wait_until(lambda: no_rules_of_other_mode(node, mode), f"no rules of {OTHER[mode]} mode")  # noqa: B023 - called at once
                stream.mark(f"only rules of {mode} mode")
                stream.take()
                rules = rules_of(mode, node)
                assert rules.destinations() == cluster.sockets((s, n) for s in range(SERVICES) for n in range(PODS))
                text = without_jumps_to_firewall(rules.text())
                assert text == first_rules.setdefault(mode, text), "the rules differ from those of the first round"
                stream.mark(f"SIGTERM in {mode} mode")
                assert running.terminate() == 0
            stream.take()
    assert stream.failure_report() == ""


def without_jumps_to_firewall(text: str) -> str:
    """Drop the jumps to KUBE-FIREWALL. They are never removed, so their position among the other rules varies."""
    return "\n".join(line for line in text.splitlines() if not line.endswith(f"-j {FIREWALL}"))


def test_firewall_chain_keeps_all_its_rules(lab: Lab, servers: Servers, tmp_path: Path) -> None:
    cluster = LabCluster(lab, servers, tmp_path / "objects", pods=1)
    cluster.start(0, 0)
    cluster.write(0, [0])
    node = lab.node.namespace

    def firewall() -> list[str]:
        return [line for line in node.run(["iptables-save"]).stdout.splitlines() if line.startswith(f"-A {FIREWALL}")]

    with Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag("iptables")) as daemon:
        daemon.wait_until_synced()
    node.run(["iptables", "-A", FIREWALL, "-s", "192.0.2.1/32", "-j", "DROP"])
    before = firewall()
    assert len(before) > 1
    with Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag("nftables")) as daemon:
        daemon.wait_until_synced()
        wait_until(lambda: no_rules_of_other_mode(node, "nftables"), "no rules of iptables mode")
    assert firewall() == before
