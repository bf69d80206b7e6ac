"""Frontends claimed by several Services: both modes give them to the same Service, in any order of creation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.iptables.frontend_conflicts import FrontendIndex, frontend_of
from kproxy.iptables.names import ChainName
from kproxy.iptables.render import DispatchRule, FrontendMatch
from kproxy.model.frontend_conflicts import ClaimRank, FrontendConflict
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.inprocess import FakeKernelProxy
from tests.unit.strategies import endpoint_slices, services

SHARED = "203.0.113.1"
THIS_NODE, OTHER_NODE = "node-1", "node-2"


def service(name: str, number: int, *, node_port: int = 0, **fields: Any) -> Service:
    return Service("ns", name, (f"10.96.0.{number}",), (ServicePort("http", 80, "TCP", node_port),), **fields)


def slices(name: str, *nodes: str) -> EndpointSlice:
    endpoints = tuple(Endpoint(f"10.244.0.{number}", node) for number, node in enumerate(nodes, 1))
    ports = (EndpointPort("http", 8080, "TCP"),)
    return EndpointSlice("ns", name, f"ns/{name}", Family.IPV4, endpoints, ports)


class ClaimsProxy(FakeKernelProxy):
    """One family of a node in one mode, with the conflicts that a sync finds."""

    def conflicts_after(self, *objects: Service | EndpointSlice) -> tuple[FrontendConflict, ...]:
        self.sync(*objects)
        return tuple(self.result.applied.conflicts)

    def reported_rules(self) -> int:
        """The number of rules that the backend reports in iptables mode, without the jumps from built-in chains."""
        return sum(self.result.applied.total_rules.values())

    def existing_rules(self) -> int:
        return sum(line.startswith("-A KUBE-") for line in self.kernel.dump())


BOTH = pytest.mark.parametrize("mode", ["iptables", "nftables"])


def conflict(owner: str, loser: str, frontend: str = f"{SHARED}:80/TCP") -> FrontendConflict:
    return FrontendConflict(frontend, f"ns/{owner}:http", f"ns/{loser}:http")


@BOTH
def test_service_owns_its_cluster_ip_with_and_without_endpoints(mode: str) -> None:
    proxy = ClaimsProxy(mode)
    frontend = "10.96.0.1:80/TCP"
    owner, other = service("web", 1), service("another", 2, external_ips=("10.96.0.1",))
    conflicts = (conflict("web", "another", frontend),)
    assert proxy.conflicts_after(other, slices("another", THIS_NODE)) == ()
    assert proxy.conflicts_after(owner) == conflicts
    assert proxy.conflicts_after(slices("web", THIS_NODE)) == conflicts
    assert proxy.conflicts_after(slices("web")) == conflicts
    assert proxy.conflicts_after(service("another", 2)) == ()


@BOTH
def test_first_service_by_name_wins_among_those_with_endpoints(mode: str) -> None:
    proxy = ClaimsProxy(mode)
    for name, number in (("b", 2), ("a", 1)):
        conflicts = proxy.conflicts_after(service(name, number, external_ips=(SHARED,)), slices(name, THIS_NODE))
    assert conflicts == (conflict("a", "b"),)


@BOTH
def test_forwarding_service_wins_over_dropping_and_dropping_over_rejecting(mode: str) -> None:
    proxy = ClaimsProxy(mode)
    a, b = (service(name, n, vips=(SHARED,), external_local=True) for n, name in enumerate("ab", 1))
    assert proxy.conflicts_after(a, b) == (conflict("a", "b"),)
    assert proxy.conflicts_after(slices("b", OTHER_NODE)) == (conflict("b", "a"),)
    assert proxy.conflicts_after(slices("a", OTHER_NODE)) == (conflict("a", "b"),)
    assert proxy.conflicts_after(slices("b", THIS_NODE)) == (conflict("b", "a"),)
    assert proxy.conflicts_after(slices("a", THIS_NODE)) == (conflict("a", "b"),)


@BOTH
def test_only_equal_ports_and_protocols_conflict(mode: str) -> None:
    proxy = ClaimsProxy(mode)
    assert proxy.conflicts_after(service("a", 1, external_ips=(SHARED,)), slices("a", THIS_NODE)) == ()
    ports = (ServicePort("http", 81, "TCP"), ServicePort("dns", 80, "UDP"))
    assert proxy.conflicts_after(replace(service("b", 2, external_ips=(SHARED,)), ports=ports)) == ()
    conflicts = proxy.conflicts_after(service("c", 3, node_port=30080), service("d", 4, node_port=30080))
    assert conflicts == (conflict("c", "d", "NodePort 30080/TCP"),)


def test_services_that_share_only_an_address_are_not_compared() -> None:
    """Thousands of Services may share the address of one load balancer, each with its own port."""
    index, chain = FrontendIndex(), ChainName("nat", "KUBE-SERVICES")
    claim = DispatchRule(chain, "a rule", 42, frontend=FrontendMatch("tcp", 80, ClaimRank.FORWARDS))
    others = [
        claim._replace(frontend=FrontendMatch("tcp", 81, ClaimRank.FORWARDS)),
        claim._replace(frontend=FrontendMatch("udp", 80, ClaimRank.FORWARDS)),
        claim._replace(destination=43),
        claim._replace(destination=80, protocol="tcp"),
        claim._replace(frontend=None),
    ]
    for number, rule in enumerate(others):
        index.update(f"ns/s{number}", (), (rule,))
    assert index.shared_frontends({"ns/web": [claim]}) == {}
    index.update("ns/web", (), (claim,))
    ((frontend, services),) = index.shared_frontends({"ns/same": [claim]}).items()
    assert (frontend, services) == (frontend_of(claim), {"ns/web", "ns/same"})


def test_rules_of_the_losing_service_are_neither_written_nor_counted() -> None:
    proxy = ClaimsProxy("iptables")
    more: dict[str, Any] = {"vips": (SHARED,), "source_ranges": ("198.51.100.0/24",)}
    proxy.conflicts_after(
        service("a", 1, **more), slices("a", THIS_NODE), service("b", 2, **more), slices("b", THIS_NODE)
    )

    def shared() -> list[str]:
        """Return the owners of the two rules for the shared address: the jump to KUBE-FW and the final drop."""
        rules = [line for line in proxy.kernel.dump() if f"-d {SHARED}/32" in line]
        return [line.split('--comment "')[1][:6] for line in rules]

    assert shared() == ["ns/a:h"] * 2
    assert any("-d 10.96.0.2/32" in line for line in proxy.kernel.dump())
    assert proxy.reported_rules() == proxy.existing_rules()
    proxy.conflicts_after(service("a", 1))
    assert shared() == ["ns/b:h"] * 2
    assert proxy.reported_rules() == proxy.existing_rules()


def conflicts(
    mode: str, family: Family, claimants: Iterable[Service], endpoints: Iterable[EndpointSlice]
) -> list[FrontendConflict]:
    proxy = ClaimsProxy(mode, family)
    return sorted(proxy.conflicts_after(*claimants, *endpoints))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(services(), max_size=3, unique_by=lambda each: each.name),
    st.lists(endpoint_slices(), max_size=4, unique_by=lambda each: each.name),
    st.sampled_from(Family),
)
def test_both_modes_resolve_all_conflicts_alike(
    claimants: list[Service], endpoints: list[EndpointSlice], family: Family
) -> None:
    assert conflicts("iptables", family, claimants, endpoints) == conflicts("nftables", family, claimants, endpoints)
