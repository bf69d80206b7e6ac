"""The nftables simulator: DNAT maps, random load balancing and session affinity."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import PacketOutcome, Verdict
from tests.unit.simulation import ACCEPTED, POD, TRANSLATED, packet
from tests.unit.test_simulate_nftables import DNAT, rules

OTHER = "10.244.1.10:80"


def test_dnat_ends_the_hook_and_later_hooks_see_the_new_destination() -> None:
    simulator = rules(
        prerouting=["ip daddr 10.96.0.1 jump other", f"dnat to {OTHER}"],
        other=[DNAT],
        closed=["ip daddr 10.244.1.9 th dport 8080 ct status dnat accept"],
    )
    assert simulator.send(packet()).only == TRANSLATED
    assert simulator.send(packet(protocol="UDP")).only == PacketOutcome(Verdict.DROPPED, OTHER)


@pytest.mark.parametrize("statement", ["dnat ip to", "dnat to"])
def test_anonymous_endpoint_map(statement: str) -> None:
    elements = "0 : 10.0.0.1 . 1, 1 : 10.0.0.2 . 2, 2 : 10.0.0.2 . 2, 3 : 10.0.0.3 . 3"
    simulator = rules(prerouting=[f"meta l4proto tcp {statement} numgen random mod 4 map {{ {elements} }}"])
    assert simulator.send(packet()).endpoints == {"10.0.0.1:1": 0.25, "10.0.0.2:2": 0.5, "10.0.0.3:3": 0.25}


PICK = "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod {} map @endpoints"


@pytest.mark.parametrize(
    ("modulus", "endpoints", "unmatched"),
    [(1, 1, 0.0), (2, 2, 0.0), (3, 3, 0.0), (4, 3, 0.25), (1_000_000, 3, 1 - 3e-6)],
)
def test_random_number_without_an_endpoint_does_not_match(modulus: int, endpoints: int, unmatched: float) -> None:
    simulator = rules(prerouting=[PICK.format(modulus)])
    outcome = simulator.send(packet())
    share = (1.0 - unmatched) / endpoints
    assert outcome.endpoints == pytest.approx({f"10.244.1.{1 + number}:8080": share for number in range(endpoints)})
    assert outcome.probabilities.get(ACCEPTED, 0.0) == pytest.approx(unmatched)


def test_next_rule_picks_another_random_number() -> None:
    simulator = rules(prerouting=[PICK.format(4), PICK.format(4), PICK.format(1)])
    share = 1 / 4 + 1 / 4 * 1 / 4
    assert simulator.send(packet()).endpoints == pytest.approx(
        {"10.244.1.1:8080": share + 1 / 16, "10.244.1.2:8080": share, "10.244.1.3:8080": share}
    )


@pytest.mark.parametrize("changes", [{"destination": "10.96.0.2"}, {"port": 81}, {"protocol": "UDP"}])
def test_lookup_without_an_endpoint_proceeds_with_the_next_rule(changes: dict[str, Any]) -> None:
    simulator = rules(prerouting=[PICK.format(4), f"dnat to {OTHER}"])
    assert simulator.send(packet(**changes)).probabilities == {PacketOutcome(Verdict.ACCEPTED, OTHER): 1.0}


def test_probabilities_apply_to_the_remaining_packets() -> None:
    simulator = rules(
        prerouting=[
            "numgen random mod 3 0 goto first",
            "numgen random mod 2 1 goto second",
            "meta l4proto tcp dnat to 10.0.0.3:3",
        ],
        first=["meta l4proto tcp dnat to 10.0.0.1:1"],
        second=["meta l4proto tcp dnat to 10.0.0.2:2"],
    )
    outcome = simulator.send(packet())
    assert outcome.endpoints == pytest.approx({"10.0.0.1:1": 1 / 3, "10.0.0.2:2": 1 / 3, "10.0.0.3:3": 1 / 3})


def test_random_branches_both_continue_after_the_chain() -> None:
    simulator = rules(
        prerouting=["numgen random mod 4 vmap { 0 : jump other, 3 : continue }", DNAT],
        other=["meta mark set meta mark | 0x00000001"],
        postrouting=["meta mark & 0x00000001 != 0x00000000 masquerade"],
    )
    masqueraded = PacketOutcome(Verdict.ACCEPTED, POD, masqueraded=True)
    assert simulator.send(packet()).probabilities == pytest.approx({masqueraded: 0.25, TRANSLATED: 0.75})


def affinity(first: str = "one", second: str = "two") -> NftablesSimulator:
    return rules(
        prerouting=[
            f"ip saddr @{first} goto endpoint-{first}",
            f"ip saddr @{second} goto endpoint-{second}",
            "numgen random mod 2 vmap { 0 : goto endpoint-one, 1 : goto endpoint-two }",
        ],
        endpoint_one=["update @one { ip saddr }", "meta l4proto tcp dnat to 10.0.0.1:1"],
        endpoint_two=["update @two { ip saddr }", "meta l4proto tcp dnat to 10.0.0.2:2"],
    )


def test_affinity_records_the_client() -> None:
    simulator = affinity()
    first = simulator.send(packet())
    assert first.probabilities == {
        PacketOutcome(Verdict.ACCEPTED, "10.0.0.1:1", affinity_recorded=True): 0.5,
        PacketOutcome(Verdict.ACCEPTED, "10.0.0.2:2", affinity_recorded=True): 0.5,
    }
    assert simulator.send(packet(affinity_endpoints=frozenset({"10.0.0.3:3"}))) == first


@pytest.mark.parametrize("endpoint", ["10.0.0.1:1", "10.0.0.2:2"])
@pytest.mark.parametrize("sets", [("one", "two"), ("two", "one")])
def test_each_affinity_set_selects_its_endpoint(sets: tuple[str, str], endpoint: str) -> None:
    outcome = affinity(*sets).send(packet(affinity_endpoints=frozenset({endpoint})))
    assert outcome.probabilities == {PacketOutcome(Verdict.ACCEPTED, endpoint, affinity_recorded=True): 1.0}


def test_affinity_includes_existing_set_elements() -> None:
    assert affinity().send(packet(source="192.0.2.1")).endpoints == {"10.0.0.1:1": 1.0}
    assert affinity().send(packet(source="192.0.2.2")).endpoints == {"10.0.0.1:1": 1.0}


def test_affinity_applies_to_source_addresses_only() -> None:
    simulator = rules(forward=["ip daddr @one drop"], other=["update @one { ip saddr }", f"dnat to {POD}"])
    assert simulator.send(packet(affinity_endpoints=frozenset({POD}))).only == ACCEPTED


def test_repeated_random_picks_leave_the_exact_remainder() -> None:
    outcome = rules(prerouting=[PICK.format(4)] * 20).send(packet())
    assert outcome.probabilities[ACCEPTED] == pytest.approx(0.25**20)
