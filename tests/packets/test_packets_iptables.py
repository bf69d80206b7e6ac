"""In iptables mode, every packet of the table has the same fate under kube-proxy's recorded rules and kproxy's."""

from __future__ import annotations

import pytest

from tests.packets.compare import wrong_fates
from tests.packets.programmed import programmed_iptables
from tests.packets.record import record, recorded_iptables
from tests.packets.table import read_table
from tests.recordings import SCENARIOS

TABLE = read_table()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_recorded_rules_match_the_table(scenario: str) -> None:
    assert not wrong_fates(TABLE, scenario, recorded_iptables(scenario))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kproxy_rules_match_the_table(scenario: str) -> None:
    assert not wrong_fates(TABLE, scenario, programmed_iptables(scenario))


def test_table_contains_all_packets_of_the_recordings() -> None:
    generated = [str(row) for row in record()]
    assert [str(row) for row in TABLE] == generated, "run `python -m tests.packets.record` and review the new rows"
