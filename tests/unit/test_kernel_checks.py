"""The tests that `make kernels` selects exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.checks import SELECTED

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("node_id", sorted({each.partition("[")[0] for each in SELECTED}))
def test_selected_test_exists(node_id: str) -> None:
    path, _, name = node_id.partition("::")
    assert re.search(rf"^def {name}\(", (CHECKOUT / path).read_text(), re.MULTILINE)
