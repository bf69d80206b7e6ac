"""A look at the rules finds nothing wrong in our own, and what others do to the chains that all Services share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.apply import Iptables
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.names import DISPATCH, Chain
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.context import Context
from kproxy.model.types import Family, Node
from kproxy.sync.family import FamilySync
from tests.lab.namespace import Namespace
from tests.recordings import SCENARIOS, replaces, store
from tests.unit.test_render import recorded_context

SCENARIO = "random-11"


def _constant(context: Context, _: Node | None) -> Context:
    return context


@pytest.fixture
def namespace(kernel: None) -> Iterator[Namespace]:
    found = Namespace("look")
    try:
        found.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("threshold", [2, 1000])
def test_own_rules_are_as_they_should_be(namespace: Namespace, family: Family, threshold: int) -> None:
    kernel = IptablesBackend(Iptables(family), dispatch_threshold=threshold)
    found = store(SCENARIOS[0])
    for scenario in SCENARIOS[::3]:
        context = recorded_context(scenario, family, store(scenario))
        proxy = FamilySync(kernel, partial(_constant, context))
        for delta in replaces(scenario):
            proxy.note(found.apply(delta))
        kernel.forget()
        namespace.call(partial(proxy.sync, found))
        assert namespace.call(proxy.verify), scenario
        assert not kernel.needs_everything


@pytest.mark.parametrize("chain", DISPATCH, ids=lambda chain: f"{chain.table}-{chain.name}")
def test_a_rule_of_others_in_a_chain_that_all_share(namespace: Namespace, chain: Chain) -> None:
    found = store(SCENARIO)
    context = recorded_context(SCENARIO, Family.IPV4, found)
    kernel = IptablesBackend(Iptables(Family.IPV4))
    proxy = FamilySync(kernel, partial(_constant, context))
    namespace.call(partial(proxy.sync, found))
    namespace.run(["iptables", "-t", chain.table, "-A", chain.name, "-j", "RETURN"])
    assert not namespace.call(proxy.verify)
    assert kernel.needs_everything
    namespace.call(partial(proxy.sync, found))
    assert namespace.call(proxy.verify)
