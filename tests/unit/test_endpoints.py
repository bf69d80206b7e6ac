"""Endpoint selection: readiness, termination, topology hints, and endpoints on this node."""

from __future__ import annotations

import pytest

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.context import LocalTraffic, local_traffic
from kproxy.model.endpoints import cluster_endpoints, endpoints_by_socket, local_endpoints, usable
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family

NODE, ZONE = "node-1", "zone-a"


def ready(node: str = NODE, zones: str = "", nodes: str = "") -> Endpoint:
    return Endpoint("", node, for_zones=tuple(zones.split()), for_nodes=tuple(nodes.split()))


def terminating_endpoint(node: str = NODE, zones: str = "", nodes: str = "") -> Endpoint:
    return Endpoint("", node, False, True, True, tuple(zones.split()), tuple(nodes.split()))


def unready(node: str = NODE) -> Endpoint:
    return Endpoint("", node, ready=False)


def not_serving(node: str = NODE) -> Endpoint:
    return Endpoint("", node, ready=False, serving=False, terminating=True)


def named(*endpoints: Endpoint) -> dict[str, Endpoint]:
    """Name the endpoints a, b, c ... in their order."""
    return dict(zip("abcdef", endpoints, strict=False))


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ((), ""),
        ((ready(), ready()), "ab"),
        ((ready(), terminating_endpoint(), unready()), "a"),
        ((unready(), terminating_endpoint(), terminating_endpoint(), not_serving()), "bc"),
        ((unready(), not_serving()), ""),
        ((Endpoint("", ready=True, serving=True, terminating=True), terminating_endpoint()), "a"),
        ((Endpoint("", ready=True, serving=False),), "a"),
    ],
)
def test_serving_terminating_endpoints_are_used_only_without_ready_ones(
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
        # an endpoint that is not ready needs no hint, and its hint attracts no traffic
        ((ready(zones="zone-a"), unready(), terminating_endpoint()), "a"),
        ((ready(zones="zone-b"), terminating_endpoint(zones="zone-a")), "a"),
        ((terminating_endpoint(zones="zone-a"), terminating_endpoint(zones="zone-b")), "ab"),
        # node hints take precedence over zone hints
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
def test_hints_apply_only_if_all_ready_endpoints_have_one_and_one_matches(
    endpoints: tuple[Endpoint, ...], expected: str
) -> None:
    assert cluster_endpoints(named(*endpoints), NODE, ZONE) == tuple(expected)


def test_zone_hints_are_ignored_on_a_node_without_a_zone() -> None:
    assert cluster_endpoints(named(ready(zones="zone-a"), ready(zones="zone-b")), NODE, "") == ("a", "b")


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ((ready("node-1"), ready("node-2"), ready("")), "a"),
        ((ready("node-2"),), ""),
        # the fallback to terminating endpoints considers only endpoints on this node
        ((terminating_endpoint("node-1"), ready("node-2")), "a"),
        ((terminating_endpoint("node-1"), ready("node-1")), "b"),
        ((unready("node-1"), ready("node-2")), ""),
        # hints do not apply
        ((ready("node-1", zones="zone-b", nodes="node-2"), ready("node-1", zones="zone-a", nodes="node-1")), "ab"),
    ],
)
def test_local_endpoints(endpoints: tuple[Endpoint, ...], expected: str) -> None:
    assert local_endpoints(named(*endpoints), NODE) == tuple(expected)


def test_endpoint_without_a_node_name_is_local_to_no_node() -> None:
    assert local_endpoints(named(ready("")), "") == ()


# From slices to endpoints.


def endpoint_slice(
    *endpoints: Endpoint, family: Family = Family.IPV4, name: str = "s", port: int = 8080
) -> EndpointSlice:
    ports = (EndpointPort("http", port, "TCP"), EndpointPort("http", 53, "UDP"), EndpointPort("", 81, "TCP"))
    return EndpointSlice("ns", name, "ns/web", family, endpoints, ports)


def sockets(*slices: EndpointSlice, family: Family = Family.IPV4, port: str = "http") -> list[str]:
    return list(endpoints_by_socket(slices, family, port, "TCP"))


def test_endpoints_are_sorted_as_text() -> None:
    addresses = sockets(
        endpoint_slice(Endpoint("10.0.0.9"), Endpoint("10.0.0.10")), endpoint_slice(Endpoint("10.0.0.1"), port=9)
    )
    assert addresses == ["10.0.0.10:8080", "10.0.0.1:9", "10.0.0.9:8080"]


def test_ports_match_by_name_and_protocol() -> None:
    one = endpoint_slice(Endpoint("10.0.0.1"))
    assert sockets(one) == ["10.0.0.1:8080"]
    assert sockets(one, port="") == ["10.0.0.1:81"]
    assert sockets(one, port="other") == []
    assert list(endpoints_by_socket([one], Family.IPV4, "http", "UDP")) == ["10.0.0.1:53"]
    assert list(endpoints_by_socket([one], Family.IPV4, "", "UDP")) == []


def test_endpoint_slices_of_the_other_family_are_ignored() -> None:
    both = (endpoint_slice(Endpoint("10.0.0.1")), endpoint_slice(Endpoint("fd00::1"), family=Family.IPV6))
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
def test_duplicate_endpoint_takes_the_best_conditions(one: Endpoint, other: Endpoint) -> None:
    for slices in ((endpoint_slice(one), endpoint_slice(other)), (endpoint_slice(other), endpoint_slice(one))):
        assert endpoints_by_socket(slices, Family.IPV4, "http", "TCP") == {"10.0.0.1:8080": one}


def test_one_address_with_two_target_ports_is_two_endpoints() -> None:
    assert sockets(endpoint_slice(Endpoint("10.0.0.1")), endpoint_slice(Endpoint("10.0.0.1"), port=9)) == [
        "10.0.0.1:8080",
        "10.0.0.1:9",
    ]


@pytest.mark.parametrize(
    ("address", "text"), [("10.0.0.1", "10.0.0.1:80"), ("fd00::1", "[fd00::1]:80"), ("::", "[::]:80")]
)
def test_socket_text_round_trip(address: str, text: str) -> None:
    assert socket_text(address, 80) == text
    assert split_socket_text(text) == (address, 80)


# Detection of local traffic.

BOTH = ("10.244.0.0/16", "fd00:10:244::/48")


@pytest.mark.parametrize(
    ("actual", "expected"),
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
def test_detect_local_mode(actual: LocalTraffic, expected: LocalTraffic) -> None:
    assert actual == expected
    assert actual.detectable is (expected != LocalTraffic())
