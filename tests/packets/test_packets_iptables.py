"""In iptables mode, both kube-proxy's recorded rules and our own treat every packet of the table as it says."""

from __future__ import annotations

from functools import partial

import pytest

from kproxy.app.contexts import make_context
from kproxy.config import Config
from kproxy.config.load import load_config
from kproxy.iptables.backend import IptablesPrinter
from kproxy.model.context import Context
from kproxy.model.types import Family, Node
from kproxy.simulate.iptables import IptablesSimulator
from kproxy.sync.family import FamilySync
from tests.fakekernel import FakeKernel
from tests.packets.compare import wrong_fates
from tests.packets.record import record, recorded_iptables
from tests.packets.senders import NODE_ADDRESSES
from tests.packets.table import read_table
from tests.recordings import GOLDEN, SCENARIOS, store

TABLE = read_table()


def our_rules(scenario: str) -> dict[Family, IptablesSimulator]:
    """Return what kproxy programs for the recorded objects and configuration."""
    path = GOLDEN / scenario / "config.json"
    config, _ = load_config(path.read_bytes(), str(path))
    rules = {}
    for family in Family:
        kernel = FakeKernel()
        FamilySync(IptablesPrinter(kernel.restore), partial(context_of, config, family)).sync(store(scenario))
        rules[family] = IptablesSimulator("".join(kernel.dump()), family)
    return rules


def context_of(config: Config, family: Family, node: Node | None) -> Context:
    addresses = NODE_ADDRESSES.values()
    return make_context(config, family, "node-1", node, addresses, accounting=True, random_fully=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_recorded_rules_treat_packets_as_the_table_says(scenario: str) -> None:
    assert not wrong_fates(TABLE, scenario, recorded_iptables(scenario))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_our_rules_treat_packets_as_the_table_says(scenario: str) -> None:
    assert not wrong_fates(TABLE, scenario, our_rules(scenario))


def test_the_table_is_complete() -> None:
    """A new recording, or a new question in record.py, is not in the table until that is run and reviewed."""
    assert [str(row) for row in TABLE] == [str(row) for row in record()]
