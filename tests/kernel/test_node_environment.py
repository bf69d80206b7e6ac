"""A node with iptables-legacy, with leftover tables of nftables mode, and with changing addresses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kproxy.iptables.names import ChainName
from kproxy.model.types import Family
from tests.lab.iptables import link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN, State, comparable, recorded

SERVICES_CHAIN = ChainName("nat", "KUBE-SERVICES")


def saved(node: Namespace, program: str = "iptables-save") -> State:
    return comparable(node.run([program]).stdout.splitlines())


@pytest.mark.parametrize("scenario", ["clusterip", "session-affinity", "loadbalancer-source-ranges", "random-13"])
def test_iptables_legacy_gets_the_same_rules_and_keeps_them_after_a_restart(
    node: Namespace, tmp_path: Path, scenario: str
) -> None:
    link_programs(programs_of("legacy"), tmp_path)
    folder = GOLDEN / scenario
    command = [KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}"]
    legacy_first = ["env", f"PATH={tmp_path}:{os.environ['PATH']}", f"XTABLES_LOCKFILE={tmp_path}/lock"]
    for _ in range(2):
        log = node.run([*legacy_first, *command]).stderr
        assert "(legacy)" in log
        assert saved(node, "iptables-legacy-save") == recorded(scenario, Family.IPV4)
        assert saved(node, "ip6tables-legacy-save") == recorded(scenario, Family.IPV6)


def test_tables_of_nftables_mode_are_removed_after_the_first_sync(node: Namespace, tmp_path: Path) -> None:
    folder = GOLDEN / "nodeport"
    for family in ("ip", "ip6"):
        node.run(["nft", "-f", "-"], (folder / f"nft-{family}.txt").read_text())
    log = tmp_path / "log"
    with log.open("w") as output:
        config = f"--config={folder}/config.json"
        process = node.popen([KPROXY, "run", config, f"--objects={folder}"], output)
    wait_until(lambda: "kube-proxy" not in node.run(["nft", "list", "tables"]).stdout, "removal of the tables")
    assert saved(node) == recorded("nodeport", Family.IPV4)
    process.terminate()
    assert process.wait(HANG_GUARD) == 0


def test_node_ports_are_updated_when_the_node_addresses_change(node: Namespace, tmp_path: Path) -> None:
    folder = GOLDEN / "config-nodeport-addresses"
    with (tmp_path / "log").open("w") as output:
        config = f"--config={folder}/config.json"
        process = node.popen([KPROXY, "run", config, f"--objects={folder}"], output)

    def addresses() -> list[str]:
        rules = saved(node).get(SERVICES_CHAIN, [])
        return [rule.split()[3] for rule in rules if "must be the last rule" in rule]

    wait_until(lambda: addresses() == ["10.99.0.2/32"], "the first address")
    node.run(["ip", "address", "add", "10.99.0.7/24", "dev", "lo"])
    wait_until(lambda: addresses() == ["10.99.0.2/32", "10.99.0.7/32"], "the new address")
    node.run(["ip", "address", "delete", "10.99.0.2/24", "dev", "lo"])
    wait_until(lambda: "10.99.0.2/32" not in addresses(), "removal of the old address")
    process.terminate()
    assert process.wait(HANG_GUARD) == 0
