"""What the simulator of nftables does not know is an error that names it, never a guess."""

from __future__ import annotations

import pytest

from kproxy.model.types import Family
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import UnknownRuleError
from tests.unit.test_simulate_nftables import chain, rules, table

UNKNOWN = [
    ("log", "log is not known"),
    ("counter packets 0 bytes 0 drop", "counter is not known"),
    ("goto nowhere", "there is no chain nowhere"),
    ("th dport vmap { 80 : jump nowhere }", "there is no chain nowhere"),
    ("drop accept", "accept is not known here"),
    ("drop comment", "nothing after comment"),
    ("drop comment word", "word does not stand in quotes"),
    ('comment "x" drop', "drop is not known here"),
    ("drop;", "; is not known here"),
    ('drop comment "x', "a quote without its end"),
    ("queue to 1", "queue is not known"),
    ("tcp dport 80 drop", "tcp is not known"),
    ("ip protocol tcp drop", "ip is not known"),
    ("ip6 daddr fd00::1 drop", "ip6 is not known"),
    ("ip daddr fd00::1 drop", "fd00::1 is not of IPv4"),
    ("ip daddr fd00::/64 drop", "fd00::/64 is not of IPv4"),
    ("ip daddr 10.0.0.1/8 drop", "10.0.0.1/8 is not a network"),
    ("ip daddr somewhere drop", "somewhere is not an address"),
    ("ip daddr < 10.0.0.1 drop", "< is not an address"),
    ("ip daddr @nothing drop", "there is no set or map nothing"),
    ("ip daddr @connections drop", "a key of address is none of"),
    ("ip daddr @verdicts drop", "verdict has no place here"),
    ("ip daddr { 10.0.0.1 10.0.0.2 } drop", "10.0.0.2 is not known here, only ,"),
    ("ip daddr . th dport { 10.0.0.0/8 . 80 } drop", "10.0.0.0/8 is not an address"),
    ("ip daddr vmap @ports", "a key of address is none of"),
    ("ip daddr vmap @plain", "nothing has no place here"),
    ("ip daddr map @plain", "map is not an address"),
    ("th dport vmap { 80 : queue }", "queue is not a verdict"),
    ("th dport vmap { 80 : drop, 80 : accept }", "stands twice"),
    ("th dport http drop", "http is not a number"),
    ("th dport 65536 drop", "65536 is not a port"),
    ("th dport 80-90 drop", "80-90 is not a number"),
    ("meta l4proto icmp drop", "protocol icmp"),
    ("meta skuid 0 drop", "meta is not known here"),
    ("meta mark 0x00004000 drop", "0x00004000 is not known here, only &"),
    ("meta mark set 0x00004000", "set is not known here"),
    ("meta mark set meta mark + 0x1", "+ is not known here"),
    ("meta mark & 0x1 > 0x0 drop", "> is not known here"),
    ("ct state untracked drop", "untracked"),
    ("ct state != new drop", "!= is not known"),
    ("ct status snat drop", "snat is not known"),
    ("ct mark 1 drop", "ct is not known"),
    ("fib daddr oif 1 drop", "oif is not known"),
    ("fib daddr type broadcast drop", "broadcast is not known"),
    ("fib daddr . iif type local drop", ". is not known"),
    ('iifname { "eth0" } drop', "{ does not stand in quotes"),
    ('oifname "eth0" drop', "oifname is not known"),
    ("numgen inc mod 2 0 drop", "numgen is not known"),
    ("numgen random mod 2 offset 1 0 drop", "offset is not a number"),
    ("numgen random mod 0 0 drop", "no number below 0"),
    ("numgen random mod 2 != 0 drop", "!= is not a number"),
    ("numgen random mod 2 . th dport 1 . 80 drop", "in maps only"),
    ("numgen random mod 2 . numgen random mod 2 vmap { 0 . 0 : drop }", "two numbers"),
    ("reject with icmp host-unreachable", "with is not known"),
    ("masquerade to :1-2", "to is not known"),
    ("masquerade random", "random is not known"),
    ("snat to 10.0.0.1", "snat is not known"),
    ("dnat to 10.0.0.1", "10.0.0.1 is not an address with a port"),
    ("dnat to 10.0.0.1-10.0.0.9:80", "is not an address with a port"),
    ("dnat to 300.0.0.1:80", "300.0.0.1 is not an address"),
    ("dnat to [fd00::1]:80", "fd00::1 is not of IPv4"),
    ("dnat to 10.0.0.1:70000", "70000 is not a port"),
    ("dnat to 10.0.0.1:80 persistent", "persistent is not known"),
    ("dnat ip6 to 10.0.0.1:80", "ip6 is not known here, only to"),
    ("dnat ip to th dport map @endpoints", "a key of port"),
    ("dnat ip to th dport map @ports", "verdict has no place here"),
    ("dnat ip to th dport vmap @ports", "vmap is not known here, only map"),
    ("dnat ip to numgen random mod 1 map { 0 : 10.0.0.1 }", "} is not known here, only ."),
    ("update @nothing { ip saddr }", "there is no set or map nothing"),
    ("update @one { ip daddr }", "source only"),
    ("update @one { ip saddr timeout 1m }", "timeout is not known"),
    ("add @one { ip saddr }", "add is not known"),
    ("ip daddr { 10.0.0.1 drop", "the table has no end"),
    ("word", "word is not known"),
]


@pytest.mark.parametrize(("rule", "what"), UNKNOWN)
def test_what_is_not_known_is_an_error_that_names_it(rule: str, what: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        rules(other=[rule])
    assert what in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("block", "what"),
    [
        ("set x {\ntype ipv4_addr\nelements = { 10.0.0.1 : drop }\n}", ": is not known here"),
        ("set x {\ntype ipv4_addr\nelements = { 10.0.0.1 counter packets 1 bytes 1 }\n}", "counter is not known"),
        ("set x {\ntype ipv4_addr\nelements = { * }\n}", "* is not an address"),
        ("set x {\ntype ipv6_addr\n}", "type ipv6_addr is not known"),
        ("set x {\ntype ifname\n}", "type ifname is not known"),
        ("set x {\ntype ipv4_addr\nflags constant\n}", "flags constant"),
        ("set x {\ntype ipv4_addr\nauto-merge\n}", "auto-merge is not known"),
        ("set x {\ntype ipv4_addr\ntype ipv4_addr\n}", "type is not known here"),
        ("set x {\nelements = { 10.0.0.1 }\n}", "elements is not known here"),
        ("set x {\nsize 1\n}", "set x has no type"),
        ("map x {\ntype ipv4_addr\n}", "nothing after ipv4_addr"),
        ("map x {\ntype ipv4_addr : mark\n}", "mark is not known here"),
        ("map x {\ntypeof ip daddr : th dport\n}", "are not known"),
        ("map x {\ntype ipv4_addr : verdict\nelements = { 10.0.0.1 }\n}", "only :"),
        ("set x {\ntype ipv4_addr\n}\nset x {\ntype ipv4_addr\n}", "one name"),
        ("chain x {\n}\nchain x {\n}", "one name"),
        ("chain x {\ntype filter hook ingress device eth0 priority 0; policy accept;\n}", "ingress"),
        ("chain x {\ntype nat hook input priority srcnat; policy accept;\n}", "type nat at hook input"),
        ("chain x {\ntype route hook output priority 0; policy accept;\n}", "type route"),
        ("chain x {\ntype filter hook output priority dstnat; policy accept;\n}", "priority dstnat at hook output"),
        ("chain x {\ntype filter hook prerouting priority raw; policy accept;\n}", "priority -300"),
        ("chain x {\ntype filter hook forward priority 0; policy queue;\n}", "policy queue"),
        ("chain x {\ntype filter hook forward priority 0;\n}", "nothing after ;"),
        (chain("forward") + chain("forward").replace("chain forward", "chain again"), "same priority"),
        (chain("prerouting") + chain("before").replace("dstnat - 10", "dstnat"), "same priority"),
        (chain("prerouting").replace("dstnat", "dstnat + 5") + chain("before").replace(" - 10", ""), "same priority"),
        ("flowtable x {\n}", "flowtable is not known"),
        ("flags dormant", "flags is not known"),
        ("chain x {", "the table has no end"),
    ],
)
def test_what_is_no_known_part_of_a_table_is_an_error(block: str, what: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        NftablesSimulator(table(block), Family.IPV4)
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("table ip6 kube-proxy {\n}", "line 1: ip6"),
        ("table inet kube-proxy {\n}", "line 1: inet"),
        ("table ip kube-proxy {", "the table has no end"),
        ("table ip kube-proxy {\n}\ntable ip other {\n}", "line 3: a second table"),
        ("table ip kube-proxy {\nchain x {\ndrop", "line 2: a block without its end"),
        ("table ip kube-proxy {\nchain x {\nip daddr { 10.0.0.1,", "line 3: braces are open at the end"),
        ("*filter", "line 1: *filter"),
        ("}", "line 1: }"),
    ],
)
def test_what_is_no_table_of_the_family_is_an_error(text: str, what: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        NftablesSimulator(text, Family.IPV4)
    assert what in str(error.value)


def test_errors_show_where_and_not_all_of_a_long_line() -> None:
    elements = ", ".join(f"10.0.{number}.1" for number in range(200))
    with pytest.raises(UnknownRuleError, match=r"^line 5: word is not an address: elements = ") as error:
        NftablesSimulator(table(f"set x {{\ntype ipv4_addr\nelements = {{ {elements}, word }}\n}}"), Family.IPV4)
    assert len(str(error.value)) < 300
