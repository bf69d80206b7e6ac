"""The fake kernel handles input like the real one with either variant of iptables."""

from __future__ import annotations

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.runner import RestoreError
from kproxy.model.types import Family
from tests.fakekernel import FakeKernel
from tests.inprocess import SingleFamilyProxy
from tests.lab.iptables import RealKernel
from tests.lab.namespace import Namespace
from tests.recordings import comparable, replaces, store
from tests.unit.test_iptables_render import recorded_context

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
"""Recorded clusters that a proxy programs one after another."""

INVALID_INPUTS = (
    "*nat\n-A KUBE-NONE -j ACCEPT\nCOMMIT\n",
    "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j KUBE-NONE\nCOMMIT\n",
    "*nat\n:KUBE-A - [0:0]\n:KUBE-B - [0:0]\n-A KUBE-A -j KUBE-B\n-X KUBE-B\nCOMMIT\n",
    "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j ACCEPT\n-X KUBE-A\nCOMMIT\n",
    "*nat\n-X KUBE-NONE\nCOMMIT\n",
    "*nat\n:KUBE-IN-USE - [0:0]\n-X KUBE-IN-USE\nCOMMIT\n",
)
IN_USE = "*nat\n:KUBE-IN-USE - [0:0]\n-A PREROUTING -j KUBE-IN-USE\nCOMMIT\n"

pytestmark = pytest.mark.usefixtures("counters")


@pytest.mark.parametrize("family", Family)
def test_input_of_a_proxy_has_the_same_effect(namespace: Namespace, variant: str, family: Family) -> None:
    real, fake = RealKernel(namespace, family, variant), FakeKernel()
    found = store(HISTORY[0])
    context = recorded_context(HISTORY[0], family, found)
    proxy = SingleFamilyProxy(IptablesBackend(fake, max_transaction_rules=20), context, store=found)
    for scenario in HISTORY:
        proxy.apply(*replaces(scenario)).sync()
        for text in fake.inputs:
            real.restore(text)
        assert real.state() == comparable(fake.dump())
        fake.inputs.clear()


def test_both_reject_the_same_input_and_stay_unchanged(namespace: Namespace, variant: str) -> None:
    real, fake = RealKernel(namespace, Family.IPV4, variant), FakeKernel()
    real.restore(IN_USE)
    fake.restore(IN_USE)
    before = comparable(fake.dump())
    for text in INVALID_INPUTS:
        with pytest.raises(RestoreError):
            fake.restore(text)
        with pytest.raises(RuntimeError, match="exit code"):
            real.restore(text)
        assert comparable(fake.dump()) == before
        assert {chain: rules for chain, rules in real.state().items() if chain.table == "nat"} == {
            chain: rules for chain, rules in before.items() if chain.table == "nat"
        }


def test_inserted_rules_and_flushed_chains_are_identical(namespace: Namespace, variant: str) -> None:
    real, fake = RealKernel(namespace, Family.IPV4, variant), FakeKernel()
    inputs = (
        "*nat\n:KUBE-A - [0:0]\n-A KUBE-A -j RETURN\n-I PREROUTING 1 -j KUBE-A\n-I PREROUTING 1 -j ACCEPT\nCOMMIT\n",
        "*nat\n:KUBE-A - [0:0]\n:KUBE-B - [0:0]\n-A KUBE-A -j KUBE-B\nCOMMIT\n*filter\n:KUBE-F - [0:0]\nCOMMIT\n",
        "*nat\n:KUBE-A - [0:0]\n:KUBE-B - [0:0]\n-X KUBE-B\nCOMMIT\n",
    )
    for text in inputs:
        fake.restore(text)
        real.restore(text)
        state = real.state()
        assert {chain: rules for chain, rules in comparable(fake.dump()).items() if chain in state} == state
