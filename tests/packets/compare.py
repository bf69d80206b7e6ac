"""Rules against the table: what they do to its packets, and what they should do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kproxy.model.types import Family
from kproxy.simulate.packet import Simulator
from tests.packets.expectation import EXACTLY, describe, uneven
from tests.packets.senders import packet_of
from tests.packets.table import Row


def wrong_fates(
    table: Iterable[Row], scenario: str, rules: Mapping[Family, Simulator], unevenness: float = EXACTLY
) -> dict[str, tuple[str, str]]:
    """Return what the rules do and what the table says, for every packet of a scenario where it is not the same.

    So is chance that prefers an endpoint over others by more than a part of `unevenness`.
    """
    rows = [row for row in table if row.scenario == scenario]
    assert rows, f"{scenario}: no packet of it is in the table"
    found = {str(row): (_fate_of(row, rules[row.family], unevenness), row.fate) for row in rows}
    return {row: both for row, both in found.items() if both[0] != both[1]}


def _fate_of(row: Row, rules: Simulator, unevenness: float) -> str:
    outcome = rules.send(packet_of(row))
    preferred = uneven(outcome, unevenness)
    return describe(outcome) + "".join(f" ({share:.4f} of all to {one})" for one, share in preferred.items())
