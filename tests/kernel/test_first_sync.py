"""Once the rules of one mode work, what the other mode left goes, and nothing else."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from kproxy.app.first_sync import FirstSyncSteps
from kproxy.config import Config
from kproxy.config.types import Mode
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
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
    """A node on which others have rules already."""
    for prefix in PREFIXES.values():
        node.run([f"{prefix}-restore", "--noflush"], FOREIGN)
    return node


Tell: TypeAlias = Callable[[SyncReport], None]


@pytest.fixture
def told(node: Namespace) -> Callable[[Mode], Tell]:
    """Makes an observer of a mode, and returns what tells it of a sync."""

    def make(mode: Mode) -> Tell:
        steps = FirstSyncSteps(Config(mode=mode), list(Family))
        return lambda report: node.call(lambda: steps.run(report))

    return make


def report(family: Family, error: str = "") -> SyncReport:
    return failed(family, error=error) if error else succeeded(family)


def program_nftables(node: Namespace) -> None:
    """Program what kube-proxy in nftables mode did."""
    for _, name in NFT.values():
        node.run(["nft", "-f", str(GOLDEN / SCENARIO / name)])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def chains(node: Namespace, family: Family) -> set[str]:
    """The chains that begin as ours do, but for those that stay."""
    others = {":KUBE-FIREWALL", ":KUBE-KUBELET-CANARY", ":KUBE-IPTABLES-HINT", ":KUBE-ROUTER-INPUT"}
    return {line for line in rules(node, family) if line.startswith(":KUBE-")} - others


def test_in_nftables_mode_the_rules_of_iptables_mode_go_family_by_family(
    node: Namespace, told: Callable[[Mode], Tell]
) -> None:
    before = {family: rules(node, family) for family in Family}
    restore_recording(node, SCENARIO)
    program_nftables(node)
    of_ipv6 = rules(node, Family.IPV6)
    tell = told("nftables")

    tell(report(Family.IPV4))
    assert not chains(node, Family.IPV4)
    assert without_firewall(rules(node, Family.IPV4)) == before[Family.IPV4]
    assert ":KUBE-FIREWALL" in rules(node, Family.IPV4)
    assert rules(node, Family.IPV6) == of_ipv6

    tell(report(Family.IPV6))
    assert not chains(node, Family.IPV6)
    assert without_firewall(rules(node, Family.IPV6)) == before[Family.IPV6]
    assert len(proxy_tables(node)) == 2


def test_in_iptables_mode_the_tables_of_nftables_mode_go_family_by_family(
    node: Namespace, told: Callable[[Mode], Tell]
) -> None:
    restore_recording(node, SCENARIO)
    program_nftables(node)
    node.run(["nft", "add", "table", "inet", "mine"])
    before = {family: rules(node, family) for family in Family}
    tell = told("iptables")
    tell(report(Family.IPV6))
    assert proxy_tables(node) == ["table ip kube-proxy"]
    tell(report(Family.IPV4))
    assert proxy_tables(node) == []
    assert "table inet mine" in nft_tables(node)
    assert {family: rules(node, family) for family in Family} == before


@pytest.mark.parametrize(("mode", "value"), [("iptables", "1"), ("nftables", "0")])
def test_localhost_is_opened_to_node_ports_in_iptables_mode_only(
    node: Namespace, told: Callable[[Mode], Tell], mode: Mode, value: str
) -> None:
    node.sysctl(ipv4__conf__all__route_localnet=0)
    told(mode)(report(Family.IPV4))
    assert node.call(ROUTE_LOCALNET.read_text).strip() == value


def test_nothing_goes_before_the_first_success(node: Namespace, told: Callable[[Mode], Tell]) -> None:
    restore_recording(node, SCENARIO)
    before = rules(node, Family.IPV4)
    tell = told("nftables")
    tell(report(Family.IPV4, "refused"))
    tell(report(Family.IPV6))
    assert rules(node, Family.IPV4) == before
    assert not chains(node, Family.IPV6)


def test_it_happens_once(node: Namespace, told: Callable[[Mode], Tell], logged: pytest.LogCaptureFixture) -> None:
    tell = told("nftables")
    restore_recording(node, SCENARIO)
    tell(report(Family.IPV4))
    restore_recording(node, SCENARIO)
    there = rules(node, Family.IPV4)
    tell(report(Family.IPV4))
    assert rules(node, Family.IPV4) == there
    assert warnings(logged) == []


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program of this name before the real one, which its shell script may call as `$REAL`."""
    usual = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(name: str, script: str) -> None:
        path = tmp_path / f"{name}.new"
        path.write_text(f"#!/bin/sh\nREAL={shutil.which(name, path=usual)}\n{script}\n")
        path.chmod(0o755)
        path.rename(tmp_path / name)  # there is one at any moment, old or new

    return put


def test_what_cannot_be_removed_is_tried_again_and_said_once(
    node: Namespace,
    told: Callable[[Mode], Tell],
    program: Callable[[str, str], None],
    logged: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    restore_recording(node, SCENARIO)
    tries = tmp_path / "tries"
    tries.touch()
    program("iptables-restore", f"echo >>{tries}; echo 'iptables-restore: Another app is busy' >&2; exit 4")
    tell = told("nftables")

    for _ in range(3):
        tell(report(Family.IPV4))
    assert len(tries.read_text()) == 3
    assert chains(node, Family.IPV4)
    program("iptables-restore", 'exec "$REAL" "$@"')
    tell(report(Family.IPV4))
    assert not chains(node, Family.IPV4)
    said = "IPv4: rules of other modes are still there beside ours: iptables-restore failed with status 4: "
    assert [line.startswith(said) for line in warnings(logged)] == [True]


def test_without_iptables_there_is_nothing_to_say(
    node: Namespace,
    told: Callable[[Mode], Tell],
    logged: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tell = told("nftables")
    tell(report(Family.IPV4))
    tell(report(Family.IPV6))
    assert logged.text == ""


def test_rules_that_the_iptables_in_use_does_not_see_are_said_once(
    node: Namespace, told: Callable[[Mode], Tell], logged: pytest.LogCaptureFixture
) -> None:
    legacy = shutil.which("iptables-legacy")
    if legacy is None or "nf_tables" not in node.run(["iptables", "--version"]).stdout:
        pytest.skip("needs iptables-nft in use, with iptables-legacy beside it")
    restore_recording(node, SCENARIO)
    node.run([legacy, "-t", "nat", "-N", "KUBE-SERVICES"])
    tell = told("nftables")
    tell(report(Family.IPV4))
    tell(report(Family.IPV6))
    assert not chains(node, Family.IPV4) | chains(node, Family.IPV6)
    said = warnings(logged)
    assert [line.partition(":")[0] for line in said] == ["KUBE- chains of iptables-legacy remain and cannot be removed"]


def test_the_command_ends_only_when_they_are_gone(node: Namespace) -> None:
    restore_recording(node, SCENARIO)
    folder = GOLDEN / SCENARIO
    command = [KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}"]
    said = node.run([*command, "--proxy-mode=nftables"]).stderr
    assert not chains(node, Family.IPV4) | chains(node, Family.IPV6)
    assert len(proxy_tables(node)) == 2
    assert [line.rpartition(" ")[2] for line in said.splitlines() if "] removed " in line] == ["IPv4", "IPv6"]
    node.run([*command, "--proxy-mode=iptables"])
    assert proxy_tables(node) == []
    assert all(chains(node, family) for family in Family)
