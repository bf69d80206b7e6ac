"""Who reaches what, and how: the rows of a table for policies, refusals, source ranges and families."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, TrafficDecision, plan_service
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort

HERE, THERE = "10.244.1.1:8080", "10.244.2.1:8080"
NODE_PORT = ServicePort("http", 80, "TCP", 30080)
FORWARD, REJECT, DROP = TrafficDecision.FORWARD, TrafficDecision.REJECT, TrafficDecision.DROP


def here(**more: Any) -> Endpoint:
    return Endpoint("10.244.1.1", "node-1", **more)


def there(**more: Any) -> Endpoint:
    return Endpoint("10.244.2.1", "node-2", **more)


LEAVING = {"ready": False, "serving": True, "terminating": True}
UNREADY = {"ready": False}


def service(**more: Any) -> Service:
    return Service(**{"namespace": "ns", "name": "web", "cluster_ips": ("10.96.0.1",), "ports": (NODE_PORT,), **more})


def plans(
    found: Service, *endpoints: Endpoint, family: Family = Family.IPV4, **more: Any
) -> tuple[ServicePortPlan, ...]:
    address = "10.99.0.2" if family is Family.IPV4 else "fd00:99::2"
    context = Context(**{"family": family, "node_name": "node-1", "zone": "zone-a", "node_address": address, **more})
    slices = [EndpointSlice("ns", "s", "ns/web", Family.IPV4, endpoints, (EndpointPort("http", 8080, "TCP"),))]
    return plan_service(found, slices, context)


def plan(found: Service, *endpoints: Endpoint, **more: Any) -> ServicePortPlan:
    (only,) = plans(found, *endpoints, **more)
    return only


@pytest.mark.parametrize(
    ("internal_local", "external_local", "endpoints", "internal", "external", "cluster", "local"),
    [
        (False, False, (here(), there()), FORWARD, FORWARD, (HERE, THERE), ()),
        (False, True, (here(), there()), FORWARD, FORWARD, (HERE, THERE), (HERE,)),
        (True, False, (here(), there()), FORWARD, FORWARD, (HERE, THERE), (HERE,)),
        (True, True, (here(), there()), FORWARD, FORWARD, (HERE, THERE), (HERE,)),
        # none on this node
        (False, True, (there(),), FORWARD, DROP, (THERE,), ()),
        (True, False, (there(),), DROP, FORWARD, (THERE,), ()),
        (True, True, (there(),), DROP, DROP, (THERE,), ()),
        (True, True, (here(**UNREADY), there()), DROP, DROP, (THERE,), ()),
        # none anywhere
        (False, False, (), REJECT, REJECT, (), ()),
        (True, True, (), REJECT, REJECT, (), ()),
        (True, True, (here(**UNREADY),), REJECT, REJECT, (), ()),
        # those that leave
        (False, False, (here(**LEAVING), there()), FORWARD, FORWARD, (THERE,), ()),
        (True, True, (here(**LEAVING), there()), FORWARD, FORWARD, (THERE,), (HERE,)),
        (False, False, (here(**LEAVING),), FORWARD, FORWARD, (HERE,), ()),
        (False, True, (there(**LEAVING),), FORWARD, DROP, (THERE,), ()),
    ],
)
def test_policies(  # noqa: PLR0917 - the columns of the table
    internal_local: bool,
    external_local: bool,
    endpoints: tuple[Endpoint, ...],
    internal: TrafficDecision,
    external: TrafficDecision,
    cluster: tuple[str, ...],
    local: tuple[str, ...],
) -> None:
    found = plan(service(internal_local=internal_local, external_local=external_local), *endpoints)
    assert (found.internal, found.external) == (internal, external)
    assert (found.cluster_endpoints, found.local_endpoints) == (cluster, local)
    assert found.has_endpoints is (internal is not REJECT)


def test_hints_apply_to_policy_cluster_alone() -> None:
    found = plan(service(external_local=True), here(for_zones=("zone-b",)), there(for_zones=("zone-a",)), zone="zone-a")
    assert found.cluster_endpoints == (THERE,)
    assert found.local_endpoints == (HERE,)
    assert found.reachable_endpoints == (HERE, THERE)


def test_node_hints_are_for_this_node() -> None:
    found = plan(service(), here(for_nodes=("node-2",)), there(for_nodes=("node-1",)))
    assert found.cluster_endpoints == (THERE,)


def test_a_service_that_only_has_a_local_cluster_ip_needs_no_other_endpoints() -> None:
    found = plan(service(internal_local=True, ports=(ServicePort("http", 80, "TCP"),)), here(), there())
    assert (found.cluster_endpoints, found.local_endpoints) == ((), (HERE,))
    assert found.reachable_endpoints == (HERE,)


def test_external_policy_without_an_external_frontend_needs_no_local_endpoints() -> None:
    found = plan(service(external_local=True, ports=(ServicePort("http", 80, "TCP"),)), here(), there())
    assert (found.cluster_endpoints, found.local_endpoints) == ((HERE, THERE), ())
    assert not found.externally_accessible


@pytest.mark.parametrize(
    "frontend",
    [{}, {"external_ips": ("192.0.2.1",)}, {"vips": ("203.0.113.1",)}],
)
def test_any_external_frontend_has_the_external_policy(frontend: dict[str, Any]) -> None:
    ports = (ServicePort("http", 80, "TCP"),) if frontend else (NODE_PORT,)
    found = plan(service(external_local=True, ports=ports, **frontend), here(), there())
    assert found.externally_accessible
    assert found.local_endpoints == (HERE,)


# Source ranges.

VIP = {"vips": ("203.0.113.1",)}


@pytest.mark.parametrize(
    ("more", "ranges", "vips_are_sources"),
    [
        ({**VIP, "source_ranges": ("198.51.100.0/24",)}, ("198.51.100.0/24",), False),
        ({**VIP, "source_ranges": ("198.51.100.0/24", "10.99.0.0/24")}, ("198.51.100.0/24", "10.99.0.0/24"), True),
        ({**VIP, "source_ranges": ("10.99.0.2/32",)}, ("10.99.0.2/32",), True),
        ({**VIP, "source_ranges": ("10.99.0.3/32",)}, ("10.99.0.3/32",), False),
        ({**VIP, "source_ranges": ("198.51.100.0/24", "0.0.0.0/0")}, (), False),
        ({**VIP, "source_ranges": ("0.0.0.0/1",)}, ("0.0.0.0/1",), True),
        ({**VIP, "source_ranges": ("fd00::/8",)}, (), False),
        ({**VIP, "source_ranges": ("::/0", "198.51.100.0/24")}, ("198.51.100.0/24",), False),
        # they restrict VIPs, and nothing else
        ({"source_ranges": ("10.99.0.0/24",)}, (), False),
        ({"source_ranges": ("10.99.0.0/24",), "external_ips": ("192.0.2.1",)}, (), False),
        ({"source_ranges": ("10.99.0.0/24",), "vips": ("2001:db8::1",)}, (), False),
    ],
)
def test_source_ranges(more: dict[str, Any], ranges: tuple[str, ...], vips_are_sources: bool) -> None:
    found = plan(service(**more), here())
    assert (found.source_ranges, found.vips_are_sources) == (ranges, vips_are_sources)


def test_vips_are_no_sources_while_the_node_address_is_unknown() -> None:
    found = plan(service(**VIP, source_ranges=("10.99.0.0/24",)), here(), node_address="")
    assert found.vips_are_sources is False


# Families.

DUAL = service(
    cluster_ips=("fd00::1", "10.96.0.1"),
    external_ips=("192.0.2.1", "2001:db8::1"),
    vips=("2001:db8::2", "203.0.113.1"),
    source_ranges=("198.51.100.0/24", "2001:db8::/32"),
)


def test_each_family_has_its_own_frontends() -> None:
    four, six = plan(DUAL, here()), plan(DUAL, here(), family=Family.IPV6)
    assert (four.cluster_ip, six.cluster_ip) == ("10.96.0.1", "fd00::1")
    assert (four.external_ips, six.external_ips) == (("192.0.2.1",), ("2001:db8::1",))
    assert (four.vips, six.vips) == (("203.0.113.1",), ("2001:db8::2",))
    assert (four.source_ranges, six.source_ranges) == (("198.51.100.0/24",), ("2001:db8::/32",))


def test_each_family_has_its_own_endpoints() -> None:
    assert plan(DUAL, here()).internal is FORWARD
    assert plan(DUAL, here(), family=Family.IPV6).internal is REJECT


def test_a_service_without_a_cluster_ip_of_the_family_has_no_plans() -> None:
    assert plans(service(), here(), family=Family.IPV6) == ()
    assert plans(service(cluster_ips=("fd00::1",)), here()) == ()


# Ports.


def test_every_port_has_a_plan_of_its_own() -> None:
    ports = (ServicePort("http", 80, "TCP"), ServicePort("", 81, "TCP"), ServicePort("http", 80, "UDP"))
    first, second, third = plans(service(ports=ports), here())
    assert [each.name for each in (first, second, third)] == ["ns/web:http", "ns/web", "ns/web:http"]
    assert [each.internal for each in (first, second, third)] == [FORWARD, REJECT, REJECT]


def test_a_plan_carries_what_the_service_says() -> None:
    found = plan(service(affinity_seconds=60, health_check_node_port=32000), here())
    assert (found.service, found.port, found.protocol, found.node_port) == ("ns/web", 80, "TCP", 30080)
    assert (found.affinity_seconds, found.health_check_node_port) == (60, 32000)


def test_the_order_of_slices_decides_nothing() -> None:
    context = Context(Family.IPV4, "node-1")
    ports = (EndpointPort("http", 8080, "TCP"),)
    one = EndpointSlice("ns", "a", "ns/web", Family.IPV4, (Endpoint("10.244.1.1", "node-1"),), ports)
    other = EndpointSlice("ns", "b", "ns/web", Family.IPV4, (Endpoint("10.244.1.1", "node-2"),), ports)
    found = service(internal_local=True)
    assert plan_service(found, (one, other), context) == plan_service(found, (other, one), context)
    assert plan_service(found, (other, one), context)[0].local_endpoints == (HERE,)
