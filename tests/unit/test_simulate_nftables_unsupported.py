"""The nftables simulator rejects every rule and block that it does not support, and names it in the error."""

from __future__ import annotations

import pytest

from kproxy.model.types import Family
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import UnknownRuleError
from tests.unit.test_simulate_nftables import chain, rules, table

UNSUPPORTED = [
    ("log", "unsupported expression or statement log"),
    ("counter packets 0 bytes 0 drop", "unsupported expression or statement counter"),
    ("goto nowhere", "chain other: chain nowhere does not exist"),
    ("th dport vmap { 80 : jump nowhere }", "chain other: chain nowhere does not exist"),
    ("drop accept", "unexpected accept"),
    ("drop comment", "unexpected end of line after comment"),
    ("drop comment word", "unexpected word, expected a quoted string"),
    ('comment "x" drop', "unexpected drop"),
    ("drop;", "unexpected ;"),
    ('drop comment "x', "unterminated quoted string"),
    ("queue to 1", "unsupported expression or statement queue"),
    ("tcp dport 80 drop", "unsupported expression or statement tcp"),
    ("ip protocol tcp drop", "unsupported expression or statement ip"),
    ("ip6 daddr fd00::1 drop", "unsupported expression or statement ip6"),
    ("ip daddr fd00::1 drop", "fd00::1 does not belong to family IPv4"),
    ("ip daddr fd00::/64 drop", "fd00::/64 does not belong to family IPv4"),
    ("ip daddr 10.0.0.1/8 drop", "invalid network 10.0.0.1/8"),
    ("ip daddr somewhere drop", "invalid address somewhere"),
    ("ip daddr < 10.0.0.1 drop", "invalid address <"),
    ("ip daddr @nothing drop", "set or map nothing does not exist"),
    ("ip daddr @connections drop", "key type address does not match address . address . protocol . port"),
    ("ip daddr @verdicts drop", "expected set, got verdict map"),
    ("ip daddr { 10.0.0.1 10.0.0.2 } drop", "unexpected 10.0.0.2, expected ,"),
    ("ip daddr . th dport { 10.0.0.0/8 . 80 } drop", "invalid address 10.0.0.0/8"),
    ("ip daddr vmap @ports", "key type address does not match protocol . port"),
    ("ip daddr vmap @plain", "expected verdict map, got set"),
    ("ip daddr map @plain", "invalid address map"),
    ("th dport vmap { 80 : queue }", "unexpected queue, expected a verdict"),
    ("th dport vmap { 80 : drop, 80 : accept }", "duplicate element"),
    ("th dport http drop", "unexpected http, expected a number"),
    ("th dport 65536 drop", "invalid port 65536"),
    ("th dport 80-90 drop", "unexpected 80-90, expected a number"),
    ("meta l4proto icmp drop", "unsupported protocol icmp"),
    ("meta skuid 0 drop", "unsupported expression or statement meta"),
    ("meta mark 0x00004000 drop", "unexpected 0x00004000, expected &"),
    ("meta mark set 0x00004000", "unexpected set, expected &"),
    ("meta mark set meta mark + 0x1", "unsupported operator +, expected one of |, ^, &"),
    ("meta mark & 0x1 > 0x0 drop", "unexpected >, expected =="),
    ("ct state untracked drop", "unsupported connection state untracked"),
    ("ct state != new drop", "unsupported connection state !="),
    ("ct status snat drop", "unexpected snat, expected dnat"),
    ("ct mark 1 drop", "unsupported expression or statement ct"),
    ("fib daddr oif 1 drop", "unexpected oif, expected type"),
    ("fib daddr type broadcast drop", "unexpected broadcast, expected local"),
    ("fib daddr . iif type local drop", "unexpected ., expected type"),
    ('iifname { "eth0" } drop', "unexpected {, expected a quoted string"),
    ('oifname "eth0" drop', "unsupported expression or statement oifname"),
    ("numgen inc mod 2 0 drop", "unsupported expression or statement numgen"),
    ("numgen random mod 2 offset 1 0 drop", "unexpected offset, expected a number"),
    ("numgen random mod 0 0 drop", "invalid modulus 0"),
    ("numgen random mod 2 != 0 drop", "unexpected !=, expected a number"),
    ("numgen random mod 2 . th dport 1 . 80 drop", "unsupported numgen in a concatenation outside of a map lookup"),
    ("numgen random mod 2 . numgen random mod 2 vmap { 0 . 0 : drop }", "unsupported key with two numgen expressions"),
    ("reject with icmp host-unreachable", "unexpected with"),
    ("masquerade to :1-2", "unexpected to"),
    ("masquerade random", "unexpected random"),
    ("snat to 10.0.0.1", "unsupported expression or statement snat"),
    ("dnat to 10.0.0.1", "invalid address and port 10.0.0.1"),
    ("dnat to 10.0.0.1-10.0.0.9:80", "invalid address and port 10.0.0.1-10.0.0.9:80"),
    ("dnat to 300.0.0.1:80", "invalid address 300.0.0.1"),
    ("dnat to [fd00::1]:80", "fd00::1 does not belong to family IPv4"),
    ("dnat to 10.0.0.1:70000", "invalid port 70000"),
    ("dnat to 10.0.0.1:80 persistent", "unexpected persistent"),
    ("dnat ip6 to 10.0.0.1:80", "unexpected ip6, expected to"),
    ("dnat ip to th dport map @endpoints", "key type port does not match address . protocol . port . number"),
    ("dnat ip to th dport map @ports", "expected endpoint map, got verdict map"),
    ("dnat ip to th dport vmap @ports", "unexpected vmap, expected map"),
    ("dnat ip to numgen random mod 1 map { 0 : 10.0.0.1 }", "unexpected }, expected ."),
    ("update @nothing { ip saddr }", "set or map nothing does not exist"),
    ("update @one { ip daddr }", "unsupported update: the key must be the source address"),
    ("update @one { ip saddr timeout 1m }", "unexpected timeout, expected }"),
    ("add @one { ip saddr }", "unsupported expression or statement add"),
    ("ip daddr { 10.0.0.1 drop", "unterminated table"),
    ("word", "unsupported expression or statement word"),
]


@pytest.mark.parametrize(("rule", "message"), UNSUPPORTED)
def test_unsupported_rules(rule: str, message: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        rules(other=[rule])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("set x {\ntype ipv4_addr\nelements = { 10.0.0.1 : drop }\n}", "unexpected :, expected ,"),
        (
            "set x {\ntype ipv4_addr\nelements = { 10.0.0.1 last used never }\n}",
            "unexpected last, expected ,",
        ),
        ("set x {\ntype ipv4_addr\nelements = { * }\n}", "invalid address *"),
        ("set x {\ntype ipv6_addr\n}", "unsupported type ipv6_addr"),
        ("set x {\ntype ifname\n}", "unsupported type ifname"),
        ("set x {\ntype ipv4_addr\nflags constant\n}", "unsupported flags constant"),
        ("set x {\ntype ipv4_addr\nauto-merge\n}", "unsupported property auto-merge"),
        ("set x {\ntype ipv4_addr\ntype ipv4_addr\n}", "unsupported property type"),
        ("set x {\nelements = { 10.0.0.1 }\n}", "unsupported property elements"),
        ("set x {\nsize 1\n}", "set x has no type"),
        ("map x {\ntype ipv4_addr\n}", "unexpected end of line after ipv4_addr"),
        ("map x {\ntype ipv4_addr : mark\n}", "unsupported expression or statement mark"),
        ("map x {\ntypeof ip daddr : th dport\n}", "unsupported map: values must be verdicts, or addresses with ports"),
        ("map x {\ntype ipv4_addr : verdict\nelements = { 10.0.0.1 }\n}", "unexpected }, expected :"),
        ("set x {\ntype ipv4_addr\n}\nset x {\ntype ipv4_addr\n}", "duplicate name of a set, map or chain"),
        ("chain x {\n}\nchain x {\n}", "duplicate name of a set, map or chain"),
        (
            "chain x {\ntype filter hook ingress device eth0 priority 0; policy accept;\n}",
            "unsupported type filter at hook ingress",
        ),
        ("chain x {\ntype nat hook input priority srcnat; policy accept;\n}", "unsupported type nat at hook input"),
        ("chain x {\ntype route hook output priority 0; policy accept;\n}", "unsupported type route at hook output"),
        (
            "chain x {\ntype filter hook output priority dstnat; policy accept;\n}",
            "unsupported priority dstnat at hook output",
        ),
        (
            "chain x {\ntype filter hook prerouting priority raw; policy accept;\n}",
            "unsupported priority -300, before connection tracking",
        ),
        ("chain x {\ntype filter hook forward priority 0; policy queue;\n}", "unsupported policy queue"),
        ("chain x {\ntype filter hook forward priority 0;\n}", "unexpected end of line after ;"),
        (
            chain("forward") + chain("forward").replace("chain forward", "chain again"),
            "ambiguous order: two base chains at hook forward have the same priority",
        ),
        (
            chain("prerouting") + chain("before").replace("dstnat - 10", "dstnat"),
            "ambiguous order: two base chains at hook prerouting have the same priority",
        ),
        (
            chain("prerouting").replace("dstnat", "dstnat + 5") + chain("before").replace(" - 10", ""),
            "ambiguous order: two base chains at hook prerouting have the same priority",
        ),
        ("flowtable x {\n}", "unexpected flowtable, expected one of counter, set, map, chain"),
        ("flags dormant", "unexpected flags, expected one of counter, set, map, chain"),
        ("chain x {", "unterminated table"),
    ],
)
def test_unsupported_blocks_of_a_table(block: str, message: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        NftablesSimulator(table(block), Family.IPV4)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("table ip6 kube-proxy {\n}", "line 1: unexpected ip6, expected ip"),
        ("table inet kube-proxy {\n}", "line 1: unexpected inet, expected ip"),
        ("table ip kube-proxy {", "unterminated table"),
        ("table ip kube-proxy {\n}\ntable ip other {\n}", "line 3: unexpected second table"),
        ("table ip kube-proxy {\nchain x {\ndrop", "line 2: unterminated block"),
        ("table ip kube-proxy {\nchain x {\nip daddr { 10.0.0.1,", "line 3: unbalanced braces"),
        ("*filter", "line 1: unexpected *filter, expected table"),
        ("}", "line 1: unexpected }, expected table"),
    ],
)
def test_text_that_is_not_a_table_of_the_family(text: str, message: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        NftablesSimulator(text, Family.IPV4)
    assert message in str(error.value)


def test_error_has_the_line_number_and_shortens_a_long_line() -> None:
    elements = ", ".join(f"10.0.{number}.1" for number in range(200))
    with pytest.raises(UnknownRuleError, match=r"^line 5: invalid address word: elements = ") as error:
        NftablesSimulator(table(f"set x {{\ntype ipv4_addr\nelements = {{ {elements}, word }}\n}}"), Family.IPV4)
    assert len(str(error.value)) < 300
