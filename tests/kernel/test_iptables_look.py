"""A look at the rules finds nothing wrong in our own, and what others do to what leads to all Services."""

from __future__ import annotations

import fcntl
import logging
import os
from functools import partial
from pathlib import Path

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.names import CANARIES, DISPATCH_CHAINS, ChainName
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.context import Context
from kproxy.model.types import Family, Node
from kproxy.sync.family import FamilySync
from tests.lab.iptables import link, programs_of
from tests.lab.namespace import Namespace
from tests.recordings import SCENARIOS, replaces, store
from tests.unit.test_iptables_render import recorded_context

SCENARIO = "random-11"

pytestmark = pytest.mark.usefixtures("counters")


def _constant(context: Context, _: Node | None) -> Context:
    return context


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is first in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    return tmp_path


@pytest.fixture
def variant(programs: Path, variant: str) -> str:
    """Each variant of iptables that works here, for this test the one in PATH."""
    link(programs_of(variant), programs)
    return variant


class Proxy:
    """A proxy that has programmed a recorded cluster in a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._store = store(SCENARIO)
        self.context = recorded_context(SCENARIO, Family.IPV4, self._store)
        self.backend = IptablesBackend(IptablesRunner(Family.IPV4))
        self._proxy = FamilySync(self.backend, partial(_constant, self.context))
        self.sync()

    def sync(self) -> None:
        self._namespace.call(partial(self._proxy.sync, self._store))

    def verify(self) -> bool:
        return self._namespace.call(self._proxy.verify)

    def forget(self) -> None:
        self._proxy.forget()

    def sees_what_is_missing(self) -> bool:
        """Whether a look finds something missing, and the next finds nothing once it is put back."""
        if self.verify():
            return False
        assert self.backend.needs_full_sync
        self.sync()
        return self.verify()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("threshold", [2, 1000])
def test_own_rules_are_as_they_should_be(namespace: Namespace, family: Family, threshold: int) -> None:
    kernel = IptablesBackend(IptablesRunner(family), dispatch_threshold=threshold)
    found = store(SCENARIOS[0])
    for scenario in SCENARIOS[::3]:
        context = recorded_context(scenario, family, store(scenario))
        proxy = FamilySync(kernel, partial(_constant, context))
        for delta in replaces(scenario):
            proxy.note(found.apply(delta))
        kernel.forget()
        namespace.call(partial(proxy.sync, found))
        assert namespace.call(proxy.verify), scenario
        assert not kernel.needs_full_sync


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("chain", DISPATCH_CHAINS, ids=lambda chain: f"{chain.table}-{chain.name}")
def test_a_rule_of_others_in_a_chain_that_all_share(namespace: Namespace, chain: ChainName) -> None:
    proxy = Proxy(namespace)
    namespace.run(["iptables", "-t", chain.table, "-A", chain.name, "-j", "RETURN"])
    assert proxy.sees_what_is_missing()


@pytest.mark.usefixtures("variant")
def test_each_rule_in_a_chain_of_others_and_each_canary_is_missed(namespace: Namespace) -> None:
    proxy = Proxy(namespace)
    for rule in ensured_rules(proxy.context):
        namespace.run(["iptables-restore", "--noflush"], f"*{rule.chain.table}\n-D{rule.text[2:]}\nCOMMIT\n")
        assert proxy.sees_what_is_missing(), rule
    for canary in CANARIES:
        namespace.run(["iptables", "-t", canary.table, "-X", canary.name])
        assert proxy.sees_what_is_missing(), canary


@pytest.mark.usefixtures("variant")
def test_a_jump_in_another_spelling_is_as_good_as_ours(namespace: Namespace) -> None:
    namespace.run(["iptables", "-t", "nat", "-N", "KUBE-POSTROUTING"])
    namespace.run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "KUBE-POSTROUTING"])
    proxy = Proxy(namespace)
    assert proxy.verify()
    namespace.run(["iptables", "-t", "nat", "-D", "POSTROUTING", "-j", "KUBE-POSTROUTING"])
    assert proxy.sees_what_is_missing()


def test_a_look_does_not_wait_for_the_lock_that_somebody_else_holds(
    namespace: Namespace, variant: str, programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(namespace)
    with (programs / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert proxy.verify(), variant
    assert "cannot check" not in caplog.text


def test_a_look_that_fails_says_so_and_changes_nothing(
    namespace: Namespace, variant: str, programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(namespace)
    failing = programs / ("iptables" if variant == "nft" else "iptables-save")
    failing.unlink()
    failing.write_text("#!/bin/sh\necho 'Another app is currently holding the xtables lock.' >&2\nexit 4\n")
    failing.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        assert proxy.verify()
    assert not proxy.backend.needs_full_sync
    assert f"cannot check the iptables rules for drift: {failing.name} failed with status 4: Another app" in caplog.text


UNREADABLE = (
    "add rule ip filter OUTPUT meta skuid 12345 counter drop",
    "insert rule ip filter OUTPUT meta skuid 12345 counter drop",
    "insert rule ip filter FORWARD meta cpu 99 accept",
    "add rule ip filter INPUT ct state new meta nftrace set 1",
    "insert rule ip filter INPUT ct state new meta nftrace set 1",
    "add rule ip nat PREROUTING meta cpu 99 accept",
    "insert rule ip nat POSTROUTING meta cpu 99 accept",
    "add rule ip filter foreign meta length 5 accept",
)
"""Rules that iptables 1.8.9 cannot print, at the end and on top of chains that hold jumps, and elsewhere."""


@pytest.mark.parametrize("rule", UNREADABLE)
def test_a_rule_that_only_nft_can_show_hides_nothing_that_matters(namespace: Namespace, rule: str) -> None:
    """Neither is a jump missed that is there, nor one put in twice for ever."""
    proxy = Proxy(namespace)
    namespace.run(["nft", "add", "chain", "ip", "filter", "foreign"])
    namespace.run(["nft", *rule.split()])
    assert proxy.verify()
    proxy.forget()
    proxy.sync()
    assert proxy.verify()
    once = jumps(namespace)
    proxy.forget()
    proxy.sync()
    assert jumps(namespace) == once
    namespace.run(["iptables", "-t", "nat", "-D", "PREROUTING", "1"])
    assert proxy.sees_what_is_missing()


@pytest.mark.parametrize("chain", DISPATCH_CHAINS, ids=lambda chain: f"{chain.table}-{chain.name}")
def test_a_rule_that_only_nft_can_show_in_a_chain_of_ours_is_taken_out(namespace: Namespace, chain: ChainName) -> None:
    proxy = Proxy(namespace)
    namespace.run(["nft", "add", "rule", "ip", *chain, "meta", "cpu", "99", "accept"])
    assert proxy.sees_what_is_missing()
    assert "meta cpu" not in namespace.run(["nft", "list", "ruleset"]).stdout


def jumps(namespace: Namespace) -> list[str]:
    """The jumps to chains of ours, as nft shows them, which shows what iptables-save does not."""
    rules = namespace.run(["nft", "-s", "list", "ruleset", "ip"]).stdout.splitlines()
    return [rule.strip() for rule in rules if "jump KUBE-" in rule]
