"""Split dispatch chains in the kernel: no connection fails while chains are split or merged."""

from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from msgspec.structs import replace

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.cleanup import cleanup
from kproxy.iptables.names import DISPATCH_CHAINS, ChainName, is_shard
from kproxy.iptables.runner import IptablesRunner
from kproxy.iptables.save_restore import parse_save
from kproxy.model.context import Context
from kproxy.model.delta import Upsert
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.fakekernel import FakeKernel
from tests.inprocess import SingleFamilyProxy
from tests.lab.connection_stream import ConnectionStream
from tests.lab.iptables import RealKernel, RecordingIptables, add_counters, current_rules
from tests.lab.namespace import Namespace
from tests.lab.recorded import RecordedCluster
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.recordings import State, comparable, store
from tests.unit.test_iptables_render import recorded_context

THRESHOLD = 20
SCENARIO = "random-11"


def extra(number: int, family: Family) -> tuple[Service, EndpointSlice]:
    """Return a Service with every kind of frontend, and its slice. One in three has no endpoints."""
    six = family is Family.IPV6
    cluster_ip = f"fd00:10:97::{number * 40 + 1:x}" if six else f"10.97.{number * 40 >> 8}.{number * 40 & 255}"
    vip = f"2001:db8:{number + 1:x}::1" if six else f"203.0.{number}.1"
    name = f"extra-{number}"
    service = Service(
        "many",
        name,
        (cluster_ip,),
        (ServicePort("", 80, ("TCP", "UDP", "SCTP")[number % 4 % 3], 31000 + number * 5),),
        vips=(vip,),
        source_ranges=("2001:db8:51::/48" if six else "198.51.100.0/24",),
        external_local=True,
        health_check_node_port=32200 + number,
    )
    endpoints = (Endpoint("fd00:10:244:1::99" if six else "10.244.1.99", "node-1"),) if number % 3 else ()
    ports = (EndpointPort("", 8080, service.ports[0].protocol),)
    return service, EndpointSlice("many", name, f"many/{name}", family, endpoints, ports)


class ManyServicesProxy(SingleFamilyProxy):
    """A proxy of one family with a variable number of extra Services."""

    def __init__(self, found: Store, context: Context, backend: IptablesBackend) -> None:
        super().__init__(backend, context, store=found)

    def sync_extra(self, count: int) -> None:
        """Set the number of extra Services and sync."""
        present = sum(key.startswith("many/") for key in self.store.service_keys())
        self.put(*(each for number in range(count) for each in extra(number, self.context.family)))
        for number in range(count, present):
            self.delete(Service, f"extra-{number}", namespace="many")
        self.sync()


def shards(state: State) -> list[ChainName]:
    return [chain for chain in state if is_shard(chain)]


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("family", Family)
def test_split_chains_are_read_back_as_written(namespace: Namespace, variant: str, family: Family) -> None:
    real, fake = RealKernel(namespace, family, variant), FakeKernel()
    context = replace(Context(family, "node-1"), localhost_node_ports=family is Family.IPV4)
    backend = IptablesBackend(fake, max_transaction_rules=50, dispatch_threshold=THRESHOLD)
    proxy = ManyServicesProxy(Store("node-1"), context, backend)
    for count in (THRESHOLD - 5, 3 * THRESHOLD, 2 * THRESHOLD, 5):
        proxy.sync_extra(count)
        for text in fake.inputs:
            real.restore(text)
        fake.inputs.clear()
        assert real.state() == comparable(fake.dump())
        assert bool(shards(real.state())) is (count > THRESHOLD)
    proxy.sync_extra(4 * THRESHOLD)
    for text in fake.inputs:
        real.restore(text)
    stems = {(chain.table, chain.name.split("-")[1]) for chain in shards(real.state())}
    assert {stem for table, stem in stems if table == "filter"} == {"SVC", "EXT", "SVL", "FW"}
    assert {stem for table, stem in stems if table == "nat"} == {"SVC", "EXT"}
    for change in cleanup(parse_save(real.lines()).chains, max_transaction_rules=100):
        real.restore(change.text())
    assert [chain.name for chain in real.state() if chain.name.startswith("KUBE-")] == ["KUBE-FIREWALL"]


@pytest.mark.usefixtures("counters")
def test_kernel_accepts_the_deepest_tree(namespace: Namespace, variant: str) -> None:
    """With the longest path after it: source range, external traffic policy, group of endpoints and masquerading."""
    real, fake = RealKernel(namespace, Family.IPV6, variant), FakeKernel()
    service = replace(extra(1, Family.IPV6)[0], vips=nested_addresses(), external_local=False)
    found = Store("node-1")
    found.apply(Upsert(service))
    endpoints = tuple(Endpoint(f"fd00:10:244:1::{number:x}", "node-1") for number in range(1, 1100))
    found.apply(Upsert(replace(extra(1, Family.IPV6)[1], endpoints=endpoints)))
    context = Context(Family.IPV6, "node-1", masquerade_all=True)
    SingleFamilyProxy(IptablesBackend(fake, dispatch_threshold=1), context, store=found).sync()
    for text in fake.inputs:
        real.restore(text)
    assert real.state() == comparable(fake.dump())
    assert max_jump_depth(real.state(), ChainName("nat", "PREROUTING")) == 15


def nested_addresses() -> tuple[str, ...]:
    """Return addresses. Each shares four more leading bits with the last address than its predecessor."""
    return tuple(str(IPv6Address(2 << 124 | 1 << 4 * digit)) for digit in range(1, 30))


def max_jump_depth(state: State, chain: ChainName) -> int:
    """Return the maximum depth of jumps from a chain."""
    targets = [ChainName(chain.table, rule.rpartition(" -j ")[2].split(" ")[0]) for rule in state.get(chain, [])]
    return max((1 + max_jump_depth(state, target) for target in targets if target in state), default=0)


@pytest.mark.usefixtures("counters")
def test_restart_with_split_chains_writes_nothing(namespace: Namespace) -> None:
    for family in Family:
        for writes in (True, False):
            iptables = RecordingIptables(family)
            backend = IptablesBackend(iptables, max_transaction_rules=50, dispatch_threshold=THRESHOLD)
            proxy = ManyServicesProxy(Store("node-1"), Context(family, "node-1"), backend)
            for number in range(3 * THRESHOLD):
                for each in extra(number, family):
                    proxy.store.apply(Upsert(each))
            namespace.call(lambda proxy=proxy: proxy.sync_extra(3 * THRESHOLD))  # type: ignore[misc]
            assert bool(iptables.inputs) is writes


def test_no_connection_fails_while_chains_are_split_and_merged(lab: Lab, servers: Servers) -> None:
    cluster = RecordedCluster(lab, servers, SCENARIO)
    found = store(SCENARIO)
    node = lab.node.namespace
    add_counters(node)
    context = recorded_context(SCENARIO, Family.IPV4, found)
    kernel = IptablesRunner(Family.IPV4)

    def start(threshold: int) -> ManyServicesProxy:
        return ManyServicesProxy(
            found, context, IptablesBackend(kernel, max_transaction_rules=50, dispatch_threshold=threshold)
        )

    def split() -> set[ChainName]:
        state = current_rules(node, Family.IPV4)
        targets = {chain: {rule.rpartition(" -j ")[2] for rule in state[chain]} for chain in DISPATCH_CHAINS}
        return {
            chain for chain, names in targets.items() if any(is_shard(ChainName(chain.table, each)) for each in names)
        }

    proxy = start(60)
    node.call(lambda: proxy.sync_extra(0))
    assert split() == set()
    with ConnectionStream(cluster.targets) as stream:
        stream.take()
        for count in (60, 0, 60, 40, 0):
            stream.mark(f"{count} more Services")
            node.call(lambda count=count: proxy.sync_extra(count))  # type: ignore[misc]
            stream.take()
            assert {chain.name for chain in split()} >= {"KUBE-SERVICES"} if count else not split()
        for threshold in (1, 60, 3, 0):
            stream.mark(f"start with threshold {threshold}")
            again = start(threshold)
            node.call(lambda again=again: again.sync_extra(0))  # type: ignore[misc]
            stream.take()
            assert bool(split()) is (threshold in {1, 3})
    assert stream.failure_report() == ""
