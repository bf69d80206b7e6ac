"""An image with both iptables variants uses the one that the host uses."""

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
    """Both variants, in the directory layout of the image."""
    for variant in ("nft", "legacy"):
        multi = shutil.which(f"xtables-{variant}-multi")
        if multi is None:
            pytest.skip(f"iptables-{variant} not found")
        (tmp_path / variant).mkdir()
        for name in (program + action for program in PROGRAMS for action in ("", "-save", "-restore")):
            (tmp_path / variant / name).symlink_to(multi)
    return tmp_path


def add(node: Namespace, program: str, *chains: str, table: str = "mangle", rules: int = 0) -> None:
    for chain in chains:
        node.run([program, "-t", table, "-N", chain])
        for _ in range(rules):
            node.run([program, "-t", table, "-A", chain, "-j", "RETURN"])


def detected(node: Namespace, folder: Path) -> str:
    return node.call(lambda: detect_variant(folder))


def test_nft_is_the_default_and_detection_changes_nothing(node: Namespace, folder: Path) -> None:
    assert detected(node, folder) == "nft"
    assert node.run(["nft", "list", "ruleset"]).stdout == ""
    assert node.call(lambda: Path("/proc/thread-self/net/ip_tables_names").read_text()) == ""


@pytest.mark.parametrize("chain", [HINT, CANARY])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_chains_of_the_kubelet_decide(node: Namespace, folder: Path, variant: str, program: str, chain: str) -> None:
    add(node, f"{program}-{variant}", chain)
    other = "legacy" if variant == "nft" else "nft"
    add(node, f"iptables-{other}", "MANY", table="nat", rules=3)
    assert detected(node, folder) == variant


def test_variant_with_more_rules_wins_without_chains_of_the_kubelet(node: Namespace, folder: Path) -> None:
    add(node, "iptables-nft", "SOME", table="filter", rules=2)
    add(node, "ip6tables-legacy", "SOME", table="filter", rules=2)
    assert detected(node, folder) == "nft"
    add(node, "iptables-legacy", "MORE", table="nat", rules=1)
    assert detected(node, folder) == "legacy"


def test_tables_without_rules_are_ignored(node: Namespace, folder: Path) -> None:
    add(node, "iptables-legacy", "EMPTY", table="nat")
    assert detected(node, folder) == "nft"


def test_missing_variant_is_never_selected(node: Namespace, folder: Path) -> None:
    add(node, "iptables-nft", HINT)
    shutil.rmtree(folder / "nft")
    assert detected(node, folder) == "nft"
    add(node, "iptables-legacy", HINT)
    assert detected(node, folder) == "legacy"


def test_selected_variant_precedes_others_in_path(node: Namespace, folder: Path) -> None:
    add(node, "iptables-legacy", HINT)
    environment = {FOLDER_VARIABLE: str(folder), "PATH": "/usr/sbin:/usr/bin"}
    assert node.call(lambda: use_host_variant(environment)) == "legacy"
    program = shutil.which("iptables-save", path=environment["PATH"])
    assert program == str(folder / "legacy/iptables-save")
    assert environment["PATH"].endswith(":/usr/sbin:/usr/bin")


def test_path_is_unchanged_outside_the_image() -> None:
    environment = {"PATH": "/usr/sbin"}
    assert use_host_variant(environment) is None
    assert environment == {"PATH": "/usr/sbin"}
