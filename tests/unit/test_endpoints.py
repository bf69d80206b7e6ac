"""Which endpoints a node uses: the rows of a table, one per rule."""

from __future__ import annotations

import pytest

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.context import LocalTraffic, local_traffic
from kproxy.model.endpoints import cluster_endpoints, endpoints_by_socket, local_endpoints, usable
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family

NODE, ZONE = "node-1", "zone-a"


def ready(node: str = NODE, zones: str = "", nodes: str = "") -> Endpoint:
    return Endpoint("", node, for_zones=tuple(zones.split()), for_nodes=tuple(nodes.split()))


def leaving(node: str = NODE, zones: str = "", nodes: str = "") -> Endpoint:
    return Endpoint("", node, False, True, True, tuple(zones.split()), tuple(nodes.split()))


def unready(node: str = NODE) -> Endpoint:
    return Endpoint("", node, ready=False)


def gone(node: str = NODE) -> Endpoint:
    return Endpoint("", node, ready=False, serving=False, terminating=True)


def named(*endpoints: Endpoint) -> dict[str, Endpoint]:
    """Name the endpoints a, b, c in their order."""
    return dict(zip("abcdef", endpoints, strict=False))


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ((), ""),
        ((ready(), ready()), "ab"),
        ((ready(), leaving(), unready()), "a"),
        ((unready(), leaving(), leaving(), gone()), "bc"),
        ((unready(), gone()), ""),
        ((Endpoint("", ready=True, serving=True, terminating=True), leaving()), "a"),
        ((Endpoint("", ready=True, serving=False),), "a"),
    ],
)
def test_ready_endpoints_or_else_those_that_serve_while_they_leave(
    endpoints: tuple[Endpoint, ...], expected: str
) -> None:
    assert usable(named(*endpoints)) == tuple(expected)


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        # zone hints
        ((ready(zones="zone-a"), ready(zones="zone-b")), "a"),
        ((ready(zones="zone-b zone-a"), ready(zones="zone-b")), "a"),
        ((ready(zones="zone-a"), ready()), "ab"),
        ((ready(zones="zone-b"), ready(zones="zone-c")), "ab"),
        # an endpoint that is not ready needs no hint and gets no traffic for its own
        ((ready(zones="zone-a"), unready(), leaving()), "a"),
        ((ready(zones="zone-b"), leaving(zones="zone-a")), "a"),
        ((leaving(zones="zone-a"), leaving(zones="zone-b")), "ab"),
        # node hints come first, and fall back to zone hints
        ((ready(nodes="node-1", zones="zone-b"), ready(nodes="node-2", zones="zone-a")), "a"),
        ((ready(nodes="node-2", zones="zone-a"), ready(nodes="node-3", zones="zone-b")), "a"),
        ((ready(nodes="node-1"), ready(zones="zone-a")), "ab"),
        ((ready(nodes="node-1", zones="zone-b"), ready(zones="zone-a")), "b"),
        ((ready(nodes="node-2"), ready(nodes="node-2 node-1")), "b"),
        # no endpoint at all
        ((), ""),
        ((unready(),), ""),
    ],
)
def test_hints_count_only_if_complete_and_useful(endpoints: tuple[Endpoint, ...], expected: str) -> None:
    assert cluster_endpoints(named(*endpoints), NODE, ZONE) == tuple(expected)


def test_zone_hints_lead_nowhere_on_a_node_without_a_zone() -> None:
    assert cluster_endpoints(named(ready(zones="zone-a"), ready(zones="zone-b")), NODE, "") == ("a", "b")


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ((ready("node-1"), ready("node-2"), ready("")), "a"),
        ((ready("node-2"),), ""),
        # the fallback looks at this node's endpoints alone
        ((leaving("node-1"), ready("node-2")), "a"),
        ((leaving("node-1"), ready("node-1")), "b"),
        ((unready("node-1"), ready("node-2")), ""),
        # hints do not apply
        ((ready("node-1", zones="zone-b", nodes="node-2"), ready("node-1", zones="zone-a", nodes="node-1")), "ab"),
    ],
)
def test_local_endpoints_are_those_on_this_node(endpoints: tuple[Endpoint, ...], expected: str) -> None:
    assert local_endpoints(named(*endpoints), NODE) == tuple(expected)


def test_endpoints_without_a_node_are_local_to_none() -> None:
    assert local_endpoints(named(ready("")), "") == ()


# From slices to endpoints.


def a_slice(*endpoints: Endpoint, family: Family = Family.IPV4, name: str = "s", port: int = 8080) -> EndpointSlice:
    ports = (EndpointPort("http", port, "TCP"), EndpointPort("http", 53, "UDP"), EndpointPort("", 81, "TCP"))
    return EndpointSlice("ns", name, "ns/web", family, endpoints, ports)


def sockets(*slices: EndpointSlice, family: Family = Family.IPV4, port: str = "http") -> list[str]:
    return list(endpoints_by_socket(slices, family, port, "TCP"))


def test_endpoints_are_ordered_by_their_text() -> None:
    found = sockets(a_slice(Endpoint("10.0.0.9"), Endpoint("10.0.0.10")), a_slice(Endpoint("10.0.0.1"), port=9))
    assert found == ["10.0.0.10:8080", "10.0.0.1:9", "10.0.0.9:8080"]


def test_a_port_belongs_to_the_service_port_of_its_name_and_protocol() -> None:
    one = a_slice(Endpoint("10.0.0.1"))
    assert sockets(one) == ["10.0.0.1:8080"]
    assert sockets(one, port="") == ["10.0.0.1:81"]
    assert sockets(one, port="other") == []
    assert list(endpoints_by_socket([one], Family.IPV4, "http", "UDP")) == ["10.0.0.1:53"]
    assert list(endpoints_by_socket([one], Family.IPV4, "", "UDP")) == []


def test_slices_of_the_other_family_do_not_count() -> None:
    both = (a_slice(Endpoint("10.0.0.1")), a_slice(Endpoint("fd00::1"), family=Family.IPV6))
    assert sockets(*both) == ["10.0.0.1:8080"]
    assert sockets(*both, family=Family.IPV6) == ["[fd00::1]:8080"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Endpoint("10.0.0.1", ready=False, terminating=False), Endpoint("10.0.0.1", terminating=True)),
        (Endpoint("10.0.0.1"), Endpoint("10.0.0.1", ready=False)),
        (Endpoint("10.0.0.1", ready=False), Endpoint("10.0.0.1", ready=False, serving=False)),
    ],
)
def test_of_two_entries_of_an_endpoint_the_more_useful_one_counts(one: Endpoint, other: Endpoint) -> None:
    for slices in ((a_slice(one), a_slice(other)), (a_slice(other), a_slice(one))):
        assert endpoints_by_socket(slices, Family.IPV4, "http", "TCP") == {"10.0.0.1:8080": one}


def test_one_address_with_two_target_ports_is_two_endpoints() -> None:
    assert sockets(a_slice(Endpoint("10.0.0.1")), a_slice(Endpoint("10.0.0.1"), port=9)) == [
        "10.0.0.1:8080",
        "10.0.0.1:9",
    ]


@pytest.mark.parametrize(
    ("address", "text"), [("10.0.0.1", "10.0.0.1:80"), ("fd00::1", "[fd00::1]:80"), ("::", "[::]:80")]
)
def test_the_text_of_a_socket_and_back(address: str, text: str) -> None:
    assert socket_text(address, 80) == text
    assert split_socket_text(text) == (address, 80)


# Telling local traffic.

BOTH = ("10.244.0.0/16", "fd00:10:244::/48")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (local_traffic("ClusterCIDR", Family.IPV4, cluster_cidrs=BOTH), LocalTraffic(cidr="10.244.0.0/16")),
        (local_traffic("ClusterCIDR", Family.IPV6, cluster_cidrs=BOTH), LocalTraffic(cidr="fd00:10:244::/48")),
        (local_traffic("ClusterCIDR", Family.IPV6, cluster_cidrs=BOTH[:1], pod_cidrs=BOTH), LocalTraffic()),
        (local_traffic("NodeCIDR", Family.IPV6, pod_cidrs=BOTH), LocalTraffic(cidr="fd00:10:244::/48")),
        (local_traffic("NodeCIDR", Family.IPV4, cluster_cidrs=BOTH), LocalTraffic()),
        (local_traffic("NodeCIDR", Family.IPV4, pod_cidrs=("10.1.0.0/24", "10.2.0.0/24")), LocalTraffic("10.1.0.0/24")),
        (local_traffic("BridgeInterface", Family.IPV4, bridge="cbr0", cluster_cidrs=BOTH), LocalTraffic("", "cbr0")),
        (local_traffic("InterfaceNamePrefix", Family.IPV6, interface_prefix="veth"), LocalTraffic("", "", "veth")),
    ],
)
def test_how_local_traffic_is_told(found: LocalTraffic, expected: LocalTraffic) -> None:
    assert found == expected
    assert found.detectable is (expected != LocalTraffic())
