"""What these tests need of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.namespace import Namespace
from tests.lab.requirements import missing_commands, missing_privilege


@pytest.fixture(scope="session")
def kernel() -> None:
    """Skip unless namespaces can be made here, and rules in them."""
    if reason := missing_commands() or missing_privilege():
        pytest.skip(reason)


@pytest.fixture
def node(kernel: None) -> Iterator[Namespace]:
    namespace = Namespace("node-1")
    namespace.run(["ip", "link", "set", "lo", "up"])
    yield namespace
    namespace.close()
