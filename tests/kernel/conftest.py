"""Fixtures of the tests on a real kernel. They need root, network namespaces and iptables."""

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
    """Skip the test if this machine or user cannot create the lab."""
    reason = missing_commands() or missing_privilege()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def nft() -> None:
    """Skip the test without `nft`, which loads and lists rules of nftables mode."""
    if shutil.which("nft") is None:
        pytest.skip("nft not found: it is in the Debian package nftables")


@pytest.fixture
def namespaces(kernel: None) -> Iterator[Callable[[], Namespace]]:
    """Create network namespaces that are removed after the test."""
    created: list[Namespace] = []

    def make() -> Namespace:
        created.append(Namespace(f"test-{len(created)}"))
        return created[-1]

    yield make
    for namespace in created:
        namespace.close()


@pytest.fixture
def namespace(namespaces: Callable[[], Namespace]) -> Namespace:
    """A new network namespace."""
    return namespaces()


@pytest.fixture
def node(namespace: Namespace) -> Namespace:
    """A namespace with the addresses of the recorded node."""
    namespace.run(["ip", "link", "set", "lo", "up"])
    add_addresses(namespace, "lo", "10.99.0.2/24", "fd00:99::2/64")
    return namespace


@pytest.fixture
def counters(namespace: Namespace) -> None:
    """Create the nfacct counters that the rules of iptables mode use."""
    add_counters(namespace)


@pytest.fixture(params=["nft", "legacy"])
def variant(request: pytest.FixtureRequest, namespace: Namespace) -> str:
    """Each variant of iptables that works on this machine."""
    variant: str = request.param
    if reason := missing_variant(variant, namespace):
        pytest.skip(reason)
    return variant


@pytest.fixture
def lab(kernel: None) -> Iterator[Lab]:
    """A lab that contains only the node."""
    with Lab() as lab:
        yield lab


@pytest.fixture
def servers(lab: Lab) -> Iterator[Servers]:
    """The servers of the lab's pods."""
    with Servers() as servers:
        yield servers
