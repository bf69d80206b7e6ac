"""Changing single rules of a chain leaves the real kernel with the same rules as writing all of them."""

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


class Interrupted(RecordingIptables):
    """The iptables in PATH, and somebody who acts once, right after it was asked how many rules chains have."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.meanwhile: Callable[[], object] = lambda: None

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        found = super().count_rules(chains)
        act, self.meanwhile = self.meanwhile, lambda: None
        act()
        return found


class PatchingProxy(SingleServiceProxy):
    """One Service with endpoints that change, in a namespace."""

    def __init__(self, node: Namespace, family: Family, affinity: int = 0, *, patching: bool = True) -> None:
        self.node = node
        self.iptables = Interrupted(family)
        if not self.iptables.version().supports_patching:
            pytest.skip(f"{self.iptables.version()} finds no single rules")
        backend = IptablesBackend(self.iptables, patching=patching)
        super().__init__(backend, Context(family, "node-1"), affinity=affinity, namespace=node)

    def written_for(self, addresses: Sequence[str]) -> str:
        """Make these addresses the endpoints and return what this wrote."""
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
    """How long a client keeps its endpoint."""
    return 0


@pytest.fixture
def proxies(namespaces: Callable[[], Namespace], family: Family, affinity: int) -> tuple[PatchingProxy, PatchingProxy]:
    """One that lives through all changes, and one, on a node of its own, that only has to make the last."""
    nodes = namespaces(), namespaces()
    for node in nodes:
        add_counters(node)
    return PatchingProxy(nodes[0], family, affinity), PatchingProxy(nodes[1], family, affinity)


def addresses(family: Family, count: int) -> list[str]:
    """Return addresses in the order that rules have."""
    separator = "." if family is Family.IPV4 else ":"
    return [f"{PREFIXES[family]}1{separator}{number}" for number in range(10, 10 + count)]


@pytest.mark.parametrize("affinity", [0, 60])
def test_endpoints_come_go_and_are_replaced(proxies: tuple[PatchingProxy, PatchingProxy], family: Family) -> None:
    chance = random.Random(20)
    proxy, fresh = proxies
    patched = set()
    there, spare = addresses(family, 20), addresses(family, 80)[20:]
    proxy.sync_endpoints(there)
    for _ in range(25):
        match chance.randrange(3):
            case 0:
                there.pop(chance.randrange(len(there)))
            case 1:
                there.append(spare.pop())
            case 2:
                there[-1 - chance.randrange(4)] = spare.pop()
        written = proxy.written_for(there)
        patched |= {command for command in ("-R", "-I", "-D") if f"{command} KUBE-SVC" in written}
    fresh.sync_endpoints(there)
    assert proxy.state() == fresh.state()
    assert "-R" in patched


def test_the_first_of_a_list_come_and_go_by_single_rules(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family
) -> None:
    """The probabilities of those after them stay as they are."""
    proxy, fresh = proxies
    there = addresses(family, 30)
    proxy.sync_endpoints(there)
    assert "-D KUBE-SVC" in proxy.written_for(there[4:])
    assert "-I KUBE-SVC" in proxy.written_for(there[1:])
    fresh.sync_endpoints(there[1:])
    assert proxy.state() == fresh.state()


@pytest.mark.parametrize("meddling", ["-I {} 1 -j ACCEPT", "-D {} 1", "-A {} -j ACCEPT", "-F {}"])
def test_a_chain_that_somebody_else_was_at_is_written_anew(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family, meddling: str
) -> None:
    proxy, fresh = proxies
    *others, last, other = addresses(family, 20)
    proxy.sync_endpoints([*others, last])
    assert "-R KUBE-SVC" in proxy.written_for([*others, other])
    command = f"*nat\n{meddling.format(proxy.chain())}\nCOMMIT\n"
    proxy.call(lambda: proxy.iptables.restore(command))
    assert "-R KUBE-SVC" not in proxy.written_for([*others, last])
    fresh.sync_endpoints([*others, last])
    assert proxy.state() == fresh.state()
    assert "-R KUBE-SVC" in proxy.written_for([*others, other])


@pytest.mark.parametrize("patching", [True, False])
@pytest.mark.parametrize(("before", "after"), [(30, 27), (27, 30), (30, 30)])
def test_two_proxies_that_are_told_the_same_do_it_once(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family, before: int, after: int, patching: bool
) -> None:
    """Both look at the chain before either has changed it. One that does not patch is like kube-proxy."""
    proxy, fresh = proxies
    other = PatchingProxy(proxy.node, family, patching=patching)
    found = addresses(family, 31)
    wanted = found[30 - after : 30] if after != before else [*found[:29], found[30]]
    for each in (proxy, other):
        each.sync_endpoints(found[30 - before : 30])
    proxy.iptables.meanwhile = lambda: other.written_for(wanted)
    written = proxy.written_for(wanted)
    fresh.sync_endpoints(wanted)
    assert proxy.state() == fresh.state()
    assert any(f"{command} KUBE-SVC" in written for command in ("-I", "-D", "-R"))
    assert f"-A {proxy.chain()}" in written or before == after
    assert f"-A {proxy.chain()}" not in proxy.written_for(found[30 - before : 30]), "and it knows what is there"


@pytest.mark.parametrize("meddling", ["-I {} 1 -j ACCEPT", "-D {} 1", "-D {} 20", "-A {} -j ACCEPT", "-F {}"])
def test_what_somebody_does_right_after_the_look_is_undone(
    proxies: tuple[PatchingProxy, PatchingProxy], family: Family, meddling: str
) -> None:
    proxy, fresh = proxies
    there = addresses(family, 30)
    proxy.sync_endpoints(there)
    command = f"*nat\n{meddling.format(proxy.chain())}\nCOMMIT\n"
    proxy.iptables.meanwhile = lambda: proxy.iptables.restore(command)
    with suppress(SyncError):  # what the rest of a change refers to may be gone: then all is compared
        proxy.sync_endpoints(there[3:])
    proxy.sync_endpoints(there[3:])
    fresh.sync_endpoints(there[3:])
    assert proxy.state() == fresh.state()
