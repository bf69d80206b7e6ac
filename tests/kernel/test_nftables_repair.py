"""What other processes change in the table is found and restored, whatever it is, and nothing else is written."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from kproxy.model.drift import Part, RepairResult, Touched
from kproxy.model.types import Family
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.base_table import COUNTED_MAPS
from kproxy.nftables.decode import TableReader
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, NftTable
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.transaction import Transaction
from tests.inprocess import SingleFamilyProxy
from tests.kernel.test_nftables_commit import dump_table, recorded_proxy
from tests.kernel.test_nftables_restart import RecordingTable
from tests.lab.namespace import Namespace
from tests.lab.proxy import FLAGS, KPROXY
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import GOLDEN, SCENARIOS

pytestmark = pytest.mark.usefixtures("kernel", "nft")
SCENARIO = "dual-stack"
OWN_ADDRESSES = {Family.IPV4: "10.244.", Family.IPV6: "fd00:10:244:"}
FOREIGN_ADDRESSES = {Family.IPV4: "10.245.", Family.IPV6: "fd00:10:245:"}
LONG_PERIOD = ("--iptables-sync-period=1h", "--iptables-min-sync-period=10ms")
_COUNTED = re.compile(r"(?<=[{,])\s*([^{},]* counter packets 0 bytes 0[^{},]*?) ?(?=[,}])")
"""An element of a map that has not counted anything, as nft lists it."""
EVERYTHING = {TABLE: Touched(everything=True)}


class Damageable:
    """The table of one family in a namespace."""

    def __init__(self, node: Namespace, family: Family) -> None:
        self.node = node
        self.family = family

    def nft(self, commands: str) -> str:
        """Run nft commands in which TABLE stands for the table's family and name."""
        return self.node.run(["nft", "-a", commands.replace("TABLE", f"{table_family(self.family)} {TABLE}")]).stdout


class Repaired(Damageable):
    """A recorded cluster in a table that is damaged and repaired by hand."""

    def __init__(
        self,
        node: Namespace,
        family: Family,
        commit: Commit | None = None,
        scenario: str = SCENARIO,
        *,
        counters: bool = False,
    ) -> None:
        super().__init__(node, family)
        self.kernel = RecordingTable(family) if commit is None else NftTable(family, commit)
        self.backend = NftablesBackend(self.kernel)
        self.proxy: SingleFamilyProxy = recorded_proxy(scenario, family, self.backend, node, counters=counters).sync()
        self.before = dump_table(node, family)

    def repair(self, touched: Touched | None = None) -> RepairResult:
        tables = EVERYTHING if touched is None else {TABLE: touched}
        sync = self.proxy.families[self.family]
        return self.node.call(lambda: sync.repair(self.proxy.store, tables))

    def compare(self) -> list[Part]:
        """Run a complete comparison and return the parts that it repaired."""
        repaired: list[Part] = []
        sync = self.proxy.families[self.family]
        while (result := self.node.call(lambda: sync.compare_next(self.proxy.store))) is not None:
            assert not result.needs_full_sync
            repaired += result.repaired
        return repaired

    def is_restored(self) -> bool:
        return dump_table(self.node, self.family) == self.before


@pytest.mark.parametrize("commit", [NetlinkCommit, NftCommit])
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_own_rules_are_never_taken_for_changed(
    namespaces: Callable[[], Namespace], scenario: str, family: Family, commit: Callable[[Family], Commit]
) -> None:
    found = Repaired(namespaces(), family, commit(family), scenario)
    assert found.repair() == RepairResult()
    assert found.compare() == []


@pytest.mark.parametrize("family", Family)
def test_counters_are_never_taken_for_changes(namespaces: Callable[[], Namespace], family: Family) -> None:
    found = Repaired(namespaces(), family, counters=True)
    assert found.backend.needs_full_sync is False
    for name in COUNTED_MAPS:
        for element in _COUNTED.findall(map_text(found, name)):
            key = element.partition(" counter ")[0]
            counting = element.replace("packets 0 bytes 0", "packets 7 bytes 420")
            found.nft(f"delete element TABLE {name} {{ {key} }}; add element TABLE {name} {{ {counting} }}")

    def assert_counts_are_kept() -> None:
        for name in ("service-ips", "service-endpoints"):
            assert "packets 7 bytes 420" in map_text(found, name)
            assert "packets 0 " not in map_text(found, name)

    assert_counts_are_kept()
    assert found.repair() == RepairResult()
    assert found.compare() == []
    found.proxy.forget()
    found.proxy.sync()
    assert_counts_are_kept()


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("damage", ["service-endpoints flushed", "elements of service-ips deleted"])
def test_damages_of_maps_with_counters_are_restored(
    namespaces: Callable[[], Namespace], damage: str, family: Family
) -> None:
    found = Repaired(namespaces(), family, counters=True)
    DAMAGES[damage](found)
    assert found.compare() != []
    assert found.is_restored()


@pytest.mark.parametrize("family", Family)
def test_map_that_lost_its_counters_needs_a_full_sync(namespaces: Callable[[], Namespace], family: Family) -> None:
    found = Repaired(namespaces(), family, counters=True)
    Repaired(found.node, family)  # another process with the other setting
    assert not found.is_restored()
    assert found.repair().needs_full_sync
    found.proxy.sync()
    assert found.is_restored()


def map_text(found: Damageable, name: str) -> str:
    return found.nft(f"list map TABLE {name}")


def list_handles(found: Damageable, chain: str) -> list[str]:
    lines = found.nft(f"list chain TABLE {chain}").splitlines()
    return [line.rpartition("# handle ")[2] for line in lines if "# handle " in line and "chain" not in line]


def replace_rules(chain: str) -> Callable[[Damageable], object]:
    def replace(found: Damageable) -> None:
        handles = list_handles(found, chain)
        found.nft("; ".join(f"replace rule TABLE {chain} handle {handle} counter" for handle in handles))

    return replace


def delete_last_rule(chain: str) -> Callable[[Damageable], object]:
    return lambda found: found.nft(f"delete rule TABLE {chain} handle {list_handles(found, chain)[-1]}")


def swap_rules(chain: str) -> Callable[[Damageable], object]:
    def swap(found: Damageable) -> None:
        lines = found.nft(f"list chain TABLE {chain}").splitlines()
        rules = [line.split(" # ")[0].strip() for line in lines if "# handle" in line and "chain" not in line]
        added = [f"add rule TABLE {chain} {each}" for each in reversed(rules)]
        found.nft("; ".join([f"flush chain TABLE {chain}", *added]))

    return swap


def change_base_chain(hook: str, policy: str = "accept") -> Callable[[Damageable], object]:
    """Delete a base chain, and create it again with another hook or policy and the same rules."""

    def change(found: Damageable) -> None:
        found.nft(
            "flush chain TABLE filter-forward; delete chain TABLE filter-forward;"
            f"add chain TABLE filter-forward {{ type filter {hook}; policy {policy}; }};"
            "add rule TABLE filter-forward ct state new jump service-endpoints-check;"
            "add rule TABLE filter-forward ct state new jump cluster-ips-check"
        )

    return change


def nft(commands: str) -> Callable[[Damageable], object]:
    return lambda found: found.nft(commands)


def delete_some_elements(map_name: str) -> Callable[[Damageable], object]:
    """Delete every other element of a map, as another process."""

    def delete(found: Damageable) -> None:
        snapshot = found.node.call(TableReader(found.family).snapshot)
        assert snapshot is not None
        elements = sorted(snapshot.elements[map_name].values(), key=lambda element: element.key)
        found.node.call(lambda: NetlinkCommit(found.family)(Transaction(deleted_elements={map_name: elements[::2]})))

    return delete


DAMAGES: dict[str, Callable[[Damageable], object]] = {
    "all rules": nft("flush table TABLE"),
    "base chain flushed": nft("flush chain TABLE nat-output"),
    "base chain deleted": nft("flush chain TABLE nat-output; delete chain TABLE nat-output"),
    "policy": nft("add chain TABLE filter-forward { policy drop; }"),
    "priority": change_base_chain("hook forward priority 50"),
    "hook": change_base_chain("hook input priority 0"),
    "hook and policy": change_base_chain("hook input priority 0", "drop"),
    "return inserted": nft("insert rule TABLE nat-output return; insert rule TABLE nat-prerouting return"),
    "rule deleted": delete_last_rule("service-any-2"),
    "rules replaced, same count": replace_rules("service-any-2"),
    "masquerading replaced, same count": replace_rules("masquerading"),
    "rules in another order": swap_rules("filter-forward"),
    "comment of a rule": nft("flush chain TABLE firewall-check; add rule TABLE firewall-check return comment x"),
    "foreign base chain": nft("add chain TABLE mine { type nat hook output priority 0; }; add rule TABLE mine drop"),
    "foreign chains that jump": nft("add chain TABLE a; add chain TABLE b; add rule TABLE a jump b"),
    "foreign set": nft("add set TABLE mine { type inet_service; }; add rule TABLE services tcp dport @mine drop"),
    "foreign element": nft("add element TABLE service-nodeports { tcp . 9 : drop }"),
    "cluster-ips flushed": nft("flush set TABLE cluster-ips"),
    "nodeport-ips flushed": nft("flush set TABLE nodeport-ips"),
    "service-ips flushed": nft("flush map TABLE service-ips"),
    "service-endpoints flushed": nft("flush map TABLE service-endpoints"),
    "map and its users deleted": nft("flush table TABLE; delete map TABLE service-endpoints"),
    "elements of service-ips deleted": delete_some_elements("service-ips"),
    "elements of service-endpoints deleted": delete_some_elements("service-endpoints"),
    "dormant": nft("add table TABLE { flags dormant; }"),
    "dormant and damaged": nft("flush chain TABLE nat-output; add table TABLE { flags dormant; }"),
}


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("damage", DAMAGES)
def test_check_of_everything_restores_the_table(
    namespaces: Callable[[], Namespace], damage: str, family: Family
) -> None:
    found = Repaired(namespaces(), family)
    DAMAGES[damage](found)
    assert not found.is_restored()
    result = found.repair()
    assert result.repaired
    assert not result.needs_full_sync
    assert found.is_restored()
    assert found.repair() == RepairResult()


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("damage", DAMAGES)
def test_periodic_comparison_restores_the_table(
    namespaces: Callable[[], Namespace], damage: str, family: Family
) -> None:
    found = Repaired(namespaces(), family)
    assert found.compare() == []
    DAMAGES[damage](found)
    assert found.compare() != []
    assert found.is_restored()
    assert found.compare() == []


# The daemon, which learns about changes from the kernel's notifications


class DaemonOnNode(Damageable):
    """A daemon whose periodic comparison never runs during a test, and its log."""

    def __init__(self, node: Namespace, family: Family, log: Path) -> None:
        super().__init__(node, family)
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        command = [KPROXY, "run", f"--objects={GOLDEN / SCENARIO}", *FLAGS, "--proxy-mode=nftables", *LONG_PERIOD]
        with self._log.open("w") as output:
            self._process = self.node.popen(command, output)
        wait_until(self._watches, "the daemon watches the tables")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(HANG_GUARD)

    def log(self) -> str:
        return self._log.read_text()

    def _watches(self) -> bool:
        """Return whether the daemon has removed a foreign chain, as it does once it watches."""
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        if not all(f"{family.value}: synced" in self.log() for family in Family):
            return False
        self.nft("add chain TABLE probe")
        return "chain probe" not in self.nft("list table TABLE") or self._is_probed()

    def _is_probed(self) -> bool:
        time.sleep(0.05)
        return "chain probe" not in self.nft("list table TABLE")


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("damage", [*DAMAGES, "table deleted", "rule set flushed", "older rules restored"])
def test_daemon_restores_the_table_as_soon_as_it_is_changed(
    node: Namespace, tmp_path: Path, damage: str, family: Family
) -> None:
    with DaemonOnNode(node, family, tmp_path / "log") as daemon:
        before = dump_table(node, family)
        if damage == "older rules restored":
            saved = daemon.nft("list table TABLE").replace(OWN_ADDRESSES[family], FOREIGN_ADDRESSES[family])
            node.run(["nft", "-f", "-"], f"delete table {table_family(family)} {TABLE}\n{saved}")
        elif damage in DAMAGES:
            DAMAGES[damage](daemon)
        else:
            daemon.nft("delete table TABLE" if damage == "table deleted" else "flush ruleset")
        wait_until(lambda: _dump_or_none(node, family) == before, "the table is as before")


def _dump_or_none(node: Namespace, family: Family) -> object:
    """Return the contents of the table, or None if it does not exist or cannot be read."""
    try:
        return dump_table(node, family)
    except (IndexError, OSError):
        return None
