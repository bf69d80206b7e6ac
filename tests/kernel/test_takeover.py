"""No connection notices that kproxy takes a node over from kube-proxy, in either of its modes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.names import DISPATCH
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.types import Family
from tests.lab.load import Stream, Target
from tests.lab.namespace import Namespace
from tests.lab.recorded import RecordedCluster
from tests.lab.restart import MortalDaemon
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until
from tests.recordings import GOLDEN, State, comparable, recorded

PREFIXES = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
NFT_FILES = ("nft-ip.txt", "nft-ip6.txt")
SWAPS = (("random-11", "random-12"), ("random-12", "random-13"), ("random-13", "random-11"))
"""A recorded cluster, and the one whose rules kube-proxy failed to remove before."""

API_SERVER = "default/kubernetes"
TABLES = ("nat", "filter")


@pytest.fixture(autouse=True)
def nft() -> None:
    """Skip where there is no `nft`, which the tests load nftables mode's rules with."""
    if shutil.which("nft") is None:
        pytest.skip("nft not found: it is in the Debian package nftables")


def state(node: Namespace, family: Family) -> State:
    return comparable(node.run([f"{PREFIXES[family]}-save"]).stdout.splitlines())


def leftovers(own: State, other: State) -> str:
    """Return what adds to the rules of one cluster those of another, with all that leads to them."""
    text = ""
    for table in TABLES:
        chains = [chain for chain in other if chain.table == table and chain not in own]
        rules = [rule for chain in chains for rule in other[chain]]
        for chain in DISPATCH:
            rules += [rule for rule in other[chain] if chain.table == table and rule not in own[chain]]
        text += "\n".join((f"*{table}", *(f":{chain.name} - [0:0]" for chain in chains), *rules, "COMMIT\n"))
    return text


def load_iptables_mode(node: Namespace, scenario: str, stale: str) -> None:
    node.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))
    for family, prefix in PREFIXES.items():
        name = "ip6tables-save.txt" if family is Family.IPV6 else "iptables-save.txt"
        node.run([f"{prefix}-restore"], (GOLDEN / scenario / name).read_text())
        own = recorded(scenario, family)
        assert state(node, family) == own
        node.run([f"{prefix}-restore", "--noflush"], leftovers(own, recorded(stale, family)))
    assert set(recorded(stale, Family.IPV4)) <= set(state(node, Family.IPV4))


def load_nftables_mode(node: Namespace, scenario: str) -> None:
    for name in NFT_FILES:
        node.run(["nft", "-f", str(GOLDEN / scenario / name)])
    assert len(nft_tables(node)) == len(NFT_FILES)


def nft_tables(node: Namespace) -> list[str]:
    tables = node.run(["nft", "list", "tables"]).stdout.splitlines()
    return [table for table in tables if table.endswith(" kube-proxy")]


def take_over(lab: Lab, scenario: str, targets: Sequence[Target], log: Path) -> None:
    """Start kproxy, and end it, under a stream that began before and ends after it."""
    assert len({target.service for target in targets}) >= 10
    with Stream(targets) as stream:
        stream.mark("kube-proxy's rules alone")
        stream.take(4)
        stream.mark("kproxy was started")
        with MortalDaemon(lab, GOLDEN / scenario, log) as daemon:
            daemon.wait_in_force()
            wait_until(lambda: not nft_tables(lab.node.namespace), "the other mode's tables are gone")
            stream.mark("kproxy took over")
            stream.take(4)
        stream.mark("SIGTERM")
        stream.take(4)
    assert stream.complaints() == ""
    for family in Family:
        assert state(lab.node.namespace, family) == recorded(scenario, family)


@pytest.mark.parametrize(("scenario", "stale"), SWAPS)
def test_from_iptables_mode(lab: Lab, servers: Servers, tmp_path: Path, scenario: str, stale: str) -> None:
    load_iptables_mode(lab.node.namespace, scenario, stale)
    take_over(lab, scenario, RecordedCluster(lab, servers, scenario).targets, tmp_path / "kproxy.log")


@pytest.mark.parametrize("scenario", [scenario for scenario, _ in SWAPS])
def test_from_nftables_mode(lab: Lab, servers: Servers, tmp_path: Path, scenario: str) -> None:
    load_nftables_mode(lab.node.namespace, scenario)
    # The recorded API server's address is in the Services' range, where that mode drops what is no Service.
    targets = [each for each in RecordedCluster(lab, servers, scenario).targets if each.service != API_SERVER]
    take_over(lab, scenario, targets, tmp_path / "kproxy.log")
