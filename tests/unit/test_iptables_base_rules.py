"""The rules of iptables mode that do not depend on Services."""

from __future__ import annotations

import pytest

from kproxy.iptables.base_rules import base_chains, dispatch_trailing_rules, ensured_rules
from kproxy.iptables.names import (
    DISPATCH_CHAINS,
    FILTER_FIREWALL,
    FILTER_FORWARD,
    MARK_MASQ,
    NAT_SERVICES,
    POSTROUTING,
    ChainName,
)
from kproxy.model.context import Context
from kproxy.model.types import Family

FOUR, SIX = Context(Family.IPV4, "node-1"), Context(Family.IPV6, "node-1")
LOCALHOST = Context(Family.IPV4, "node-1", localhost_node_ports=True)


def test_any_bit_can_be_the_masquerade_mark() -> None:
    chains = base_chains(Context(Family.IPV4, "node-1", masquerade_mark=1 << 31))
    assert chains[MARK_MASQ] == "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x80000000/0x80000000"
    assert chains[POSTROUTING].splitlines()[:2] == [
        "-A KUBE-POSTROUTING -m mark ! --mark 0x80000000/0x80000000 -j RETURN",
        "-A KUBE-POSTROUTING -j MARK --set-xmark 0x80000000/0x0",
    ]
    assert "--mark 0x80000000/0x80000000 -j ACCEPT" in chains[FILTER_FORWARD]


@pytest.mark.parametrize(("random_fully", "end"), [(True, "-j MASQUERADE --random-fully"), (False, "-j MASQUERADE")])
def test_random_fully_is_used_if_iptables_supports_it(random_fully: bool, end: str) -> None:
    chains = base_chains(Context(Family.IPV4, "node-1", random_fully=random_fully))
    assert chains[POSTROUTING].endswith(end)


@pytest.mark.parametrize(
    ("drop_invalid", "accounting", "first"),
    [
        (True, True, "INVALID -m nfacct --nfacct-name ct_state_invalid_dropped_pkts -j DROP"),
        (True, False, "INVALID -j DROP"),
        (False, True, "-j ACCEPT"),
        (False, False, "-j ACCEPT"),
    ],
)
def test_invalid_packets_are_dropped_and_counted(drop_invalid: bool, accounting: bool, first: str) -> None:
    chains = base_chains(Context(Family.IPV4, "node-1", drop_invalid=drop_invalid, accounting=accounting))
    rules = chains[FILTER_FORWARD].splitlines()
    assert rules[0].endswith(first)
    assert len(rules) == 2 + drop_invalid


def test_martian_rule_exists_only_with_localhost_node_ports() -> None:
    martian_rules = [rule for rule in ensured_rules(LOCALHOST) if rule.chain == FILTER_FIREWALL]
    assert len(martian_rules) == 1
    assert martian_rules[0].rule.startswith("! -s 127.0.0.0/8 -d 127.0.0.0/8 ")
    assert martian_rules[0].rule.endswith("-j DROP")
    assert not [rule for rule in ensured_rules(FOUR) if rule.chain == FILTER_FIREWALL]
    assert not [rule for rule in ensured_rules(SIX) if rule.chain == FILTER_FIREWALL]


def test_ensured_rule_is_satisfied_only_by_itself() -> None:
    rules = ensured_rules(LOCALHOST)
    for rule in rules:
        assert [other for other in rules if other.chain == rule.chain and rule.is_satisfied_by(other.text)] == [rule]


@pytest.mark.parametrize(
    ("listed", "satisfied"),
    [
        ("-A OUTPUT -m conntrack --ctstate NEW -m comment --comment portals -j KUBE-SERVICES", True),
        ('-A OUTPUT -m comment --comment "of -d another version" -j KUBE-SERVICES', True),
        ("-A OUTPUT -j KUBE-SERVICES", True),
        ("-A OUTPUT -d 192.0.2.1/32 -j KUBE-SERVICES", False),
        ("-A OUTPUT -o eth0 -m comment --comment portals -j KUBE-SERVICES", False),
        ("-A OUTPUT -g KUBE-SERVICES", False),
        ("-A OUTPUT -j KUBE-SERVICES-OF-MINE", False),
    ],
)
def test_jump_is_satisfied_only_by_a_rule_without_restricting_matches(listed: str, satisfied: bool) -> None:
    jump = next(rule for rule in ensured_rules(FOUR) if rule.chain == ChainName("nat", "OUTPUT"))
    assert jump.is_satisfied_by(listed) is satisfied


def test_only_service_jumps_of_table_filter_are_limited_to_new_connections() -> None:
    jumps = {(rule.chain, rule.rule[rule.rule.index("-j ") :]): rule.rule for rule in ensured_rules(FOUR)}
    new = "-m conntrack --ctstate NEW"
    assert new not in jumps[ChainName("nat", "PREROUTING"), "-j KUBE-SERVICES"]
    assert new in jumps[ChainName("filter", "FORWARD"), "-j KUBE-SERVICES"]
    assert new in jumps[ChainName("filter", "INPUT"), "-j KUBE-EXTERNAL-SERVICES"]
    assert new not in jumps[ChainName("filter", "FORWARD"), "-j KUBE-FORWARD"]


@pytest.mark.parametrize(
    ("context", "starts"),
    [
        (FOUR, ["! -d 127.0.0.0/8 -m comment"]),
        (LOCALHOST, ["-m comment"]),
        (SIX, ["! -d ::1/128 -m comment"]),
        (
            Context(Family.IPV4, "n", node_port_addresses=("10.0.0.1", "10.0.0.2")),
            ["-d 10.0.0.1/32 ", "-d 10.0.0.2/32 "],
        ),
        (Context(Family.IPV6, "n", node_port_addresses=("fd00::1",)), ["-d fd00::1/128 "]),
        (Context(Family.IPV4, "n", node_port_addresses=()), []),
    ],
)
def test_rules_that_jump_to_node_ports(context: Context, starts: list[str]) -> None:
    tails = dispatch_trailing_rules(context)
    assert set(tails) == set(DISPATCH_CHAINS)
    assert [text for chain, tail in tails.items() if chain != NAT_SERVICES for text in tail] == []
    rules = [rule.removeprefix("-A KUBE-SERVICES ") for rule in tails[NAT_SERVICES]]
    assert len(rules) == len(starts)
    assert all(rule.startswith(start) for rule, start in zip(rules, starts, strict=True))
    assert all(rule.endswith("-j KUBE-NODEPORTS") for rule in rules)
    assert all(("--dst-type LOCAL" in rule) is (context.node_port_addresses is None) for rule in rules)
