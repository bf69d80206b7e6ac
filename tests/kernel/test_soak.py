"""A short soak test in each mode: no connection fails, and in the end everything is as after a fresh start."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest

from tests.lab.modes import BOTH_MODES
from tests.soak.run import Soak

log = logging.getLogger(__name__)

SEED = "SOAK_SEED"
"""The environment variable with the seed of a run to repeat."""

SECONDS = 30.0


@pytest.mark.usefixtures("kernel", "nft")
@BOTH_MODES
def test_no_connection_fails_in_a_short_run(mode: str, tmp_path: Path) -> None:
    seed = int(os.environ.get(SEED) or random.randrange(1 << 32))
    outcome = Soak(mode, SECONDS, seed, tmp_path).run()
    log.info("seed %d: %s", seed, outcome.text)
    assert outcome.problems == (), f"seed {seed}, logs in {tmp_path}:\n{outcome.text}"
