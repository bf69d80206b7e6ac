"""10,000 random histories end with the rules of a fresh start, and no packet ever meets half a change.

A failure names its seed and the command that replays it. `--start` and `--count` of that command try more seeds.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.history import ViolationError, World

HISTORIES = 10_000
CHUNK = 250
"""How many histories one test plays, so that the tests can run on all CPUs."""


@pytest.fixture
def _few_collections() -> Iterator[None]:
    """Histories make many objects that refer to each other, and looking for them takes a tenth of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)
    yield
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("_few_collections")
@pytest.mark.parametrize("start", range(0, HISTORIES, CHUNK))
def test_random_histories(start: int) -> None:
    for seed in range(start, start + CHUNK):
        try:
            World(seed).run()
        except ViolationError as error:
            command = (
                f"PYTHONHASHSEED={os.environ.get('PYTHONHASHSEED', '?')} python -m tests.simulation {seed} --verbose"
            )
            pytest.fail(f"replay it with `{command}`: {error}", pytrace=False)


def test_histories_are_not_idle() -> None:
    """The histories contain everything that they are made for."""
    worlds = [World(seed) for seed in range(200)]
    for world in worlds:
        world.run()
    total = sum((world.counts for world in worlds), Counter[str]())
    for name in ("packet", "sync", "failed sync", "damage", "restart"):
        assert total[name] > 20, total


def test_equal_seeds_make_equal_histories() -> None:
    def lines(seed: int) -> list[str]:
        found: list[str] = []
        World(seed, show=lambda line: found.append(str(line))).run()
        return found

    assert len(lines(7)) > 10
    assert lines(7) == lines(7)
