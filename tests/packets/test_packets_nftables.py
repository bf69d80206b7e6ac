"""In nftables mode, every packet of the table has the same fate under kube-proxy's recorded rules and kproxy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from kproxy.model.types import Family
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import OutcomeDistribution, Packet, PacketOutcome, Simulator, Verdict
from tests.packets.compare import wrong_fates
from tests.packets.differences import Reason, read_differences, read_kproxy_table, read_nftables_table, reason_for
from tests.packets.expectation import EXACTLY, describe, uneven
from tests.packets.programmed import programmed_iptables, programmed_nftables
from tests.packets.record import record_differences, recorded_iptables, recorded_nftables
from tests.packets.senders import NODE_ADDRESSES, SECOND_NODE_ADDRESSES, SENDERS
from tests.packets.table import Row, read_table
from tests.recordings import SCENARIOS

Rules: TypeAlias = Callable[[str], dict[Family, NftablesSimulator]]

TABLE = read_nftables_table()

SOURCES = [
    pytest.param(recorded_nftables, TABLE, EXACTLY, id="recorded"),
    pytest.param(programmed_nftables, read_kproxy_table(), 0.005, id="kproxy"),
]
"""Rules to test, the table of their fates, and the relative tolerance for the probability of an endpoint."""


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("rules", "table", "tolerance"), SOURCES)
def test_rules_match_the_table(rules: Rules, table: list[Row], tolerance: float, scenario: str) -> None:
    assert not wrong_fates(table, scenario, rules(scenario), tolerance)


def test_exactly_the_rows_that_differ_are_listed_with_their_reasons() -> None:
    recorded = record_differences(read_table())
    assert set(read_differences()) == set(recorded)
    assert {reason for reason, _ in recorded} == set(Reason)


def test_differences_are_unique_rows_of_the_table() -> None:
    rows = [row._replace(fate="") for _, row in read_differences()]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= {row._replace(fate="") for row in read_table()}


def test_difference_without_a_reason_is_an_error() -> None:
    row = next(row for row in read_table() if row.fate.startswith("dnat") and row.sender == "client")
    with pytest.raises(ValueError, match="no reason"):
        reason_for(row, "untouched")


# Packets that the table cannot express: those that start no connection, and those to a second address of the node.


@pytest.mark.parametrize("scenario", ["nodeport", "config-conntrack-liberal"])
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (recorded_iptables, "drop"),
        (programmed_iptables, "drop"),
        (recorded_nftables, "untouched"),
        (programmed_nftables, "untouched"),
    ],
)
def test_only_iptables_mode_drops_invalid_packets(
    rules: Callable[[str], dict[Family, Simulator]], expected: str, scenario: str
) -> None:
    packet = Packet(
        protocol="TCP",
        source="10.244.1.1",
        destination="198.51.100.10",
        port=50000,
        interface="veth0",
        conntrack_state="INVALID",
    )
    expected = "untouched" if scenario == "config-conntrack-liberal" else expected
    assert describe(rules(scenario)[Family.IPV4].send(packet)) == expected


@pytest.mark.parametrize(
    ("scenario", "all_addresses"),
    [("nodeport", True), ("config-nodeport-primary", False), ("config-nodeport-addresses", False)],
)
@pytest.mark.parametrize(
    ("rules", "is_iptables"),
    [(recorded_iptables, True), (programmed_iptables, True), (recorded_nftables, False), (programmed_nftables, False)],
)
def test_node_ports_at_a_second_address_of_the_node(
    rules: Callable[[str], dict[Family, Simulator]], is_iptables: bool, scenario: str, all_addresses: bool
) -> None:
    packet = Packet(
        protocol="TCP",
        source=SENDERS["client"].addresses[4],
        destination=SECOND_NODE_ADDRESSES[4],
        port=30080,
        interface="eth0",
        local_addresses=frozenset({NODE_ADDRESSES[4], SECOND_NODE_ADDRESSES[4]}),
    )
    outcome = rules(scenario)[Family.IPV4].send(packet)
    assert bool(outcome.endpoints) == (is_iptables and all_addresses)
    assert {fate.verdict for fate in outcome.probabilities} == {Verdict.ACCEPTED}


@pytest.mark.parametrize(
    ("first", "tolerance", "is_uneven"), [(0.5, EXACTLY, False), (0.502, 0.005, False), (0.503, 0.005, True)]
)
def test_unequal_probability_of_an_endpoint_is_detected(first: float, tolerance: float, is_uneven: bool) -> None:
    shares = {"10.0.0.1:1": first, "10.0.0.2:2": 1 - first}
    outcome = OutcomeDistribution((PacketOutcome(Verdict.ACCEPTED, target), share) for target, share in shares.items())
    assert uneven(outcome, tolerance) == (shares if is_uneven else {})
