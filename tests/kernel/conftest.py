"""Fixtures of the tests that need a real kernel: network namespaces and iptables, and so root."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.requirements import missing_commands, missing_privilege
from tests.lab.servers import Servers
from tests.lab.topology import Lab


@pytest.fixture(scope="session")
def kernel() -> None:
    """Skip where this machine or user cannot run a lab, and say why."""
    reason = missing_commands() or missing_privilege()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def lab(kernel: None) -> Iterator[Lab]:
    """A lab of one's own, with nothing but the node in it."""
    with Lab() as lab:
        yield lab


@pytest.fixture
def servers(lab: Lab) -> Iterator[Servers]:
    """Servers for the lab's pods."""
    with Servers() as servers:
        yield servers
