"""In iptables mode, the endpoints of a Service that has very many are divided into groups."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from kproxy.iptables.names import ChainName, deletion_order
from kproxy.iptables.render import MAX_CHAIN_ENDPOINTS
from kproxy.iptables.save_restore import parse_save, probability_text
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.simulate.iptables import IptablesSimulator
from tests.unit.simulation import packet
from tests.unit.test_iptables_diff import IptablesProxy, deleted, written

PORTS = (EndpointPort("http", 8080, "TCP"),)


def addresses(count: int) -> list[str]:
    return [f"10.245.{number // 250}.{number % 250 + 1}" for number in range(count)]


def big(endpoints: Iterable[str], affinity: int = 0) -> tuple[Service, EndpointSlice]:
    service = Service("ns", "big", ("10.96.0.1",), (ServicePort("http", 80, "TCP"),), affinity_seconds=affinity)
    found = tuple(Endpoint(address, "node-2") for address in endpoints)
    return service, EndpointSlice("ns", "big-1", "ns/big", Family.IPV4, found, PORTS)


@pytest.mark.parametrize("count", [MAX_CHAIN_ENDPOINTS + 1, 1792, 2500])
def test_all_endpoints_are_equally_likely(count: int) -> None:
    proxy = IptablesProxy()
    proxy.sync(*big(addresses(count)))
    simulator = IptablesSimulator("".join(proxy.kernel.dump()), Family.IPV4)
    found = simulator.send(packet(destination="10.96.0.1", port=80)).probabilities
    assert {outcome.endpoint for outcome in found} == {f"{address}:8080" for address in addresses(count)}
    # The kernel stores probabilities as multiples of 2**-31.
    assert all(math.isclose(chance, 1 / count, rel_tol=1e-5) for chance in found.values())


def test_chain_of_the_maximum_length_has_no_groups() -> None:
    proxy = IptablesProxy()
    lines = proxy.lines_of(*big(addresses(MAX_CHAIN_ENDPOINTS)))
    chains = [name for name in written(lines) if name.startswith("KUBE-SVC-")]
    assert len(chains) == 1
    more = written(proxy.lines_of(*big(addresses(MAX_CHAIN_ENDPOINTS + 1))))
    assert sum(name.startswith("KUBE-SVC-") for name in more) == 1 + 4
    fewer = proxy.lines_of(*big(addresses(MAX_CHAIN_ENDPOINTS)))
    assert sum(name.startswith("KUBE-SVC-") for name in deleted(fewer)) == 4


@pytest.mark.parametrize("affinity", [0, 60])
def test_changed_endpoint_rewrites_one_group(affinity: int) -> None:
    proxy = IptablesProxy()
    proxy.sync(*big(addresses(3000), affinity))
    lines = proxy.lines_of(*big(addresses(3000)[1:], affinity))
    commands = [line.split(" ") for line in lines if line.startswith("-")]
    groups = {words[1] for words in commands if len(words[1]) == 28}
    assert len(groups) == 1 + bool(affinity)
    assert len(commands) < 700
    fresh = IptablesProxy()
    fresh.sync(*big(addresses(3000)[1:], affinity))
    assert proxy.kernel.dump() == fresh.kernel.dump()


def test_large_service_is_written_in_blocks_that_jump_only_to_existing_chains() -> None:
    # The fake kernel rejects jumps to chains that do not exist.
    proxy = IptablesProxy(max_transaction_rules=300)
    proxy.sync(*big(addresses(3000), affinity=60))
    inputs = list(proxy.kernel.inputs)
    assert max(sum(line.startswith("-A ") for line in text.splitlines()) for text in inputs) < 600
    assert not proxy.result.applied.rejected
    proxy.kernel.inputs.clear()
    proxy.sync(Service("ns", "big", ("10.96.0.1",), (), affinity_seconds=60))
    assert not [name for name in proxy.kernel.tables["nat"] if name.startswith(("KUBE-SVC-", "KUBE-SEP-"))]


def test_chain_is_deleted_before_its_groups() -> None:
    names = ("KUBE-SEP-A", "KUBE-SVC-AAAAAAAAAAAAAAAA-00", "KUBE-SVC-AAAAAAAAAAAAAAAA", "KUBE-EXT-AAAAAAAAAAAAAAAA")
    assert sorted((ChainName("nat", name) for name in names), key=deletion_order) == [
        ChainName("nat", name) for name in reversed(names)
    ]


@pytest.mark.parametrize(("chosen", "total"), [(1, 3), (193, 50_000), (256, 1024), (7, 50_001), (49_999, 50_000)])
def test_probability_is_written_as_it_is_read(chosen: int, total: int) -> None:
    text = probability_text(chosen, total)
    stored = round(float(text) * 2**31) / 2**31  # as iptables encodes and prints it
    assert math.isclose(stored, chosen / total, abs_tol=2**-31)
    rule = "-A KUBE-SVC-A -m statistic --mode random --probability {} -j KUBE-SVC-B"
    lines = ["*nat", ":KUBE-SVC-A - [0:0]", rule.format(f"{stored:.11f}"), "COMMIT"]
    assert parse_save(lines).chains[ChainName("nat", "KUBE-SVC-A")].rules == [rule.format(text)]
