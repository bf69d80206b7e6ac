"""Cleanup removes all rules of kube-proxy and kproxy, and nothing else."""

from __future__ import annotations

import socket
import struct
from functools import partial
from pathlib import Path

import pytest

from kproxy.app.cleanup import remove_all, remove_iptables
from kproxy.host.commands import CommandError
from kproxy.host.netlink import BatchSocket
from kproxy.host.netlink_message import NLM_F_CREATE, attribute, nfgenmsg
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES
from kproxy.model.types import Family
from kproxy.nftables.kernel import remove_table
from tests.kernel.test_recordings import apply
from tests.lab.iptables import PREFIXES, PROGRAMS, link_programs
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.transaction_monitor import TransactionMonitor
from tests.recordings import GOLDEN

NFT_TABLE_F_OWNER = 2
SCENARIOS = ("random-11", "loadbalancer-source-ranges-with-node", "nodeport-external-local", "dual-stack")
NFT = {Family.IPV4: ("ip", "nft-ip.txt"), Family.IPV6: ("ip6", "nft-ip6.txt")}

FOREIGN = """\
*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:MY-MARKS - [0:0]
-A PREROUTING -j MY-MARKS
-A MY-MARKS -p tcp -m tcp --dport 7 -j MARK --set-xmark 0x7/0xffffffff
COMMIT
*nat
:MY-NAT - [0:0]
-A PREROUTING -p tcp -m tcp --dport 7 -j MY-NAT
-A MY-NAT -p tcp -m tcp --dport 7 -j REDIRECT --to-ports 8007
-A POSTROUTING -p tcp -m comment --comment "not KUBE-POSTROUTING" -j MASQUERADE
COMMIT
*filter
:MY-FILTER - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
-A INPUT -j KUBE-ROUTER-INPUT
-A INPUT -g MY-FILTER
-A FORWARD -p udp -m udp --dport 7 -j DROP
-A MY-FILTER -p tcp -m tcp --dport 22 -j ACCEPT
-A MY-FILTER -j RETURN
COMMIT
"""
"""Foreign rules in their own and in built-in chains. Some names resemble those of kproxy's chains."""

FIREWALL = [":KUBE-FIREWALL", "-A INPUT -j KUBE-FIREWALL", "-A OUTPUT -j KUBE-FIREWALL"]
MARTIANS = (
    '-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" '
    "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
)
KEPT = {Family.IPV4: sorted([*FIREWALL, MARTIANS]), Family.IPV6: sorted(FIREWALL)}
JUMP = '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES'

pytestmark = pytest.mark.usefixtures("nft")


@pytest.fixture
def node(node: Namespace) -> Namespace:
    """A node with foreign rules."""
    for prefix in PREFIXES.values():
        node.run([f"{prefix}-restore", "--noflush"], FOREIGN)
    return node


def rules(node: Namespace, family: Family) -> list[str]:
    """Return the lines of iptables-save without counters and comments."""
    saved = node.run([f"{PREFIXES[family]}-save"]).stdout.splitlines()
    return [line.partition(" ")[0] if line.startswith(":") else line for line in saved if not line.startswith("#")]


def without_firewall(lines: list[str]) -> list[str]:
    return [line for line in lines if "KUBE-FIREWALL" not in line]


def program_both_modes(node: Namespace, scenario: str) -> None:
    apply(node, scenario)
    for _, name in NFT.values():
        node.run(["nft", "-f", str(GOLDEN / scenario / name)])


def nft_tables(node: Namespace) -> list[str]:
    return node.run(["nft", "list", "tables"]).stdout.splitlines()


def proxy_tables(node: Namespace) -> list[str]:
    return [table for table in nft_tables(node) if table.endswith(" kube-proxy")]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_only_proxy_rules_are_removed(node: Namespace, scenario: str) -> None:
    before = {family: rules(node, family) for family in Family}
    node.run(["nft", "add", "table", "inet", "mine"])
    program_both_modes(node, scenario)
    assert len(proxy_tables(node)) == 2
    for family in Family:
        assert len(rules(node, family)) > len(before[family]) + len(KEPT[family])

    messages = node.call(lambda: list(remove_all()))

    assert [line.partition(" ")[0] for line in messages] == ["removed"] * 4
    assert proxy_tables(node) == []
    assert "table inet mine" in nft_tables(node)
    for family in Family:
        after = rules(node, family)
        assert without_firewall(after) == before[family]
        assert sorted(set(after) - set(without_firewall(after))) == KEPT[family]


def test_second_cleanup_changes_nothing(node: Namespace) -> None:
    program_both_modes(node, "random-12")
    node.call(lambda: list(remove_all()))
    with TransactionMonitor(node) as commits:
        assert node.call(lambda: list(remove_all())) == []
        assert commits.new() == []


def test_rules_of_several_clusters_and_duplicate_jumps_are_removed(node: Namespace) -> None:
    before = rules(node, Family.IPV4)
    apply(node, "random-13")
    stale = (GOLDEN / "random-11" / "iptables-save.txt").read_text().splitlines()
    chains = {line.split()[0] for line in stale if line.startswith((":KUBE-SVC-", ":KUBE-SEP-"))}
    declared = "\n".join(f"{chain} - [0:0]" for chain in sorted(chains))
    node.run(["iptables-restore", "--noflush"], f"*nat\n{declared}\n{JUMP}\n{JUMP}\nCOMMIT\n")
    node.call(lambda: remove_iptables(Family.IPV4))
    assert without_firewall(rules(node, Family.IPV4)) == before


def test_families_are_cleaned_up_separately(node: Namespace) -> None:
    program_both_modes(node, "dual-stack")
    ipv6 = rules(node, Family.IPV6)
    assert node.call(lambda: remove_iptables(Family.IPV4)).endswith(" IPv4 iptables chains")
    assert node.call(lambda: remove_table(Family.IPV4))
    assert rules(node, Family.IPV6) == ipv6
    assert proxy_tables(node) == ["table ip6 kube-proxy"]
    assert not node.call(lambda: remove_table(Family.IPV4))


FOREIGN_COMMENT = '-A FORWARD -m comment --comment "what -j KUBE-FORWARD accepts" -j ACCEPT'


def test_foreign_rule_with_a_jump_in_its_comment_is_kept(node: Namespace) -> None:
    node.run(["iptables-restore", "--noflush"], f"*filter\n{FOREIGN_COMMENT}\nCOMMIT\n")
    before = rules(node, Family.IPV4)
    apply(node, "clusterip")
    node.call(lambda: list(remove_all()))
    assert without_firewall(rules(node, Family.IPV4)) == before


def test_jump_is_removed_whatever_its_comment(node: Namespace) -> None:
    before = rules(node, Family.IPV4)
    apply(node, "clusterip")
    jump = '-A MY-NAT -m comment --comment "was -j ACCEPT once" -j KUBE-MARK-MASQ'
    node.run(["iptables-restore", "--noflush"], f"*nat\n{jump}\nCOMMIT\n")
    node.call(lambda: list(remove_all()))
    assert without_firewall(rules(node, Family.IPV4)) == before


def test_cleanup_does_not_need_nft(node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rules(node, Family.IPV4)
    program_both_modes(node, "clusterip")
    path = tmp_path / "bin"
    path.mkdir()
    link_programs({name: name for name in PROGRAMS}, path)
    with monkeypatch.context() as changed:
        changed.setenv("PATH", str(path))
        assert len(node.call(lambda: list(remove_all()))) == 4
    assert without_firewall(rules(node, Family.IPV4)) == before
    assert proxy_tables(node) == []


def test_table_that_cannot_be_deleted_is_reported(node: Namespace) -> None:
    # Only the owner can delete a table with an owner.
    with node.call(partial(BatchSocket, NFNL_SUBSYS_NFTABLES)) as owner:
        table = attribute(1, b"kube-proxy\0") + attribute(2, struct.pack(">I", NFT_TABLE_F_OWNER))
        owner.commit([(NFNL_SUBSYS_NFTABLES << 8, NLM_F_CREATE, nfgenmsg(socket.AF_INET) + table)])
        with pytest.raises(CommandError, match=r"^cannot delete the nftables table of IPv4: .*not permitted$"):
            node.call(lambda: list(remove_all()))


def test_command_prints_removals_and_can_be_repeated(node: Namespace) -> None:
    before = rules(node, Family.IPV4)
    program_both_modes(node, "random-11")
    first = node.run([KPROXY, "run", "--cleanup"])
    assert first.stderr == ""
    messages = first.stdout.splitlines()
    assert [line.split()[-3] for line in messages] == ["IPv4", "IPv6", "IPv4", "IPv6"]
    assert proxy_tables(node) == []
    assert without_firewall(rules(node, Family.IPV4)) == before
    assert node.run([KPROXY, "run", "--cleanup"]).stdout == "nothing to remove\n"


def test_command_fails_with_one_line(node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(node, "clusterip")
    failing = tmp_path / "iptables-restore"
    failing.write_text("#!/bin/sh\necho 'iptables-restore: line 3 failed' >&2; exit 4\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    done = node.run([KPROXY, "run", "--cleanup"], check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("kproxy: iptables-restore failed with status 4: ")
    assert done.stderr.count("\n") == 1
