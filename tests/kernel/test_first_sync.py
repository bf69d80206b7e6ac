"""After the first successful sync in one mode, only the rules of the other mode are removed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from kproxy.app.first_sync import MAX_RETRY_SECONDS, FirstSyncSteps
from kproxy.config import Config
from kproxy.config.types import Mode
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
from tests.clock import Clock
from tests.kernel.test_cleanup import FOREIGN, NFT, nft_tables, proxy_tables, rules, without_firewall
from tests.lab.iptables import PREFIXES, restore_recording
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.recordings import GOLDEN
from tests.reports import failed, succeeded

SCENARIO = "random-11"
ROUTE_LOCALNET = Path("/proc/sys/net/ipv4/conf/all/route_localnet")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def node(node: Namespace) -> Namespace:
    """A node with foreign rules."""
    for prefix in PREFIXES.values():
        node.run([f"{prefix}-restore", "--noflush"], FOREIGN)
    return node


ReportSync: TypeAlias = Callable[[SyncReport], None]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def first_sync_steps(node: Namespace, clock: Clock) -> Callable[[Mode], ReportSync]:
    """Create the first-sync steps of a mode; return the function that reports a sync to them."""

    def make(mode: Mode) -> ReportSync:
        steps = FirstSyncSteps(Config(mode=mode), list(Family), clock=clock)
        return lambda report: node.call(lambda: steps.run(report))

    return make


def report(family: Family, error: str = "") -> SyncReport:
    return failed(family, error=error) if error else succeeded(family)


def program_nftables(node: Namespace) -> None:
    """Program the tables of kube-proxy in nftables mode."""
    for _, name in NFT.values():
        node.run(["nft", "-f", str(GOLDEN / SCENARIO / name)])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def chains(node: Namespace, family: Family) -> set[str]:
    """Return the chains with kproxy's prefix, except those that are never removed."""
    others = {":KUBE-FIREWALL", ":KUBE-KUBELET-CANARY", ":KUBE-IPTABLES-HINT", ":KUBE-ROUTER-INPUT"}
    return {line for line in rules(node, family) if line.startswith(":KUBE-")} - others


def test_nftables_mode_removes_iptables_rules_per_family(
    node: Namespace, first_sync_steps: Callable[[Mode], ReportSync]
) -> None:
    before = {family: rules(node, family) for family in Family}
    restore_recording(node, SCENARIO)
    program_nftables(node)
    ipv6_rules = rules(node, Family.IPV6)
    report_sync = first_sync_steps("nftables")

    report_sync(report(Family.IPV4))
    assert not chains(node, Family.IPV4)
    assert without_firewall(rules(node, Family.IPV4)) == before[Family.IPV4]
    assert ":KUBE-FIREWALL" in rules(node, Family.IPV4)
    assert rules(node, Family.IPV6) == ipv6_rules

    report_sync(report(Family.IPV6))
    assert not chains(node, Family.IPV6)
    assert without_firewall(rules(node, Family.IPV6)) == before[Family.IPV6]
    assert len(proxy_tables(node)) == 2


def test_iptables_mode_removes_nftables_tables_per_family(
    node: Namespace, first_sync_steps: Callable[[Mode], ReportSync]
) -> None:
    restore_recording(node, SCENARIO)
    program_nftables(node)
    node.run(["nft", "add", "table", "inet", "mine"])
    before = {family: rules(node, family) for family in Family}
    report_sync = first_sync_steps("iptables")
    report_sync(report(Family.IPV6))
    assert proxy_tables(node) == ["table ip kube-proxy"]
    report_sync(report(Family.IPV4))
    assert proxy_tables(node) == []
    assert "table inet mine" in nft_tables(node)
    assert {family: rules(node, family) for family in Family} == before


@pytest.mark.parametrize(("mode", "value"), [("iptables", "1"), ("nftables", "0")])
def test_route_localnet_is_set_only_in_iptables_mode(
    node: Namespace, first_sync_steps: Callable[[Mode], ReportSync], mode: Mode, value: str
) -> None:
    node.sysctl(ipv4__conf__all__route_localnet=0)
    first_sync_steps(mode)(report(Family.IPV4))
    assert node.call(ROUTE_LOCALNET.read_text).strip() == value


def test_nothing_is_removed_before_the_first_successful_sync(
    node: Namespace, first_sync_steps: Callable[[Mode], ReportSync]
) -> None:
    restore_recording(node, SCENARIO)
    before = rules(node, Family.IPV4)
    report_sync = first_sync_steps("nftables")
    report_sync(report(Family.IPV4, "rejected"))
    report_sync(report(Family.IPV6))
    assert rules(node, Family.IPV4) == before
    assert not chains(node, Family.IPV6)


def test_rules_are_removed_only_once(
    node: Namespace, first_sync_steps: Callable[[Mode], ReportSync], logged: pytest.LogCaptureFixture
) -> None:
    report_sync = first_sync_steps("nftables")
    restore_recording(node, SCENARIO)
    report_sync(report(Family.IPV4))
    restore_recording(node, SCENARIO)
    restored = rules(node, Family.IPV4)
    report_sync(report(Family.IPV4))
    assert rules(node, Family.IPV4) == restored
    assert warnings(logged) == []


@pytest.fixture
def wrap_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a shell script in front of a program in PATH. The script can run the program as `$REAL`."""
    usual = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(name: str, script: str) -> None:
        path = tmp_path / f"{name}.new"
        path.write_text(f"#!/bin/sh\nREAL={shutil.which(name, path=usual)}\n{script}\n")
        path.chmod(0o755)
        path.rename(tmp_path / name)  # atomic: one of the scripts always exists

    return put


def test_failed_removal_is_retried_and_logged_once(
    node: Namespace,
    first_sync_steps: Callable[[Mode], ReportSync],
    wrap_program: Callable[[str, str], None],
    logged: pytest.LogCaptureFixture,
    tmp_path: Path,
    *,
    clock: Clock,
) -> None:
    restore_recording(node, SCENARIO)
    attempts = tmp_path / "tries"
    attempts.touch()
    wrap_program("iptables-restore", f"echo >>{attempts}; echo 'iptables-restore: Another app is busy' >&2; exit 4")
    report_sync = first_sync_steps("nftables")

    for _ in range(3):
        report_sync(report(Family.IPV4))
        report_sync(report(Family.IPV4))
        clock.advance(MAX_RETRY_SECONDS)
    assert len(attempts.read_text()) == 3
    assert chains(node, Family.IPV4)
    wrap_program("iptables-restore", 'exec "$REAL" "$@"')
    report_sync(report(Family.IPV4))
    assert not chains(node, Family.IPV4)
    message = "IPv4: cannot remove the rules of the other proxy mode: iptables-restore failed with status 4: "
    assert [line.startswith(message) for line in warnings(logged)] == [True]


def test_missing_iptables_is_not_logged(
    node: Namespace,
    first_sync_steps: Callable[[Mode], ReportSync],
    logged: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report_sync = first_sync_steps("nftables")
    report_sync(report(Family.IPV4))
    report_sync(report(Family.IPV6))
    assert logged.text == ""


def test_rules_of_the_other_iptables_variant_are_logged_once(
    node: Namespace, first_sync_steps: Callable[[Mode], ReportSync], logged: pytest.LogCaptureFixture
) -> None:
    legacy = shutil.which("iptables-legacy")
    if legacy is None or "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("needs iptables-nft in use, with iptables-legacy beside it")
    restore_recording(node, SCENARIO)
    node.run([legacy, "-t", "nat", "-N", "KUBE-SERVICES"])
    report_sync = first_sync_steps("nftables")
    report_sync(report(Family.IPV4))
    report_sync(report(Family.IPV6))
    assert not chains(node, Family.IPV4) | chains(node, Family.IPV6)
    messages = warnings(logged)
    assert [line.partition(":")[0] for line in messages] == [
        "KUBE- chains of iptables-legacy remain and cannot be removed"
    ]


def test_apply_exits_after_the_removal(node: Namespace) -> None:
    restore_recording(node, SCENARIO)
    folder = GOLDEN / SCENARIO
    command = [KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}"]
    log = node.run([*command, "--proxy-mode=nftables"]).stderr
    assert not chains(node, Family.IPV4) | chains(node, Family.IPV6)
    assert len(proxy_tables(node)) == 2
    assert [line.split()[-3] for line in log.splitlines() if "] removed " in line] == ["IPv4", "IPv6"]
    node.run([*command, "--proxy-mode=iptables"])
    assert proxy_tables(node) == []
    assert all(chains(node, family) for family in Family)
