"""Hypothesis strategies for random clusters.

They draw from few names and addresses, so that objects of one example often refer to or conflict with each other.
"""

from __future__ import annotations

from typing import TypeVar

from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.model.context import Context, LocalTraffic
from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServiceCIDR, ServicePort

_T = TypeVar("_T")

NAMES = ("a", "b", "c")
PROTOCOLS = ("TCP", "UDP", "SCTP")
PORTS = {"": 80, "http": 81, "dns": 53}


def services() -> st.SearchStrategy[Service]:
    ports = st.lists(
        st.builds(
            lambda name, protocol, node_port: ServicePort(name, PORTS[name], protocol, node_port),
            st.sampled_from(tuple(PORTS)),
            st.sampled_from(PROTOCOLS),
            st.sampled_from((0, 0, 30080, 30081)),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda port: port.name,
    )
    return st.builds(
        lambda name, families, ports, **more: Service(
            "ns", name, tuple(f"{prefix}{NAMES.index(name) + 1}" for prefix in families), tuple(ports), **more
        ),
        name=st.sampled_from(NAMES),
        families=st.sampled_from((("10.96.0.",), ("10.96.0.", "fd00::"), ("fd00::",))),
        ports=ports,
        affinity_seconds=st.sampled_from((0, 10800)),
        internal_local=st.booleans(),
        external_local=st.booleans(),
        # 10.96.0.1 and fd00::1 are also the ClusterIPs of Service `a`.
        external_ips=st.sampled_from(((), ("192.0.2.1",), ("192.0.2.1", "2001:db8::1"), ("10.96.0.1", "fd00::1"))),
        vips=st.sampled_from(((), ("203.0.113.1",), ("2001:db8::2",))),
        source_ranges=st.sampled_from(((), ("198.51.100.0/24",), ("10.99.0.0/24", "0.0.0.0/0"), ("10.99.0.0/16",))),
        health_check_node_port=st.sampled_from((0, 32000)),
    )


def endpoint_slices() -> st.SearchStrategy[EndpointSlice]:
    def build(
        name: str, service: str, family: Family, templates: list[Endpoint], ports: list[EndpointPort]
    ) -> EndpointSlice:
        prefix = "10.244.0." if family is Family.IPV4 else "fd00:1::"
        endpoints = tuple(
            Endpoint(prefix + item.address, item.node, item.ready, item.serving, item.terminating, item.for_zones)
            for item in templates
        )
        return EndpointSlice("ns", name, f"ns/{service}", family, endpoints, tuple(ports))

    endpoint = st.builds(
        Endpoint,
        address=st.sampled_from("123456"),
        node=st.sampled_from(("node-1", "node-2", "")),
        ready=st.booleans(),
        serving=st.booleans(),
        terminating=st.booleans(),
        for_zones=st.sampled_from(((), ("zone-a",), ("zone-b",))),
    )
    port = st.builds(
        EndpointPort, st.sampled_from(tuple(PORTS)), st.sampled_from((8080, 8081)), st.sampled_from(PROTOCOLS)
    )
    return st.builds(
        build,
        st.sampled_from(("s1", "s2", "s3")),
        st.sampled_from(NAMES),
        st.sampled_from(Family),
        st.lists(endpoint, max_size=4),
        st.lists(port, max_size=2, unique_by=lambda item: item.name),
    )


def nodes() -> st.SearchStrategy[Node]:
    return st.builds(
        Node,
        name=st.sampled_from(("node-1", "node-2")),
        addresses=st.sampled_from(((), ("10.99.0.2",), ("10.99.0.2", "fd00:99::2"))),
        zone=st.sampled_from(("", "zone-a", "zone-b")),
    )


def deltas() -> st.SearchStrategy[Delta]:
    upserts = st.builds(Upsert, st.one_of(services(), endpoint_slices(), endpoint_slices(), nodes()))
    deletes = st.one_of(
        st.builds(Delete, st.just(Service), st.just("ns"), st.sampled_from(NAMES)),
        st.builds(Delete, st.just(EndpointSlice), st.just("ns"), st.sampled_from(("s1", "s2", "s3"))),
        st.builds(Delete, st.just(Node), st.just(""), st.sampled_from(("node-1", "node-2"))),
    )
    relists = st.one_of(
        st.builds(
            lambda items: Replace(Service, tuple({item.key: item for item in items}.values())),
            st.lists(services(), max_size=3),
        ),
        st.builds(
            lambda items: Replace(EndpointSlice, tuple({item.name: item for item in items}.values())),
            st.lists(endpoint_slices(), max_size=3),
        ),
    )
    return st.one_of(upserts, upserts, upserts, deletes, relists)


CONTESTED_PORTS = (
    (ServicePort("", 80, "TCP", 30080),),
    (ServicePort("", 80, "TCP"), ServicePort("http", 81, "TCP", 30080)),
    (ServicePort("", 80, "UDP", 30080), ServicePort("dns", 80, "TCP", 30081)),
)


def contested_services() -> st.SearchStrategy[Service]:
    """Services that claim each other's frontends and differ in their affinity timeouts."""
    pool = ("10.96.0.1", "10.96.0.2", "10.96.0.3", "203.0.113.1", "fd00::1", "2001:db8::2")
    addresses = st.lists(st.sampled_from(pool), max_size=3, unique=True).map(tuple)
    return st.builds(
        replace,
        services(),
        ports=st.sampled_from(CONTESTED_PORTS),
        affinity_seconds=st.sampled_from((0, 0, 60, 10800)),
        external_ips=addresses,
        vips=addresses,
    )


def serving_slices() -> st.SearchStrategy[EndpointSlice]:
    """EndpointSlices whose ports match those of `contested_services`."""
    ports = (EndpointPort("", 8080, "TCP"), EndpointPort("http", 8081, "TCP"), EndpointPort("", 8080, "UDP"))
    return st.builds(lambda endpoint_slice: replace(endpoint_slice, ports=ports), endpoint_slices())


def service_cidrs() -> st.SearchStrategy[ServiceCIDR]:
    ranges = st.sampled_from((("10.96.0.0/16",), ("10.96.0.0/16", "fd00::/112"), ("10.97.0.0/16",), ("0.0.0.0/0",)))
    return st.builds(ServiceCIDR, st.sampled_from(("kubernetes", "more")), ranges)


def weighted(*choices: tuple[int, st.SearchStrategy[_T]]) -> st.SearchStrategy[_T]:
    """Draw from one of several strategies with the given weights; `one_of` would favor those with many branches."""
    expanded = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(expanded) - 1).flatmap(lambda index: expanded[index])


def contested_deltas() -> st.SearchStrategy[Delta]:
    """Mostly changes of contested Services, their EndpointSlices and the ServiceCIDRs; sometimes any other delta."""
    return weighted(
        (5, st.builds(Upsert, contested_services())),
        (5, st.builds(Upsert, serving_slices())),
        (1, st.builds(Upsert, service_cidrs())),
        (1, st.builds(Delete, st.just(ServiceCIDR), st.just(""), st.sampled_from(("kubernetes", "more")))),
        (1, st.builds(Delete, st.just(Service), st.just("ns"), st.sampled_from(NAMES))),
        (2, deltas()),
    )


def contexts(family: Family) -> st.SearchStrategy[Context]:
    """Contexts of one family, as various configurations and node addresses produce them."""
    six = family is Family.IPV6
    own = ("fd00:99::2", "fd00:99::3") if six else ("10.99.0.2", "10.99.0.3")
    local = (LocalTraffic(cidr="fd00:1::/64" if six else "10.244.0.0/16"), LocalTraffic(interface="cni0"))
    return st.builds(
        Context,
        st.just(family),
        st.just("node-1"),
        node_address=st.sampled_from(("", own[0])),
        local_traffic=st.sampled_from((*local, LocalTraffic(), LocalTraffic(interface_prefix="veth"))),
        masquerade_all=st.booleans(),
        masquerade_mark=st.sampled_from((1 << 14, 1 << 14, 1 << 30)),
        node_port_addresses=st.sampled_from((None, (), own[:1], own, own[::-1])),
    )
