"""Start with an existing table: kproxy keeps correct objects and removes all others, if need be in one transaction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from textwrap import dedent

import pytest
from msgspec.structs import asdict, replace

from kproxy.model.types import Family
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.decode import TableReader
from kproxy.nftables.kernel import NetlinkCommit, NftTable
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction
from tests.faketable import FakeTable
from tests.kernel.test_nftables_commit import Attributes, TableDump, dump_table, program, recorded_proxy
from tests.lab.namespace import Namespace
from tests.recordings import GOLDEN, SCENARIOS

SCENARIO = "clusterip-multiport"
_TABLE_USERDATA, _CHAIN_USERDATA, _SET_USERDATA = 6, 12, 13

SERVICE = "type ipv4_addr . inet_proto . inet_service : verdict"
REPAIRABLE = {
    "empty table": "add table ip kube-proxy",
    "foreign chains, sets and rules": """
        add table ip kube-proxy
        add set ip kube-proxy mine { type ipv4_addr; elements = { 192.0.2.1 } }
        add chain ip kube-proxy b
        add chain ip kube-proxy a
        add chain ip kube-proxy services
        add chain ip kube-proxy c { type filter hook input priority 7; policy drop; }
        add rule ip kube-proxy a ip saddr @mine jump b
        add rule ip kube-proxy c jump a
        add rule ip kube-proxy services ip saddr @mine goto a
        add rule ip kube-proxy services numgen random mod 2 vmap { 0 : goto a, 1 : goto b }
    """,
    "foreign verdicts, comments and elements": f"""
        add table ip kube-proxy
        add chain ip kube-proxy a
        add set ip kube-proxy cluster-ips {{ type ipv4_addr; }}
        add map ip kube-proxy service-ips {{ {SERVICE}; }}
        add map ip kube-proxy no-endpoint-services {{ {SERVICE}; }}
        add element ip kube-proxy cluster-ips {{ 10.96.0.1 comment "mine", 192.0.2.1 }}
        add element ip kube-proxy service-ips {{ 10.96.0.1 . tcp . 443 comment "mine" : jump a }}
        add element ip kube-proxy service-ips {{ 192.0.2.1 . 7 . 7 : drop }}
        add element ip kube-proxy service-ips {{ 10.96.1.1 . tcp . 80 : accept, 10.96.1.1 . tcp . 443 : return }}
        add element ip kube-proxy no-endpoint-services {{ 10.96.0.1 . tcp . 443 : drop }}
    """,
    "endpoints with gaps in their indexes": """
        add table ip kube-proxy
        add map ip kube-proxy service-endpoints { \
            typeof ip daddr . meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport; }
        add element ip kube-proxy service-endpoints { 10.96.1.1 . tcp . 80 . 0 : 192.0.2.1 . 1 }
        add element ip kube-proxy service-endpoints { 10.96.1.1 . tcp . 80 . 2 : 192.0.2.1 . 2 }
        add element ip kube-proxy service-endpoints { 10.96.1.1 . tcp . 80 . 9 : 192.0.2.1 . 3 }
    """,
}
"""Tables, as nft commands, that kproxy can repair step by step."""

UNUSABLE = {
    "set of another type": "add set ip kube-proxy cluster-ips { type inet_service; }",
    "set instead of a map": "add set ip kube-proxy service-ips { type ipv4_addr; elements = { 192.0.2.1 } }",
    "map instead of a set": "add map ip kube-proxy cluster-ips { type ipv4_addr : verdict; }",
    "interval set": "add set ip kube-proxy cluster-ips { type ipv4_addr; flags interval; }",
    "set with a timeout": "add set ip kube-proxy cluster-ips { type ipv4_addr; flags timeout; }",
    "set of limited size": "add set ip kube-proxy cluster-ips { type ipv4_addr; size 1; }",
    "base chain instead of a chain": "add chain ip kube-proxy services { type filter hook input priority 0; }",
    "base chain instead of another": "add chain ip kube-proxy service-any-2 { type filter hook input priority 0; }",
    "chain instead of a base chain": "add chain ip kube-proxy filter-input",
    "base chain of another priority": "add chain ip kube-proxy filter-input { type filter hook input priority 5; }",
    "policy drop": "add chain ip kube-proxy filter-input { type filter hook input priority 0; policy drop; }",
    "foreign map with a chain": """
        add chain ip kube-proxy a
        add map ip kube-proxy mine { type ipv4_addr : verdict; elements = { 192.0.2.1 : goto a } }
    """,
    "catch-all verdict": f"add map ip kube-proxy service-ips {{ {SERVICE}; elements = {{ * : drop }}; }}",
}
"""Objects that kproxy can only remove by replacing the whole table."""


def without_comments(found: TableDump) -> TableDump:
    """Drop the comments of the table, its sets and its chains. The kernel does not change them after creation."""
    sets = {name: _without(parts, _SET_USERDATA) for name, parts in found.sets.items()}
    chains = {name: _without(parts, _CHAIN_USERDATA) for name, parts in found.chains.items()}
    return replace(found, table=_without(found.table, _TABLE_USERDATA), sets=sets, chains=chains)


def _without(parts: Attributes, kind: int) -> Attributes:
    return tuple(part for part in parts if part[0] != kind)


def dump_of_fresh_table(
    namespaces: Callable[[], Namespace], scenario: str = SCENARIO, family: Family = Family.IPV4
) -> TableDump:
    node = namespaces()
    program(node, scenario, family, NetlinkCommit(family))
    return dump_table(node, family)


class RecordingTable(NftTable):
    """The kernel's table. Records its transactions and counts how often a sync reads it."""

    def __init__(self, family: Family) -> None:
        super().__init__(family, NetlinkCommit(family))
        self.commits: list[Transaction] = []
        self.reads = 0

    def commit(self, transaction: Transaction, generation: int | None = None, /) -> None:
        super().commit(transaction, generation)
        self.commits.append(transaction)

    def generation(self) -> int:
        self.reads += 1
        return super().generation()

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        self.reads += 1
        return super().snapshot(allow_interrupted=allow_interrupted)

    def chain_use_counts(self) -> Counter[str]:
        self.reads += 1
        return super().chain_use_counts()


def generation(node: Namespace) -> int:
    return node.call(TableReader(Family.IPV4).generation)


def start(node: Namespace, scenario: str, family: Family, *, batch_frontends: int = 2_000) -> RecordingTable:
    """Start kproxy for a recorded cluster on the existing table, sync and check for drift."""
    kernel = RecordingTable(family)
    backend = NftablesBackend(kernel, batch_frontends=batch_frontends)
    assert recorded_proxy(scenario, family, backend, node).sync().verify()
    return kernel


def fields_used(kernel: RecordingTable) -> set[str]:
    """Return the fields that any transaction used."""
    return {name for change in kernel.commits for name, part in asdict(change).items() if part}


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", ["random-11", "session-affinity", "dual-stack", "loadbalancer-source-ranges"])
def test_restart_writes_only_chains(namespaces: Callable[[], Namespace], scenario: str, family: Family) -> None:
    node = namespaces()
    program(node, scenario, family, NetlinkCommit(family))
    before, sets = dump_table(node, family), set_handles(node, family)
    assert fields_used(start(node, scenario, family)) == {"flushed_chains", "added_rules"}
    assert dump_table(node, family) == before
    assert set_handles(node, family) == sets
    assert fields_used(start(node, scenario, family, batch_frontends=1)) == {"flushed_chains", "added_rules"}
    assert dump_table(node, family) == before


def set_handles(node: Namespace, family: Family) -> list[str]:
    """Return the line of each set with its handle. A new set of the same name would have another handle."""
    listed = node.run(["nft", "-a", "list", "table", table_family(family), TABLE]).stdout
    return sorted(line for line in listed.splitlines() if re.match(r"\t(set|map) ", line))


def test_restart_keeps_affinity_clients(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    program(node, "session-affinity", Family.IPV4, NetlinkCommit(Family.IPV4))
    listed = node.run(["nft", "list", "sets", "ip"]).stdout
    names = re.findall(r"set (affinity-\S+)", listed)
    assert len(names) == 3
    for name in names:
        node.run(["nft", f"add element ip {TABLE} {name} {{ 192.0.2.7 }}"])
    before = dump_table(node, Family.IPV4)
    assert all(len(before.elements[name.encode() + b"\0"]) == 1 for name in names)
    start(node, "session-affinity", Family.IPV4)
    assert dump_table(node, Family.IPV4) == before


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_table_of_kube_proxy_is_not_replaced(
    namespaces: Callable[[], Namespace], scenario: str, family: Family
) -> None:
    expected = without_comments(dump_of_fresh_table(namespaces, scenario, family))
    for batch_frontends in (1, 2_000):
        node = namespaces()
        node.run(["nft", "-f", "-"], (GOLDEN / scenario / f"nft-{table_family(family)}.txt").read_text())
        kernel = start(node, scenario, family, batch_frontends=batch_frontends)
        assert "replace_table" not in fields_used(kernel)
        assert without_comments(dump_table(node, family)) == expected


def test_dormant_table_is_awakened_and_keeps_affinity_clients(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    program(node, "session-affinity", Family.IPV4, NetlinkCommit(Family.IPV4))
    name = re.findall(r"set (affinity-\S+)", node.run(["nft", "list", "sets", "ip"]).stdout)[0]
    node.run(["nft", f"add element ip {TABLE} {name} {{ 192.0.2.7 }}"])
    before, sets = dump_table(node, Family.IPV4), set_handles(node, Family.IPV4)
    node.run(["nft", f"add table ip {TABLE} {{ flags dormant; }}"])
    start(node, "session-affinity", Family.IPV4)
    assert dump_table(node, Family.IPV4) == before
    assert set_handles(node, Family.IPV4) == sets


def test_affinity_clients_of_kube_proxy_are_kept(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    recorded = (GOLDEN / "session-affinity" / "nft-ip.txt").read_text()
    node.run(["nft", "-f", "-"], recorded)
    name = re.findall(r"set (affinity-\S+)", recorded)[1]
    node.run(["nft", f"add element ip {TABLE} {name} {{ 192.0.2.7 }}"])
    start(node, "session-affinity", Family.IPV4)
    assert "192.0.2.7" in node.run(["nft", "list", "set", "ip", TABLE, name]).stdout


@pytest.mark.parametrize("batch_frontends", [1, 2_000])
@pytest.mark.parametrize("case", REPAIRABLE)
def test_repairable_table_is_not_replaced(namespaces: Callable[[], Namespace], case: str, batch_frontends: int) -> None:
    node = namespaces()
    node.run(["nft", "-f", "-"], dedent(REPAIRABLE[case]))
    kernel = start(node, SCENARIO, Family.IPV4, batch_frontends=batch_frontends)
    assert "replace_table" not in fields_used(kernel)
    assert without_comments(dump_table(node, Family.IPV4)) == without_comments(dump_of_fresh_table(namespaces))


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_table_is_replaced_in_one_transaction(namespaces: Callable[[], Namespace], case: str) -> None:
    node = namespaces()
    node.run(["nft", "-f", "-"], "add table ip kube-proxy\n" + dedent(UNUSABLE[case]))
    before = generation(node)
    kernel = start(node, SCENARIO, Family.IPV4)
    assert generation(node) == before + 1
    assert [change.replace_table for change in kernel.commits] == [True]
    assert dump_table(node, Family.IPV4) == dump_of_fresh_table(namespaces)


def test_affinity_set_with_another_timeout_is_replaced_alone(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    recorded = (GOLDEN / "session-affinity" / "nft-ip.txt").read_text()
    node.run(["nft", "-f", "-"], recorded.replace("timeout 3h", "timeout 1h", 1))
    kernel = start(node, "session-affinity", Family.IPV4)
    assert [change.replace_table for change in kernel.commits] == [False] * len(kernel.commits)
    replaced = [name for change in kernel.commits for name in change.deleted_sets if name.startswith("affinity-")]
    assert len(replaced) == len(set(replaced)) == 1
    assert without_comments(dump_table(node, Family.IPV4)) == without_comments(
        dump_of_fresh_table(namespaces, "session-affinity")
    )


@pytest.mark.parametrize("family", Family)
def test_table_is_read_as_it_was_written(namespaces: Callable[[], Namespace], family: Family) -> None:
    node, fake = namespaces(), FakeTable(family)
    kernel = start(node, "random-12", family)
    for change in kernel.commits:
        fake.commit(change)
    assert node.call(kernel.snapshot) == fake.snapshot()
    assert node.call(kernel.chain_use_counts) == fake.chain_use_counts()
    assert node.call(lambda: TableReader(family).exists())
    assert not namespaces().call(lambda: TableReader(family).exists())
    assert namespaces().call(RecordingTable(family).snapshot) is None
