"""Cleanup removes the rules that kproxy programmed in either mode and reports chains that it cannot remove."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kproxy.app.cleanup import remove_all, remove_iptables, unremovable_chains
from kproxy.iptables.cleanup import cleanup
from kproxy.iptables.runner import IptablesRunner
from kproxy.iptables.save_restore import parse_save
from kproxy.model.types import Family
from tests.kernel.test_cleanup import nft_tables, proxy_tables, rules, without_firewall
from tests.lab.iptables import PREFIXES, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.transaction_monitor import TransactionMonitor
from tests.recordings import GOLDEN

SCENARIO = "random-12"


def apply(node: Namespace, mode: str) -> None:
    folder = GOLDEN / SCENARIO
    config = f"--config={folder}/config.json"
    node.run([KPROXY, "apply", config, f"--objects={folder}", f"--proxy-mode={mode}"])


def kproxy_chains(node: Namespace) -> set[str]:
    found = {line for family in Family for line in rules(node, family) if line.startswith(":KUBE-")}
    return found - {":KUBE-FIREWALL"}


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_rules_of_kproxy_are_removed(node: Namespace, mode: str) -> None:
    apply(node, mode)
    assert bool(kproxy_chains(node)) == (mode == "iptables")
    assert bool(proxy_tables(node)) == (mode == "nftables")
    assert len(node.call(lambda: list(remove_all()))) == 2
    assert (kproxy_chains(node), proxy_tables(node)) == (set(), [])
    for family in Family:
        assert "KUBE-" not in "".join(without_firewall(rules(node, family)))
    assert node.call(lambda: list(remove_all())) == []


def test_chains_are_removed_without_reading_their_rules(node: Namespace) -> None:
    """Cleanup skips the rules of per-Service chains in the dump. In large clusters they are most of it."""
    lines = "".join(f":KUBE-SEP-{number:016} - [0:0]\n-A KUBE-SEP-{number:016} -j ACCEPT\n" for number in range(700))
    jumps = "-A KUBE-SVC-A -j KUBE-SEP-0000000000000000\n-A PREROUTING -j KUBE-SVC-A\n-A PREROUTING -j FOREIGN\n"
    node.run(["iptables-restore"], f"*nat\n:FOREIGN - [0:0]\n:KUBE-SVC-A - [0:0]\n{lines}{jumps}COMMIT\n")
    assert node.call(lambda: remove_iptables(Family.IPV4)) == "removed 701 IPv4 iptables chains"
    assert kproxy_chains(node) == set()
    assert "-A PREROUTING -j FOREIGN" in rules(node, Family.IPV4)


def test_each_transaction_deletes_chains_before_those_that_they_jump_to(node: Namespace) -> None:
    chains = [f"KUBE-{name}-A" for name in ("SEP", "SVL", "SVC", "EXT", "XLB", "FW")]
    declared = "".join(f":{chain} - [0:0]\n" for chain in chains)
    # The jumps of kube-proxy 1.23, which has KUBE-XLB-, and of current versions, which have KUBE-EXT-.
    jumps = ("SVC SEP", "SVL SEP", "EXT SVC", "EXT SVL", "XLB SVC", "XLB SEP", "FW XLB", "FW EXT", "FW SVC")
    rules_of_chains = "".join("-A KUBE-{}-A -j KUBE-{}-A\n".format(*jump.split()) for jump in jumps)
    node.run(["iptables-restore"], f"*nat\n{declared}{rules_of_chains}COMMIT\n")

    def remove() -> None:
        iptables = IptablesRunner(Family.IPV4)
        with iptables.save() as lines:
            saved = parse_save(lines)
        iptables.restore_each(change.text() for change in cleanup(saved.chains, max_transaction_rules=1))

    node.call(remove)
    assert kproxy_chains(node) == set()


def test_table_that_iptables_cannot_print_is_reported(node: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    if "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("iptables-legacy can print all of its rules")
    apply(node, "iptables")
    node.run(["nft", "add", "rule", "ip", "filter", "FORWARD", "ct", "state", "new", "meta", "nftrace", "set", "1"])
    node.call(lambda: remove_iptables(Family.IPV4))
    assert [record.getMessage() for record in caplog.records] == [
        "IPv4: table filter has rules that only nft can print; chains of iptables mode may remain there"
    ]
    remaining = rules(node, Family.IPV4)
    assert ":KUBE-POSTROUTING" not in remaining
    assert "KUBE-FORWARD" in node.run(["nft", "list", "table", "ip", "filter"]).stdout


@pytest.fixture
def restrict_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Restrict PATH to `nft` and the given programs: names in PATH and the programs they run."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))

    def restrict(programs: dict[str, str]) -> None:
        link_programs({"nft": "nft", **programs}, tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))

    return restrict


@pytest.mark.parametrize("used", ["nft", "legacy"])
@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_chains_of_the_other_variant_are_kept_and_reported(
    node: Namespace,
    restrict_path: Callable[[dict[str, str]], None],
    caplog: pytest.LogCaptureFixture,
    used: str,
    program: str,
) -> None:
    other = {"nft": "legacy", "legacy": "nft"}[used]
    for each in (used, other):
        if shutil.which(f"{program}-{each}") is None:
            pytest.skip(f"{program}-{each} not found")
        node.run([f"{program}-{each}", "-t", "nat", "-N", "KUBE-SERVICES"])
    listing = [str(shutil.which(f"{program}-{other}")), "-t", "nat", "-S", "KUBE-SERVICES"]
    restrict_path(programs_of(used))
    family = next(family for family, prefix in PREFIXES.items() if prefix == program)
    assert node.call(lambda: list(remove_all())) == [f"removed 1 {family.value} iptables chains"]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    version = "nf_tables" if used == "nft" else "legacy"
    assert len(messages) == 1
    subject = f"KUBE- chains of iptables-{other}"
    assert messages[0].startswith(f"{subject} remain and cannot be removed: this node uses ")
    assert messages[0].endswith(f" ({version})")
    assert node.run(listing).stdout == "-N KUBE-SERVICES\n"
    assert node.call(lambda: list(remove_all())) == []


def test_chains_of_both_variants_are_reported_without_iptables(
    node: Namespace, restrict_path: Callable[[dict[str, str]], None]
) -> None:
    for each in ("nft", "legacy"):
        if shutil.which(f"iptables-{each}") is None:
            pytest.skip(f"iptables-{each} not found")
        node.run([f"iptables-{each}", "-t", "nat", "-N", "KUBE-SERVICES"])
    restrict_path({})
    assert node.call(lambda: remove_iptables(Family.IPV4)) == ""
    problem = "remain and cannot be removed: iptables is not installed"
    assert node.call(unremovable_chains) == f"KUBE- chains of iptables-legacy and iptables-nft {problem}"


def test_nothing_is_unremovable_on_a_node_with_one_variant(node: Namespace) -> None:
    apply(node, "iptables")
    assert node.call(unremovable_chains) == ""


def test_command_reports_removals_and_unremovable_chains(node: Namespace) -> None:
    legacy = shutil.which("iptables-legacy")
    if legacy is None or "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("needs iptables-nft in use, with iptables-legacy beside it")
    apply(node, "nftables")
    node.run([legacy, "-t", "nat", "-N", "KUBE-SERVICES"])
    done = node.run([KPROXY, "run", "--cleanup"])
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["removed"] * 2
    assert re.search(r"^W\d{4} .*\] KUBE- chains of iptables-legacy remain", done.stderr, re.MULTILINE)
    assert [table for table in nft_tables(node) if "kube-proxy" in table] == []


def test_nothing_is_written_when_there_is_nothing_to_remove(node: Namespace) -> None:
    apply(node, "nftables")
    with TransactionMonitor(node) as commits:
        for family in Family:
            assert node.call(lambda family=family: remove_iptables(family)) == ""  # type: ignore[misc]
        assert commits.new() == []
