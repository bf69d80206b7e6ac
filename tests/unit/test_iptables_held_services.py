"""In iptables mode, a Service whose new rules the kernel rejects keeps its older ones, whatever happens to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.held_services import ExistingServices
from kproxy.iptables.ledger import ServiceRecord, record_chains
from kproxy.iptables.names import port_hash
from kproxy.iptables.save_restore import parse_save
from kproxy.model.delta import Delta
from kproxy.model.drift import Part, RepairResult, Touched
from kproxy.model.types import EndpointSlice, Family, Service
from tests.fakekernel import FakeKernel
from tests.unit.strategies import contested_deltas, deltas
from tests.unit.test_iptables_diff import IptablesProxy
from tests.unit.test_iptables_incremental import THRESHOLDS, KernelsProxy
from tests.unit.test_iptables_isolation import RANGES, fresh, objects, poison, rejected

V4 = Family.IPV4
OLD, NEW = (1, 2), (4, 5)
NEW_TEXT = "10.244.0.4"


def chain_of(name: str) -> str:
    return f"KUBE-SVC-{port_hash(f'ns/{name}:http', 'TCP')}"


def with_rejected(text: str = NEW_TEXT, *, limit: int = 600, threshold: int = 1000) -> IptablesProxy:
    """Return a proxy with the Services a and b. The kernel has rejected new rules of a, because they contain `text`."""
    proxy = IptablesProxy(max_transaction_rules=limit, dispatch_threshold=threshold)
    proxy.sync(*objects("a", *OLD), *objects("b", 3))
    poison(proxy.kernel, "a", text=text)
    proxy.sync(*objects("a", *NEW))
    assert rejected(proxy) == {"a"}
    assert proxy.kernel.dump() == fresh(*objects("a", *OLD), *objects("b", 3), threshold=threshold)
    return proxy


def repair(proxy: IptablesProxy, *chains: str) -> RepairResult:
    proxy.kernel.foreign_commits += 1
    return proxy.families[V4].repair(proxy.store, {"nat": Touched(chains=set(chains))})


def delete_chain(nat: dict[str, list[str]]) -> None:
    del nat[chain_of("a")]
    for rules in nat.values():
        rules[:] = [rule for rule in rules if f"-j {chain_of('a')}" not in rule]


DAMAGES: Mapping[str, Callable[[dict[str, list[str]]], object]] = {
    "flush": lambda nat: nat[chain_of("a")].clear(),
    "insert": lambda nat: nat[chain_of("a")].insert(0, "-j RETURN"),
    "delete rule": lambda nat: nat[chain_of("a")].pop(),
    "delete chain": delete_chain,
}


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_restores_the_older_rules_of_a_rejected_service(damage: str, threshold: int) -> None:
    proxy = with_rejected(threshold=threshold)
    before = proxy.kernel.dump()
    DAMAGES[damage](proxy.kernel.tables["nat"])
    shards = [name for name in proxy.kernel.tables["nat"] if "/" in name]
    result = repair(proxy, chain_of("a"), "KUBE-SERVICES", *shards)
    assert Part("nat", "chain", chain_of("a")) in result.repaired
    assert proxy.kernel.dump() == before
    assert repair(proxy, chain_of("a")) == RepairResult()
    assert proxy.verify()


@pytest.mark.parametrize("limit", [2, 600])
@pytest.mark.parametrize("damage", DAMAGES)
def test_full_sync_restores_the_older_rules_of_a_rejected_service(damage: str, limit: int) -> None:
    proxy = with_rejected(limit=limit)
    before = proxy.kernel.dump()
    DAMAGES[damage](proxy.kernel.tables["nat"])
    proxy.forget()
    proxy.sync()
    assert rejected(proxy) == {"a"}
    assert proxy.kernel.dump() == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_full_sync_that_the_kernel_rejects_restores_them_too(damage: str) -> None:
    """It then programs the Services in small transactions."""
    proxy = with_rejected()
    DAMAGES[damage](proxy.kernel.tables["nat"])
    poison(proxy.kernel, "ab", text=NEW_TEXT)
    proxy.forget()
    proxy.sync(*objects("b", 4), *objects("c", 6))
    assert rejected(proxy) == {"a", "b"}
    assert proxy.kernel.dump() == fresh(*objects("a", *OLD), *objects("b", 3), *objects("c", 6))


def test_comparison_restores_the_older_rules_of_a_rejected_service() -> None:
    proxy = with_rejected()
    before = proxy.kernel.dump()
    proxy.kernel.tables["nat"][chain_of("a")].clear()
    proxy.kernel.foreign_commits += 1
    assert not proxy.verify()
    assert proxy.kernel.dump() == before
    assert proxy.verify()


def test_chains_that_the_kernel_does_not_accept_again_do_not_block_other_repairs() -> None:
    proxy = with_rejected(text="")
    before = list(proxy.kernel.tables["nat"][chain_of("b")])
    for name in "ab":
        proxy.kernel.tables["nat"][chain_of(name)].clear()
    result = repair(proxy, chain_of("a"), chain_of("b"))
    assert [part.name for part in result.repaired if part.kind == "chain"] == [chain_of("b")]
    assert not result.needs_full_sync
    assert proxy.kernel.tables["nat"][chain_of("b")] == before
    assert repair(proxy, chain_of("a"), chain_of("b")) == RepairResult()


def test_chains_that_the_kernel_did_not_accept_again_are_restored_with_the_next_attempt() -> None:
    proxy = with_rejected(text="")
    before = proxy.kernel.dump()
    proxy.kernel.tables["nat"][chain_of("a")].clear()
    repair(proxy, chain_of("a"))
    poison(proxy.kernel, "a", text=NEW_TEXT)
    proxy.sync(*objects("a", *NEW, 6))
    assert rejected(proxy) == {"a"}
    assert proxy.kernel.dump() == before


def test_service_that_a_repair_finds_rejected_is_quarantined_by_a_full_sync() -> None:
    """The repair renders the current objects, whose sync is still to come."""
    proxy = IptablesProxy()
    proxy.sync(*objects("a", *OLD), *objects("b", 3))
    poison(proxy.kernel, "a", text=NEW_TEXT)
    proxy.put(*objects("a", *NEW))
    before = list(proxy.kernel.tables["nat"][chain_of("b")])
    for name in "ab":
        proxy.kernel.tables["nat"][chain_of(name)].clear()
    result = repair(proxy, chain_of("a"), chain_of("b"))
    assert result.needs_full_sync
    assert proxy.backend.needs_full_sync
    assert proxy.kernel.tables["nat"][chain_of("b")] == before
    proxy.sync()
    assert rejected(proxy) == {"a"}


def test_service_whose_chain_was_deleted_during_a_sync_of_another_one_is_not_rejected() -> None:
    """The sync rewrites a dispatch chain that jumps to the deleted chain."""
    proxy = IptablesProxy()
    proxy.sync(*objects("a", *OLD), *objects("b", 3))
    delete_chain(proxy.kernel.tables["nat"])
    proxy.sync(*objects("c", 4))
    assert rejected(proxy) == set()
    assert proxy.kernel.dump() == fresh(*objects("a", *OLD), *objects("b", 3), *objects("c", 4))


def test_service_that_is_accepted_after_a_sync_failed_midway_is_no_longer_suspected() -> None:
    proxy = IptablesProxy(max_transaction_rules=5)
    proxy.sync(*(each for name in "abcdefgh" for each in objects(name, 1, 2)))
    poison(proxy.kernel, "h")
    proxy.sync(*objects("h", 3, 4))
    assert rejected(proxy) == {"h"}
    poison(proxy.kernel, "a")
    proxy.sync(*(each for name in "abcdefg" for each in objects(name, 5, 6)), *objects("h", 5))
    assert rejected(proxy) == {"a"}
    proxy.kernel.inputs.clear()
    proxy.sync(*objects("h", 7), *objects("g", 7))
    assert len(proxy.kernel.inputs) == 1  # h is written together with g


# Restarts

KINDS: Mapping[str, dict[str, Any]] = {
    "ClusterIP": {},
    "NodePort": {"ports": (), "node_port": 30080},
    "load balancer with source ranges": RANGES,
    "external IP": {"external_ips": ("203.0.113.9",)},
    "session affinity": {"affinity_seconds": 60},
    "local": {"vips": ("203.0.113.1",), "external_local": True, "health_check_node_port": 32000},
}


def of_kind(kind: str, *lasts: int) -> list[Service | EndpointSlice]:
    more = dict(KINDS[kind])
    service, endpoints = objects("a", *lasts)
    assert isinstance(service, Service)
    if node_port := more.pop("node_port", 0):
        (port,) = service.ports
        more["ports"] = (type(port)("http", 80, "TCP", node_port=node_port),)
    return [*objects("a", *lasts, **more)[:1], endpoints]


def restart(proxy: IptablesProxy, threshold: int) -> None:
    proxy.restart(IptablesBackend(proxy.kernel, max_transaction_rules=600, dispatch_threshold=threshold))


@pytest.mark.parametrize("lasts", [OLD, ()], ids=["endpoints", "none"])
@pytest.mark.parametrize("threshold", [1, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_rejected_service_keeps_its_rules_over_a_restart(kind: str, threshold: int, lasts: tuple[int, ...]) -> None:
    proxy = IptablesProxy(dispatch_threshold=threshold)
    proxy.sync(*of_kind(kind, *lasts), *objects("b", 3))
    before = proxy.kernel.dump()
    poison(proxy.kernel, "a", text=NEW_TEXT)
    proxy.sync(*of_kind(kind, *NEW))
    for _ in range(2):
        restart(proxy, threshold)
        proxy.sync()
        assert rejected(proxy) == {"a"}
        assert proxy.kernel.dump() == before
    # The rules that were found are restored, follow the dispatch chains, and are replaced in the end.
    for name in [name for name in proxy.kernel.tables["nat"] if name == chain_of("a")]:
        proxy.kernel.tables["nat"][name].clear()
        assert repair(proxy, name).repaired
    assert proxy.kernel.dump() == before
    proxy.sync(*objects("c", 6))
    assert proxy.kernel.dump() == fresh(*of_kind(kind, *lasts), *objects("b", 3), *objects("c", 6), threshold=threshold)
    poison(proxy.kernel, "")
    proxy.sync(*of_kind(kind, 7))
    assert rejected(proxy) == set()
    assert proxy.kernel.dump() == fresh(*of_kind(kind, 7), *objects("b", 3), *objects("c", 6), threshold=threshold)


def test_restart_with_another_threshold_moves_the_rules_of_a_rejected_service() -> None:
    proxy = with_rejected(threshold=1)
    restart(proxy, 1000)
    proxy.sync()
    assert rejected(proxy) == {"a"}
    assert proxy.kernel.dump() == fresh(*objects("a", *OLD), *objects("b", 3))


def test_deleted_service_leaves_nothing_behind_after_a_restart() -> None:
    proxy = with_rejected()
    restart(proxy, 1000)
    proxy.sync()
    proxy.delete(Service, "a").sync()
    assert proxy.kernel.dump() == fresh(*objects("b", 3))


def comparable(record: ServiceRecord) -> tuple[object, ...]:
    """Return what the kernel knows of a record: not the order of its rules, nor the port of a health check rule."""
    rules = {rule for port in record.values() for rule in port.dispatch}
    return dict(record_chains(record)), rules, sum(port.rule_count for port in record.values())


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(deltas(), contested_deltas()), max_size=15), st.sampled_from(THRESHOLDS))
def test_records_that_are_found_in_the_kernel_are_those_of_the_process_that_wrote_the_rules(
    history: list[Delta], threshold: int
) -> None:
    proxy = KernelsProxy(dispatch_threshold=threshold)
    proxy.apply(*history)
    proxy.settle()
    for family, kernel in proxy.kernels.items():
        found = ExistingServices(parse_save(kernel.dump()).chains)
        ledger = proxy.families[family]._backend._ledger  # type: ignore[attr-defined]
        for key, record in ledger.services.items():
            if not any(rule in ledger.resolution.omitted_rules for port in record.values() for rule in port.dispatch):
                assert comparable(found.record(key)) == comparable(record)


def test_chains_of_other_services_and_unknown_services_are_not_found() -> None:
    proxy = with_rejected()
    found = ExistingServices(parse_save(proxy.kernel.dump()).chains)
    assert found.record("ns/c") == {}
    names = {name for name, _ in record_chains(found.record("ns/a"))}
    assert chain_of("a") in names
    assert not names & {name for name, _ in record_chains(found.record("ns/b"))}


def test_rules_of_a_service_that_changed_before_its_first_rejection_are_left_as_they_are() -> None:
    """Nobody knows the rules that another process has changed."""
    kernel = FakeKernel()
    proxy = IptablesProxy(kernel)
    proxy.sync(*objects("a", *OLD), *objects("b", 3))
    kernel.tables["nat"][chain_of("a")].pop()
    damaged = kernel.dump()
    poison(kernel, "a", text=NEW_TEXT)
    proxy.sync(*objects("a", *NEW))
    assert rejected(proxy) == {"a"}
    assert kernel.dump() == damaged
    assert proxy.verify()
