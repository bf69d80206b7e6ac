"""The kernel in memory does with an input what the real one does, whichever variant of iptables feeds it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from kproxy.host.nfacct import ensure_counters
from kproxy.host.run import first_line
from kproxy.iptables.apply import RestoreError
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.types import Family
from kproxy.sync.family import FamilySync
from tests.fakekernel import FakeKernel
from tests.lab.namespace import Namespace
from tests.recordings import State, comparable, replaces, store
from tests.unit.test_render import recorded_context

HISTORY = (
    "clusterip",
    "loadbalancer-source-ranges-with-node",
    "session-affinity",
    "nodeport-external-local-none-here",
    "no-endpoints",
    "random-11",
    "dual-stack",
    "protocols-tcp-udp-sctp-same-port",
)
"""Recorded clusters that a proxy is led through, one after the other."""

REFUSED = (
    "*nat\n-A KUBE-NONE -j ACCEPT\nCOMMIT\n",
    "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j KUBE-NONE\nCOMMIT\n",
    "*nat\n:KUBE-A - [0:0]\n:KUBE-B - [0:0]\n-A KUBE-A -j KUBE-B\n-X KUBE-B\nCOMMIT\n",
    "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j ACCEPT\n-X KUBE-A\nCOMMIT\n",
    "*nat\n-X KUBE-NONE\nCOMMIT\n",
    "*nat\n:KUBE-IN-USE - [0:0]\n-X KUBE-IN-USE\nCOMMIT\n",
)
IN_USE = "*nat\n:KUBE-IN-USE - [0:0]\n-A PREROUTING -j KUBE-IN-USE\nCOMMIT\n"


class RealKernel:
    """The rules of one family in a namespace, through one variant of iptables."""

    def __init__(self, namespace: Namespace, family: Family, variant: str) -> None:
        self._namespace = namespace
        self._prefix = f"{'ip6' if family is Family.IPV6 else 'ip'}tables-{variant}"

    def restore(self, text: str) -> bool:
        return self._namespace.run([f"{self._prefix}-restore", "--noflush"], text, check=False).returncode == 0

    def state(self) -> State:
        return comparable(self._namespace.run([f"{self._prefix}-save"]).stdout.splitlines())


@pytest.fixture
def namespace(kernel: None) -> Iterator[Namespace]:
    """A fresh namespace that has the counters which the rules name."""
    found = Namespace("fakekernel")
    try:
        found.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))
        yield found
    finally:
        found.close()


@pytest.fixture(params=["nft", "legacy"])
def variant(request: pytest.FixtureRequest, namespace: Namespace) -> str:
    """Each variant of iptables that works here."""
    found: str = request.param
    if shutil.which(f"iptables-{found}-restore") is None:
        pytest.skip(f"iptables-{found}-restore not found: it is in the Debian package iptables")
    done = namespace.run([f"iptables-{found}-restore", "--noflush"], "*nat\nCOMMIT\n", check=False)
    if done.returncode:
        pytest.skip(f"{found} iptables does not work here: {first_line(done.stderr)}")
    return found


@pytest.mark.parametrize("family", Family)
def test_a_proxys_inputs_have_the_same_effect(namespace: Namespace, variant: str, family: Family) -> None:
    real, fake = RealKernel(namespace, family, variant), FakeKernel()
    found = store(HISTORY[0])
    context = recorded_context(HISTORY[0], family, found)
    proxy = FamilySync(IptablesBackend(fake, block_rules=20), lambda _: context)
    for scenario in HISTORY:
        for delta in replaces(scenario):
            proxy.note(found.apply(delta))
        proxy.sync(found)
        assert [real.restore(text) for text in fake.inputs] == [True] * len(fake.inputs)
        assert real.state() == comparable(fake.dump())
        fake.inputs.clear()


def test_both_refuse_the_same_and_keep_what_they_had(namespace: Namespace, variant: str) -> None:
    real, fake = RealKernel(namespace, Family.IPV4, variant), FakeKernel()
    assert real.restore(IN_USE)
    fake.restore(IN_USE)
    before = comparable(fake.dump())
    for text in REFUSED:
        with pytest.raises(RestoreError):
            fake.restore(text)
        assert not real.restore(text), text
        assert comparable(fake.dump()) == before
        assert {chain: rules for chain, rules in real.state().items() if chain.table == "nat"} == {
            chain: rules for chain, rules in before.items() if chain.table == "nat"
        }


def test_rules_inserted_at_the_top_and_chains_emptied(namespace: Namespace, variant: str) -> None:
    real, fake = RealKernel(namespace, Family.IPV4, variant), FakeKernel()
    inputs = (
        "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j RETURN\n-I PREROUTING 1 -j KUBE-A\n-I PREROUTING 1 -j ACCEPT\nCOMMIT\n",
        "*nat\n:KUBE-A - [0:0]\n:KUBE-B - [0:0]\n-A KUBE-A -j KUBE-B\nCOMMIT\n*filter\n:KUBE-F - [0:0]\nCOMMIT\n",
        "*nat\n:KUBE-A - [0:0]\n:KUBE-B - [0:0]\n-X KUBE-B\nCOMMIT\n",
    )
    for text in inputs:
        fake.restore(text)
        assert real.restore(text)
        state = real.state()
        assert {chain: rules for chain, rules in comparable(fake.dump()).items() if chain in state} == state
