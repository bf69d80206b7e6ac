"""Random clusters for property tests: few names and addresses, so that changes meet each other."""

from __future__ import annotations

from hypothesis import strategies as st

from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort

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
        external_ips=st.sampled_from(((), ("192.0.2.1",), ("192.0.2.1", "2001:db8::1"))),
        vips=st.sampled_from(((), ("203.0.113.1",), ("2001:db8::2",))),
        source_ranges=st.sampled_from(((), ("198.51.100.0/24",), ("10.99.0.0/24", "0.0.0.0/0"), ("10.99.0.0/16",))),
        health_check_node_port=st.sampled_from((0, 32000)),
    )


def endpoint_slices() -> st.SearchStrategy[EndpointSlice]:
    def build(
        name: str, service: str, family: Family, numbers: list[Endpoint], ports: list[EndpointPort]
    ) -> EndpointSlice:
        prefix = "10.244.0." if family is Family.IPV4 else "fd00:1::"
        endpoints = tuple(
            Endpoint(prefix + each.address, each.node, each.ready, each.serving, each.terminating, each.for_zones)
            for each in numbers
        )
        return EndpointSlice("ns", name, f"ns/{service}", family, endpoints, tuple(ports))

    endpoint = st.builds(
        Endpoint,
        address=st.sampled_from("123456"),
        node=st.sampled_from(("node-1", "node-2")),
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
        st.lists(port, max_size=2, unique_by=lambda each: each.name),
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
            lambda found: Replace(Service, tuple({each.key: each for each in found}.values())),
            st.lists(services(), max_size=3),
        ),
        st.builds(
            lambda found: Replace(EndpointSlice, tuple({each.name: each for each in found}.values())),
            st.lists(endpoint_slices(), max_size=3),
        ),
    )
    return st.one_of(upserts, upserts, upserts, deletes, relists)
