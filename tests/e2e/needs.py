"""The marker for requirements of a test."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Need


def needs(*requirements: Need) -> pytest.MarkDecorator:
    """Skip the test, with a reason, on a cluster that does not meet one of these requirements."""
    return pytest.mark.needs(*requirements)
