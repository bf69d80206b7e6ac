"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.namespace import Namespace
from tests.lab.requirements import missing_commands, missing_privilege


@pytest.fixture(scope="session")
def kernel() -> None:
    """Skip the test if network namespaces or rules in them cannot be created."""
    if reason := missing_commands() or missing_privilege():
        pytest.skip(reason)


@pytest.fixture
def node(kernel: None) -> Iterator[Namespace]:
    """A network namespace with a loopback interface."""
    namespace = Namespace("node-1")
    namespace.run(["ip", "link", "set", "lo", "up"])
    yield namespace
    namespace.close()
