"""A table that is already there: what is right stays untouched, whatever else there is goes, in one step if need be."""

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
from tests.kernel.test_nftables_commit import Attributes, Held, held, program, recorded_proxy
from tests.lab.namespace import Namespace
from tests.recordings import GOLDEN, SCENARIOS

SCENARIO = "clusterip-multiport"
_TABLE_USERDATA, _CHAIN_USERDATA, _SET_USERDATA = 6, 12, 13

SERVICE = "type ipv4_addr . inet_proto . inet_service : verdict"
CHANGEABLE = {
    "nothing": "add table ip kube-proxy",
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
    "endpoints with gaps in their numbers": """
        add table ip kube-proxy
        add map ip kube-proxy service-endpoints { \
            typeof ip daddr . meta l4proto . th dport . numgen random mod 2 : ip daddr . th dport; }
        add element ip kube-proxy service-endpoints { 10.96.1.1 . tcp . 80 . 0 : 192.0.2.1 . 1 }
        add element ip kube-proxy service-endpoints { 10.96.1.1 . tcp . 80 . 2 : 192.0.2.1 . 2 }
        add element ip kube-proxy service-endpoints { 10.96.1.1 . tcp . 80 . 9 : 192.0.2.1 . 3 }
    """,
}
"""Tables, as commands for nft, that become what they are to be step by step."""

UNUSABLE = {
    "set of another type": "add set ip kube-proxy cluster-ips { type inet_service; }",
    "set in place of a map": "add set ip kube-proxy service-ips { type ipv4_addr; elements = { 192.0.2.1 } }",
    "map in place of a set": "add map ip kube-proxy cluster-ips { type ipv4_addr : verdict; }",
    "set of ranges": "add set ip kube-proxy cluster-ips { type ipv4_addr; flags interval; }",
    "set that forgets": "add set ip kube-proxy cluster-ips { type ipv4_addr; flags timeout; }",
    "set that is soon full": "add set ip kube-proxy cluster-ips { type ipv4_addr; size 1; }",
    "base chain in place of a chain": "add chain ip kube-proxy services { type filter hook input priority 0; }",
    "base chain in place of another": "add chain ip kube-proxy service-any-2 { type filter hook input priority 0; }",
    "chain in place of a base chain": "add chain ip kube-proxy filter-input",
    "base chain of another priority": "add chain ip kube-proxy filter-input { type filter hook input priority 5; }",
    "base chain that drops": "add chain ip kube-proxy filter-input { type filter hook input priority 0; policy drop; }",
    "map that leads to chains": """
        add chain ip kube-proxy a
        add map ip kube-proxy mine { type ipv4_addr : verdict; elements = { 192.0.2.1 : goto a } }
    """,
    "verdict for all keys": f"add map ip kube-proxy service-ips {{ {SERVICE}; elements = {{ * : drop }}; }}",
    "table that sleeps": "add table ip kube-proxy { flags dormant; }",
}
"""Things in the table that can only go with it."""


def without_remarks(found: Held) -> Held:
    """What counts of a table: it, its sets and its chains keep the comment that they were made with."""
    sets = {name: _without(parts, _SET_USERDATA) for name, parts in found.sets.items()}
    chains = {name: _without(parts, _CHAIN_USERDATA) for name, parts in found.chains.items()}
    return replace(found, table=_without(found.table, _TABLE_USERDATA), sets=sets, chains=chains)


def _without(parts: Attributes, kind: int) -> Attributes:
    return tuple(part for part in parts if part[0] != kind)


def fresh(namespaces: Callable[[], Namespace], scenario: str = SCENARIO, family: Family = Family.IPV4) -> Held:
    node = namespaces()
    program(node, scenario, family, NetlinkCommit(family))
    return held(node, family)


class Watched:
    """The kernel's table, with what was committed to it and how often it was read."""

    def __init__(self, family: Family) -> None:
        self._table = NftTable(family, NetlinkCommit(family))
        self.commits: list[Transaction] = []
        self.reads = 0

    def commit(self, change: Transaction, generation: int | None = None, /) -> None:
        self._table.commit(change, generation)
        self.commits.append(change)

    def generation(self) -> int:
        self.reads += 1
        return self._table.generation()

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        self.reads += 1
        return self._table.snapshot(allow_interrupted=allow_interrupted)

    def chain_use_counts(self) -> Counter[str]:
        self.reads += 1
        return self._table.chain_use_counts()


def generation(node: Namespace) -> int:
    return node.call(TableReader(Family.IPV4).generation)


def start(node: Namespace, scenario: str, family: Family, *, batch_frontends: int = 2_000) -> Watched:
    """Start over a recorded cluster with whatever the kernel holds, and make sure of what it holds then."""
    kernel = Watched(family)
    backend = NftablesBackend(kernel, batch_frontends=batch_frontends)
    assert recorded_proxy(scenario, family, backend, node).sync().verify()
    return kernel


def written(kernel: Watched) -> set[str]:
    """The parts of transactions that were used."""
    return {name for change in kernel.commits for name, part in asdict(change).items() if part}


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", ["random-11", "session-affinity", "dual-stack", "loadbalancer-source-ranges"])
def test_a_restart_writes_chains_and_nothing_else(
    namespaces: Callable[[], Namespace], scenario: str, family: Family
) -> None:
    node = namespaces()
    program(node, scenario, family, NetlinkCommit(family))
    before, sets = held(node, family), set_handles(node, family)
    assert written(start(node, scenario, family)) == {"flushed_chains", "added_rules"}
    assert held(node, family) == before
    assert set_handles(node, family) == sets
    assert written(start(node, scenario, family, batch_frontends=1)) == {"flushed_chains", "added_rules"}
    assert held(node, family) == before


def set_handles(node: Namespace, family: Family) -> list[str]:
    """The line of each set that says its handle, which a new set of the same name would not have."""
    listed = node.run(["nft", "-a", "list", "table", table_family(family), TABLE]).stdout
    return sorted(line for line in listed.splitlines() if re.match(r"\t(set|map) ", line))


def test_a_restart_leaves_clients_with_their_endpoints(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    program(node, "session-affinity", Family.IPV4, NetlinkCommit(Family.IPV4))
    listed = node.run(["nft", "list", "sets", "ip"]).stdout
    names = re.findall(r"set (affinity-\S+)", listed)
    assert len(names) == 3
    for name in names:
        node.run(["nft", f"add element ip {TABLE} {name} {{ 192.0.2.7 }}"])
    before = held(node, Family.IPV4)
    assert all(len(before.elements[name.encode() + b"\0"]) == 1 for name in names)
    start(node, "session-affinity", Family.IPV4)
    assert held(node, Family.IPV4) == before


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_table_of_kube_proxy_is_taken_over_without_a_new_one(
    namespaces: Callable[[], Namespace], scenario: str, family: Family
) -> None:
    wanted = without_remarks(fresh(namespaces, scenario, family))
    for batch_frontends in (1, 2_000):
        node = namespaces()
        node.run(["nft", "-f", "-"], (GOLDEN / scenario / f"nft-{table_family(family)}.txt").read_text())
        kernel = start(node, scenario, family, batch_frontends=batch_frontends)
        assert "replace_table" not in written(kernel)
        assert without_remarks(held(node, family)) == wanted


def test_clients_that_kube_proxy_remembered_stay_with_their_endpoints(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    recorded = (GOLDEN / "session-affinity" / "nft-ip.txt").read_text()
    node.run(["nft", "-f", "-"], recorded)
    name = re.findall(r"set (affinity-\S+)", recorded)[1]
    node.run(["nft", f"add element ip {TABLE} {name} {{ 192.0.2.7 }}"])
    start(node, "session-affinity", Family.IPV4)
    assert "192.0.2.7" in node.run(["nft", "list", "set", "ip", TABLE, name]).stdout


@pytest.mark.parametrize("batch_frontends", [1, 2_000])
@pytest.mark.parametrize("garbage", CHANGEABLE)
def test_garbage_goes_step_by_step(namespaces: Callable[[], Namespace], garbage: str, batch_frontends: int) -> None:
    node = namespaces()
    node.run(["nft", "-f", "-"], dedent(CHANGEABLE[garbage]))
    kernel = start(node, SCENARIO, Family.IPV4, batch_frontends=batch_frontends)
    assert "replace_table" not in written(kernel)
    assert without_remarks(held(node, Family.IPV4)) == without_remarks(fresh(namespaces))


@pytest.mark.parametrize("garbage", UNUSABLE)
def test_an_unusable_table_is_replaced_in_one_step(namespaces: Callable[[], Namespace], garbage: str) -> None:
    node = namespaces()
    node.run(["nft", "-f", "-"], "add table ip kube-proxy\n" + dedent(UNUSABLE[garbage]))
    before = generation(node)
    kernel = start(node, SCENARIO, Family.IPV4)
    assert generation(node) == before + 1
    assert [change.replace_table for change in kernel.commits] == [True]
    assert held(node, Family.IPV4) == fresh(namespaces)


def test_only_a_set_of_clients_that_lasts_otherwise_is_replaced(namespaces: Callable[[], Namespace]) -> None:
    node = namespaces()
    recorded = (GOLDEN / "session-affinity" / "nft-ip.txt").read_text()
    node.run(["nft", "-f", "-"], recorded.replace("timeout 3h", "timeout 1h", 1))
    kernel = start(node, "session-affinity", Family.IPV4)
    assert [change.replace_table for change in kernel.commits] == [False] * len(kernel.commits)
    replaced = [name for change in kernel.commits for name in change.deleted_sets if name.startswith("affinity-")]
    assert len(replaced) == len(set(replaced)) == 1
    assert without_remarks(held(node, Family.IPV4)) == without_remarks(fresh(namespaces, "session-affinity"))


@pytest.mark.parametrize("family", Family)
def test_what_is_read_is_what_was_written(namespaces: Callable[[], Namespace], family: Family) -> None:
    node, fake = namespaces(), FakeTable(family)
    kernel = start(node, "random-12", family)
    for change in kernel.commits:
        fake.commit(change)
    assert node.call(kernel.snapshot) == fake.snapshot()
    assert node.call(kernel.chain_use_counts) == fake.chain_use_counts()
    assert node.call(lambda: TableReader(family).exists())
    assert not namespaces().call(lambda: TableReader(family).exists())
    assert namespaces().call(Watched(family).snapshot) is None
