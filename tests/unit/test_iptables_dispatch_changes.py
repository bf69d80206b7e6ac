"""Dispatch chains in the kernel while they are split into shards, while shards change, and when they become flat."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from kproxy.app.family_contexts import make_context
from kproxy.config import Config
from kproxy.config.load import load_config
from kproxy.iptables.backend import IptablesBackend, IptablesPrinter
from kproxy.iptables.cleanup import cleanup
from kproxy.iptables.names import DISPATCH_CHAINS, NAT_SERVICES, PORT_CHAIN_PREFIXES, ChainName, is_shard
from kproxy.iptables.save_restore import parse_save
from kproxy.model.context import Context
from kproxy.model.delta import Delete, Upsert
from kproxy.model.plan import plan_service
from kproxy.model.sync_report import SyncError
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServicePort
from kproxy.simulate.iptables import IptablesSimulator
from kproxy.sync.family_sync import FamilySync
from tests.fakekernel import FakeKernel
from tests.packets.expectation import describe
from tests.packets.senders import NODE_ADDRESSES, packet_of
from tests.packets.table import Row, read_table
from tests.recordings import GOLDEN, SCENARIOS, store
from tests.reports import FixedPlans
from tests.unit.test_iptables_diff import CONTEXT, IptablesProxy, Watched, a_slice, deleted, written
from tests.unit.test_iptables_dispatch import Traversal

THRESHOLD = 40
TABLE = read_table()


UNCOUNTED = replace(CONTEXT, accounting=False)
"""Without accounting, each NodePort is one rule."""


def web(number: int, **more: object) -> Service:
    ports = (ServicePort("http", 80, "TCP", 30000 + number),)
    address = f"10.96.{number // 8}.{number % 8 * 8}"
    return Service("ns", f"web{number}", (address,), ports, **more)  # type: ignore[arg-type]


def objects(count: int) -> Iterator[Service | EndpointSlice]:
    for number in range(count):
        yield web(number)
        yield a_slice(1, 2, owner=f"web{number}")


def split(proxy: IptablesProxy) -> set[ChainName]:
    """Return the dispatch chains of the kernel that are split, that is, jump to shards."""
    tables = proxy.kernel.tables
    jumps = {
        chain: [rule.rpartition("-j ")[2] for rule in tables[chain.table][chain.name]] for chain in DISPATCH_CHAINS
    }
    return {
        chain for chain, targets in jumps.items() if any(is_shard(ChainName(chain.table, item)) for item in targets)
    }


def shards(proxy: IptablesProxy) -> list[str]:
    return [
        name for table, chains in proxy.kernel.tables.items() for name in chains if is_shard(ChainName(table, name))
    ]


@pytest.fixture
def large() -> IptablesProxy:
    """A proxy with three times as many Services as its threshold."""
    proxy = IptablesProxy(dispatch_threshold=THRESHOLD, context=UNCOUNTED)
    proxy.sync(*objects(3 * THRESHOLD))
    assert {chain.name for chain in split(proxy)} == {"KUBE-SERVICES", "KUBE-NODEPORTS"}
    return proxy


def dispatch_written(lines: list[str]) -> set[str]:
    """Return the dispatch chains and shards among the written chains, without per-Service chains."""
    fixed = {chain.name for chain in DISPATCH_CHAINS}
    return {name for name in written(lines) if name in fixed or is_shard(ChainName("nat", name))}


def test_chain_is_split_only_above_the_threshold() -> None:
    proxy = IptablesProxy(dispatch_threshold=THRESHOLD, context=UNCOUNTED)
    proxy.sync(*objects(THRESHOLD))
    assert split(proxy) == set()
    flat = proxy.kernel.dump()
    proxy.sync(web(THRESHOLD), a_slice(1, owner=f"web{THRESHOLD}"))
    assert len(split(proxy)) == 2
    proxy.apply(Delete(Service, "ns", f"web{THRESHOLD}"))
    proxy.sync()
    assert shards(proxy) == []
    assert proxy.kernel.dump() == flat


def test_threshold_zero_disables_splitting() -> None:
    proxy = IptablesProxy(dispatch_threshold=0, context=UNCOUNTED)
    proxy.sync(*objects(3 * THRESHOLD))
    assert split(proxy) == set()


def test_added_or_deleted_service_rewrites_one_shard(large: IptablesProxy) -> None:
    new = Service("ns", "new", ("10.96.14.1",), (ServicePort("http", 80, "TCP"),))
    for change in (Upsert(new), Delete(Service, "ns", "new")):
        large.apply(Upsert(a_slice(9, owner="new")), change)
        lines = large.lines_of()
        assert dispatch_written(lines) == {"KUBE-SVC-10.96.12.0/22"}
        assert sum(line.startswith("-A ") for line in lines) <= 30
        assert lines.count("COMMIT") == 1


def test_endpoint_change_rewrites_no_dispatch_chain(large: IptablesProxy) -> None:
    lines = large.lines_of(a_slice(1, 2, 3, owner="web7"))
    assert lines
    assert dispatch_written(lines) == set()
    assert large.lines_of() == []


def test_services_without_endpoints_move_to_the_split_reject_chains(large: IptablesProxy) -> None:
    for number in range(THRESHOLD + 1):
        large.apply(Upsert(a_slice(owner=f"web{number}")))
    large.sync()
    assert {(chain.table, chain.name) for chain in split(large)} >= {
        ("filter", "KUBE-SERVICES"),
        ("filter", "KUBE-EXTERNAL-SERVICES"),
    }
    again = IptablesProxy(dispatch_threshold=THRESHOLD, context=UNCOUNTED)
    again.sync(*objects(3 * THRESHOLD), *(a_slice(owner=f"web{number}") for number in range(THRESHOLD + 1)))
    assert large.kernel.dump() == again.kernel.dump()


def test_total_rules_match_the_kernel() -> None:
    proxy = IptablesProxy(dispatch_threshold=THRESHOLD, context=UNCOUNTED)
    proxy.apply(*map(Upsert, objects(3 * THRESHOLD)))
    proxy.apply(Upsert(web(0, health_check_node_port=32000, vips=("203.0.113.1",), external_local=True)))
    plans = {
        key: plan_service(service, proxy.store.slices(key), CONTEXT)
        for key in proxy.store.service_keys()
        if (service := proxy.store.service(key))
    }
    backend = IptablesBackend(proxy.kernel, dispatch_threshold=THRESHOLD)
    for planned in (plans, {"ns/web1": ()}, {"ns/web1": plans["ns/web1"], "ns/web2": ()}):
        total_rules = backend.sync(FixedPlans(planned), CONTEXT).total_rules
        for table in ("nat", "filter"):
            ours = [rules for name, rules in proxy.kernel.tables[table].items() if name.startswith("KUBE-")]
            assert total_rules[table] == sum(map(len, ours))


# From flat to split and back.


def states(kernel: Watched) -> list[dict[ChainName, str]]:
    """Return the dispatch chains and shards of table nat after each commit."""
    return [
        {
            chain: "\n".join(f"-A {name} {rule}" for rule in rules)
            for name, rules in state.items()
            if (chain := ChainName("nat", name)) in DISPATCH_CHAINS or is_shard(chain)
        }
        for state in kernel.states
    ]


@pytest.mark.parametrize("max_transaction_rules", [1, 30, 600])
@pytest.mark.parametrize("restarted", [False, True])
def test_no_packet_misses_its_service_while_the_threshold_is_crossed(
    max_transaction_rules: int, restarted: bool
) -> None:
    kernel = Watched()

    def start() -> IptablesProxy:
        return IptablesProxy(
            kernel, max_transaction_rules=max_transaction_rules, dispatch_threshold=THRESHOLD, context=UNCOUNTED
        )

    proxy = start()
    proxy.sync(*objects(THRESHOLD))
    for count in (2 * THRESHOLD, THRESHOLD, THRESHOLD + 1, THRESHOLD - 1):
        previous = len(list(proxy.store.service_keys()))
        kernel.states.clear()
        if restarted:
            proxy = start()
            proxy.apply(*map(Upsert, objects(min(previous, count))))
        proxy.apply(*map(Upsert, objects(count)))
        proxy.apply(*(Delete(Service, "ns", f"web{number}") for number in range(count, previous)))
        proxy.sync()
        assert bool(split(proxy)) is (count > THRESHOLD)
        assert kernel.states
        for state, nat in zip(states(kernel), kernel.states, strict=True):
            for number in range(0, min(previous, count), 5):
                (hit,) = Traversal(state, NAT_SERVICES, int(ip_address(web(number).cluster_ips[0]))).hit
                assert f'"ns/web{number}:http cluster IP"' in hit
                (hit,) = Traversal(state, ChainName("nat", "KUBE-NODEPORTS"), 30000 + number, "tcp").hit
                assert f'"ns/web{number}:http"' in hit
                assert len(nat[hit.rpartition("-j ")[2]]) == 2


@pytest.mark.parametrize("rejected", range(1, 12))
def test_rejected_transaction_while_crossing_the_threshold_is_retried(rejected: int) -> None:
    proxy = IptablesProxy(max_transaction_rules=30, dispatch_threshold=THRESHOLD, context=UNCOUNTED)
    proxy.sync(*objects(THRESHOLD))
    remaining = rejected

    def reject(_: str) -> str | None:
        nonlocal remaining
        remaining -= 1
        return None if remaining else "out of memory"

    for count in (THRESHOLD + 20, THRESHOLD - 10):
        remaining, proxy.kernel.reject = rejected, reject
        proxy.apply(*map(Upsert, objects(count)))
        proxy.apply(*(Delete(Service, "ns", f"web{number}") for number in range(count, THRESHOLD + 20)))
        try:
            proxy.sync()
        except SyncError:
            assert remaining == 0
        proxy.kernel.reject = lambda _: None
        proxy.sync()
        fresh = IptablesProxy(dispatch_threshold=THRESHOLD, context=UNCOUNTED)
        fresh.sync(*objects(count))
        assert proxy.kernel.dump() == fresh.kernel.dump()


# Cleanup, migration and repair.


def test_cleanup_removes_all_shards(large: IptablesProxy) -> None:
    large.sync(web(0, health_check_node_port=32000), *(a_slice(owner=f"web{number}") for number in range(60)))
    assert {
        table for table in ("nat", "filter") for name in large.kernel.tables[table] if is_shard(ChainName(table, name))
    }
    for change in cleanup(parse_save(large.kernel.dump()).chains, max_transaction_rules=30):
        large.kernel.restore(change.text())
    assert [name for chains in large.kernel.tables.values() for name in chains if name.startswith("KUBE-")] == [
        "KUBE-FIREWALL"
    ]


def test_kube_proxy_can_take_over(large: IptablesProxy) -> None:
    """Kube-proxy rewrites its fixed chains, and flushes and deletes chains of table nat with per-Service names."""
    nat = large.kernel.tables["nat"]
    stale = [name for name in nat if name.startswith(PORT_CHAIN_PREFIXES)]
    known = ["KUBE-SERVICES", "KUBE-NODEPORTS"]
    flushed = "".join(f":{name} - [0:0]\n" for name in (*known, *stale))
    large.kernel.restore(f"*nat\n{flushed}" + "".join(f"-X {name}\n" for name in stale) + "COMMIT\n")
    assert not [name for name in large.kernel.tables["nat"] if is_shard(ChainName("nat", name))]
    again = IptablesProxy(large.kernel, dispatch_threshold=0, context=UNCOUNTED)
    again.sync(*objects(3))
    assert shards(again) == []
    fresh = IptablesProxy(context=UNCOUNTED)
    fresh.sync(*objects(3))
    assert again.kernel.dump() == fresh.kernel.dump()


def test_modified_shard_is_repaired_at_start(large: IptablesProxy) -> None:
    expected = large.kernel.dump()
    name = next(name for name in shards(large) if name.startswith("KUBE-SVC-10.96."))
    large.kernel.tables["nat"][name].pop()
    again = IptablesProxy(large.kernel, dispatch_threshold=THRESHOLD, context=UNCOUNTED)
    lines = again.lines_of(*objects(3 * THRESHOLD))
    assert (written(lines), deleted(lines)) == ({name}, set())
    assert large.kernel.dump() == expected


# Packets.


def our_rules(scenario: str, dispatch_threshold: int) -> dict[Family, FakeKernel]:
    path = GOLDEN / scenario / "config.json"
    config, _ = load_config(path.read_bytes(), str(path))
    kernels = {}
    for family in Family:
        kernel = FakeKernel()
        context = partial(context_of, config, family)
        FamilySync(IptablesPrinter(kernel.restore, dispatch_threshold=dispatch_threshold), context).sync(
            store(scenario)
        )
        kernels[family] = kernel
    return kernels


def context_of(config: Config, family: Family, node: Node | None) -> Context:
    addresses = NODE_ADDRESSES.values()
    return make_context(config, family, "node-1", node, addresses, accounting=True, random_fully=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_packets_of_the_table_have_the_same_fate_in_split_chains(scenario: str) -> None:
    kernels = our_rules(scenario, 1)
    rules = {family: IptablesSimulator("".join(kernel.dump()), family) for family, kernel in kernels.items()}
    fates: dict[Row, str] = {}
    for row in TABLE:
        if row.scenario == scenario:
            fates[row] = describe(rules[row.family].send(packet_of(row)))
    assert {str(row): (fate, row.fate) for row, fate in fates.items() if fate != row.fate} == {}


def test_packet_table_covers_shards_of_every_dispatch_chain() -> None:
    covered = set()
    for scenario in SCENARIOS:
        for kernel in our_rules(scenario, 1).values():
            names = {ChainName(table, name) for table, chains in kernel.tables.items() for name in chains}
            covered |= {(chain.table, chain.name.split("-")[1]) for chain in names if is_shard(chain)}
    assert covered >= {("nat", "SVC"), ("nat", "EXT"), ("filter", "SVC"), ("filter", "EXT"), ("filter", "FW")}
