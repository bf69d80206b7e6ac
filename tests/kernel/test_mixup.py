"""Rules in the variant of iptables that is not in use are noticed."""

from __future__ import annotations

import pytest

from kproxy.iptables.variant import rules_in_other_variant
from tests.lab.namespace import Namespace


def create(node: Namespace, program: str) -> None:
    if node.run([program, "--version"], check=False).returncode:
        pytest.skip(f"no {program} here")
    node.run([program, "-t", "nat", "-N", "KUBE-SERVICES"])


def test_nothing_to_say_on_a_fresh_node(node: Namespace) -> None:
    for ours_is_nft in (True, False):
        assert node.call(lambda ours_is_nft=ours_is_nft: rules_in_other_variant(ours_is_nft=ours_is_nft)) == ""  # type: ignore[misc]


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
def test_legacy_rules_beside_nft(node: Namespace, program: str) -> None:
    create(node, program)
    said = node.call(lambda: rules_in_other_variant(ours_is_nft=True))
    assert said.startswith("iptables-legacy holds 1 KUBE- chains beside")


@pytest.mark.parametrize("program", ["iptables-nft", "ip6tables-nft"])
def test_nft_rules_beside_legacy(node: Namespace, program: str) -> None:
    create(node, program)
    said = node.call(lambda: rules_in_other_variant(ours_is_nft=False))
    assert said.startswith(
        f"iptables-nft holds KUBE-SERVICES in table {'ip6' if program.startswith('ip6') else 'ip'} nat"
    )


def test_our_own_variant_is_no_mix_up(node: Namespace) -> None:
    create(node, "iptables-nft")
    assert node.call(lambda: rules_in_other_variant(ours_is_nft=True)) == ""
