"""Rules in the variant of iptables that is not in use are noticed."""

from __future__ import annotations

import pytest

from kproxy.iptables.variant import other_variant_warning
from tests.lab.namespace import Namespace


def create(node: Namespace, program: str) -> None:
    if node.run([program, "--version"], check=False).returncode:
        pytest.skip(f"no {program} here")
    node.run([program, "-t", "nat", "-N", "KUBE-SERVICES"])


def test_nothing_to_say_on_a_fresh_node(node: Namespace) -> None:
    for uses_nft in (True, False):
        assert node.call(lambda uses_nft=uses_nft: other_variant_warning(uses_nft=uses_nft)) == ""  # type: ignore[misc]


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
def test_legacy_rules_beside_nft(node: Namespace, program: str) -> None:
    create(node, program)
    said = node.call(lambda: other_variant_warning(uses_nft=True))
    assert said.startswith("iptables-legacy has KUBE- chains (1), but kproxy uses iptables-nft")


@pytest.mark.parametrize("program", ["iptables-nft", "ip6tables-nft"])
def test_nft_rules_beside_legacy(node: Namespace, program: str) -> None:
    create(node, program)
    said = node.call(lambda: other_variant_warning(uses_nft=False))
    assert said.startswith(
        f"iptables-nft has the chain KUBE-SERVICES in table {'ip6' if program.startswith('ip6') else 'ip'} nat"
    )


def test_our_own_variant_is_no_mix_up(node: Namespace) -> None:
    create(node, "iptables-nft")
    assert node.call(lambda: other_variant_warning(uses_nft=True)) == ""
