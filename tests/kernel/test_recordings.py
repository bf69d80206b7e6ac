"""`kproxy apply` on a new node programs the same chains as kube-proxy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kproxy.model.types import Family
from tests.lab.iptables import PREFIXES, add_counters, current_rules, link_programs, programs_of, restore_recording
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.recordings import GOLDEN, SCENARIOS, recorded


def apply(node: Namespace, scenario: str) -> None:
    folder = str(GOLDEN / scenario)
    node.run([KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}"])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_apply_programs_the_rules_of_kube_proxy(node: Namespace, scenario: str) -> None:
    apply(node, scenario)
    for family in Family:
        assert current_rules(node, family) == recorded(scenario, family)


@pytest.mark.parametrize("scenario", ["random-11", "dual-stack", "session-affinity"])
def test_both_variants_of_iptables_program_the_rules_of_kube_proxy(
    node: Namespace, variant: str, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_programs(programs_of(variant), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    apply(node, scenario)
    for family in Family:
        assert current_rules(node, family) == recorded(scenario, family)


@pytest.mark.parametrize("scenario", ["random-11", "dual-stack"])
def test_apply_replaces_other_rules_of_kube_proxy(node: Namespace, scenario: str) -> None:
    restore_recording(node, "random-12")
    apply(node, scenario)
    for family in Family:
        assert current_rules(node, family) == recorded(scenario, family)


def test_canaries_are_in_all_tables(node: Namespace) -> None:
    apply(node, "clusterip")
    for prefix in PREFIXES.values():
        for table in ("mangle", "nat", "filter"):
            assert ":KUBE-PROXY-CANARY -" in node.run([f"{prefix}-save", "-t", table]).stdout


@pytest.mark.parametrize("family", Family)
def test_rendered_text_programs_the_same_rules(node: Namespace, family: Family) -> None:
    folder = str(GOLDEN / "random-13")
    argv = [
        KPROXY,
        "render",
        f"--config={folder}/config.json",
        f"--objects={folder}",
        f"--family={family.value.lower()}",
    ]
    text = node.run(argv).stdout
    add_counters(node)
    node.run([f"{PREFIXES[family]}-restore", "--noflush"], text)
    assert current_rules(node, family) == recorded("random-13", family)
