"""The simulator of nftables where destinations are chosen: by maps, by chance and by affinity."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import PacketOutcome, Verdict
from tests.unit.simulation import ACCEPTED, POD, TRANSLATED, packet
from tests.unit.test_simulate_nftables import DNAT, rules

OTHER = "10.244.1.10:80"


def test_translation_ends_the_hook_and_changes_what_later_ones_see() -> None:
    found = rules(
        prerouting=["ip daddr 10.96.0.1 jump other", f"dnat to {OTHER}"],
        other=[DNAT],
        closed=["ip daddr 10.244.1.9 th dport 8080 ct status dnat accept"],
    )
    assert found.send(packet()).only == TRANSLATED
    assert found.send(packet(protocol="UDP")).only == PacketOutcome(Verdict.DROPPED, OTHER)


@pytest.mark.parametrize("statement", ["dnat ip to", "dnat to"])
def test_a_map_of_endpoints_within_a_rule(statement: str) -> None:
    elements = "0 : 10.0.0.1 . 1, 1 : 10.0.0.2 . 2, 2 : 10.0.0.2 . 2, 3 : 10.0.0.3 . 3"
    found = rules(prerouting=[f"meta l4proto tcp {statement} numgen random mod 4 map {{ {elements} }}"])
    assert found.send(packet()).endpoints == {"10.0.0.1:1": 0.25, "10.0.0.2:2": 0.5, "10.0.0.3:3": 0.25}


PICK = "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod {} map @endpoints"


@pytest.mark.parametrize(
    ("below", "endpoints", "untouched"),
    [(1, 1, 0.0), (2, 2, 0.0), (3, 3, 0.0), (4, 3, 0.25), (1_000_000, 3, 1 - 3e-6)],
)
def test_numbers_without_an_endpoint_do_not_match(below: int, endpoints: int, untouched: float) -> None:
    found = rules(prerouting=[PICK.format(below)])
    outcome = found.send(packet())
    each = (1.0 - untouched) / endpoints
    assert outcome.endpoints == pytest.approx({f"10.244.1.{1 + number}:8080": each for number in range(endpoints)})
    assert outcome.probabilities.get(ACCEPTED, 0.0) == pytest.approx(untouched)


def test_who_drew_no_endpoint_draws_again() -> None:
    found = rules(prerouting=[PICK.format(4), PICK.format(4), PICK.format(1)])
    share = 1 / 4 + 1 / 4 * 1 / 4
    assert found.send(packet()).endpoints == pytest.approx(
        {"10.244.1.1:8080": share + 1 / 16, "10.244.1.2:8080": share, "10.244.1.3:8080": share}
    )


@pytest.mark.parametrize("changes", [{"destination": "10.96.0.2"}, {"port": 81}, {"protocol": "UDP"}])
def test_a_key_without_endpoints_below_the_number_goes_on_with_the_next_rule(changes: dict[str, Any]) -> None:
    found = rules(prerouting=[PICK.format(4), f"dnat to {OTHER}"])
    assert found.send(packet(**changes)).probabilities == {PacketOutcome(Verdict.ACCEPTED, OTHER): 1.0}


def test_chance_divides_what_is_left() -> None:
    found = rules(
        prerouting=[
            "numgen random mod 3 0 goto first",
            "numgen random mod 2 1 goto second",
            "meta l4proto tcp dnat to 10.0.0.3:3",
        ],
        first=["meta l4proto tcp dnat to 10.0.0.1:1"],
        second=["meta l4proto tcp dnat to 10.0.0.2:2"],
    )
    outcome = found.send(packet())
    assert outcome.endpoints == pytest.approx({"10.0.0.1:1": 1 / 3, "10.0.0.2:2": 1 / 3, "10.0.0.3:3": 1 / 3})


def test_chance_that_meets_again_after_a_chain_goes_on_with_both() -> None:
    found = rules(
        prerouting=["numgen random mod 4 vmap { 0 : jump other, 3 : continue }", DNAT],
        other=["meta mark set meta mark | 0x00000001"],
        postrouting=["meta mark & 0x00000001 != 0x00000000 masquerade"],
    )
    masqueraded = PacketOutcome(Verdict.ACCEPTED, POD, masqueraded=True)
    assert found.send(packet()).probabilities == pytest.approx({masqueraded: 0.25, TRANSLATED: 0.75})


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


def test_affinity_remembers_whoever_is_sent_to_an_endpoint() -> None:
    found = affinity()
    anyone = found.send(packet())
    assert anyone.probabilities == {
        PacketOutcome(Verdict.ACCEPTED, "10.0.0.1:1", affinity_recorded=True): 0.5,
        PacketOutcome(Verdict.ACCEPTED, "10.0.0.2:2", affinity_recorded=True): 0.5,
    }
    assert found.send(packet(affinity_endpoints=frozenset({"10.0.0.3:3"}))) == anyone


@pytest.mark.parametrize("endpoint", ["10.0.0.1:1", "10.0.0.2:2"])
@pytest.mark.parametrize("sets", [("one", "two"), ("two", "one")])
def test_each_affinity_set_leads_to_its_own_endpoint(sets: tuple[str, str], endpoint: str) -> None:
    found = affinity(*sets).send(packet(affinity_endpoints=frozenset({endpoint})))
    assert found.probabilities == {PacketOutcome(Verdict.ACCEPTED, endpoint, affinity_recorded=True): 1.0}


def test_affinity_knows_whom_the_kernel_has_in_a_set() -> None:
    assert affinity().send(packet(source="192.0.2.1")).endpoints == {"10.0.0.1:1": 1.0}
    assert affinity().send(packet(source="192.0.2.2")).endpoints == {"10.0.0.1:1": 1.0}


def test_who_is_remembered_is_so_as_a_source_only() -> None:
    found = rules(forward=["ip daddr @one drop"], other=["update @one { ip saddr }", f"dnat to {POD}"])
    assert found.send(packet(affinity_endpoints=frozenset({POD}))).only == ACCEPTED


def test_many_draws_leave_their_exact_rest() -> None:
    outcome = rules(prerouting=[PICK.format(4)] * 20).send(packet())
    assert outcome.probabilities[ACCEPTED] == pytest.approx(0.25**20)
