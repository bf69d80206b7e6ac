"""`kproxy trace` agrees with the table of packets on every recorded cluster, from dumps alone."""

from __future__ import annotations

import re
from functools import cache

import pytest
from msgspec.structs import replace

from kproxy.diagnose.trace.dumps import Dumps
from kproxy.diagnose.trace.flow import Flow, Interface, TraceFacts, number_of
from kproxy.diagnose.trace.program import Program
from kproxy.diagnose.trace.result import Result
from kproxy.diagnose.trace.walk import walk
from kproxy.simulate.packet import OutcomeDistribution, Packet, PacketOutcome, Verdict
from tests.packets.differences import read_nftables_table
from tests.packets.expectation import describe, uneven
from tests.packets.senders import packet_of
from tests.packets.table import Row, read_table
from tests.recordings import GOLDEN, SCENARIOS

DUMPS = {"iptables": ("iptables-save.txt", "ip6tables-save.txt"), "nftables": ("nft-ip.txt", "nft-ip6.txt")}
VERDICTS = {"accepted": Verdict.ACCEPTED, "dropped": Verdict.DROPPED, "rejected": Verdict.REJECTED}
TOLERANCE = 1e-5
_SET = re.compile(r"\tset (affinity-\S+) \{(.*?)\n\t\}", re.DOTALL)


@cache
def rows(mode: str) -> list[Row]:
    return read_table() if mode == "iptables" else read_nftables_table()


def with_affinity(dump: str, row: Row) -> str:
    """Return a dump of nft in which the sender of a row is an element of the affinity set of its endpoint."""
    if not row.remembering:
        return dump
    suffix = row.remembering.replace("]:", "/").replace(":", "." if "[" in row.remembering else "/").strip("[")
    source = packet_of(row).source

    def add(found: re.Match[str]) -> str:
        if not found[1].endswith(f"__{suffix}"):
            return found[0]
        return f"\tset {found[1]} {{{found[2]}\n\t\telements = {{ {source} expires 3h }}\n\t}}"

    return _SET.sub(add, dump)


def program(row: Row, mode: str) -> Program:
    dumps = Dumps()
    for name in DUMPS[mode]:
        text = (GOLDEN / row.scenario / name).read_text()
        dumps.add(with_affinity(text, row) if mode == "nftables" else text, name)
    return dumps.program()


def recent_lists(rules: Program, packet: Packet) -> dict[str, frozenset[int]]:
    """Return the lists of `-m recent` that contain the sender, because it has affinity to their endpoint."""
    texts = [rule.source.text for chain in rules.chains.values() for rule in chain]
    sets = [re.search(r"--name (\S+) .*--to-destination (\S+)", text) for text in texts if "--set" in text]
    return {
        found[1]: frozenset({number_of(packet.source)})
        for found in sets
        if found and found[2] in packet.affinity_endpoints
    }


def send(rules: Program, row: Row) -> Result:
    packet = packet_of(row)
    destination = number_of(packet.destination)
    flow = Flow(
        family=row.family,
        protocol=packet.protocol,
        source=number_of(packet.source),
        destination=destination,
        port=packet.port,
        original=(destination, packet.port),
        iif=Interface(packet.interface),
    )
    facts = TraceFacts(
        local_addresses=frozenset(map(number_of, packet.local_addresses)),
        complete=True,
        recent=recent_lists(rules, packet),
    )
    return walk(rules, facts, flow).result


def distribution(result: Result) -> OutcomeDistribution:
    assert not result.unknown, result
    assert all(outcome.masqueraded is not None for outcome in result.known)
    return OutcomeDistribution(
        (
            PacketOutcome(
                VERDICTS[each.verdict],
                each.destination if each.translated else "",
                masqueraded=bool(each.masqueraded),
                affinity_recorded=each.affinity,
                reject_with=each.reject_with,
            ),
            share,
        )
        for each, share in result.known.items()
    )


@pytest.mark.parametrize("mode", DUMPS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_packet_of_the_table_has_its_fate(scenario: str, mode: str) -> None:
    wrong = {}
    chosen = [row for row in rows(mode) if row.scenario == scenario]
    common = program(replace_remembering(chosen[0]), mode)
    for row in chosen:
        rules = program(row, mode) if row.remembering and mode == "nftables" else common
        fate = distribution(send(rules, row))
        if describe(fate) != row.fate or uneven(fate, TOLERANCE):
            wrong[str(row)] = (describe(fate), row.fate)
    assert wrong == {}


def replace_remembering(row: Row) -> Row:
    return row._replace(remembering="")


def test_session_affinity_that_a_dump_does_not_show_is_unknown() -> None:
    row = next(row for row in rows("iptables") if row.scenario == "session-affinity" and row.fate.count("8080") > 1)
    rules = program(row, "iptables")
    packet = packet_of(row)
    destination = number_of(packet.destination)
    flow = Flow(
        family=row.family,
        protocol=packet.protocol,
        source=number_of(packet.source),
        destination=destination,
        port=packet.port,
        original=(destination, packet.port),
        iif=Interface(packet.interface),
    )
    facts = TraceFacts(local_addresses=frozenset(map(number_of, packet.local_addresses)), complete=True)
    unknown = walk(rules, facts, flow).result
    assert unknown.unknown
    assert {each.verdict for each in (*unknown.known, *unknown.possible)} == {"accepted"}
    assert not walk(rules, replace(facts, recent={}), flow).result.unknown
