"""Takeover of a node from kube-proxy, from and to either mode: no connection fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kproxy.iptables.names import DISPATCH_CHAINS
from kproxy.model.types import Family
from tests.lab.connection_stream import ConnectionStream, Target
from tests.lab.iptables import PREFIXES, current_rules, restore_recording
from tests.lab.modes import NFT_FAMILIES, mode_flag, no_rules_of_other_mode, table_state
from tests.lab.namespace import Namespace
from tests.lab.proxy import FLAGS, KPROXY, Daemon
from tests.lab.recorded import RecordedCluster
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until
from tests.recordings import GOLDEN, State, recorded

NFT_FILES = ("nft-ip.txt", "nft-ip6.txt")
SWAPS = (("random-11", "random-12"), ("random-12", "random-13"), ("random-13", "random-11"))
"""A recorded cluster, and another one whose rules kube-proxy left behind."""

API_SERVER = "default/kubernetes"
TABLES = ("nat", "filter")

pytestmark = pytest.mark.usefixtures("nft")


def leftovers(own: State, other: State) -> str:
    """Return input for iptables-restore that adds the rules of another cluster and all jumps to them."""
    text = ""
    for table in TABLES:
        chains = [chain for chain in other if chain.table == table and chain not in own]
        rules = [rule for chain in chains for rule in other[chain]]
        for chain in DISPATCH_CHAINS:
            rules += [rule for rule in other[chain] if chain.table == table and rule not in own[chain]]
        text += "\n".join((f"*{table}", *(f":{chain.name} - [0:0]" for chain in chains), *rules, "COMMIT\n"))
    return text


def load_iptables_mode(node: Namespace, scenario: str, stale: str) -> None:
    restore_recording(node, scenario)
    for family, prefix in PREFIXES.items():
        own = recorded(scenario, family)
        assert current_rules(node, family) == own
        node.run([f"{prefix}-restore", "--noflush"], leftovers(own, recorded(stale, family)))
    assert set(recorded(stale, Family.IPV4)) <= set(current_rules(node, Family.IPV4))


def load_nftables_mode(node: Namespace, scenario: str) -> None:
    for name in NFT_FILES:
        node.run(["nft", "-f", str(GOLDEN / scenario / name)])
    assert not no_rules_of_other_mode(node, "iptables")


def take_over(lab: Lab, scenario: str, targets: Sequence[Target], folder: Path, mode: str) -> None:
    """Start and stop kproxy during a stream of connections."""
    node = lab.node.namespace
    assert len({target.service for target in targets}) >= 10
    with ConnectionStream(targets) as stream:
        stream.mark("only kube-proxy's rules")
        stream.take(4)
        stream.mark("start of kproxy")
        with Daemon(lab, GOLDEN / scenario, folder / "kproxy.log", mode_flag(mode)) as daemon:
            daemon.wait_until_synced()
            wait_until(lambda: no_rules_of_other_mode(node, mode), "no rules of the other mode")
            stream.mark("takeover complete")
            stream.take(4)
        stream.mark("SIGTERM")
        stream.take(4)
    assert stream.failure_report() == ""
    if mode == "iptables":
        assert {family: current_rules(node, family) for family in Family} == {f: recorded(scenario, f) for f in Family}
    else:
        assert tables(node) == tables_on_empty_node(scenario)


def tables(node: Namespace) -> dict[str, dict[str, Any]]:
    return {family: table_state(node, family) for family in NFT_FAMILIES}


def tables_on_empty_node(scenario: str) -> dict[str, dict[str, Any]]:
    """Return the tables that kproxy programs for a recording on an empty node."""
    fresh = Namespace("fresh")
    try:
        fresh.run([KPROXY, "apply", f"--objects={GOLDEN / scenario}", *FLAGS, mode_flag("nftables")])
        return tables(fresh)
    finally:
        fresh.close()


@pytest.mark.parametrize(("scenario", "stale"), SWAPS)
def test_takeover_from_iptables_to_iptables_mode(
    lab: Lab, servers: Servers, tmp_path: Path, scenario: str, stale: str
) -> None:
    load_iptables_mode(lab.node.namespace, scenario, stale)
    take_over(lab, scenario, RecordedCluster(lab, servers, scenario).targets, tmp_path, "iptables")


@pytest.mark.parametrize("scenario", [scenario for scenario, _ in SWAPS])
def test_takeover_from_nftables_to_iptables_mode(lab: Lab, servers: Servers, tmp_path: Path, scenario: str) -> None:
    load_nftables_mode(lab.node.namespace, scenario)
    take_over(lab, scenario, targets_of(lab, servers, scenario), tmp_path, "iptables")


@pytest.mark.parametrize(("scenario", "stale"), SWAPS)
def test_takeover_from_iptables_to_nftables_mode(
    lab: Lab, servers: Servers, tmp_path: Path, scenario: str, stale: str
) -> None:
    load_iptables_mode(lab.node.namespace, scenario, stale)
    take_over(lab, scenario, targets_of(lab, servers, scenario), tmp_path, "nftables")


@pytest.mark.parametrize("scenario", [scenario for scenario, _ in SWAPS])
def test_takeover_from_nftables_to_nftables_mode(lab: Lab, servers: Servers, tmp_path: Path, scenario: str) -> None:
    load_nftables_mode(lab.node.namespace, scenario)
    take_over(lab, scenario, targets_of(lab, servers, scenario), tmp_path, "nftables")


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
@pytest.mark.parametrize("scenario", [scenario for scenario, _ in SWAPS])
def test_takeover_of_nftables_rules_in_the_style_of_kube_proxy_1_37(
    lab: Lab, servers: Servers, tmp_path: Path, scenario: str, mode: str
) -> None:
    for name in NFT_FILES:
        lab.node.namespace.run(["nft", "-f", "-"], in_style_of_1_37((GOLDEN / scenario / name).read_text()))
    assert not no_rules_of_other_mode(lab.node.namespace, "iptables")
    take_over(lab, scenario, targets_of(lab, servers, scenario), tmp_path, mode)


def in_style_of_1_37(recording: str) -> str:
    """Return a table of kube-proxy 1.36 with what 1.37 changes: its exact rules were not recorded.

    A Service port with one endpoint has a plain dnat, and NodePorts on localhost are rejected and counted by rules and
    elements with names that kproxy does not know.
    """
    one = re.compile(r"(meta l4proto \w+) dnat (ip6?) to numgen random mod 1 map \{ 0 : (\S+) \. (\d+) \}")
    text, count = one.subn(lambda match: f"{match[1]} dnat to {_socket(match[3], match[4])}", recording)
    assert count or text.startswith("table ip6"), "the recordings have IPv4 Services only"
    assert text.rstrip().endswith("}")
    loopback = "ip6 daddr ::1" if text.startswith("table ip6") else "ip daddr 127.0.0.0/8"
    return f"""{text.rstrip()[:-1]}
        counter localhost-nodeport-rejected {{
        }}
        map localhost-nodeports {{
                type inet_proto . inet_service : verdict
                elements = {{ tcp . 30999 : goto reject-localhost-nodeport }}
        }}
        chain reject-localhost-nodeport {{
                counter name "localhost-nodeport-rejected" reject
        }}
        chain localhost-nodeport-output {{
                type filter hook output priority filter; policy accept;
                {loopback} meta l4proto . th dport vmap @localhost-nodeports
        }}
}}
"""


def _socket(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def targets_of(lab: Lab, servers: Servers, scenario: str) -> list[Target]:
    """Return the targets that are reachable in nftables mode too.

    The recorded API server has an address in the ServiceCIDR, where nftables mode drops packets for unknown Services.
    """
    return [each for each in RecordedCluster(lab, servers, scenario).targets if each.service != API_SERVER]
