"""Fixtures of the tests that need a real kernel: network namespaces and iptables, and so root."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.lab.iptables import add_counters, missing_variant
from tests.lab.links import add_addresses
from tests.lab.namespace import Namespace
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
def nft() -> None:
    """Skip where there is no `nft`, which the tests load or look at nftables mode's rules with."""
    if shutil.which("nft") is None:
        pytest.skip("nft not found: it is in the Debian package nftables")


@pytest.fixture
def namespaces(kernel: None) -> Iterator[Callable[[], Namespace]]:
    """Makes network namespaces that end with the test."""
    made: list[Namespace] = []

    def make() -> Namespace:
        made.append(Namespace(f"test-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def namespace(namespaces: Callable[[], Namespace]) -> Namespace:
    """A fresh namespace."""
    return namespaces()


@pytest.fixture
def node(namespace: Namespace) -> Namespace:
    """The namespace, with the addresses of the recorded node."""
    namespace.run(["ip", "link", "set", "lo", "up"])
    add_addresses(namespace, "lo", "10.99.0.2/24", "fd00:99::2/64")
    return namespace


@pytest.fixture
def counters(namespace: Namespace) -> None:
    """Give the namespace the counters which iptables mode's rules name."""
    add_counters(namespace)


@pytest.fixture(params=["nft", "legacy"])
def variant(request: pytest.FixtureRequest, namespace: Namespace) -> str:
    """Each variant of iptables that works here."""
    found: str = request.param
    if reason := missing_variant(found, namespace):
        pytest.skip(reason)
    return found


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
