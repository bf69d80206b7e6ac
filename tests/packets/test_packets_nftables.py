"""In nftables mode, both kube-proxy's recorded rules and our own treat every packet of the table as it says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest
from msgspec.structs import replace

from kproxy.config.load import load_config
from kproxy.model.delta import BASIC_KINDS, Replace
from kproxy.model.store import Store
from kproxy.model.types import Family, ServiceCIDR
from kproxy.nftables.backend import NftablesPrinter
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.simulate.packet import OutcomeDistribution, Packet, PacketOutcome, Simulator, Verdict
from kproxy.sync.family import FamilySync
from tests.packets.compare import wrong_fates
from tests.packets.differences import Reason, read_differences, read_nftables_table, reason_for
from tests.packets.expectation import EXACTLY, describe, uneven
from tests.packets.places import NODE_ADDRESSES, PLACES, SECOND_NODE_ADDRESSES, SERVICE_CIDRS
from tests.packets.record import record_differences, recorded_iptables, recorded_nftables
from tests.packets.table import read_table
from tests.packets.test_packets_iptables import context_of
from tests.packets.test_packets_iptables import our_rules as our_iptables
from tests.recordings import GOLDEN, SCENARIOS, replaces

Rules: TypeAlias = Callable[[str], dict[Family, NftablesSimulator]]

TABLE = read_nftables_table()


def our_nftables(scenario: str) -> dict[Family, NftablesSimulator]:
    """Return what kproxy programs for the recorded objects, configuration and ServiceCIDR."""
    path = GOLDEN / scenario / "config.json"
    config, _ = load_config(path.read_bytes(), str(path))
    store = Store("node-1", (*BASIC_KINDS, ServiceCIDR))
    for delta in (*replaces(scenario), Replace(ServiceCIDR, (ServiceCIDR("kubernetes", SERVICE_CIDRS),))):
        store.apply(delta)
    rules = {}
    for family in Family:
        pages: list[str] = []
        context = partial(context_of, replace(config, mode="nftables"), family)
        FamilySync(NftablesPrinter(family, pages.append), context).sync(store)
        rules[family] = NftablesSimulator("".join(pages), family)
    return rules


SOURCES = [pytest.param(recorded_nftables, EXACTLY, id="recorded"), pytest.param(our_nftables, 0.005, id="ours")]
"""Whose rules, and by what part of it an endpoint's probability may differ from that of the others."""


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("rules", "unevenness"), SOURCES)
def test_rules_treat_packets_as_the_table_says(rules: Rules, unevenness: float, scenario: str) -> None:
    assert not wrong_fates(TABLE, scenario, rules(scenario), unevenness)


def test_every_difference_has_a_reason_and_is_one() -> None:
    """A row that differs without standing here, or stands here without differing, is an error like a wrong reason."""
    recorded = record_differences(read_table())
    assert set(read_differences()) == set(recorded)
    assert {reason for reason, _ in recorded} == set(Reason)


def test_every_difference_stands_once_and_is_a_row_of_the_table() -> None:
    rows = [row._replace(fate="") for _, row in read_differences()]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= {row._replace(fate="") for row in read_table()}


def test_a_difference_that_no_reason_fits_is_an_error() -> None:
    row = next(row for row in read_table() if row.fate.startswith("dnat") and row.sender == "client")
    with pytest.raises(ValueError, match="no reason"):
        reason_for(row, "untouched")


# What the table has no words for: packets that begin no connection, and a second address seen from outside.


@pytest.mark.parametrize("scenario", ["nodeport", "config-conntrack-liberal"])
@pytest.mark.parametrize(
    ("rules", "invalid"),
    [
        (recorded_iptables, "drop"),
        (our_iptables, "drop"),
        (recorded_nftables, "untouched"),
        (our_nftables, "untouched"),
    ],
)
def test_only_iptables_mode_drops_what_is_invalid(
    rules: Callable[[str], dict[Family, Simulator]], invalid: str, scenario: str
) -> None:
    packet = Packet(
        protocol="TCP",
        source="10.244.1.1",
        destination="198.51.100.10",
        port=50000,
        interface="veth0",
        conntrack_state="INVALID",
    )
    expected = "untouched" if scenario == "config-conntrack-liberal" else invalid
    assert describe(rules(scenario)[Family.IPV4].send(packet)) == expected


@pytest.mark.parametrize(
    ("scenario", "everywhere"),
    [("nodeport", True), ("config-nodeport-primary", False), ("config-nodeport-addresses", False)],
)
@pytest.mark.parametrize(
    ("rules", "is_iptables"),
    [(recorded_iptables, True), (our_iptables, True), (recorded_nftables, False), (our_nftables, False)],
)
def test_who_takes_node_ports_at_another_address(
    rules: Callable[[str], dict[Family, Simulator]], is_iptables: bool, scenario: str, everywhere: bool
) -> None:
    packet = Packet(
        protocol="TCP",
        source=PLACES["client"].addresses[4],
        destination=SECOND_NODE_ADDRESSES[4],
        port=30080,
        interface="eth0",
        local_addresses=frozenset({NODE_ADDRESSES[4], SECOND_NODE_ADDRESSES[4]}),
    )
    outcome = rules(scenario)[Family.IPV4].send(packet)
    assert bool(outcome.endpoints) == (is_iptables and everywhere)
    assert {fate.verdict for fate in outcome.probabilities} == {Verdict.ACCEPTED}


@pytest.mark.parametrize(
    ("first", "tolerance", "is_uneven"), [(0.5, EXACTLY, False), (0.502, 0.005, False), (0.503, 0.005, True)]
)
def test_chance_that_prefers_an_endpoint_is_told(first: float, tolerance: float, is_uneven: bool) -> None:
    shares = {"10.0.0.1:1": first, "10.0.0.2:2": 1 - first}
    outcome = OutcomeDistribution((PacketOutcome(Verdict.ACCEPTED, target), share) for target, share in shares.items())
    assert uneven(outcome, tolerance) == (shares if is_uneven else {})
