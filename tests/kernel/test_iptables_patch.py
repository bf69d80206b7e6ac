"""Patching single rules of a chain leaves the same rules in the kernel as rewriting the chain."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import ChainName
from kproxy.model.context import Context
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family
from tests.inprocess import SingleServiceProxy
from tests.lab.iptables import RecordingIptables, add_counters
from tests.lab.namespace import Namespace
from tests.recordings import State, comparable

PREFIXES = {Family.IPV4: "10.244.", Family.IPV6: "fd00:10:244::"}


class ConcurrentlyChangedIptables(RecordingIptables):
    """The iptables in PATH, with one action of another process right after it counts rules."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.concurrent_action: Callable[[], object] = lambda: None

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        found = super().count_rules(chains)
        action, self.concurrent_action = self.concurrent_action, lambda: None
        action()
        return found


class PatchingProxy(SingleServiceProxy):
    """A proxy of one Service with changing endpoints in a namespace."""

    def __init__(self, node: Namespace, family: Family, affinity: int = 0, *, patching: bool = True) -> None:
        self.node = node
        self.iptables = ConcurrentlyChangedIptables(family)
        if not self.iptables.version().supports_patching:
            pytest.skip(f"{self.iptables.version()} does not support patching")
        backend = IptablesBackend(self.iptables, patching=patching)
        super().__init__(backend, Context(family, "node-1"), affinity=affinity, namespace=node)

    def written_for(self, addresses: Sequence[str]) -> str:
        """Make these addresses the endpoints and return the input for iptables-restore."""
        self.iptables.inputs.clear()
        self.sync_endpoints(addresses)
        return "".join(self.iptables.inputs)

    def state(self) -> State:
        def save() -> State:
            with self.iptables.save() as lines:
                return comparable(lines)

        return self.call(save)

    def chain(self) -> str:
        (found,) = (name for table, name in self.state() if table == "nat" and name.startswith("KUBE-SVC"))
        return found


@pytest.fixture(params=Family)
def family(request: pytest.FixtureRequest, kernel: None) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def affinity() -> int:
    """The session affinity timeout in seconds."""
    return 0


@pytest.fixture
def proxies(namespaces: Callable[[], Namespace], family: Family, affinity: int) -> tuple[PatchingProxy, PatchingProxy]:
    """A proxy that makes all changes, and one in another namespace that only programs the result."""
    nodes = namespaces(), namespaces()
    for node in nodes:
        add_counters(node)
    return PatchingProxy(nodes[0], family, affinity), PatchingProxy(nodes[1], family, affinity)


def addresses(family: Family, count: int) -> list[str]:
    """Return addresses in the order of the rules."""
    separator = "." if family is Family.IPV4 else ":"
    return [f"{PREFIXES[family]}1{separator}{number}" for number in range(10, 10 + count)]


@pytest.mark.parametrize("affinity", [0, 60])
def test_endpoints_are_added_removed_and_replaced(proxies: tuple[PatchingProxy, PatchingProxy], family: Family) -> None:
    chance = random.Random(20)
    proxy, fresh = proxies
    patched = set()
    current, spare = addresses(family, 20), addresses(family, 80)[20:]
    proxy.sync_endpoints(current)
    for _ in range(25):
        match chance.randrange(3):
            case 0:
                current.pop(chance.randrange(len(current)))
            case 1:
                current.append(spare.pop())
            case 2:
                current[-1 - chance.randrange(4)] = spare.pop()
        written = proxy.written_for(current)
        patched |= {command for command in ("-R", "-I", "-D") if f"{command} KUBE-SVC" in written}
    fresh.sync_endpoints(current)
    assert proxy.state() == fresh.state()
    assert "-R" in patched


def test_first_endpoints_are_added_and_removed_by_patching(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family
) -> None:
    """The probabilities of the rules after them do not change."""
    proxy, fresh = proxies
    current = addresses(family, 30)
    proxy.sync_endpoints(current)
    assert "-D KUBE-SVC" in proxy.written_for(current[4:])
    assert "-I KUBE-SVC" in proxy.written_for(current[1:])
    fresh.sync_endpoints(current[1:])
    assert proxy.state() == fresh.state()


@pytest.mark.parametrize("foreign_change", ["-I {} 1 -j ACCEPT", "-D {} 1", "-A {} -j ACCEPT", "-F {}"])
def test_chain_changed_by_another_process_is_rewritten(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family, foreign_change: str
) -> None:
    proxy, fresh = proxies
    *others, last, other = addresses(family, 20)
    proxy.sync_endpoints([*others, last])
    assert "-R KUBE-SVC" in proxy.written_for([*others, other])
    command = f"*nat\n{foreign_change.format(proxy.chain())}\nCOMMIT\n"
    proxy.call(lambda: proxy.iptables.restore(command))
    assert "-R KUBE-SVC" not in proxy.written_for([*others, last])
    fresh.sync_endpoints([*others, last])
    assert proxy.state() == fresh.state()
    assert "-R KUBE-SVC" in proxy.written_for([*others, other])


@pytest.mark.parametrize("patching", [True, False])
@pytest.mark.parametrize(("before", "after"), [(30, 27), (27, 30), (30, 30)])
def test_two_proxies_that_make_the_same_change_at_once_agree(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family, before: int, after: int, patching: bool
) -> None:
    """Both check the chain before either changes it. Without patching, a proxy behaves like kube-proxy."""
    proxy, fresh = proxies
    other = PatchingProxy(proxy.node, family, patching=patching)
    found = addresses(family, 31)
    expected = found[30 - after : 30] if after != before else [*found[:29], found[30]]
    for each in (proxy, other):
        each.sync_endpoints(found[30 - before : 30])
    proxy.iptables.concurrent_action = lambda: other.written_for(expected)
    written = proxy.written_for(expected)
    fresh.sync_endpoints(expected)
    assert proxy.state() == fresh.state()
    assert any(f"{command} KUBE-SVC" in written for command in ("-I", "-D", "-R"))
    assert f"-A {proxy.chain()}" in written or before == after
    assert f"-A {proxy.chain()}" not in proxy.written_for(found[30 - before : 30]), (
        "the proxy does not know the current rules"
    )


@pytest.mark.parametrize("foreign_change", ["-I {} 1 -j ACCEPT", "-D {} 1", "-D {} 20", "-A {} -j ACCEPT", "-F {}"])
def test_change_by_another_process_right_after_the_check_is_undone(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family, foreign_change: str
) -> None:
    proxy, fresh = proxies
    current = addresses(family, 30)
    proxy.sync_endpoints(current)
    command = f"*nat\n{foreign_change.format(proxy.chain())}\nCOMMIT\n"
    proxy.iptables.concurrent_action = lambda: proxy.iptables.restore(command)
    with suppress(SyncError):  # a chain may be missing; the next sync then compares everything
        proxy.sync_endpoints(current[3:])
    proxy.sync_endpoints(current[3:])
    fresh.sync_endpoints(current[3:])
    assert proxy.state() == fresh.state()
