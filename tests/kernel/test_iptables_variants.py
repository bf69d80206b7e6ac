"""Warnings about rules in the variant of iptables that is not in use."""

from __future__ import annotations

import pytest

from kproxy.iptables.variant import other_variant_warning
from tests.lab.namespace import Namespace


def create(node: Namespace, program: str) -> None:
    if node.run([program, "--version"], check=False).returncode:
        pytest.skip(f"{program} not found")
    node.run([program, "-t", "nat", "-N", "KUBE-SERVICES"])


def test_no_warning_on_a_new_node(node: Namespace) -> None:
    for uses_nft in (True, False):
        assert node.call(lambda uses_nft=uses_nft: other_variant_warning(uses_nft=uses_nft)) == ""  # type: ignore[misc]


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
def test_rules_of_iptables_legacy_are_reported(node: Namespace, program: str) -> None:
    create(node, program)
    warning = node.call(lambda: other_variant_warning(uses_nft=True))
    assert warning.startswith("iptables-legacy has KUBE- chains (1), but kproxy uses iptables-nft")


@pytest.mark.parametrize("program", ["iptables-nft", "ip6tables-nft"])
def test_rules_of_iptables_nft_are_reported(node: Namespace, program: str) -> None:
    create(node, program)
    warning = node.call(lambda: other_variant_warning(uses_nft=False))
    assert warning.startswith(
        f"iptables-nft has the chain KUBE-SERVICES in table {'ip6' if program.startswith('ip6') else 'ip'} nat"
    )


def test_rules_of_the_variant_in_use_are_not_reported(node: Namespace) -> None:
    create(node, "iptables-nft")
    assert node.call(lambda: other_variant_warning(uses_nft=True)) == ""
