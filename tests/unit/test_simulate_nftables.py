"""The simulator of nftables, statement by statement, against what nft(8) says and Linux does."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.model.types import Family
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import PacketOutcome, Verdict
from tests.unit.simulation import ACCEPTED, DROPPED, NODE, OWN, POD, TRANSLATED, packet

DNAT = f"meta l4proto tcp dnat to {POD}"

BASE = {
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
"""Base chains by the names that the tests below have for them."""

EVERYTHING = """
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
    elements = { 10.96.0.1 . tcp . 80 comment "web" : goto other, 10.96.0.2 . tcp . 80 : drop,
                 10.96.0.3 . tcp . 80 : accept, 10.96.0.4 . tcp . 80 : return,
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
"""Sets and maps that rules of the tests refer to."""


def table(body: str, family: str = "ip") -> str:
    return f'table {family} kube-proxy {{\n\tcomment "rules"\n{body}\n}}\n'


def chain(name: str, *rules: str) -> str:
    lines = [BASE[name]] if name in BASE else ['comment "no base chain"']
    return "\n".join([f"chain {name} {{", *(f"\t{line}" for line in (*lines, *rules)), "}", ""])


def rules(sets: str = EVERYTHING, family: Family = Family.IPV4, **chains: list[str]) -> NftablesSimulator:
    """Return rules by chain, an underscore in its name for a hyphen; there always is an empty chain `other`."""
    named = {name.replace("_", "-"): lines for name, lines in chains.items()}
    body = sets + "".join(chain(name, *lines) for name, lines in ({"other": list[str]()} | named).items())
    return NftablesSimulator(table(body, "ip6" if family is Family.IPV6 else "ip"), family)


def test_a_packet_that_meets_no_rule_arrives() -> None:
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
def test_a_match_hits_and_misses(match: str, hit: dict[str, Any], miss: dict[str, Any] | None) -> None:
    found = rules(forward=[f'{match} drop comment "a {{ b"'])
    assert found.send(packet(**hit)).only == DROPPED
    if miss is not None:
        assert found.send(packet(**miss)).only == ACCEPTED


@pytest.mark.parametrize(
    "match", ["ip saddr != 0.0.0.0/0", "ct status dnat", "meta mark & 0x4000 != 0x0", "numgen random mod 3 3"]
)
def test_a_match_that_holds_for_none(match: str) -> None:
    assert rules(forward=[f"{match} drop"]).send(packet()).probabilities == {ACCEPTED: 1.0}


def test_what_goes_to_this_node_itself() -> None:
    found = rules(before=["fib daddr type local drop"])
    assert found.send(packet(destination=NODE)).only == DROPPED
    assert found.send(packet()).only == ACCEPTED


def test_all_matches_of_a_rule_must_hold() -> None:
    found = rules(forward=["ip saddr 198.51.100.1 meta l4proto tcp th dport 80 drop"])
    assert found.send(packet()).only == DROPPED
    assert found.send(packet(port=81)).only == ACCEPTED
    assert found.send(packet(source="198.51.100.2")).only == ACCEPTED


def test_ipv6() -> None:
    found = rules(
        "",
        Family.IPV6,
        prerouting=[
            "ip6 daddr fd00:99::2 meta l4proto tcp dnat to [fd00::9]:8080",
            "ip6 daddr fd00:10:96::/112 dnat ip6 to numgen random mod 1 map { 0 : fd00::8 . 80 }",
        ],
        nat_output=["ip6 daddr != ::1 fib daddr type local meta l4proto tcp dnat to [fd00::7]:80"],
        forward=["ip6 saddr fd00::/16 reject"],
    )
    outside = {"source": "2001:db8::1"}
    assert found.send(packet(**outside, destination="fd00:99::2")).only.endpoint == "[fd00::9]:8080"
    assert found.send(packet(**outside, destination="fd00:10:96::4")).only.endpoint == "[fd00::8]:80"
    own = {"source": "::1", "interface": ""}
    assert found.send(packet(**own, destination="::1")).only == ACCEPTED
    assert found.send(packet(**own, destination="fd00:99::2")).only.endpoint == "[fd00::7]:80"
    rejected = found.send(packet(source="fd00::1", destination="2001:db8::1")).only
    assert rejected == PacketOutcome(Verdict.REJECTED, reject_with="icmp6-port-unreachable")


def test_packets_of_the_other_family_are_no_question_for_these_rules() -> None:
    with pytest.raises(ValueError, match="IPv4"):
        rules().send(packet(source="2001:db8::1", destination="fd00::1"))


# Verdicts and the walk through chains.


def test_a_chain_entered_by_jump_returns_to_the_rule_after_it() -> None:
    found = rules(
        forward=["jump other", "drop"],
        other=["meta l4proto udp return", "meta l4proto udp accept", "meta l4proto sctp jump last", "th dport 80"],
        last=["accept"],
    )
    assert found.send(packet(protocol="UDP")).only == DROPPED
    assert found.send(packet(protocol="TCP")).only == DROPPED
    assert found.send(packet(protocol="SCTP")).only == ACCEPTED


@pytest.mark.parametrize("leave", ["return", "continue"])
def test_a_chain_entered_by_goto_returns_to_where_the_one_before_was_entered(leave: str) -> None:
    found = rules(
        forward=["meta l4proto sctp goto first", "jump first", "drop"],
        first=["goto second", "accept"],
        second=[leave],
    )
    assert found.send(packet()).only == DROPPED
    assert found.send(packet(protocol="SCTP")).only == ACCEPTED


def test_a_base_chain_left_by_goto_or_return_ends_with_its_policy() -> None:
    found = rules(closed=["meta l4proto udp return", "meta l4proto sctp goto other", "accept"])
    assert found.send(packet(protocol="UDP")).only == DROPPED
    assert found.send(packet(protocol="SCTP")).only == DROPPED
    assert found.send(packet()).only == ACCEPTED


def test_accept_ends_a_base_chain_and_no_other() -> None:
    found = rules(forward=["accept", "drop"], closed=["meta l4proto udp accept"])
    assert found.send(packet(protocol="UDP")).only == ACCEPTED
    assert found.send(packet()).only == DROPPED


def test_reject_names_the_icmp_message_and_ends_all() -> None:
    found = rules(forward=["reject"], closed=[])
    assert found.send(packet()).only == PacketOutcome(Verdict.REJECTED, reject_with="icmp-port-unreachable")


VERDICTS = [
    ({}, "from other"),
    ({"destination": "10.96.0.2"}, "dropped"),
    ({"destination": "10.96.0.3"}, "arrives"),
    ({"destination": "10.96.0.4"}, "arrives"),
    ({"destination": "10.96.0.5"}, "next rule"),
    ({"destination": "10.96.0.6", "protocol": "SCTP"}, "next rule"),
    ({"destination": "10.96.0.7"}, "next rule"),
    ({"port": 81}, "next rule"),
]


@pytest.mark.parametrize(("changes", "what"), VERDICTS)
def test_a_map_of_verdicts(changes: dict[str, Any], what: str) -> None:
    """Its miss is no match, and `jump` and `continue` go on with the next rule."""
    found = rules(
        prerouting=["ip daddr . meta l4proto . th dport vmap @verdicts", "dnat to 10.0.0.2:2"],
        other=["meta l4proto tcp dnat to 10.0.0.1:1"],
    )
    fate = found.send(packet(**changes)).only
    told = {"dropped": DROPPED, "arrives": ACCEPTED, "from other": PacketOutcome(Verdict.ACCEPTED, "10.0.0.1:1")}
    assert fate == told.get(what, PacketOutcome(Verdict.ACCEPTED, "10.0.0.2:2"))


def test_a_map_of_verdicts_within_a_rule() -> None:
    found = rules(forward=["th dport vmap { 80 : drop, 81 : goto other }", "reject"], other=["accept"])
    assert found.send(packet()).only == DROPPED
    assert found.send(packet(port=81)).only == ACCEPTED
    assert found.send(packet(port=82)).only.verdict is Verdict.REJECTED


def test_a_map_with_a_type_by_example() -> None:
    found = rules(forward=["meta l4proto . th dport vmap @ports"])
    assert found.send(packet(protocol="UDP", port=53)).only == DROPPED
    assert found.send(packet(port=53)).only == ACCEPTED


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        (["| 0x00004000"], "& 0xffffffff == 0x00004000"),
        (["| 0x00004001", "^ 0x00004000"], "& 0xffffffff == 0x00000001"),
        (["| 0x000000ff", "& 0x0000000f"], "& 0xffffffff == 0x0000000f"),
        (["| 0x00004000"], "& 0x00004000 != 0x00000000"),
    ],
)
def test_marks(changes: list[str], mark: str) -> None:
    lines = [f'meta mark set meta mark {each} comment "mark"' for each in changes]
    assert rules(forward=[*lines, f"meta mark {mark} drop"]).send(packet()).only == DROPPED


def test_a_mark_set_at_one_hook_is_seen_at_the_next() -> None:
    found = rules(
        prerouting=["meta mark set meta mark | 0x00004000"],
        postrouting=["meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade"],
    )
    assert found.send(packet()).only == PacketOutcome(Verdict.ACCEPTED, masqueraded=True)
    assert found.send(packet(**OWN)).only == ACCEPTED


def test_what_a_rule_has_done_stays_done_if_it_does_not_match_in_the_end() -> None:
    found = rules(
        forward=["meta mark set meta mark | 0x00000001 meta l4proto udp drop", "meta mark & 0x00000001 == 0x1 reject"]
    )
    assert found.send(packet()).only.verdict is Verdict.REJECTED


# Which hooks a packet passes, and when.


def test_where_a_packet_goes_is_decided_after_its_translation() -> None:
    found = rules(
        prerouting=[f"ip daddr {NODE} {DNAT}", f"ip daddr 10.96.0.7 meta l4proto tcp dnat to {NODE}:443"],
        input=["reject"],
        postrouting=["masquerade"],
    )
    assert found.send(packet(destination=NODE)).only == PacketOutcome(Verdict.ACCEPTED, POD, masqueraded=True)
    taken_in = found.send(packet(destination="10.96.0.7")).only
    assert taken_in == PacketOutcome(Verdict.REJECTED, f"{NODE}:443", reject_with="icmp-port-unreachable")


def test_what_comes_in_for_this_node_passes_no_postrouting() -> None:
    assert rules(postrouting=["masquerade"], forward=["drop"]).send(packet(destination=NODE)).only == ACCEPTED


def test_what_is_dropped_before_translation_is_not_translated() -> None:
    found = rules(prerouting=[DNAT], before=["ip daddr 10.96.0.1 drop"])
    assert found.send(packet()).only == DROPPED
    assert found.send(packet(destination="10.96.0.2")).only == TRANSLATED


def test_the_chains_of_a_hook_run_by_priority_however_they_are_listed() -> None:
    found = rules(
        output=["ip daddr 10.244.1.9 drop"],
        nat_output=["meta l4proto tcp dnat to 10.244.1.9:8080"],
        early=["ip daddr 10.244.1.9 reject"],
    )
    assert found.send(packet(**OWN)).only == PacketOutcome(Verdict.DROPPED, POD)


def test_priorities_of_type_nat_only_order_such_chains() -> None:
    """The kernel runs all of them where the first was meant to be; one that translates is the last."""
    text = "".join(
        f"chain {name} {{\n type {kind} hook prerouting priority {priority}; policy accept;\n {rule}\n}}\n"
        for name, kind, priority, rule in [
            ("late", "nat", "dstnat + 20", "meta l4proto tcp dnat to 10.0.0.2:2"),
            ("between", "filter", "dstnat + 10", "ip daddr 10.0.0.0/8 ct status dnat drop"),
            ("soon", "nat", "-100", "ip saddr 192.0.2.1 meta l4proto tcp dnat to 10.0.0.1:1"),
        ]
    )
    found = NftablesSimulator(table(text), Family.IPV4)
    assert found.send(packet()).only == PacketOutcome(Verdict.DROPPED, "10.0.0.2:2")
    assert found.send(packet(source="192.0.2.1")).only == PacketOutcome(Verdict.DROPPED, "10.0.0.1:1")


def test_what_the_node_sends_to_itself_comes_in_by_lo_untranslated() -> None:
    found = rules(prerouting=[DNAT], input=['iifname "lo" ct state new drop'], output=['iifname "lo" reject'])
    assert found.send(packet(**OWN, destination=NODE)).only == DROPPED
    assert found.send(packet(source="127.0.0.1", interface="", destination="127.0.0.1")).only == DROPPED
    assert found.send(packet(**OWN)).only == ACCEPTED


def test_what_the_node_sends_to_itself_passes_filters_before_routing() -> None:
    found = rules(before=['iifname "lo" drop'])
    assert found.send(packet(**OWN, destination=NODE)).only == DROPPED
    assert found.send(packet(**OWN)).only == ACCEPTED


def test_what_comes_from_no_interface_is_not_from_any_other() -> None:
    found = rules(output=['iifname != "veth*" drop'], forward=['iifname != "veth*" accept'])
    assert found.send(packet(**OWN)).only == DROPPED


@pytest.mark.parametrize("state", ["ESTABLISHED", "RELATED", "INVALID"])
def test_only_the_first_packet_of_a_connection_is_translated(state: str) -> None:
    found = rules(prerouting=[DNAT], nat_output=[DNAT], postrouting=["masquerade"])
    assert found.send(packet(conntrack_state=state)).only == ACCEPTED
    assert found.send(packet(**OWN, conntrack_state=state)).only == ACCEPTED


def test_what_one_hook_ends_the_next_does_not_see() -> None:
    assert rules(forward=["drop"], postrouting=["masquerade"]).send(packet()).only == DROPPED
