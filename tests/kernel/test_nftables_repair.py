"""What other processes change in the table is found and restored, whatever it is, and nothing else is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kproxy.model.drift import Part, RepairResult, Touched
from kproxy.model.types import Family
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, NftTable
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.transaction import Transaction
from tests.inprocess import SingleFamilyProxy
from tests.kernel.test_nftables_commit import dump_table, recorded_proxy
from tests.kernel.test_nftables_restart import RecordingTable
from tests.lab.namespace import Namespace
from tests.recordings import SCENARIOS

pytestmark = pytest.mark.usefixtures("kernel", "nft")
SCENARIO = "dual-stack"
EVERYTHING = {TABLE: Touched(everything=True)}


class Repaired:
    """A recorded cluster in a table that is damaged and repaired."""

    def __init__(self, node: Namespace, family: Family, commit: Commit | None = None, scenario: str = SCENARIO) -> None:
        self.node = node
        self.family = family
        self.kernel = RecordingTable(family) if commit is None else NftTable(family, commit)
        self.backend = NftablesBackend(self.kernel)
        self.proxy: SingleFamilyProxy = recorded_proxy(scenario, family, self.backend, node).sync()
        self.before = dump_table(node, family)

    def nft(self, commands: str) -> str:
        """Run nft commands in which TABLE stands for the table's family and name."""
        return self.node.run(["nft", "-a", commands.replace("TABLE", f"{table_family(self.family)} {TABLE}")]).stdout

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


def list_handles(found: Repaired, chain: str) -> list[str]:
    lines = found.nft(f"list chain TABLE {chain}").splitlines()
    return [line.rpartition("# handle ")[2] for line in lines if "# handle " in line and "chain" not in line]


def replace_rules(chain: str) -> Callable[[Repaired], object]:
    def replace(found: Repaired) -> None:
        for handle in list_handles(found, chain):
            found.nft(f"replace rule TABLE {chain} handle {handle} counter")

    return replace


def delete_last_rule(chain: str) -> Callable[[Repaired], object]:
    return lambda found: found.nft(f"delete rule TABLE {chain} handle {list_handles(found, chain)[-1]}")


def swap_rules(chain: str) -> Callable[[Repaired], object]:
    def swap(found: Repaired) -> None:
        lines = found.nft(f"list chain TABLE {chain}").splitlines()
        rules = [line.split(" # ")[0].strip() for line in lines if "# handle" in line and "chain" not in line]
        added = [f"add rule TABLE {chain} {each}" for each in reversed(rules)]
        found.nft("; ".join([f"flush chain TABLE {chain}", *added]))

    return swap


def change_base_chain(hook: str, policy: str = "accept") -> Callable[[Repaired], object]:
    """Delete a base chain, and create it again with another hook or policy and the same rules."""

    def change(found: Repaired) -> None:
        found.nft(
            "flush chain TABLE filter-forward; delete chain TABLE filter-forward;"
            f"add chain TABLE filter-forward {{ type filter {hook}; policy {policy}; }};"
            "add rule TABLE filter-forward ct state new jump service-endpoints-check;"
            "add rule TABLE filter-forward ct state new jump cluster-ips-check"
        )

    return change


def nft(commands: str) -> Callable[[Repaired], object]:
    return lambda found: found.nft(commands)


def delete_some_elements(map_name: str) -> Callable[[Repaired], object]:
    """Delete every other element of a map, as another process."""

    def delete(found: Repaired) -> None:
        snapshot = found.node.call(found.kernel.snapshot)
        assert snapshot is not None
        elements = sorted(snapshot.elements[map_name].values(), key=lambda element: element.key)
        found.node.call(lambda: NetlinkCommit(found.family)(Transaction(deleted_elements={map_name: elements[::2]})))

    return delete


DAMAGES: dict[str, Callable[[Repaired], object]] = {
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
