"""Leftovers of kube-proxy's ipvs mode are removed after the first sync and by --cleanup. Foreign objects are kept."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kproxy.app.cleanup import VirtualServersRemainError, remove_all, remove_ipvs
from kproxy.app.first_sync import MAX_RETRY_SECONDS, FirstSyncSteps
from kproxy.config import Config
from kproxy.config.types import Mode
from kproxy.host.commands import first_line
from kproxy.ipvs import cleanup
from kproxy.ipvs.cleanup import INTERFACE, SETS
from kproxy.ipvs.ipset import IpsetEntry, set_entries, set_names
from kproxy.ipvs.virtual_servers import VirtualServer, virtual_servers
from kproxy.model.types import Family
from tests.clock import Clock
from tests.kernel.test_cleanup import rules, without_firewall
from tests.lab.iptables import PREFIXES, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.transaction_monitor import TransactionMonitor
from tests.recordings import GOLDEN
from tests.reports import failed, succeeded

ADDRESSES = ("10.96.0.1/32", "10.96.0.80/32", "fd00:10:96::80/128")
TYPES = {
    "LOOP-BACK": "hash:ip,port,ip",
    "LOAD-BALANCER-SOURCE-IP": "hash:ip,port,ip",
    "LOAD-BALANCER-SOURCE-CIDR": "hash:ip,port,net",
    "IPVS-IPS": "hash:ip",
}
"""Set types by the suffix of the set name. All other sets contain addresses and ports, or only ports."""

CHAINS = """\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-MARK-DROP - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -m set --match-set {set}CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-SERVICES -m set --match-set {set}LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER
-A KUBE-SERVICES -m set --match-set {set}CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-LOAD-BALANCER -m set --match-set {set}LOAD-BALANCER-FW dst,dst -j KUBE-FIREWALL
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-FIREWALL -j KUBE-MARK-DROP
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-MARK-DROP -j MARK --or-mark 0x8000
-A KUBE-NODE-PORT -p tcp -m set --match-set {set}NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-POSTROUTING -m set --match-set {set}LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-POSTROUTING -j MASQUERADE
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SOURCE-RANGES-FIREWALL - [0:0]
:KUBE-IPVS-FILTER - [0:0]
:KUBE-IPVS-OUT-FILTER - [0:0]
-A INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A INPUT -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT
-A FORWARD -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A OUTPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-OUT-FILTER
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-NODE-PORT -m set --match-set {set}HEALTH-CHECK-NODE-PORT dst -j ACCEPT
-A KUBE-PROXY-FIREWALL -m set --match-set {set}LOAD-BALANCER-FW dst,dst -j KUBE-SOURCE-RANGES-FIREWALL
-A KUBE-SOURCE-RANGES-FIREWALL -j DROP
-A KUBE-IPVS-FILTER -m set --match-set {set}CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set {set}IPVS-IPS dst -j REJECT
-A KUBE-IPVS-OUT-FILTER -m conntrack --ctstate NEW -m set --match-set {set}IPVS-IPS dst -j REJECT
COMMIT
"""
"""The rules of ipvs mode of old and new releases, without similar ones."""

OF_IPVS_MODE = 7
"""The number of these chains that iptables mode does not use."""

pytestmark = pytest.mark.usefixtures("ipset")


@pytest.fixture
def ipset(namespaces: Callable[[], Namespace]) -> None:
    """Skip the test if sets cannot be created."""
    if shutil.which("ipset") is None:
        pytest.skip("ipset not found: it is in the Debian package ipset")
    done = namespaces().run(["ipset", "create", "KUBE-CLUSTER-IP", "hash:ip,port"], check=False)
    if done.returncode:
        pytest.skip(f"this kernel has no ipset: {done.stderr.strip()}")


def type_of(name: str) -> str:
    family = "inet6" if name.startswith("KUBE-6-") else "inet"
    end = name.removeprefix("KUBE-").removeprefix("6-")
    if end.endswith(("-TCP", "-UDP", "CHECK-NODE-PORT")):
        return "bitmap:port range 0-65535"
    end += "R" * (end == "LOAD-BALANCER-SOURCE-CID")  # set names have at most 31 characters
    return f"{TYPES.get(end, 'hash:ip,port')} family {family}"


def create_leftovers(node: Namespace) -> None:
    """Create the objects of kube-proxy in ipvs mode in both families."""
    node.run(["ipset", "restore"], "".join(f"create {name} {type_of(name)}\n" for name in sorted(SETS)))
    node.run(["ipset", "add", "KUBE-CLUSTER-IP", "10.96.0.80,tcp:80"])
    node.run(["ipset", "add", "KUBE-LOAD-BALANCER", "10.96.0.1,udp:53"])
    node.run(["ipset", "add", "KUBE-6-CLUSTER-IP", "fd00:10:96::80,tcp:80"])
    node.run(["ipset", "add", "KUBE-NODE-PORT-TCP", "30080"])
    add_interface(node)
    for family, prefix in PREFIXES.items():
        text = CHAINS.replace("{set}", "KUBE-6-" if family is Family.IPV6 else "KUBE-")
        node.run([f"{prefix}-restore", "--noflush"], text)


def add_interface(node: Namespace) -> None:
    """Add the interface, as a bridge if the kernel has no dummy interfaces. Both are deleted alike."""
    if node.run(["ip", "link", "add", INTERFACE, "type", "dummy"], check=False).returncode:
        node.run(["ip", "link", "add", INTERFACE, "type", "bridge"])
    for address in ADDRESSES:
        node.run(["ip", "address", "add", address, "dev", INTERFACE])


def sets(node: Namespace) -> list[str]:
    return node.run(["ipset", "list", "-name"]).stdout.split()


def has_interface(node: Namespace) -> bool:
    return INTERFACE in node.run(["ip", "-brief", "link"]).stdout


def leftover_rules(node: Namespace) -> list[str]:
    """Return the chains that only ipvs mode has, the jumps to them and the rules that match sets."""
    names = (
        "KUBE-NODE-PORT ",
        "KUBE-LOAD-BALANCER",
        "KUBE-SOURCE-RANGES",
        "KUBE-IPVS",
        "KUBE-MARK-DROP",
        "--match-set",
    )
    found = [line for family in Family for line in rules(node, family)]
    return [line for line in found if any(name in f"{line} " for name in names) and "KUBE-MARK-DROP" not in line]


def apply(node: Namespace, mode: str) -> list[str]:
    """Run `kproxy apply`; return the logged removals and warnings."""
    folder = GOLDEN / "dual-stack"
    command = [KPROXY, "apply", f"--config={folder}/config.json", f"--objects={folder}", f"--proxy-mode={mode}"]
    lines = node.run(command).stderr.splitlines()
    return [line.partition("] ")[2] for line in lines if " removed " in line or line.startswith("W")]


EVERYTHING = f"{len(SETS)} ipsets, the interface {INTERFACE}"


def test_iptables_mode_removes_all_but_its_own_chains(
    node: Namespace, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_programs(programs_of(variant), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    create_leftovers(node)
    chains = ", ".join(f"{OF_IPVS_MODE} {family.value} iptables chains" for family in Family)
    assert apply(node, "iptables") == [f"removed leftovers of ipvs mode: {chains}, {EVERYTHING}"]
    assert (leftover_rules(node), sets(node), has_interface(node)) == ([], [], False)
    assert any(line.startswith("-A KUBE-SERVICES -d ") for line in rules(node, Family.IPV4))
    assert apply(node, "iptables") == []


def test_nftables_mode_removes_everything(node: Namespace) -> None:
    before = {family: rules(node, family) for family in Family}
    create_leftovers(node)
    *chains, rest = apply(node, "nftables")
    assert [line.split()[-3] for line in chains] == ["IPv4", "IPv6"]
    assert rest == f"removed leftovers of ipvs mode: {EVERYTHING}"
    assert (leftover_rules(node), sets(node), has_interface(node)) == ([], [], False)
    for family in Family:
        after = [line for line in rules(node, family) if "KUBE-MARK-DROP" not in line]
        assert [line for line in without_firewall(after) if line not in before[family] and "KUBE-" in line] == []


def test_cleanup_removes_everything_and_can_be_repeated(node: Namespace) -> None:
    create_leftovers(node)
    done = node.run([KPROXY, "run", "--cleanup"])
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == f"removed {EVERYTHING} of ipvs mode"
    assert (leftover_rules(node), sets(node), has_interface(node)) == ([], [], False)
    assert node.run([KPROXY, "run", "--cleanup"]).stdout == "nothing to remove\n"


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_leftovers_are_removed_once_all_families_have_rules(node: Namespace, mode: Mode) -> None:
    create_leftovers(node)
    steps = FirstSyncSteps(Config(mode=mode), list(Family))

    def run_steps(family: Family, error: str = "") -> None:
        node.call(lambda: steps.run(failed(family, error=error) if error else succeeded(family)))

    run_steps(Family.IPV6)
    run_steps(Family.IPV4, "rejected")
    assert has_interface(node)
    run_steps(Family.IPV4)
    assert not has_interface(node)


def test_leftovers_are_removed_if_the_other_family_is_skipped(node: Namespace) -> None:
    create_leftovers(node)
    steps = FirstSyncSteps(Config(mode="nftables"), [Family.IPV4])
    node.call(lambda: steps.run(succeeded(Family.IPV4)))
    assert not has_interface(node)


def test_foreign_sets_with_similar_names_are_kept(node: Namespace) -> None:
    others = ["KUBE-DST-3YNVZWWGX3UQQ4VQ", "KUBE-CLUSTER-IP-OURS", "mine"]
    node.run(["ipset", "restore"], "".join(f"create {name} hash:ip\n" for name in others))
    assert node.call(lambda: list(remove_all())) == []
    create_leftovers(node)
    node.call(lambda: list(remove_all()))
    assert sorted(sets(node)) == sorted(others)


def test_set_used_by_a_foreign_rule_is_kept_and_reported(node: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    create_leftovers(node)
    node.run(["iptables", "-A", "INPUT", "-m", "set", "--match-set", "KUBE-IPVS-IPS", "dst", "-j", "ACCEPT"])
    assert (
        node.call(lambda: list(remove_all()))[-1]
        == f"removed {len(SETS) - 1} ipsets, the interface {INTERFACE} of ipvs mode"
    )
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert messages == ["cannot remove ipsets KUBE-IPVS-IPS: in use by rules"]
    assert sets(node) == ["KUBE-IPVS-IPS"]


def test_nothing_is_started_or_written_without_leftovers(
    node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    for name in ("iptables", "ip6tables", "iptables-save", "ip6tables-save"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {started}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with TransactionMonitor(node) as commits:
        assert node.call(remove_ipvs) == ""
        assert commits.new() == []
    assert not started.exists()


def test_set_entries_are_read(node: Namespace) -> None:
    many = "".join(f"add KUBE-NODE-PORT-TCP {port}\n" for port in range(30000, 32768))
    text = (
        f"create KUBE-NODE-PORT-TCP bitmap:port range 0-65535\n{many}"
        "create KUBE-NODE-PORT-SCTP-HASH hash:ip,port\nadd KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30082\n"
        "create KUBE-6-CLUSTER-IP hash:ip,port family inet6\nadd KUBE-6-CLUSTER-IP fd00:10:96::a,udp:53\n"
        "create KUBE-IPVS-IPS hash:ip\nadd KUBE-IPVS-IPS 10.96.0.1\n"
    )
    node.run(["ipset", "restore"], text)
    found = {name: node.call(partial(set_entries, name)) for name in node.call(set_names)}
    assert found == {
        "KUBE-NODE-PORT-TCP": {IpsetEntry("", 0, port) for port in range(30000, 32768)},
        "KUBE-NODE-PORT-SCTP-HASH": {IpsetEntry("192.0.2.1", 132, 30082)},
        "KUBE-6-CLUSTER-IP": {IpsetEntry("fd00:10:96::a", 17, 53)},
        "KUBE-IPVS-IPS": set(),
    }


@pytest.fixture
def ipvs(node: Namespace) -> None:
    """Skip the test if this kernel has no IPVS. A virtual server that no kube-proxy created exists."""
    if shutil.which("ipvsadm") is None:
        pytest.skip("ipvsadm not found: it is in the Debian package ipvsadm")
    done = node.run(["ipvsadm", "-A", "-t", "192.0.2.50:80", "-s", "rr"], check=False)
    if done.returncode:
        pytest.skip(f"this kernel has no IPVS: {first_line(done.stderr)}")


@pytest.mark.usefixtures("ipvs")
def test_foreign_virtual_servers_are_kept(node: Namespace) -> None:
    create_leftovers(node)
    for server in (
        "-t 10.96.0.80:80",
        "-t 10.96.0.80:8080",
        "-u 10.96.0.1:53",
        "-t [fd00:10:96::80]:80",
        "-t 192.0.2.10:30080",
        "-f 7",
    ):
        node.run(["ipvsadm", "-A", *server.split(), "-s", "rr"])
    assert "3 virtual servers" in node.call(lambda: list(remove_all()))[-1]
    remaining = {(found.address, found.port) for found in node.call(virtual_servers)}
    assert remaining == {("192.0.2.50", 80), ("192.0.2.10", 30080), ("10.96.0.80", 8080)}
    assert "FWM" in node.run(["ipvsadm", "-L", "-n"]).stdout


@pytest.mark.parametrize("command", ["iptables", "nftables", "cleanup"])
@pytest.mark.usefixtures("ipvs")
def test_virtual_servers_with_destinations_are_removed(node: Namespace, command: str) -> None:
    create_leftovers(node)
    for server, destination in (
        ("-t 10.96.0.80:80", "10.244.1.1:8080"),
        ("-u 10.96.0.1:53", "10.244.1.1:5353"),
        ("-t [fd00:10:96::80]:80", "[fd00:10:244:1::1]:8080"),
    ):
        node.run(["ipvsadm", "-A", *server.split(), "-s", "rr", "-p", "10800"])
        node.run(["ipvsadm", "-a", *server.split(), "-r", destination, "-m"])
    assert len(node.call(virtual_servers)) == 4
    removed = f"3 virtual servers, {EVERYTHING}"
    if command == "cleanup":
        done = node.run([KPROXY, "run", "--cleanup"])
        assert (done.stdout.splitlines()[-1], done.stderr) == (f"removed {removed} of ipvs mode", "")
    else:
        last = apply(node, command)[-1]
        assert last.endswith(removed)
    assert [(found.address, found.port) for found in node.call(virtual_servers)] == [("192.0.2.50", 80)]
    assert (leftover_rules(node), sets(node), has_interface(node)) == ([], [], False)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_failed_removal_of_virtual_servers_is_retried_after_complete_syncs(
    node: Namespace, mode: Mode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create_leftovers(node)
    server = VirtualServer("10.96.0.80", 6, 80, b"a")
    busy = [True]
    monkeypatch.setattr(cleanup, "virtual_servers", lambda: [server])
    monkeypatch.setattr(
        cleanup, "delete_virtual_servers", lambda _: {server: "Device or resource busy"} if busy else {}
    )
    steps = FirstSyncSteps(Config(mode=mode), [Family.IPV4])

    def run_steps(*, complete: bool) -> bool:
        node.call(lambda: steps.run(succeeded(Family.IPV4, complete=complete)))
        return has_interface(node)

    assert run_steps(complete=True)
    busy.clear()
    assert run_steps(complete=False)
    assert sorted(sets(node)) == sorted(SETS)
    assert not run_steps(complete=True)
    assert "KUBE-IPVS-IPS" not in sets(node)
    messages = [record.getMessage() for record in caplog.records if "leftovers of ipvs mode" in record.getMessage()]
    assert messages == [
        "leftovers of ipvs mode remain and may intercept Service traffic: cannot remove 1 IPVS virtual "
        "server (first: 10.96.0.80 port 80): Device or resource busy; its interface and ipsets are kept as well"
    ]


def test_other_failures_are_retried_after_later_syncs(
    node: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create_leftovers(node)
    clock = Clock()
    steps = FirstSyncSteps(Config(mode="nftables"), [Family.IPV4], clock=clock)
    steps._done.add(Family.IPV4)

    def run_steps() -> bool:
        clock.advance(MAX_RETRY_SECONDS)
        node.call(lambda: steps.run(succeeded(Family.IPV4, complete=False)))
        return has_interface(node)

    (tmp_path / "iptables-restore").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "iptables-restore").chmod(0o755)
    with monkeypatch.context() as broken:
        broken.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert run_steps()
        assert run_steps()
    assert not run_steps()


def test_cleanup_that_fails_at_the_end_has_reported_removals(node: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    create_leftovers(node)
    server = VirtualServer("10.96.0.80", 6, 80, b"a")
    monkeypatch.setattr(cleanup, "virtual_servers", lambda: [server])
    monkeypatch.setattr(cleanup, "delete_virtual_servers", lambda _: {server: "Device or resource busy"})
    output: list[str] = []

    def clean_up() -> None:
        output.extend(remove_all())

    with pytest.raises(VirtualServersRemainError, match=r"port 80\): Device or resource busy"):
        node.call(clean_up)
    assert [line.split()[-3] for line in output] == ["IPv4", "IPv6"]


def test_virtual_servers_are_removed_before_the_interface(node: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel may have no IPVS, so the test replaces the functions that query it."""
    create_leftovers(node)
    node.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"])
    server = VirtualServer
    kube_proxy_servers = [
        server("10.96.0.80", 6, 80, b"a"),
        server("fd00:10:96::80", 6, 80, b"b"),
        server("192.0.2.1", 6, 30080, b"c"),
    ]
    foreign = [
        server("192.0.2.50", 6, 80, b"d"),
        server("192.0.2.1", 17, 30080, b"e"),
        server("10.96.0.80", 6, 8080, b"f"),
        server("192.0.2.50", 6, 30080, b"g"),
    ]
    deleted: list[object] = []

    def delete(servers: list[object]) -> dict[object, str]:
        assert has_interface(node)
        deleted.extend(servers)
        return {}

    monkeypatch.setattr(cleanup, "virtual_servers", lambda: [*kube_proxy_servers, *foreign])
    monkeypatch.setattr(cleanup, "delete_virtual_servers", delete)
    assert node.call(lambda: list(remove_all()))[-1] == f"removed 3 virtual servers, {EVERYTHING} of ipvs mode"
    assert deleted == kube_proxy_servers
