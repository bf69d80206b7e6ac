"""The nftables simulator: statements as documented in nft(8) and implemented in Linux."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.model.types import Family
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import PacketOutcome, Verdict
from tests.unit.simulation import ACCEPTED, DROPPED, FROM_NODE, NODE, POD, TRANSLATED, packet

DNAT = f"meta l4proto tcp dnat to {POD}"

BASE_CHAINS = {
    "before": "type filter hook prerouting priority dstnat - 10; policy accept;",
    "prerouting": "type nat hook prerouting priority dstnat; policy accept;",
    "input": "type filter hook input priority filter; policy accept;",
    "forward": "type filter hook forward priority filter; policy accept;",
    "closed": "type filter hook forward priority filter + 5; policy drop;",
    "early": "type filter hook output priority -110; policy accept;",
    "nat-output": "type nat hook output priority -100; policy accept;",
    "output": "type filter hook output priority filter; policy accept;",
    "postrouting": "type nat hook postrouting priority srcnat; policy accept;",
}
"""The base chains of the tests, by name."""

SETS_AND_MAPS = """
set plain {
    type ipv4_addr
    comment "braces { in a comment }"
    elements = { 10.96.0.1, 10.96.0.2 comment "two",
                 10.96.0.3 }
}

set networks {
    type ipv4_addr
    flags interval
    elements = { 10.0.0.0/8, 11.0.0.1-11.0.0.7 }
}

set connections {
    type ipv4_addr . ipv4_addr . inet_proto . inet_service
    elements = { 198.51.100.1 . 10.96.0.1 . tcp . 80 }
}

set typed {
    typeof ip daddr . meta l4proto
    elements = { 10.96.0.1 . udp }
}

set one {
    type ipv4_addr
    size 65535
    flags dynamic,timeout
    timeout 3h
    elements = { 192.0.2.1 expires 2h59m59s996ms, 192.0.2.2 timeout 2h expires 1h59m comment "x" }
}

set two {
    type ipv4_addr
    size 65535
    flags dynamic,timeout
    timeout 3h
}

map verdicts {
    type ipv4_addr . inet_proto . inet_service : verdict
    counter
    elements = { 10.96.0.1 . tcp . 80 counter packets 3 bytes 180 comment "web" : goto other,
                 10.96.0.2 . tcp . 80 : drop, 10.96.0.3 . tcp . 80 : accept, 10.96.0.4 . tcp . 80 : return,
                 10.96.0.5 . tcp . 80 : continue, 10.96.0.6 . sctp . 80 : jump other }
}

map ports {
    typeof meta l4proto . th dport : verdict
    elements = { udp . 53 : drop }
}

map endpoints {
    typeof ip daddr . meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport
    comment "numbered"
    elements = { 10.96.0.1 . tcp . 80 . 0 : 10.244.1.1 . 8080, 10.96.0.1 . tcp . 80 . 1 comment "x" : 10.244.1.2 . 8080,
                 10.96.0.1 . tcp . 80 . 2 : 10.244.1.3 . 8080, 10.96.0.2 . tcp . 80 . 5 : 10.244.1.4 . 8080 }
}
"""
"""The sets and maps that the rules of the tests refer to."""


def table(body: str, family: str = "ip") -> str:
    return f'table {family} kube-proxy {{\n\tcomment "rules"\n{body}\n}}\n'


def chain(name: str, *rules: str) -> str:
    lines = [BASE_CHAINS[name]] if name in BASE_CHAINS else ['comment "no base chain"']
    return "\n".join([f"chain {name} {{", *(f"\t{line}" for line in (*lines, *rules)), "}", ""])


def rules(sets: str = SETS_AND_MAPS, family: Family = Family.IPV4, **chains: list[str]) -> NftablesSimulator:
    """Return a simulator of rules by chain name, with `_` for `-`. The chain `other` always exists."""
    named = {name.replace("_", "-"): lines for name, lines in chains.items()}
    body = sets + "".join(chain(name, *lines) for name, lines in ({"other": list[str]()} | named).items())
    return NftablesSimulator(table(body, "ip6" if family is Family.IPV6 else "ip"), family)


def test_packet_without_a_matching_rule_is_accepted() -> None:
    assert rules().send(packet()).probabilities == {ACCEPTED: 1.0}
    assert NftablesSimulator("", Family.IPV4).send(packet()).probabilities == {ACCEPTED: 1.0}


MATCHING: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    ("ip saddr 198.51.100.0/24", {}, {"source": "198.51.101.1"}),
    ("ip saddr 198.51.100.1", {}, {"source": "198.51.100.2"}),
    ("ip saddr != 10.244.0.0/16", {}, {"source": "10.244.3.1"}),
    ("ip saddr { 10.0.0.0/8, 198.51.100.1 }", {}, {"source": "11.0.0.1"}),
    ("ip saddr { 198.51.100.0-198.51.100.9 }", {}, {"source": "198.51.100.10"}),
    ("ip saddr != { 10.0.0.0/8, 11.0.0.1 }", {}, {"source": "11.0.0.1"}),
    ("ip daddr 10.96.0.1-10.96.0.2", {}, {"destination": "10.96.0.3"}),
    ("ip daddr @plain", {}, {"destination": "10.96.0.4"}),
    ("ip daddr @plain", {"destination": "10.96.0.2"}, None),
    ("ip daddr @plain", {"destination": "10.96.0.3"}, None),
    ("ip daddr != @plain", {"destination": "10.96.0.4"}, {}),
    ("ip daddr @networks", {"destination": "10.1.2.3"}, {"destination": "11.0.0.8"}),
    ("ip daddr @networks", {"destination": "11.0.0.7"}, {"destination": "12.0.0.1"}),
    ("ip saddr . ip daddr . meta l4proto . th dport @connections", {}, {"port": 81}),
    ("ip saddr . ip daddr . meta l4proto . th dport @connections", {}, {"protocol": "UDP"}),
    ("ip daddr . meta l4proto @typed", {"protocol": "UDP"}, {}),
    ("ip daddr . meta l4proto { 10.96.0.1 . tcp }", {}, {"protocol": "UDP"}),
    ("meta l4proto tcp", {}, {"protocol": "UDP"}),
    ("meta l4proto { udp, sctp }", {"protocol": "SCTP"}, {}),
    ("meta l4proto . th dport udp . 53", {"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}),
    ("th dport 80", {}, {"port": 8080}),
    ('iifname "eth0"', {}, {"interface": "eth01"}),
    ('iifname != "veth0"', {}, {"interface": "veth0"}),
    ('iifname "veth*"', {"interface": "veth1"}, {}),
    ('iifname != "veth*"', {}, {"interface": "veth"}),
    ("fib saddr type local", {"source": NODE}, {}),
    ("fib saddr type local", {"source": "127.8.8.8"}, {"source": "128.0.0.1"}),
    ("ct state new", {}, {"conntrack_state": "ESTABLISHED"}),
    ("ct state established,related", {"conntrack_state": "RELATED"}, {"conntrack_state": "INVALID"}),
    ("meta mark & 0x00004000 == 0x00000000", {}, None),
    ("numgen random mod 1 0", {}, None),
]


@pytest.mark.parametrize(("match", "hit", "miss"), MATCHING)
def test_match(match: str, hit: dict[str, Any], miss: dict[str, Any] | None) -> None:
    simulator = rules(forward=[f'{match} drop comment "a {{ b"'])
    assert simulator.send(packet(**hit)).only == DROPPED
    if miss is not None:
        assert simulator.send(packet(**miss)).only == ACCEPTED


@pytest.mark.parametrize(
    "match", ["ip saddr != 0.0.0.0/0", "ct status dnat", "meta mark & 0x4000 != 0x0", "numgen random mod 3 3"]
)
def test_match_that_never_applies(match: str) -> None:
    assert rules(forward=[f"{match} drop"]).send(packet()).probabilities == {ACCEPTED: 1.0}


def test_destination_type_local() -> None:
    simulator = rules(before=["fib daddr type local drop"])
    assert simulator.send(packet(destination=NODE)).only == DROPPED
    assert simulator.send(packet()).only == ACCEPTED


def test_rule_applies_only_if_all_its_matches_do() -> None:
    simulator = rules(forward=["ip saddr 198.51.100.1 meta l4proto tcp th dport 80 drop"])
    assert simulator.send(packet()).only == DROPPED
    assert simulator.send(packet(port=81)).only == ACCEPTED
    assert simulator.send(packet(source="198.51.100.2")).only == ACCEPTED


def test_ipv6() -> None:
    simulator = rules(
        "",
        Family.IPV6,
        prerouting=[
            "ip6 daddr fd00:99::2 meta l4proto tcp dnat to [fd00::9]:8080",
            "ip6 daddr fd00:10:96::/112 dnat ip6 to numgen random mod 1 map { 0 : fd00::8 . 80 }",
        ],
        nat_output=["ip6 daddr != ::1 fib daddr type local meta l4proto tcp dnat to [fd00::7]:80"],
        forward=["ip6 saddr fd00::/16 reject"],
    )
    external = {"source": "2001:db8::1"}
    assert simulator.send(packet(**external, destination="fd00:99::2")).only.endpoint == "[fd00::9]:8080"
    assert simulator.send(packet(**external, destination="fd00:10:96::4")).only.endpoint == "[fd00::8]:80"
    from_loopback = {"source": "::1", "interface": ""}
    assert simulator.send(packet(**from_loopback, destination="::1")).only == ACCEPTED
    assert simulator.send(packet(**from_loopback, destination="fd00:99::2")).only.endpoint == "[fd00::7]:80"
    rejected = simulator.send(packet(source="fd00::1", destination="2001:db8::1")).only
    assert rejected == PacketOutcome(Verdict.REJECTED, reject_with="icmp6-port-unreachable")


def test_packet_of_another_family_is_rejected() -> None:
    with pytest.raises(ValueError, match="IPv4"):
        rules().send(packet(source="2001:db8::1", destination="fd00::1"))


# Verdicts and the traversal of chains.


def test_chain_returns_to_the_rule_after_the_jump() -> None:
    simulator = rules(
        forward=["jump other", "drop"],
        other=["meta l4proto udp return", "meta l4proto udp accept", "meta l4proto sctp jump last", "th dport 80"],
        last=["accept"],
    )
    assert simulator.send(packet(protocol="UDP")).only == DROPPED
    assert simulator.send(packet(protocol="TCP")).only == DROPPED
    assert simulator.send(packet(protocol="SCTP")).only == ACCEPTED


@pytest.mark.parametrize("leave", ["return", "continue"])
def test_chain_entered_by_goto_returns_to_the_last_jump(leave: str) -> None:
    simulator = rules(
        forward=["meta l4proto sctp goto first", "jump first", "drop"],
        first=["goto second", "accept"],
        second=[leave],
    )
    assert simulator.send(packet()).only == DROPPED
    assert simulator.send(packet(protocol="SCTP")).only == ACCEPTED


def test_goto_or_return_from_a_base_chain_applies_its_policy() -> None:
    simulator = rules(closed=["meta l4proto udp return", "meta l4proto sctp goto other", "accept"])
    assert simulator.send(packet(protocol="UDP")).only == DROPPED
    assert simulator.send(packet(protocol="SCTP")).only == DROPPED
    assert simulator.send(packet()).only == ACCEPTED


def test_accept_ends_only_the_current_base_chain() -> None:
    simulator = rules(forward=["accept", "drop"], closed=["meta l4proto udp accept"])
    assert simulator.send(packet(protocol="UDP")).only == ACCEPTED
    assert simulator.send(packet()).only == DROPPED


def test_reject_has_an_icmp_type_and_ends_all_chains() -> None:
    simulator = rules(forward=["reject"], closed=[])
    assert simulator.send(packet()).only == PacketOutcome(Verdict.REJECTED, reject_with="icmp-port-unreachable")


VERDICTS = [
    ({}, "from other"),
    ({"destination": "10.96.0.2"}, "dropped"),
    ({"destination": "10.96.0.3"}, "accepted"),
    ({"destination": "10.96.0.4"}, "accepted"),
    ({"destination": "10.96.0.5"}, "next rule"),
    ({"destination": "10.96.0.6", "protocol": "SCTP"}, "next rule"),
    ({"destination": "10.96.0.7"}, "next rule"),
    ({"port": 81}, "next rule"),
]


@pytest.mark.parametrize(("changes", "result"), VERDICTS)
def test_verdict_map(changes: dict[str, Any], result: str) -> None:
    """A lookup without a result does not match; `jump` and `continue` proceed with the next rule."""
    simulator = rules(
        prerouting=["ip daddr . meta l4proto . th dport vmap @verdicts", "dnat to 10.0.0.2:2"],
        other=["meta l4proto tcp dnat to 10.0.0.1:1"],
    )
    outcome = simulator.send(packet(**changes)).only
    outcomes = {"dropped": DROPPED, "accepted": ACCEPTED, "from other": PacketOutcome(Verdict.ACCEPTED, "10.0.0.1:1")}
    assert outcome == outcomes.get(result, PacketOutcome(Verdict.ACCEPTED, "10.0.0.2:2"))


def test_anonymous_verdict_map() -> None:
    simulator = rules(forward=["th dport vmap { 80 : drop, 81 : goto other }", "reject"], other=["accept"])
    assert simulator.send(packet()).only == DROPPED
    assert simulator.send(packet(port=81)).only == ACCEPTED
    assert simulator.send(packet(port=82)).only.verdict is Verdict.REJECTED


def test_map_with_typeof() -> None:
    simulator = rules(forward=["meta l4proto . th dport vmap @ports"])
    assert simulator.send(packet(protocol="UDP", port=53)).only == DROPPED
    assert simulator.send(packet(port=53)).only == ACCEPTED


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        (["| 0x00004000"], "& 0xffffffff == 0x00004000"),
        (["| 0x00004001", "^ 0x00004000"], "& 0xffffffff == 0x00000001"),
        (["| 0x000000ff", "& 0x0000000f"], "& 0xffffffff == 0x0000000f"),
        (["| 0x00004000"], "& 0x00004000 != 0x00000000"),
    ],
)
def test_mark_operations(changes: list[str], mark: str) -> None:
    lines = [f'meta mark set meta mark {change} comment "mark"' for change in changes]
    assert rules(forward=[*lines, f"meta mark {mark} drop"]).send(packet()).only == DROPPED


def test_mark_persists_across_hooks() -> None:
    simulator = rules(
        prerouting=["meta mark set meta mark | 0x00004000"],
        postrouting=["meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade"],
    )
    assert simulator.send(packet()).only == PacketOutcome(Verdict.ACCEPTED, masqueraded=True)
    assert simulator.send(packet(**FROM_NODE)).only == ACCEPTED


def test_statements_before_a_failing_match_take_effect() -> None:
    simulator = rules(
        forward=["meta mark set meta mark | 0x00000001 meta l4proto udp drop", "meta mark & 0x00000001 == 0x1 reject"]
    )
    assert simulator.send(packet()).only.verdict is Verdict.REJECTED


# Hooks and priorities.


def test_packet_is_routed_after_dnat() -> None:
    simulator = rules(
        prerouting=[f"ip daddr {NODE} {DNAT}", f"ip daddr 10.96.0.7 meta l4proto tcp dnat to {NODE}:443"],
        input=["reject"],
        postrouting=["masquerade"],
    )
    assert simulator.send(packet(destination=NODE)).only == PacketOutcome(Verdict.ACCEPTED, POD, masqueraded=True)
    delivered = simulator.send(packet(destination="10.96.0.7")).only
    assert delivered == PacketOutcome(Verdict.REJECTED, f"{NODE}:443", reject_with="icmp-port-unreachable")


def test_packet_to_this_node_does_not_pass_postrouting() -> None:
    assert rules(postrouting=["masquerade"], forward=["drop"]).send(packet(destination=NODE)).only == ACCEPTED


def test_packet_dropped_before_dnat_is_not_translated() -> None:
    simulator = rules(prerouting=[DNAT], before=["ip daddr 10.96.0.1 drop"])
    assert simulator.send(packet()).only == DROPPED
    assert simulator.send(packet(destination="10.96.0.2")).only == TRANSLATED


def test_base_chains_of_a_hook_run_in_order_of_priority() -> None:
    simulator = rules(
        output=["ip daddr 10.244.1.9 drop"],
        nat_output=["meta l4proto tcp dnat to 10.244.1.9:8080"],
        early=["ip daddr 10.244.1.9 reject"],
    )
    assert simulator.send(packet(**FROM_NODE)).only == PacketOutcome(Verdict.DROPPED, POD)


def test_priority_of_a_nat_chain_counts_among_nat_chains_only() -> None:
    """The kernel runs all nat chains of a hook at one fixed priority (dstnat or srcnat), until one of them translates.

    Their own priorities only order them among each other.
    """
    text = "".join(
        f"chain {name} {{\n type {kind} hook prerouting priority {priority}; policy accept;\n {rule}\n}}\n"
        for name, kind, priority, rule in [
            ("late", "nat", "dstnat + 20", "meta l4proto tcp dnat to 10.0.0.2:2"),
            ("between", "filter", "dstnat + 10", "ip daddr 10.0.0.0/8 ct status dnat drop"),
            ("soon", "nat", "-100", "ip saddr 192.0.2.1 meta l4proto tcp dnat to 10.0.0.1:1"),
        ]
    )
    simulator = NftablesSimulator(table(text), Family.IPV4)
    assert simulator.send(packet()).only == PacketOutcome(Verdict.DROPPED, "10.0.0.2:2")
    assert simulator.send(packet(source="192.0.2.1")).only == PacketOutcome(Verdict.DROPPED, "10.0.0.1:1")


def test_packet_from_the_node_to_itself_arrives_on_lo_untranslated() -> None:
    simulator = rules(prerouting=[DNAT], input=['iifname "lo" ct state new drop'], output=['iifname "lo" reject'])
    assert simulator.send(packet(**FROM_NODE, destination=NODE)).only == DROPPED
    assert simulator.send(packet(source="127.0.0.1", interface="", destination="127.0.0.1")).only == DROPPED
    assert simulator.send(packet(**FROM_NODE)).only == ACCEPTED


def test_packet_from_the_node_to_itself_passes_prerouting_filters() -> None:
    simulator = rules(before=['iifname "lo" drop'])
    assert simulator.send(packet(**FROM_NODE, destination=NODE)).only == DROPPED
    assert simulator.send(packet(**FROM_NODE)).only == ACCEPTED


def test_negated_interface_matches_packets_without_an_input_interface() -> None:
    simulator = rules(output=['iifname != "veth*" drop'], forward=['iifname != "veth*" accept'])
    assert simulator.send(packet(**FROM_NODE)).only == DROPPED


@pytest.mark.parametrize("state", ["ESTABLISHED", "RELATED", "INVALID"])
def test_only_the_first_packet_of_a_connection_passes_nat(state: str) -> None:
    simulator = rules(prerouting=[DNAT], nat_output=[DNAT], postrouting=["masquerade"])
    assert simulator.send(packet(conntrack_state=state)).only == ACCEPTED
    assert simulator.send(packet(**FROM_NODE, conntrack_state=state)).only == ACCEPTED


def test_dropped_packet_does_not_reach_the_next_hook() -> None:
    assert rules(forward=["drop"], postrouting=["masquerade"]).send(packet()).only == DROPPED
