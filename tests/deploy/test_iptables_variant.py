"""In an image with both variants of iptables, the one that the host uses is taken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kproxy.iptables.variant import FOLDER_VARIABLE, detect_variant, use_host_variant
from tests.lab.namespace import Namespace

PROGRAMS = ("iptables", "ip6tables")
HINT, CANARY = "KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both variants, laid out as in the image."""
    for variant in ("nft", "legacy"):
        multi = shutil.which(f"xtables-{variant}-multi")
        if multi is None:
            pytest.skip(f"no iptables-{variant} here")
        (tmp_path / variant).mkdir()
        for name in (program + action for program in PROGRAMS for action in ("", "-save", "-restore")):
            (tmp_path / variant / name).symlink_to(multi)
    return tmp_path


def add(node: Namespace, program: str, *chains: str, table: str = "mangle", rules: int = 0) -> None:
    for chain in chains:
        node.run([program, "-t", table, "-N", chain])
        for _ in range(rules):
            node.run([program, "-t", table, "-A", chain, "-j", "RETURN"])


def found(node: Namespace, folder: Path) -> str:
    return node.call(lambda: detect_variant(folder))


def test_a_fresh_host_gets_nft_and_is_left_as_it_is(node: Namespace, folder: Path) -> None:
    assert found(node, folder) == "nft"
    assert node.run(["nft", "list", "ruleset"]).stdout == ""
    assert node.call(lambda: Path("/proc/thread-self/net/ip_tables_names").read_text()) == ""


@pytest.mark.parametrize("chain", [HINT, CANARY])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_the_kubelets_chains_decide(node: Namespace, folder: Path, variant: str, program: str, chain: str) -> None:
    add(node, f"{program}-{variant}", chain)
    other = "legacy" if variant == "nft" else "nft"
    add(node, f"iptables-{other}", "MANY", table="nat", rules=3)
    assert found(node, folder) == variant


def test_without_them_the_variant_with_more_rules(node: Namespace, folder: Path) -> None:
    add(node, "iptables-nft", "SOME", table="filter", rules=2)
    add(node, "ip6tables-legacy", "SOME", table="filter", rules=2)
    assert found(node, folder) == "nft"
    add(node, "iptables-legacy", "MORE", table="nat", rules=1)
    assert found(node, folder) == "legacy"


def test_tables_without_rules_are_no_sign(node: Namespace, folder: Path) -> None:
    add(node, "iptables-legacy", "EMPTY", table="nat")
    assert found(node, folder) == "nft"


def test_a_variant_that_is_not_there_is_not_in_use(node: Namespace, folder: Path) -> None:
    add(node, "iptables-nft", HINT)
    shutil.rmtree(folder / "nft")
    assert found(node, folder) == "nft"
    add(node, "iptables-legacy", HINT)
    assert found(node, folder) == "legacy"


def test_programs_started_later_are_of_the_hosts_variant(node: Namespace, folder: Path) -> None:
    add(node, "iptables-legacy", HINT)
    environment = {FOLDER_VARIABLE: str(folder), "PATH": "/usr/sbin:/usr/bin"}
    assert node.call(lambda: use_host_variant(environment)) == "legacy"
    program = shutil.which("iptables-save", path=environment["PATH"])
    assert program == str(folder / "legacy/iptables-save")
    assert environment["PATH"].endswith(":/usr/sbin:/usr/bin")


def test_on_a_host_nothing_changes() -> None:
    environment = {"PATH": "/usr/sbin"}
    assert use_host_variant(environment) is None
    assert environment == {"PATH": "/usr/sbin"}
