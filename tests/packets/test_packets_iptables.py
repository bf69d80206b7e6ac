"""Both kube-proxy's recorded rules and our own treat every packet of the table as it says."""

from __future__ import annotations

from functools import partial

import pytest

from kproxy.config import Config
from kproxy.config.load import load_config
from kproxy.contexts import make_context
from kproxy.iptables.backend import Printer
from kproxy.model.context import Context
from kproxy.model.types import Family, Node
from kproxy.simulate.iptables import Iptables
from kproxy.simulate.packet import Simulator
from kproxy.sync.family import FamilySync
from tests.fakekernel import FakeKernel
from tests.packets.expectation import describe, uneven
from tests.packets.places import NODE_ADDRESSES, packet_of
from tests.packets.record import record, recorded_rules
from tests.packets.table import Row, read_table
from tests.recordings import GOLDEN, SCENARIOS, store

TABLE = read_table()


def our_rules(scenario: str) -> dict[Family, Iptables]:
    """Return what kproxy programs for the recorded objects and configuration."""
    path = GOLDEN / scenario / "config.json"
    config, _ = load_config(path.read_bytes(), str(path))
    rules = {}
    for family in Family:
        kernel = FakeKernel()
        FamilySync(Printer(kernel.restore), partial(context_of, config, family)).sync(store(scenario))
        rules[family] = Iptables("".join(kernel.dump()), family)
    return rules


def context_of(config: Config, family: Family, node: Node | None) -> Context:
    addresses = NODE_ADDRESSES.values()
    return make_context(config, family, "node-1", node, addresses, accounting=True, random_fully=True)


def differences(scenario: str, rules: dict[Family, Iptables]) -> dict[str, tuple[str, str]]:
    """Return what the rules do and what the table says, for every packet where it is not the same."""
    rows = [row for row in TABLE if row.scenario == scenario]
    found = {str(row): (fate_of(row, rules[row.family]), row.fate) for row in rows}
    return {row: both for row, both in found.items() if both[0] != both[1]}


def fate_of(row: Row, rules: Simulator) -> str:
    outcome = rules.send(packet_of(row))
    return describe(outcome) + "".join(f" ({share:.3f} of all to {one})" for one, share in uneven(outcome).items())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_recorded_rules_treat_packets_as_the_table_says(scenario: str) -> None:
    assert not differences(scenario, recorded_rules(scenario))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_our_rules_treat_packets_as_the_table_says(scenario: str) -> None:
    assert not differences(scenario, our_rules(scenario))


def test_the_table_is_complete() -> None:
    """A new recording, or a new question in record.py, is not in the table until that is run and reviewed."""
    assert [str(row) for row in TABLE] == [str(row) for row in record()]
