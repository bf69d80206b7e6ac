"""Clusters of any size for the benchmark."""

from __future__ import annotations

from kproxy.model.delta import Replace
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort

NODE = "node-1"


def service(number: int) -> Service:
    address = f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    return Service("bench", f"service-{number}", (address,), (ServicePort("http", 80, "TCP"),))


def endpoint_slice(number: int, endpoints: int, shift: int = 0) -> EndpointSlice:
    """The slice of one Service; with `shift`, its last endpoint has another address."""
    hosts = [number * endpoints + index for index in range(endpoints)]
    addresses = [f"10.{128 + (host >> 16)}.{host >> 8 & 255}.{host & 255}" for host in hosts]
    if shift:
        addresses[-1] = f"172.{16 + (shift >> 16)}.{shift >> 8 & 255}.{shift & 255}"
    return EndpointSlice(
        "bench",
        f"service-{number}-x",
        f"bench/service-{number}",
        Family.IPV4,
        tuple(Endpoint(address, f"node-{index}") for index, address in enumerate(addresses)),
        (EndpointPort("http", 8080, "TCP"),),
    )


def store(services: int, endpoints: int) -> Store:
    found = Store(NODE)
    found.apply(Replace(Service, tuple(service(number) for number in range(services))))
    found.apply(Replace(EndpointSlice, tuple(endpoint_slice(number, endpoints) for number in range(services))))
    found.apply(Replace(Node, (Node(NODE, addresses=("10.99.0.2",)),)))
    return found
