"""Changing single rules of a chain leaves the real kernel with the same rules as writing all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import ChainName
from kproxy.model.context import Context
from kproxy.model.delta import Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.sync.family import FamilySync
from tests.lab.iptables import Recorder, add_counters
from tests.lab.namespace import Namespace
from tests.recordings import State, comparable

PREFIXES = {Family.IPV4: "10.244.", Family.IPV6: "fd00:10:244::"}
VIPS = {Family.IPV4: "10.96.0.1", Family.IPV6: "fd00:10:96::1"}


class Interrupted(Recorder):
    """The iptables in PATH, and somebody who acts once, right after it was asked how many rules chains have."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.meanwhile: Callable[[], object] = lambda: None

    def count_rules(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        found = super().count_rules(chains)
        act, self.meanwhile = self.meanwhile, lambda: None
        act()
        return found


class Proxy:
    """One Service with endpoints that change, in a namespace."""

    def __init__(self, node: Namespace, family: Family, affinity: int = 0, *, patching: bool = True) -> None:
        self.node = node
        self.iptables = Interrupted(family)
        if not self.iptables.version().supports_patching:
            pytest.skip(f"{self.iptables.version()} finds no single rules")
        backend = IptablesBackend(self.iptables, patching=patching)
        self._family = FamilySync(backend, lambda _: Context(family, "node-1"))
        self._store = Store("node-1")
        service = Service("ns", "a", (VIPS[family],), (ServicePort("http", 80, "TCP"),), affinity_seconds=affinity)
        for delta in (Replace(Node, ()), Replace(Service, (service,)), Replace(EndpointSlice, ())):
            self._family.note(self._store.apply(delta))

    def have(self, family: Family, addresses: Sequence[str]) -> str:
        """Return the input that gave the Service these endpoints."""
        endpoints = tuple(Endpoint(each, "node-2") for each in addresses)
        found = EndpointSlice("ns", "a", "ns/a", family, endpoints, (EndpointPort("http", 8080, "TCP"),))
        self._family.note(self._store.apply(Upsert(found)))
        self.iptables.inputs.clear()
        self.node.call(lambda: self._family.sync(self._store))
        return "".join(self.iptables.inputs)

    def state(self) -> State:
        def save() -> State:
            with self.iptables.save() as lines:
                return comparable(lines)

        return self.node.call(save)

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
def proxies(namespaces: Callable[[], Namespace], family: Family, affinity: int) -> tuple[Proxy, Proxy]:
    """One that lives through all changes, and one, on a node of its own, that only has to make the last."""
    nodes = namespaces(), namespaces()
    for node in nodes:
        add_counters(node)
    return Proxy(nodes[0], family, affinity), Proxy(nodes[1], family, affinity)


def addresses(family: Family, count: int) -> list[str]:
    """Return addresses in the order that rules have."""
    separator = "." if family is Family.IPV4 else ":"
    return [f"{PREFIXES[family]}1{separator}{number}" for number in range(10, 10 + count)]


@pytest.mark.parametrize("affinity", [0, 60])
def test_endpoints_come_go_and_are_replaced(proxies: tuple[Proxy, Proxy], family: Family) -> None:
    chance = random.Random(20)
    proxy, fresh = proxies
    patched = set()
    there, spare = addresses(family, 20), addresses(family, 80)[20:]
    proxy.have(family, there)
    for _ in range(25):
        match chance.randrange(3):
            case 0:
                there.pop(chance.randrange(len(there)))
            case 1:
                there.append(spare.pop())
            case 2:
                there[-1 - chance.randrange(4)] = spare.pop()
        written = proxy.have(family, there)
        patched |= {command for command in ("-R", "-I", "-D") if f"{command} KUBE-SVC" in written}
    fresh.have(family, there)
    assert proxy.state() == fresh.state()
    assert "-R" in patched


def test_the_first_of_a_list_come_and_go_by_single_rules(proxies: tuple[Proxy, Proxy], family: Family) -> None:
    """The probabilities of those after them stay as they are."""
    proxy, fresh = proxies
    there = addresses(family, 30)
    proxy.have(family, there)
    assert "-D KUBE-SVC" in proxy.have(family, there[4:])
    assert "-I KUBE-SVC" in proxy.have(family, there[1:])
    fresh.have(family, there[1:])
    assert proxy.state() == fresh.state()


@pytest.mark.parametrize("meddling", ["-I {} 1 -j ACCEPT", "-D {} 1", "-A {} -j ACCEPT", "-F {}"])
def test_a_chain_that_somebody_else_was_at_is_written_anew(
    proxies: tuple[Proxy, Proxy], family: Family, meddling: str
) -> None:
    proxy, fresh = proxies
    *others, last, other = addresses(family, 20)
    proxy.have(family, [*others, last])
    assert "-R KUBE-SVC" in proxy.have(family, [*others, other])
    command = f"*nat\n{meddling.format(proxy.chain())}\nCOMMIT\n"
    proxy.node.call(lambda: proxy.iptables.restore(command))
    assert "-R KUBE-SVC" not in proxy.have(family, [*others, last])
    fresh.have(family, [*others, last])
    assert proxy.state() == fresh.state()
    assert "-R KUBE-SVC" in proxy.have(family, [*others, other])


@pytest.mark.parametrize("patching", [True, False])
@pytest.mark.parametrize(("before", "after"), [(30, 27), (27, 30), (30, 30)])
def test_two_proxies_that_are_told_the_same_do_it_once(
    proxies: tuple[Proxy, Proxy], family: Family, before: int, after: int, patching: bool
) -> None:
    """Both look at the chain before either has changed it. One that does not patch is like kube-proxy."""
    proxy, fresh = proxies
    other = Proxy(proxy.node, family, patching=patching)
    found = addresses(family, 31)
    wanted = found[30 - after : 30] if after != before else [*found[:29], found[30]]
    for each in (proxy, other):
        each.have(family, found[30 - before : 30])
    proxy.iptables.meanwhile = lambda: other.have(family, wanted)
    written = proxy.have(family, wanted)
    fresh.have(family, wanted)
    assert proxy.state() == fresh.state()
    assert any(f"{command} KUBE-SVC" in written for command in ("-I", "-D", "-R"))
    assert f"-A {proxy.chain()}" in written or before == after
    assert f"-A {proxy.chain()}" not in proxy.have(family, found[30 - before : 30]), "and it knows what is there"


@pytest.mark.parametrize("meddling", ["-I {} 1 -j ACCEPT", "-D {} 1", "-D {} 20", "-A {} -j ACCEPT", "-F {}"])
def test_what_somebody_does_right_after_the_look_is_undone(
    proxies: tuple[Proxy, Proxy], family: Family, meddling: str
) -> None:
    proxy, fresh = proxies
    there = addresses(family, 30)
    proxy.have(family, there)
    command = f"*nat\n{meddling.format(proxy.chain())}\nCOMMIT\n"
    proxy.iptables.meanwhile = lambda: proxy.iptables.restore(command)
    with suppress(SyncError):  # what the rest of a change refers to may be gone: then all is compared
        proxy.have(family, there[3:])
    proxy.have(family, there[3:])
    fresh.have(family, there[3:])
    assert proxy.state() == fresh.state()
