"""Cleaning up finds what either mode left, kproxy's own rules too, and says what it cannot see."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kproxy.app.cleanup import remove_all, remove_iptables, unremovable_chains
from kproxy.model.types import Family
from tests.kernel.test_cleanup import nft_tables, proxy_tables, rules, without_firewall
from tests.lab.iptables import PREFIXES, link, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.transaction_monitor import Commits
from tests.recordings import GOLDEN

SCENARIO = "random-12"


def apply(node: Namespace, mode: str) -> None:
    folder = GOLDEN / SCENARIO
    config = f"--config={folder}/config.json"
    node.run([KPROXY, "apply", config, f"--objects={folder}", f"--proxy-mode={mode}"])


def our_chains(node: Namespace) -> set[str]:
    found = {line for family in Family for line in rules(node, family) if line.startswith(":KUBE-")}
    return found - {":KUBE-FIREWALL"}


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_what_kproxy_itself_programmed_goes(node: Namespace, mode: str) -> None:
    apply(node, mode)
    assert bool(our_chains(node)) == (mode == "iptables")
    assert bool(proxy_tables(node)) == (mode == "nftables")
    assert len(node.call(lambda: list(remove_all()))) == 2
    assert (our_chains(node), proxy_tables(node)) == (set(), [])
    for family in Family:
        assert "KUBE-" not in "".join(without_firewall(rules(node, family)))
    assert node.call(lambda: list(remove_all())) == []


def test_no_rule_is_needed_to_remove_a_chain(node: Namespace) -> None:
    """A dump is read without the rules of the Services' own chains, which in large clusters are most of it."""
    lines = "".join(f":KUBE-SEP-{number:016} - [0:0]\n-A KUBE-SEP-{number:016} -j ACCEPT\n" for number in range(700))
    jumps = "-A KUBE-SVC-A -j KUBE-SEP-0000000000000000\n-A PREROUTING -j KUBE-SVC-A\n-A PREROUTING -j FOREIGN\n"
    node.run(["iptables-restore"], f"*nat\n:FOREIGN - [0:0]\n:KUBE-SVC-A - [0:0]\n{lines}{jumps}COMMIT\n")
    assert node.call(lambda: remove_iptables(Family.IPV4)) == "removed 701 iptables chains of IPv4"
    assert our_chains(node) == set()
    assert "-A PREROUTING -j FOREIGN" in rules(node, Family.IPV4)


def test_a_table_that_iptables_cannot_show_is_said(node: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    if "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("iptables-legacy can show all of its rules")
    apply(node, "iptables")
    node.run(["nft", "add", "rule", "ip", "filter", "FORWARD", "ct", "state", "new", "meta", "nftrace", "set", "1"])
    node.call(lambda: remove_iptables(Family.IPV4))
    assert [record.getMessage() for record in caplog.records] == [
        "IPv4: table filter has rules that only nft can print; chains of iptables mode may remain there"
    ]
    left = rules(node, Family.IPV4)
    assert ":KUBE-POSTROUTING" not in left
    assert "KUBE-FORWARD" in node.run(["nft", "list", "table", "ip", "filter"]).stdout


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Leaves nothing in PATH but `nft` and these programs, by the names that they have there and the real ones."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))

    def put(programs: dict[str, str]) -> None:
        link({"nft": "nft", **programs}, tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))

    return put


@pytest.mark.parametrize("used", ["nft", "legacy"])
@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_chains_of_the_other_variant_stay_and_are_said(
    node: Namespace,
    only: Callable[[dict[str, str]], None],
    caplog: pytest.LogCaptureFixture,
    used: str,
    program: str,
) -> None:
    other = {"nft": "legacy", "legacy": "nft"}[used]
    for each in (used, other):
        if shutil.which(f"{program}-{each}") is None:
            pytest.skip(f"no {program}-{each} here")
        node.run([f"{program}-{each}", "-t", "nat", "-N", "KUBE-SERVICES"])
    listing = [str(shutil.which(f"{program}-{other}")), "-t", "nat", "-S", "KUBE-SERVICES"]
    only(programs_of(used))
    family = next(family for family, prefix in PREFIXES.items() if prefix == program)
    assert node.call(lambda: list(remove_all())) == [f"removed 1 iptables chains of {family.value}"]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    version = "nf_tables" if used == "nft" else "legacy"
    assert len(said) == 1
    where = f"KUBE- chains of iptables-{other}"
    assert said[0].startswith(f"{where} remain and cannot be removed: this node uses ")
    assert said[0].endswith(f" ({version})")
    assert node.run(listing).stdout == "-N KUBE-SERVICES\n"
    assert node.call(lambda: list(remove_all())) == []


def test_without_iptables_the_chains_of_both_variants_are_said(
    node: Namespace, only: Callable[[dict[str, str]], None]
) -> None:
    for each in ("nft", "legacy"):
        if shutil.which(f"iptables-{each}") is None:
            pytest.skip(f"no iptables-{each} here")
        node.run([f"iptables-{each}", "-t", "nat", "-N", "KUBE-SERVICES"])
    only({})
    assert node.call(lambda: remove_iptables(Family.IPV4)) == ""
    said = "remain and cannot be removed: iptables is not installed"
    assert node.call(unremovable_chains) == f"KUBE- chains of iptables-legacy and iptables-nft {said}"


def test_nothing_is_out_of_reach_on_a_node_of_one_variant(node: Namespace) -> None:
    apply(node, "iptables")
    assert node.call(unremovable_chains) == ""


def test_the_command_says_what_is_out_of_reach_beside_what_it_removed(node: Namespace) -> None:
    legacy = shutil.which("iptables-legacy")
    if legacy is None or "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("needs iptables-nft in use, with iptables-legacy beside it")
    apply(node, "nftables")
    node.run([legacy, "-t", "nat", "-N", "KUBE-SERVICES"])
    done = node.run([KPROXY, "run", "--cleanup"])
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["removed"] * 2
    assert re.search(r"^W\d{4} .*\] KUBE- chains of iptables-legacy remain", done.stderr, re.MULTILINE)
    assert [table for table in nft_tables(node) if "kube-proxy" in table] == []


def test_where_there_is_nothing_to_remove_nothing_is_written(node: Namespace) -> None:
    """Where there is nothing to remove, nothing is written: a node of nftables mode sees no change by it."""
    apply(node, "nftables")
    with Commits(node) as commits:
        for family in Family:
            assert node.call(lambda family=family: remove_iptables(family)) == ""  # type: ignore[misc]
        assert commits.new() == []
