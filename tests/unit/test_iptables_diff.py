"""Changes in iptables mode write as few rules as possible, and every transaction leaves complete rules behind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.names import DISPATCH_CHAINS, PORT_CHAIN_PREFIXES, port_hash
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import Delete, Delta, Replace
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from tests.fakekernel import BUILTIN, FakeKernel
from tests.inprocess import SingleFamilyProxy
from tests.unit.strategies import deltas

CONTEXT = Context(
    Family.IPV4,
    "node-1",
    node_address="10.99.0.2",
    local_traffic=LocalTraffic(cidr="10.244.0.0/16"),
    localhost_node_ports=True,
)
SVC = f"KUBE-SVC-{port_hash('ns/web:http', 'TCP')}"
DISPATCH_NAMES = {chain.name for chain in DISPATCH_CHAINS}


def sep(last: int) -> str:
    """Return the name of the chain of the endpoint 10.244.0.`last`."""
    return f"KUBE-SEP-{port_hash('ns/web:http', 'TCP', f'10.244.0.{last}:8080')}"


def service(name: str = "web", **more: Any) -> Service:
    address = f"10.96.0.{ord(name[0])}"
    return Service(**{"namespace": "ns", "name": name, "cluster_ips": (address,), "ports": (HTTP,), **more})


HTTP = ServicePort("http", 80, "TCP")


def a_slice(*lasts: int, owner: str = "web") -> EndpointSlice:
    endpoints = tuple(Endpoint(f"10.244.0.{last}", "node-1") for last in lasts)
    ports = (EndpointPort("http", 8080, "TCP"),)
    return EndpointSlice("ns", f"{owner}-1", f"ns/{owner}", Family.IPV4, endpoints, ports)


class IptablesProxy(SingleFamilyProxy):
    """One family in iptables mode on a fake kernel."""

    def __init__(
        self,
        kernel: FakeKernel | None = None,
        *,
        max_transaction_rules: int = 600,
        dispatch_threshold: int = 1000,
        context: Context = CONTEXT,
    ) -> None:
        self.kernel = kernel or FakeKernel()
        backend = IptablesBackend(
            self.kernel, max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold
        )
        super().__init__(backend, context)

    def lines_of(self, *objects: Service | EndpointSlice | Node) -> list[str]:
        """Sync these objects and return the lines that this wrote."""
        self.kernel.inputs.clear()
        self.sync(*objects)
        return "".join(self.kernel.inputs).splitlines()


def written(lines: Iterable[str]) -> set[str]:
    """Return the chains that the lines create, flush or delete."""
    return {line[1:].split(" ")[0] for line in lines if line.startswith(":")}


def deleted(lines: Iterable[str]) -> set[str]:
    return {line.removeprefix("-X ") for line in lines if line.startswith("-X ")}


@pytest.fixture
def proxy() -> IptablesProxy:
    """A proxy that has programmed the Services `web` (endpoints 1 and 2) and `api` (endpoint 3)."""
    proxy = IptablesProxy()
    proxy.sync(service(), a_slice(1, 2), service("api"), a_slice(3, owner="api"))
    return proxy


# Small changes.


def test_sync_without_changes_writes_nothing(proxy: IptablesProxy) -> None:
    assert proxy.lines_of() == []
    assert proxy.kernel.inputs == []


def test_added_endpoint_writes_its_chain_and_the_service_chain(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(a_slice(1, 2, 4))
    assert written(lines) == {SVC, sep(4)}
    assert deleted(lines) == set()
    assert lines[0] == "*nat"
    assert lines.count("COMMIT") == 1


def test_replaced_endpoint_deletes_the_chain_of_the_old_one(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(a_slice(1, 4))
    assert written(lines) == {SVC, sep(2), sep(4)}
    assert deleted(lines) == {sep(2)}
    assert lines.count("COMMIT") == 1
    assert not [line for line in lines if "KUBE-SERVICES" in line]


def test_removed_endpoint_rewrites_the_service_chain_and_deletes_its_own(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(a_slice(1))
    assert (written(lines), deleted(lines)) == ({SVC, sep(2)}, {sep(2)})


def test_kernel_is_read_only_at_start(proxy: IptablesProxy) -> None:
    proxy.sync(a_slice(1))
    proxy.sync(service("new"))
    assert proxy.kernel.reads == 1


def test_new_service_adds_its_chains_and_rewrites_only_its_dispatch_chains(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(service("new"), a_slice(9, owner="new"))
    own = {name for name in written(lines) if name.startswith(PORT_CHAIN_PREFIXES)}
    assert len(own) == 2
    assert written(lines) - own == {"KUBE-SERVICES"}
    assert [line for line in lines if line.startswith("*")] == ["*nat"]
    assert sum("-d 10.96.0." in line for line in lines if line.startswith("-A KUBE-SERVICES")) == 3
    assert "must be the last rule" in [line for line in lines if line.startswith("-A KUBE-SERVICES")][-1]


def test_deleted_service_removes_its_chains_and_dispatch_rules(proxy: IptablesProxy) -> None:
    proxy.apply(Delete(Service, "ns", "web"))
    lines = proxy.lines_of()
    assert deleted(lines) == {SVC, sep(1), sep(2)}
    assert written(lines) == {SVC, sep(1), sep(2), "KUBE-SERVICES"}
    assert not [rule for rules in proxy.kernel.tables["nat"].values() for rule in rules if "ns/web" in rule]


def test_service_that_loses_its_last_endpoint_is_rejected(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(a_slice())
    assert deleted(lines) == {SVC, sep(1), sep(2)}
    assert [line for line in lines if line.startswith("*")] == ["*nat", "*filter"]
    assert [rule.split(" ")[1] for rule in proxy.kernel.tables["filter"]["KUBE-SERVICES"]] == ["10.96.0.119/32"]


def test_renamed_port_replaces_its_chains(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(service(ports=(ServicePort("other", 80, "TCP"),)))
    assert deleted(lines) == {SVC, sep(1), sep(2)}


def test_added_node_port_leaves_the_service_chain_unchanged(proxy: IptablesProxy) -> None:
    lines = proxy.lines_of(service(ports=(ServicePort("http", 80, "TCP", 30080),)))
    external = f"KUBE-EXT-{port_hash('ns/web:http', 'TCP')}"
    assert written(lines) == {external, "KUBE-NODEPORTS"}


def test_repeated_objects_write_nothing(proxy: IptablesProxy) -> None:
    assert proxy.lines_of(service(), a_slice(1, 2)) == []


# At start and after a failure.


def test_jumps_from_builtin_chains_are_in_the_order_of_kube_proxy() -> None:
    proxy = IptablesProxy()
    proxy.sync()
    for table, chains in BUILTIN.items():
        for chain in chains:
            expected = [item.rule for item in ensured_rules(CONTEXT) if item.chain == (table, chain)]
            assert proxy.kernel.tables[table][chain] == expected


def test_only_missing_jumps_are_restored(proxy: IptablesProxy) -> None:
    missing = proxy.kernel.tables["filter"]["FORWARD"].pop(1)
    again = IptablesProxy(proxy.kernel)
    lines = again.lines_of(service(), a_slice(1, 2), service("api"), a_slice(3, owner="api"))
    assert lines == ["*filter", f"-I FORWARD 1 {missing}", "COMMIT"]


def test_existing_jump_with_another_comment_is_kept() -> None:
    kernel = FakeKernel()
    kernel.restore("*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -m comment --comment old -j KUBE-SERVICES\nCOMMIT\n")
    lines = IptablesProxy(kernel).lines_of()
    assert not [line for line in lines if line.startswith("-I PREROUTING")]
    assert [line for line in lines if line.startswith("-I OUTPUT 1 ") and line.endswith("-j KUBE-SERVICES")]


FOREIGN = (
    "*nat\n:DOCKER - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n-A DOCKER -i docker0 -j RETURN\n"
    "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\nCOMMIT\n"
    "*filter\n:KUBE-FIREWALL - [0:0]\n"
    '-A KUBE-FIREWALL -m comment --comment "kubernetes firewall" -m mark --mark 0x8000/0x8000 -j DROP\n'
    "-A INPUT -j KUBE-FIREWALL\n-A INPUT -s 192.0.2.9/32 -j DROP\nCOMMIT\n"
)


def test_foreign_chains_and_rules_are_left_alone() -> None:
    kernel = FakeKernel()
    kernel.restore(FOREIGN)
    proxy = IptablesProxy(kernel)
    lines = proxy.lines_of(service(), a_slice(1))
    assert kernel.tables["nat"]["DOCKER"] == ["-i docker0 -j RETURN"]
    assert "-m addrtype --dst-type LOCAL -j DOCKER" in kernel.tables["nat"]["PREROUTING"]
    assert "KUBE-KUBELET-CANARY" in kernel.tables["nat"]
    assert kernel.tables["filter"]["INPUT"][-2:] == ["-j KUBE-FIREWALL", "-s 192.0.2.9/32 -j DROP"]
    assert not written(lines) & {"DOCKER", "KUBE-KUBELET-CANARY", "PREROUTING", "INPUT"}


def test_rule_is_added_to_the_kubelet_firewall_chain_without_flushing_it() -> None:
    kernel = FakeKernel()
    kernel.restore(FOREIGN)
    lines = IptablesProxy(kernel).lines_of()
    assert "KUBE-FIREWALL" not in written(lines)
    martians, kubelets = kernel.tables["filter"]["KUBE-FIREWALL"]
    assert martians.startswith("! -s 127.0.0.0/8 ")
    assert "kubernetes firewall" in kubelets
    assert IptablesProxy(kernel).lines_of() == []


def test_restart_adopts_existing_rules_without_writing(proxy: IptablesProxy) -> None:
    again = IptablesProxy(proxy.kernel)
    assert again.lines_of(service(), a_slice(1, 2), service("api"), a_slice(3, owner="api")) == []
    assert written(again.lines_of(a_slice(1, 2, 4))) == {SVC, sep(4)}


def test_stale_chains_of_a_previous_run_are_removed() -> None:
    previous = IptablesProxy()
    ranges = {"vips": ("203.0.113.1",), "source_ranges": ("198.51.100.0/24",), "external_local": True}
    previous.sync(service("old", **ranges), a_slice(1, 2, owner="old"), service(), a_slice(3))
    again = IptablesProxy(previous.kernel)
    lines = again.lines_of(service(), a_slice(3))
    assert {name.split("-")[1] for name in deleted(lines)} == {"SVC", "SVL", "EXT", "FW", "SEP"}
    fresh = IptablesProxy()
    fresh.sync(service(), a_slice(3))
    assert previous.kernel.dump() == fresh.kernel.dump()


def test_modified_chains_are_repaired_at_start(proxy: IptablesProxy) -> None:
    expected = proxy.kernel.dump()
    proxy.kernel.tables["nat"][SVC].pop()
    proxy.kernel.tables["nat"]["KUBE-SERVICES"].append("-j ACCEPT")
    proxy.kernel.tables["filter"]["KUBE-FORWARD"].clear()
    del proxy.kernel.tables["mangle"]["KUBE-PROXY-CANARY"]
    again = IptablesProxy(proxy.kernel)
    lines = again.lines_of(service(), a_slice(1, 2), service("api"), a_slice(3, owner="api"))
    assert written(lines) == {SVC, "KUBE-SERVICES", "KUBE-FORWARD", "KUBE-PROXY-CANARY"}
    assert proxy.kernel.dump() == expected


def test_after_a_failure_the_kernel_is_read_and_only_missing_rules_are_written(proxy: IptablesProxy) -> None:
    proxy.kernel.reject = lambda _: "out of memory"
    with pytest.raises(SyncError, match="out of memory"):
        proxy.sync(a_slice(1, 2, 4))
    proxy.kernel.reject = lambda _: None
    assert written(proxy.lines_of()) == {SVC, sep(4)}
    assert proxy.kernel.reads == 2


# Changes of the context that all Services share.


@pytest.mark.parametrize(
    ("change", "chains"),
    [
        ({"node_port_addresses": ("10.99.0.2",)}, {"KUBE-SERVICES"}),
        ({"random_fully": False}, {"KUBE-POSTROUTING"}),
        ({"drop_invalid": False}, {"KUBE-FORWARD"}),
        ({"masquerade_mark": 1}, {"KUBE-MARK-MASQ", "KUBE-POSTROUTING", "KUBE-FORWARD"}),
        ({"local_traffic": LocalTraffic()}, {SVC, f"KUBE-SVC-{port_hash('ns/api:http', 'TCP')}"}),
        ({"node_address": "10.99.0.3"}, set()),
        ({"zone": "zone-a"}, set()),
    ],
)
def test_changed_context_rewrites_only_the_chains_that_depend_on_it(
    proxy: IptablesProxy, change: dict[str, Any], chains: set[str]
) -> None:
    proxy.context = replace(CONTEXT, **change)
    assert written(proxy.lines_of()) == chains
    fresh = IptablesProxy(context=proxy.context)
    fresh.sync(service(), a_slice(1, 2), service("api"), a_slice(3, owner="api"))
    assert proxy.kernel.dump() == fresh.kernel.dump()
    assert proxy.lines_of() == []


# Large changes, split into several transactions.


class Watched(FakeKernel):
    """A fake kernel that records the state of table nat after every commit."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, list[str]]] = []

    def restore(self, text: str) -> None:
        for part in re.findall(r"\*.*?\nCOMMIT\n", text, re.DOTALL):
            super().restore(part)
            self.states.append(dict(self.tables["nat"]))


def reachable(table: dict[str, list[str]]) -> set[str]:
    """Return the per-Service chains that a packet can reach from a dispatch chain."""
    reached: set[str] = set()
    pending = [name for name in DISPATCH_NAMES if name in table]
    while pending:
        for rule in table[pending.pop()]:
            target = rule.rsplit("-j ", 1)[-1]
            if target.startswith(PORT_CHAIN_PREFIXES) and target not in reached:
                reached.add(target)
                pending.append(target)
    return reached


def assert_safe(before: dict[str, list[str]], states: list[dict[str, list[str]]]) -> None:
    """Assert that in every state, each reachable chain is complete: identical to its initial or its final version."""
    after = states[-1] if states else before
    for state in states:
        for name in DISPATCH_NAMES & state.keys():
            assert state[name] in (before.get(name, []), after[name])
        for name in reachable(state):
            assert state[name] in (before.get(name), after.get(name))
            assert state[name]


@pytest.mark.parametrize("max_transaction_rules", [1, 5, 20, 600])
def test_initial_load_never_exposes_an_incomplete_chain(max_transaction_rules: int) -> None:
    proxy = IptablesProxy(Watched(), max_transaction_rules=max_transaction_rules)
    kernel = proxy.kernel
    assert isinstance(kernel, Watched)
    objects = [item for name in "abcdef" for item in (service(name), a_slice(1, 2, 3, owner=name))]
    proxy.sync(*objects)
    single = IptablesProxy()
    single.sync(*objects)
    assert kernel.dump() == single.kernel.dump()
    assert_safe({}, kernel.states)


def test_transactions_respect_the_rule_limit_and_never_split_a_service() -> None:
    proxy = IptablesProxy(max_transaction_rules=30)
    proxy.sync(*(item for name in "abcdefgh" for item in (service(name), a_slice(1, 2, 3, owner=name))))
    *transactions, last = proxy.kernel.inputs
    assert len(transactions) > 2
    for text in transactions:
        lines = text.splitlines()
        assert sum(line.startswith("-A ") for line in lines) <= 30
        assert not written(lines) & DISPATCH_NAMES
        assert sum(line.startswith(":KUBE-SEP-") for line in lines) == 3 * sum(
            line.startswith(":KUBE-SVC-") for line in lines
        )
    assert written(last.splitlines()) >= DISPATCH_NAMES


def test_service_larger_than_the_rule_limit_is_one_transaction() -> None:
    proxy = IptablesProxy(max_transaction_rules=5)
    proxy.sync(service(), a_slice(*range(1, 20)))
    assert [text.count(":KUBE-SVC-") for text in proxy.kernel.inputs].count(1) == 1


def test_stale_chains_are_deleted_in_several_transactions_referrers_first() -> None:
    previous = IptablesProxy()
    ranges = {"vips": ("203.0.113.1",), "source_ranges": ("198.51.100.0/24",), "external_local": True}
    for name in "abcdef":
        previous.sync(service(name, **ranges), a_slice(1, 2, 3, owner=name))
    again = IptablesProxy(previous.kernel, max_transaction_rules=3)
    again.lines_of()
    assert not [name for name in previous.kernel.tables["nat"] if name.startswith(PORT_CHAIN_PREFIXES)]
    assert next(text.count("-X ") for text in again.kernel.inputs if "-X " in text) == 3


@settings(max_examples=80, deadline=None)
@given(
    st.lists(deltas(), max_size=12),
    st.lists(deltas(), min_size=1, max_size=8),
    st.sampled_from((1, 6, 25)),
    st.sampled_from((1, 3, 1000)),
    st.booleans(),
)
def test_no_change_ever_exposes_an_incomplete_chain(
    before: list[Delta], more: list[Delta], max_transaction_rules: int, dispatch_threshold: int, restarted: bool
) -> None:
    kernel = Watched()
    proxy = IptablesProxy(kernel, max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold)
    proxy.apply(Replace(Service, ()), Replace(EndpointSlice, ()), *before)
    proxy.sync()
    state = dict(kernel.tables["nat"])
    if restarted:
        proxy = IptablesProxy(
            kernel, max_transaction_rules=max_transaction_rules, dispatch_threshold=dispatch_threshold
        )
        proxy.apply(*before)
    kernel.states.clear()
    proxy.apply(*more)
    proxy.sync()
    assert_safe(state, kernel.states)
