"""The comparison finds no drift in kproxy's own rules, and restores damaged shared chains and jumps exactly."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.names import CANARIES, DISPATCH_CHAINS, ChainName
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family
from tests.inprocess import SingleFamilyProxy
from tests.lab.iptables import link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.recordings import SCENARIOS, replaces, store
from tests.unit.test_iptables_render import recorded_context

SCENARIO = "random-11"

pytestmark = pytest.mark.usefixtures("counters")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is first in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    return tmp_path


@pytest.fixture
def variant(programs: Path, variant: str) -> str:
    """Each variant of iptables that works on this machine. It is first in PATH for the test."""
    link_programs(programs_of(variant), programs)
    return variant


class RecordedProxy(SingleFamilyProxy):
    """A proxy that has programmed a recorded cluster."""

    def __init__(self, namespace: Namespace) -> None:
        objects = store(SCENARIO)
        context = recorded_context(SCENARIO, Family.IPV4, objects)
        super().__init__(IptablesBackend(IptablesRunner(Family.IPV4)), context, store=objects, namespace=namespace)
        self.sync()

    def detects_and_repairs(self) -> bool:
        """Return whether a comparison detects damage and repairs it without a full sync."""
        return not self.verify() and not self.backend.needs_full_sync and self.verify()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("threshold", [2, 1000])
def test_own_rules_are_not_drift(namespace: Namespace, family: Family, threshold: int) -> None:
    kernel = IptablesBackend(IptablesRunner(family), dispatch_threshold=threshold)
    found = store(SCENARIOS[0])
    for scenario in SCENARIOS[::3]:
        context = recorded_context(scenario, family, store(scenario))
        proxy = SingleFamilyProxy(kernel, context, store=found, namespace=namespace)
        proxy.apply(*replaces(scenario))
        proxy.forget()
        proxy.sync()
        assert proxy.verify(), scenario
        assert not kernel.needs_full_sync


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("chain", DISPATCH_CHAINS, ids=lambda chain: f"{chain.table}-{chain.name}")
def test_foreign_rule_in_a_shared_chain_is_drift(namespace: Namespace, chain: ChainName) -> None:
    proxy = RecordedProxy(namespace)
    namespace.run(["iptables", "-t", chain.table, "-A", chain.name, "-j", "RETURN"])
    assert proxy.detects_and_repairs()


@pytest.mark.usefixtures("variant")
def test_missing_rule_in_a_builtin_chain_and_missing_canary_are_drift(namespace: Namespace) -> None:
    proxy = RecordedProxy(namespace)
    for rule in ensured_rules(proxy.context):
        namespace.run(["iptables-restore", "--noflush"], f"*{rule.chain.table}\n-D{rule.text[2:]}\nCOMMIT\n")
        assert proxy.detects_and_repairs(), rule
    for canary in CANARIES:
        namespace.run(["iptables", "-t", canary.table, "-X", canary.name])
        assert proxy.detects_and_repairs(), canary


@pytest.mark.usefixtures("variant")
def test_equivalent_foreign_jump_is_accepted(namespace: Namespace) -> None:
    namespace.run(["iptables", "-t", "nat", "-N", "KUBE-POSTROUTING"])
    namespace.run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "KUBE-POSTROUTING"])
    proxy = RecordedProxy(namespace)
    assert proxy.verify()
    namespace.run(["iptables", "-t", "nat", "-D", "POSTROUTING", "-j", "KUBE-POSTROUTING"])
    assert proxy.detects_and_repairs()


def test_drift_check_does_not_wait_for_the_xtables_lock(
    namespace: Namespace, variant: str, programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = RecordedProxy(namespace)
    with (programs / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert proxy.verify(), variant
    assert "cannot check" not in caplog.text


def test_failed_comparison_changes_nothing(namespace: Namespace, variant: str, programs: Path) -> None:
    proxy = RecordedProxy(namespace)
    namespace.run(["iptables", "-t", "nat", "-F", "KUBE-SERVICES"])
    real = {name: (programs / name).readlink() for name in ("iptables", "iptables-save")}
    for name in real:
        (programs / name).unlink()
        (programs / name).write_text(
            "#!/bin/sh\necho 'Another app is currently holding the xtables lock.' >&2\nexit 4\n"
        )
        (programs / name).chmod(0o755)
    with pytest.raises(SyncError, match=r"failed with status 4: Another app"):
        proxy.verify()
    assert not proxy.backend.needs_full_sync, variant
    for name, target in real.items():
        (programs / name).unlink()
        (programs / name).symlink_to(target)
    assert proxy.detects_and_repairs()


def test_comparison_after_foreign_commits_lists_only_shared_chains(
    namespace: Namespace, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_programs(programs_of("nft"), programs)
    proxy = RecordedProxy(namespace)
    listed: list[ChainName] = []
    list_rules = IptablesRunner.list_rules

    def spy(runner: IptablesRunner, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        listed.extend(wanted := list(chains))
        return list_rules(runner, wanted)

    assert proxy.verify()
    monkeypatch.setattr(IptablesRunner, "list_rules", spy)
    monkeypatch.setattr(IptablesRunner, "save", None)
    namespace.run(["iptables", "-t", "nat", "-N", "OTHER"])
    assert proxy.verify()
    assert ChainName("nat", "OUTPUT") in listed
    assert not [chain for chain in listed if chain.name.startswith("KUBE-S") or chain in DISPATCH_CHAINS]


UNPRINTABLE_RULES = (
    "add rule ip filter OUTPUT meta skuid 12345 counter drop",
    "insert rule ip filter OUTPUT meta skuid 12345 counter drop",
    "insert rule ip filter FORWARD meta cpu 99 accept",
    "add rule ip filter INPUT ct state new meta nftrace set 1",
    "insert rule ip filter INPUT ct state new meta nftrace set 1",
    "add rule ip nat PREROUTING meta cpu 99 accept",
    "insert rule ip nat POSTROUTING meta cpu 99 accept",
    "add rule ip filter foreign meta length 5 accept",
)
"""Rules that iptables 1.8.9 cannot print: first and last in chains that contain jumps, and in another chain."""


@pytest.mark.parametrize("rule", UNPRINTABLE_RULES)
def test_rule_that_only_nft_can_print_does_not_hide_jumps(namespace: Namespace, rule: str) -> None:
    """An existing jump counts as present, so syncs do not add it again."""
    proxy = RecordedProxy(namespace)
    namespace.run(["nft", "add", "chain", "ip", "filter", "foreign"])
    namespace.run(["nft", *rule.split()])
    assert proxy.verify()
    proxy.forget()
    proxy.sync()
    assert proxy.verify()
    before = jumps(namespace)
    proxy.forget()
    proxy.sync()
    assert jumps(namespace) == before
    namespace.run(["iptables", "-t", "nat", "-D", "PREROUTING", "1"])
    assert proxy.detects_and_repairs()


@pytest.mark.parametrize("chain", DISPATCH_CHAINS, ids=lambda chain: f"{chain.table}-{chain.name}")
def test_rule_that_only_nft_can_print_is_removed_from_own_chains(namespace: Namespace, chain: ChainName) -> None:
    proxy = RecordedProxy(namespace)
    namespace.run(["nft", "add", "rule", "ip", *chain, "meta", "cpu", "99", "accept"])
    assert proxy.detects_and_repairs()
    assert "meta cpu" not in namespace.run(["nft", "list", "ruleset"]).stdout


def jumps(namespace: Namespace) -> list[str]:
    """Return the jumps to kproxy's chains as listed by nft, which prints rules that iptables-save cannot print."""
    rules = namespace.run(["nft", "-s", "list", "ruleset", "ip"]).stdout.splitlines()
    return [rule.strip() for rule in rules if "jump KUBE-" in rule]
