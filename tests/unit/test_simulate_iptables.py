"""The iptables simulator: matches and targets as documented in iptables(8) and iptables-extensions(8)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from kproxy.model.types import Family
from kproxy.simulate.iptables import IptablesSimulator
from kproxy.simulate.packet import OutcomeDistribution, PacketOutcome, UnknownRuleError, Verdict
from tests.unit.simulation import ACCEPTED, DROPPED, FROM_NODE, NODE, POD, TRANSLATED, packet

BUILT_IN = {
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
DNAT = f"-p tcp -j DNAT --to-destination {POD}"


def rules(
    *lines: str, family: Family = Family.IPV4, policy: str = "ACCEPT", chains: Iterable[str] = ()
) -> IptablesSimulator:
    """Return a simulator of rules, given as `TABLE CHAIN RULE`, and user-defined chains, given as `TABLE CHAIN`."""
    text = []
    for table, built_in in BUILT_IN.items():
        user_defined = [chain.split()[1] for chain in chains if chain.startswith(table)]
        text += [f"*{table}", *(f":{name} {policy if table == 'filter' else 'ACCEPT'} [0:0]" for name in built_in)]
        text += [f":{name} - [0:0]" for name in user_defined]
        text += [f"-A {line.split(' ', 1)[1]}" for line in lines if line.startswith(table)]
        text.append("COMMIT")
    return IptablesSimulator("\n".join(text), family)


def test_packet_without_a_matching_rule_is_accepted() -> None:
    assert rules().send(packet()).probabilities == {ACCEPTED: 1.0}


def test_chain_policy_applies_without_a_matching_rule() -> None:
    closed = rules("filter FORWARD -p udp -j ACCEPT", policy="DROP")
    assert closed.send(packet()).only == DROPPED
    assert closed.send(packet(protocol="UDP")).only == ACCEPTED


MATCHING = [
    ("-s 198.51.100.0/24", {}, {"source": "198.51.101.1"}),
    ("! -s 10.244.0.0/16", {}, {"source": "10.244.3.1"}),
    ("-d 10.96.0.1/32", {}, {"destination": "10.96.0.2"}),
    ("! -d 10.96.0.0/12", {"destination": "10.95.0.1"}, {}),
    ("-i eth0", {}, {"interface": "eth01"}),
    ("! -i veth0", {}, {"interface": "veth0"}),
    ("-i veth+", {"interface": "veth1"}, {}),
    ("! -i veth+", {}, {"interface": "veth"}),
    ("-p tcp", {}, {"protocol": "UDP"}),
    ("-p udp", {"protocol": "UDP"}, {"protocol": "SCTP"}),
    ("-p sctp", {"protocol": "SCTP"}, {"protocol": "TCP"}),
    ("-p tcp -m tcp --dport 80", {}, {"port": 8080}),
    ("-p udp -m udp --dport 53", {"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}),
    ("-p sctp -m sctp --dport 7", {"protocol": "SCTP", "port": 7}, {"protocol": "SCTP", "port": 70}),
    ("-m addrtype --src-type LOCAL", {"source": NODE}, {}),
    ("-m addrtype --src-type LOCAL", {"source": "127.8.8.8"}, {"source": "128.0.0.1"}),
    ("-m mark --mark 0x0/0x4000", {}, None),
    ("-m mark ! --mark 0x4000/0x4000", {}, None),
    ("-m mark --mark 0x0", {}, None),
    ("-m conntrack --ctstate NEW", {}, {"conntrack_state": "ESTABLISHED"}),
    ("-m conntrack --ctstate RELATED,ESTABLISHED", {"conntrack_state": "RELATED"}, {"conntrack_state": "INVALID"}),
    (
        "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT",
        {"conntrack_state": "INVALID"},
        {"conntrack_state": "ESTABLISHED"},
    ),
    ('-m comment --comment "say \\"-j DROP\\"; ! -s 1.2.3.4/32"', {}, None),
    ("-m nfacct --nfacct-name  seen", {}, None),
]


@pytest.mark.parametrize(("match", "hit", "miss"), MATCHING)
def test_match(match: str, hit: dict[str, Any], miss: dict[str, Any] | None) -> None:
    simulator = rules(f"filter FORWARD {match} -j DROP")
    assert simulator.send(packet(**hit)).only.verdict is Verdict.DROPPED
    if miss is not None:
        assert simulator.send(packet(**miss)).only == ACCEPTED


def test_rule_applies_only_if_all_its_matches_do() -> None:
    simulator = rules("filter FORWARD -s 198.51.100.1/32 -p tcp -m tcp --dport 80 -j DROP")
    assert simulator.send(packet()).only == DROPPED
    assert simulator.send(packet(port=81)).only == ACCEPTED
    assert simulator.send(packet(source="198.51.100.2")).only == ACCEPTED


def test_ipv6_address_match() -> None:
    simulator = rules("filter FORWARD -d fd00:10:96::/48 -j DROP", family=Family.IPV6)
    assert simulator.send(packet(source="2001:db8::1", destination="fd00:10:96::1")).only == DROPPED
    assert simulator.send(packet(source="2001:db8::1", destination="fd00:10:97::1")).only == ACCEPTED


def test_ipv6_dnat_and_loopback() -> None:
    simulator = rules(
        "nat PREROUTING -p tcp -j DNAT --to-destination [fd00::9]:8080",
        "nat OUTPUT ! -d ::1/128 -m addrtype --dst-type LOCAL -j DNAT --to-destination [fd00::8]:80",
        family=Family.IPV6,
    )
    assert simulator.send(packet(source="2001:db8::1", destination="fd00:99::2")).only.endpoint == "[fd00::9]:8080"
    from_loopback = {"source": "::1", "interface": ""}
    assert simulator.send(packet(**from_loopback, destination="::1")).only == ACCEPTED
    assert simulator.send(packet(**from_loopback, destination="fd00:99::2")).only.endpoint == "[fd00::8]:80"


def test_packet_of_another_family_is_rejected() -> None:
    with pytest.raises(ValueError, match="IPv4"):
        rules().send(packet(source="2001:db8::1", destination="fd00::1"))
    with pytest.raises(ValueError, match="differ in their IP family"):
        rules().send(packet(source="2001:db8::1"))


# Targets and the traversal of chains.


def test_chain_returns_to_the_rule_after_the_jump() -> None:
    simulator = rules(
        "filter FORWARD -j FIRST",
        "filter FORWARD -j DROP",
        "filter FIRST -p udp -j RETURN",
        "filter FIRST -p udp -j ACCEPT",
        "filter FIRST -p sctp -j SECOND",
        "filter FIRST -p tcp",
        "filter SECOND -j ACCEPT",
        chains=["filter FIRST", "filter SECOND"],
    )
    assert simulator.send(packet(protocol="UDP")).only == DROPPED
    assert simulator.send(packet(protocol="TCP")).only == DROPPED
    assert simulator.send(packet(protocol="SCTP")).only == ACCEPTED


def test_return_from_a_built_in_chain_applies_its_policy() -> None:
    simulator = rules("filter FORWARD -p udp -j RETURN", "filter FORWARD -j ACCEPT", policy="DROP")
    assert simulator.send(packet(protocol="UDP")).only == DROPPED
    assert simulator.send(packet()).only == ACCEPTED


def test_reject_has_an_icmp_type() -> None:
    simulator = rules("filter FORWARD -j REJECT --reject-with icmp-port-unreachable")
    assert simulator.send(packet()).only == PacketOutcome(Verdict.REJECTED, reject_with="icmp-port-unreachable")


@pytest.mark.parametrize(
    ("marks", "mark"),
    [
        (["0x4000/0x4000"], "0x4000/0xffffffff"),
        (["0xff/0xffffffff", "0x1/0xf"], "0xf1/0xffffffff"),
        (["0x4000/0x4000", "0x4000/0x0"], "0x0/0xffffffff"),
        (["0x4000/0x0"], "0x4000/0xffffffff"),
        (["0x4000/0x4000", "0x4000/0x4000"], "0x4000/0x4000"),
    ],
)
def test_set_xmark_clears_the_mask_and_xors_the_value(marks: list[str], mark: str) -> None:
    lines = [f"filter FORWARD -j MARK --set-xmark {value}" for value in marks]
    assert rules(*lines, f"filter FORWARD -m mark --mark {mark} -j DROP").send(packet()).only == DROPPED


def test_mark_persists_across_tables() -> None:
    simulator = rules(
        "nat PREROUTING -j MARK --set-xmark 0x4000/0x4000",
        "nat POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully",
    )
    assert simulator.send(packet()).only == PacketOutcome(Verdict.ACCEPTED, masqueraded=True)
    assert simulator.send(packet(**FROM_NODE)).only == ACCEPTED


def test_dnat_ends_the_hook_and_later_hooks_see_the_new_destination() -> None:
    simulator = rules(
        f"nat PREROUTING {DNAT}",
        "nat PREROUTING -j DNAT --to-destination 10.244.1.10:80",
        "filter FORWARD -d 10.244.1.9/32 -p tcp -m tcp --dport 8080 -m conntrack --ctstate DNAT -j ACCEPT",
        policy="DROP",
    )
    assert simulator.send(packet()).only == TRANSLATED
    assert simulator.send(packet(protocol="UDP")).only == PacketOutcome(Verdict.DROPPED, "10.244.1.10:80")


def test_counter_counts_matching_packets() -> None:
    simulator = rules("filter FORWARD -p tcp -m nfacct --nfacct-name seen -j ACCEPT")
    assert simulator.send(packet()).only.counters == ("seen",)
    assert simulator.send(packet(protocol="UDP")).only.counters == ()


# Probabilities and session affinity.


def test_probabilities_apply_to_the_remaining_packets() -> None:
    random = "-m statistic --mode random --probability"
    simulator = rules(
        f"nat PREROUTING {random} 0.33333333349 -j DNAT --to-destination 10.0.0.1:1",
        f"nat PREROUTING {random} 0.50000000000 -j DNAT --to-destination 10.0.0.2:2",
        "nat PREROUTING -j DNAT --to-destination 10.0.0.3:3",
    )
    outcome = simulator.send(packet())
    assert outcome.endpoints == pytest.approx({"10.0.0.1:1": 1 / 3, "10.0.0.2:2": 1 / 3, "10.0.0.3:3": 1 / 3})
    assert sum(outcome.probabilities.values()) == pytest.approx(1.0, abs=1e-12)


def test_random_branches_both_continue_after_the_chain() -> None:
    simulator = rules(
        "nat PREROUTING -m statistic --mode random --probability 0.25 -j SEEN",
        f"nat PREROUTING {DNAT}",
        "nat SEEN -j MARK --set-xmark 0x1/0x1",
        "nat POSTROUTING -m mark --mark 0x1/0x1 -j MASQUERADE",
        chains=["nat SEEN"],
    )
    masqueraded = PacketOutcome(Verdict.ACCEPTED, POD, masqueraded=True)
    assert simulator.send(packet()).probabilities == pytest.approx({masqueraded: 0.25, TRANSLATED: 0.75})


@pytest.mark.parametrize(("probability", "outcome"), [("0.00000000000", ACCEPTED), ("1.00000000000", DROPPED)])
def test_probability_zero_and_one(probability: str, outcome: PacketOutcome) -> None:
    simulator = rules(f"filter FORWARD -m statistic --mode random --probability {probability} -j DROP")
    assert simulator.send(packet()).probabilities == {outcome: 1.0}


def test_probabilities_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match=r"sum to 0\.5"):
        OutcomeDistribution([(ACCEPTED, 0.25), (DROPPED, 0.25)])


def test_only_requires_a_single_outcome() -> None:
    with pytest.raises(ValueError, match="unpack"):
        _ = OutcomeDistribution([(ACCEPTED, 0.25), (DROPPED, 0.75)]).only


def test_affinity_selects_the_recorded_endpoint() -> None:
    tail = "--mask 255.255.255.255 --rsource"
    simulator = rules(
        f"nat PREROUTING -m recent --rcheck --seconds 60 --reap --name ONE {tail} -j ONE",
        f"nat PREROUTING -m recent --rcheck --seconds 60 --reap --name TWO {tail} -j TWO",
        "nat PREROUTING -m statistic --mode random --probability 0.5 -j ONE",
        "nat PREROUTING -j TWO",
        f"nat ONE -p tcp -m recent --set --name ONE {tail} -m tcp -j DNAT --to-destination 10.0.0.1:1",
        f"nat TWO -p tcp -m recent --set --name TWO {tail} -m tcp -j DNAT --to-destination 10.0.0.2:2",
        chains=["nat ONE", "nat TWO"],
    )
    first, again = simulator.send(packet()), simulator.send(packet(affinity_endpoints=frozenset({"10.0.0.2:2"})))
    assert first.endpoints == {"10.0.0.1:1": 0.5, "10.0.0.2:2": 0.5}
    assert again.probabilities == {PacketOutcome(Verdict.ACCEPTED, "10.0.0.2:2", affinity_recorded=True): 1.0}
    assert simulator.send(packet(affinity_endpoints=frozenset({"10.0.0.3:3"}))) == first


# Which hooks a packet passes.


def test_packet_is_routed_after_dnat() -> None:
    simulator = rules(
        f"nat PREROUTING -d {NODE}/32 {DNAT}",
        f"nat PREROUTING -d 10.96.0.7/32 -j DNAT --to-destination {NODE}:443",
        "filter INPUT -j REJECT --reject-with icmp-port-unreachable",
        "nat POSTROUTING -j MASQUERADE",
    )
    forwarded = PacketOutcome(Verdict.ACCEPTED, POD, masqueraded=True)
    assert simulator.send(packet(destination=NODE)).only == forwarded
    delivered = simulator.send(packet(destination="10.96.0.7")).only
    assert delivered == PacketOutcome(Verdict.REJECTED, f"{NODE}:443", reject_with="icmp-port-unreachable")


def test_packet_to_this_node_does_not_pass_postrouting() -> None:
    simulator = rules("nat POSTROUTING -j MASQUERADE", "nat INPUT -m nfacct --nfacct-name seen -j ACCEPT")
    assert simulator.send(packet(destination=NODE)).only == PacketOutcome(Verdict.ACCEPTED, counters=("seen",))


def test_packet_from_the_node_passes_output_and_not_prerouting() -> None:
    simulator = rules(
        "nat PREROUTING -j DNAT --to-destination 10.0.0.1:1",
        f"nat OUTPUT {DNAT}",
        "filter OUTPUT -m conntrack --ctstate DNAT -m nfacct --nfacct-name seen -j ACCEPT",
        "filter FORWARD -j DROP",
        "filter INPUT -j DROP",
    )
    assert simulator.send(packet(**FROM_NODE)).only == PacketOutcome(Verdict.ACCEPTED, POD, counters=("seen",))


def test_packet_from_the_node_to_itself_arrives_on_lo_untranslated() -> None:
    simulator = rules(
        f"nat PREROUTING {DNAT}",
        "filter INPUT -i lo -m conntrack --ctstate NEW -j DROP",
        "filter OUTPUT -i lo -j REJECT --reject-with icmp-port-unreachable",
    )
    assert simulator.send(packet(**FROM_NODE, destination=NODE)).only == DROPPED
    assert simulator.send(packet(source="127.0.0.1", interface="", destination="127.0.0.1")).only == DROPPED
    assert simulator.send(packet(**FROM_NODE)).only == ACCEPTED


def test_negated_interface_matches_packets_without_an_input_interface() -> None:
    simulator = rules("filter OUTPUT ! -i veth+ -j DROP", "filter FORWARD ! -i veth+ -j ACCEPT")
    assert simulator.send(packet(**FROM_NODE)).only == DROPPED


@pytest.mark.parametrize("state", ["ESTABLISHED", "RELATED", "INVALID"])
def test_only_the_first_packet_of_a_connection_passes_nat(state: str) -> None:
    simulator = rules(f"nat PREROUTING {DNAT}", f"nat OUTPUT {DNAT}", "nat POSTROUTING -j MASQUERADE")
    assert simulator.send(packet(conntrack_state=state)).only == ACCEPTED
    assert simulator.send(packet(**FROM_NODE, conntrack_state=state)).only == ACCEPTED


def test_dropped_packet_does_not_reach_the_next_hook() -> None:
    simulator = rules("filter FORWARD -j DROP", "nat POSTROUTING -j MASQUERADE")
    assert simulator.send(packet()).only == DROPPED


# Unsupported rules.

RECENT = "--name X --mask 255.255.255.255 --rsource"
UNSUPPORTED = [
    ("-j LOG", "chain PREROUTING: -j LOG is neither a chain nor a supported target"),
    ("-j NOWHERE", "chain PREROUTING: -j NOWHERE is neither a chain nor a supported target"),
    ("-g OTHER", "unsupported option -g"),
    ("-o eth0 -j DROP", "unsupported option -o"),
    ("-p icmp -j DROP", "unsupported protocol icmp"),
    ("-p tcp -m tcp --sport 80 -j DROP", "unsupported option --sport"),
    ("-p tcp -m tcp --dport 80: -j DROP", "invalid port or port range 80:"),
    ("-p tcp -m tcp ! --dport 80 -j DROP", "unsupported option ! --dport"),
    ("-p tcp --dport 80 -j DROP", "unsupported option --dport"),
    ("-p tcp -m udp --dport 80 -j DROP", "-m udp requires -p udp"),
    ("! -p tcp -j DROP", "unsupported option ! -p"),
    ("-m multiport --dports 1,2 -j DROP", "unsupported option -m multiport"),
    ("-m addrtype --dst-type BROADCAST -j DROP", "unsupported address type BROADCAST"),
    ("-m addrtype --dst-type LOCAL --limit-iface-in -j DROP", "unsupported option --limit-iface-in"),
    ("-m conntrack --ctstate SNAT -j DROP", "unsupported connection state SNAT"),
    ("-m conntrack --ctstatus ASSURED -j DROP", "unsupported option --ctstatus"),
    ("-m conntrack -j DROP", "-m conntrack requires --ctstate"),
    ("-m mark --mark all -j DROP", "invalid mark all"),
    ("-m statistic --mode nth --every 2 -j DROP", "unsupported option --mode nth"),
    ("-m statistic --mode random -j DROP", "-m statistic requires --probability"),
    ("-m statistic --mode random --probability 1.5 -j DROP", "invalid probability 1.5"),
    (f"-m recent --update {RECENT} -j DROP", "unsupported option --update"),
    ("-m recent --rcheck --name X --mask 255.255.255.0 --rsource -j DROP", "unsupported option --mask 255.255.255.0"),
    ("-m recent --rcheck --name X --mask 255.255.255.255 -j DROP", "-m recent requires --rsource"),
    (f"-m recent {RECENT} -j DROP", "-m recent requires either --rcheck or --set"),
    (
        f"-m recent --set {RECENT} -m statistic --mode random --probability 0.5 -j DROP",
        "unsupported combination of -m recent --set with -m statistic",
    ),
    ("-m comment --comment one -m comment --comment two -j DROP", "duplicate option -m comment"),
    ("-s 10.0.0.0/8 -s 11.0.0.0/8 -j DROP", "duplicate option -s"),
    ("-s 10.0.0.1/8 -j DROP", "invalid network 10.0.0.1/8"),
    ("-s somewhere -j DROP", "invalid network somewhere"),
    ("-j REJECT", "-j REJECT requires --reject-with"),
    ("-j REJECT --reject-with tcp-reset", "unsupported option --reject-with tcp-reset"),
    ("-j MARK --set-mark 0x1", "unsupported option --set-mark"),
    ("-j MASQUERADE --to-ports 1-2", "unsupported option --to-ports"),
    ("-j DNAT --to-destination 10.0.0.1", "invalid address and port 10.0.0.1"),
    ("-j DNAT --to-destination 10.0.0.1-10.0.0.9:80", "invalid address and port 10.0.0.1-10.0.0.9:80"),
    ("-j DNAT --to-destination 10.0.0.1:80 --persistent", "unsupported option --persistent"),
    ("-j DROP -j ACCEPT", "duplicate option -j"),
    ("-j DROP !", "expected an option after !"),
    ("! ! -s 10.0.0.0/8 -j DROP", "unsupported option ! !"),
    ("-s", "-s requires an argument"),
    ("word", "unsupported option word"),
]


@pytest.mark.parametrize(("rule", "message"), UNSUPPORTED)
def test_unsupported_rules(rule: str, message: str) -> None:
    with pytest.raises(UnknownRuleError) as error:
        rules(f"nat PREROUTING {rule}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "-A INPUT -j DROP",
        "*filter\n-A INPUT -j DROP",
        "*filter\n:INPUT ACCEPT [0:0]\n-I INPUT -j DROP",
        "*filter\n:INPUT QUEUE [0:0]",
        "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j ACCEPT",
        "*filter\nnft add table ip x",
    ],
)
def test_invalid_dumps(text: str) -> None:
    with pytest.raises(UnknownRuleError, match=r"line \d"):
        IptablesSimulator(text, Family.IPV4)


def test_counters_comments_and_empty_tables_in_a_dump() -> None:
    text = "# made by hand\n*mangle\n:OUTPUT ACCEPT [3:4]\nCOMMIT\n\n*filter\n:FORWARD ACCEPT [1:2]\n"
    simulator = IptablesSimulator(text + "[5:6] -A FORWARD -p tcp -j DROP\nCOMMIT\n", Family.IPV4)
    assert simulator.send(packet()).only == DROPPED
