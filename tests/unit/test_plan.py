"""The plan of a service port: traffic policies, rejected and dropped traffic, source ranges, and IP families."""

from __future__ import annotations

from typing import Any

import pytest

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, TrafficDecision, count_endpoints, plan_service
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort

LOCAL, REMOTE = "10.244.1.1:8080", "10.244.2.1:8080"
NODE_PORT = ServicePort("http", 80, "TCP", 30080)
FORWARD, REJECT, DROP = TrafficDecision.FORWARD, TrafficDecision.REJECT, TrafficDecision.DROP


def local(**more: Any) -> Endpoint:
    return Endpoint("10.244.1.1", "node-1", **more)


def remote(**more: Any) -> Endpoint:
    return Endpoint("10.244.2.1", "node-2", **more)


TERMINATING = {"ready": False, "serving": True, "terminating": True}
UNREADY = {"ready": False}


def service(**more: Any) -> Service:
    return Service(**{"namespace": "ns", "name": "web", "cluster_ips": ("10.96.0.1",), "ports": (NODE_PORT,), **more})


def plans(svc: Service, *endpoints: Endpoint, family: Family = Family.IPV4, **more: Any) -> tuple[ServicePortPlan, ...]:
    address = "10.99.0.2" if family is Family.IPV4 else "fd00:99::2"
    context = Context(**{"family": family, "node_name": "node-1", "zone": "zone-a", "node_address": address, **more})
    slices = [EndpointSlice("ns", "s", "ns/web", Family.IPV4, endpoints, (EndpointPort("http", 8080, "TCP"),))]
    return plan_service(svc, slices, context)


def plan(svc: Service, *endpoints: Endpoint, **more: Any) -> ServicePortPlan:
    (only,) = plans(svc, *endpoints, **more)
    return only


@pytest.mark.parametrize(
    ("internal_local", "external_local", "endpoints", "internal", "external", "cluster", "local_sockets"),
    [
        (False, False, (local(), remote()), FORWARD, FORWARD, (LOCAL, REMOTE), ()),
        (False, True, (local(), remote()), FORWARD, FORWARD, (LOCAL, REMOTE), (LOCAL,)),
        (True, False, (local(), remote()), FORWARD, FORWARD, (LOCAL, REMOTE), (LOCAL,)),
        (True, True, (local(), remote()), FORWARD, FORWARD, (LOCAL, REMOTE), (LOCAL,)),
        # none on this node
        (False, True, (remote(),), FORWARD, DROP, (REMOTE,), ()),
        (True, False, (remote(),), DROP, FORWARD, (REMOTE,), ()),
        (True, True, (remote(),), DROP, DROP, (REMOTE,), ()),
        (True, True, (local(**UNREADY), remote()), DROP, DROP, (REMOTE,), ()),
        # none anywhere
        (False, False, (), REJECT, REJECT, (), ()),
        (True, True, (), REJECT, REJECT, (), ()),
        (True, True, (local(**UNREADY),), REJECT, REJECT, (), ()),
        # terminating endpoints
        (False, False, (local(**TERMINATING), remote()), FORWARD, FORWARD, (REMOTE,), ()),
        (True, True, (local(**TERMINATING), remote()), FORWARD, FORWARD, (REMOTE,), (LOCAL,)),
        (False, False, (local(**TERMINATING),), FORWARD, FORWARD, (LOCAL,), ()),
        (False, True, (remote(**TERMINATING),), FORWARD, DROP, (REMOTE,), ()),
    ],
)
def test_traffic_policies(  # noqa: PLR0917 - the columns of the table
    internal_local: bool,
    external_local: bool,
    endpoints: tuple[Endpoint, ...],
    internal: TrafficDecision,
    external: TrafficDecision,
    cluster: tuple[str, ...],
    local_sockets: tuple[str, ...],
) -> None:
    planned = plan(service(internal_local=internal_local, external_local=external_local), *endpoints)
    assert (planned.internal, planned.external) == (internal, external)
    assert (planned.cluster_endpoints, planned.local_endpoints) == (cluster, local_sockets)
    assert planned.has_endpoints is (internal is not REJECT)


def test_hints_apply_to_traffic_policy_cluster_only() -> None:
    planned = plan(
        service(external_local=True), local(for_zones=("zone-b",)), remote(for_zones=("zone-a",)), zone="zone-a"
    )
    assert planned.cluster_endpoints == (REMOTE,)
    assert planned.local_endpoints == (LOCAL,)
    assert planned.reachable_endpoints == (LOCAL, REMOTE)


def test_node_hint_selects_the_endpoint_for_this_node() -> None:
    planned = plan(service(), local(for_nodes=("node-2",)), remote(for_nodes=("node-1",)))
    assert planned.cluster_endpoints == (REMOTE,)


def test_internal_policy_local_without_external_frontends_needs_no_cluster_endpoints() -> None:
    planned = plan(service(internal_local=True, ports=(ServicePort("http", 80, "TCP"),)), local(), remote())
    assert (planned.cluster_endpoints, planned.local_endpoints) == ((), (LOCAL,))
    assert planned.reachable_endpoints == (LOCAL,)


def test_external_policy_local_without_external_frontends_needs_no_local_endpoints() -> None:
    planned = plan(service(external_local=True, ports=(ServicePort("http", 80, "TCP"),)), local(), remote())
    assert (planned.cluster_endpoints, planned.local_endpoints) == ((LOCAL, REMOTE), ())
    assert not planned.externally_accessible


@pytest.mark.parametrize(
    "frontend",
    [{}, {"external_ips": ("192.0.2.1",)}, {"vips": ("203.0.113.1",)}],
)
def test_external_policy_applies_to_any_external_frontend(frontend: dict[str, Any]) -> None:
    ports = (ServicePort("http", 80, "TCP"),) if frontend else (NODE_PORT,)
    planned = plan(service(external_local=True, ports=ports, **frontend), local(), remote())
    assert planned.externally_accessible
    assert planned.local_endpoints == (LOCAL,)


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
        # source ranges restrict load balancer VIPs only
        ({"source_ranges": ("10.99.0.0/24",)}, (), False),
        ({"source_ranges": ("10.99.0.0/24",), "external_ips": ("192.0.2.1",)}, (), False),
        ({"source_ranges": ("10.99.0.0/24",), "vips": ("2001:db8::1",)}, (), False),
    ],
)
def test_source_ranges(more: dict[str, Any], ranges: tuple[str, ...], vips_are_sources: bool) -> None:
    planned = plan(service(**more), local())
    assert (planned.source_ranges, planned.vips_are_sources) == (ranges, vips_are_sources)


def test_vips_are_not_sources_while_the_node_address_is_unknown() -> None:
    planned = plan(service(**VIP, source_ranges=("10.99.0.0/24",)), local(), node_address="")
    assert planned.vips_are_sources is False


# Families.

DUAL = service(
    cluster_ips=("fd00::1", "10.96.0.1"),
    external_ips=("192.0.2.1", "2001:db8::1"),
    vips=("2001:db8::2", "203.0.113.1"),
    source_ranges=("198.51.100.0/24", "2001:db8::/32"),
)


def test_each_family_has_its_own_frontends() -> None:
    four, six = plan(DUAL, local()), plan(DUAL, local(), family=Family.IPV6)
    assert (four.cluster_ip, six.cluster_ip) == ("10.96.0.1", "fd00::1")
    assert (four.external_ips, six.external_ips) == (("192.0.2.1",), ("2001:db8::1",))
    assert (four.vips, six.vips) == (("203.0.113.1",), ("2001:db8::2",))
    assert (four.source_ranges, six.source_ranges) == (("198.51.100.0/24",), ("2001:db8::/32",))


def test_each_family_has_its_own_endpoints() -> None:
    assert plan(DUAL, local()).internal is FORWARD
    assert plan(DUAL, local(), family=Family.IPV6).internal is REJECT


def test_service_without_a_cluster_ip_of_the_family_has_no_plans() -> None:
    assert plans(service(), local(), family=Family.IPV6) == ()
    assert plans(service(cluster_ips=("fd00::1",)), local()) == ()


# Ports.


def test_every_port_has_its_own_plan() -> None:
    ports = (ServicePort("http", 80, "TCP"), ServicePort("", 81, "TCP"), ServicePort("http", 80, "UDP"))
    first, second, third = plans(service(ports=ports), local())
    assert [item.name for item in (first, second, third)] == ["ns/web:http", "ns/web", "ns/web:http"]
    assert [item.internal for item in (first, second, third)] == [FORWARD, REJECT, REJECT]


def test_plan_carries_the_fields_of_the_service() -> None:
    planned = plan(service(affinity_seconds=60, health_check_node_port=32000), local())
    assert (planned.service, planned.port, planned.protocol, planned.node_port) == ("ns/web", 80, "TCP", 30080)
    assert (planned.affinity_seconds, planned.health_check_node_port) == (60, 32000)


def test_order_of_endpoint_slices_does_not_matter() -> None:
    context = Context(Family.IPV4, "node-1")
    ports = (EndpointPort("http", 8080, "TCP"),)
    one = EndpointSlice("ns", "a", "ns/web", Family.IPV4, (Endpoint("10.244.1.1", "node-1"),), ports)
    other = EndpointSlice("ns", "b", "ns/web", Family.IPV4, (Endpoint("10.244.1.1", "node-2"),), ports)
    svc = service(internal_local=True)
    assert plan_service(svc, (one, other), context) == plan_service(svc, (other, one), context)
    assert plan_service(svc, (other, one), context)[0].local_endpoints == (LOCAL,)


def test_many_ports_are_planned_like_few() -> None:
    """With many ports, the slices are first sorted by port; several slices carry parts of the ports."""
    ports = tuple(ServicePort(f"p{number}", 1000 + number, "UDP" if number % 3 else "TCP") for number in range(40))
    slices = [
        EndpointSlice(
            "ns",
            f"s{first}",
            "ns/web",
            Family.IPV4,
            tuple(Endpoint(f"10.0.{first}.{last}", ready=last != 2) for last in range(1, 4)),
            tuple(EndpointPort(port.name, 8000 + index, port.protocol) for index, port in enumerate(ports[first:])),
        )
        for first in (0, 7, 30)
    ]
    many = Service("ns", "web", ("10.96.0.1",), ports)
    context = Context(Family.IPV4, "node-1")
    expected = [plan_service(Service("ns", "web", ("10.96.0.1",), (port,)), slices, context)[0] for port in ports]
    assert [*plan_service(many, slices, context)] == expected
    assert len(expected[35].cluster_endpoints) == 6
    assert count_endpoints(many, slices, Family.IPV4) == sum(
        count_endpoints(Service("ns", "web", ("10.96.0.1",), (port,)), slices, Family.IPV4) for port in ports
    )
