"""What a test asks of the cluster it runs on."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Need


def needs(*what: Need) -> pytest.MarkDecorator:
    """Mark a test that is skipped, with the cluster's reason, where the cluster lacks one of these."""
    return pytest.mark.needs(*what)
