"""The simulation finds every fault that is planted in kproxy."""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS, NEED_EXACT_REPAIRS, NEED_QUARANTINE, applicable, find

HISTORIES = 5_000
"""Most mutations are found in the first 30 histories."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name: str) -> None:
    if name not in applicable():
        pytest.skip("the backends neither quarantine Services nor repair single elements")
    assert find(name, HISTORIES) is not None


def test_mutations_are_not_forgotten() -> None:
    assert {*NEED_QUARANTINE, *NEED_EXACT_REPAIRS} < MUTATIONS.keys()
    assert len(applicable()) >= 12
