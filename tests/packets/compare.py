"""Compare the fates of packets under a rule set with the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kproxy.model.types import Family
from kproxy.simulate.packet import Simulator
from tests.packets.expectation import EXACTLY, describe, uneven
from tests.packets.senders import packet_of
from tests.packets.table import Row


def wrong_fates(
    table: Iterable[Row], scenario: str, rules: Mapping[Family, Simulator], tolerance: float = EXACTLY
) -> dict[str, tuple[str, str]]:
    """Return the actual and the expected fate of every packet of a scenario for which they differ.

    The fates also differ if an endpoint's probability deviates from an equal share by more than `tolerance`, relative
    to that share.
    """
    rows = [row for row in table if row.scenario == scenario]
    assert rows, f"the table has no packets for scenario {scenario}"
    fates = {str(row): (_fate_of(row, rules[row.family], tolerance), row.fate) for row in rows}
    return {row: (actual, expected) for row, (actual, expected) in fates.items() if actual != expected}


def _fate_of(row: Row, rules: Simulator, tolerance: float) -> str:
    outcome = rules.send(packet_of(row))
    shares = uneven(outcome, tolerance)
    return describe(outcome) + "".join(f" (share {share:.4f}: {target})" for target, share in shares.items())
