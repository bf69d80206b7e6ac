"""Pages of the daemon's objects are small enough for the thread that also answers health checks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import msgspec

from kproxy.model.delta import Delete, Replace
from kproxy.model.object_page import PAGE_ENDPOINTS, PAGE_SERVICES, ObjectPage, make_page
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort

PORT = EndpointPort("http", 8080, "TCP")
MAX_PAGE_BYTES = 1 << 20


def make_service(name: str, ports: int = 1) -> Service:
    return Service(
        "shop", name, ("10.96.0.1",), tuple(ServicePort(f"p{each}", 80 + each, "TCP") for each in range(ports))
    )


def make_slices(service: str, endpoints: int, *, each: int = 1000) -> list[EndpointSlice]:
    addresses = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(endpoints)]
    return [
        EndpointSlice(
            "shop",
            f"{service}-{start:06}",
            f"shop/{service}",
            Family.IPV4,
            tuple(
                Endpoint(address, node=f"node-{number % 100}.example.com", for_zones=("zone-a",))
                for number, address in enumerate(addresses[start : start + each])
            ),
            (PORT,),
        )
        for start in range(0, endpoints, each)
    ]


def store_of(services: list[Service], slices: list[EndpointSlice]) -> Store:
    store = Store("node-1")
    store.apply(Replace(Service, tuple(services)))
    store.apply(Replace(EndpointSlice, tuple(slices)))
    store.apply(Replace(Node, (Node("node-1"),)))
    return store


def pages_of(store: Store) -> Iterator[ObjectPage]:
    start = ""
    while True:
        page = make_page(store, start)
        yield page
        start = page.following
        if not start:
            return


def test_a_service_of_20000_endpoints_has_several_pages() -> None:
    services = [make_service(name) for name in ("a", "large", "z")]
    slices = [*make_slices("a", 1), *make_slices("large", 20_000), *make_slices("z", 1)]
    pages = list(pages_of(store_of(services, slices)))
    assert [service for page in pages for service in page.services] == services
    assert [each for page in pages for each in page.slices] == slices
    assert len(pages) == 5
    for page in pages:
        assert sum(len(each.endpoints) for each in page.slices) <= PAGE_ENDPOINTS
        assert len(msgspec.json.encode(page)) < MAX_PAGE_BYTES
        assert page.node == Node("node-1")


def test_many_services_and_many_ports_have_several_pages() -> None:
    services = sorted((make_service(f"s{number}") for number in range(PAGE_SERVICES + 1)), key=lambda each: each.name)
    pages = list(pages_of(store_of(services, [])))
    assert [len(page.services) for page in pages] == [PAGE_SERVICES, 1]
    assert [service for page in pages for service in page.services] == services

    services = [make_service(f"s{number}", PAGE_ENDPOINTS // 2) for number in range(4)]
    assert [len(page.services) for page in pages_of(store_of(services, []))] == [2, 2]


def test_an_object_larger_than_a_page_is_alone_on_its_page() -> None:
    large = make_slices("large", PAGE_ENDPOINTS * 2, each=PAGE_ENDPOINTS * 2)
    pages = list(pages_of(store_of([make_service("large"), make_service("z")], [*large, *make_slices("z", 1)])))
    assert [(len(page.services), len(page.slices)) for page in pages] == [(1, 0), (0, 1), (1, 1)]


def test_objects_that_are_deleted_between_two_pages() -> None:
    slices = make_slices("large", 20_000)
    store = store_of([make_service("large"), make_service("z")], [*slices, *make_slices("z", 1)])
    first = make_page(store, "")
    following = slices[len(first.slices)]
    assert first.following == f"shop/large/{following.name}"
    store.apply(Delete(EndpointSlice, "shop", following.name))
    second = make_page(store, first.following)
    assert second.slices[0] == slices[len(first.slices) + 1]
    store.apply(Delete(Service, "shop", "large"))
    last = make_page(store, second.following)
    assert ([each.name for each in last.services], last.following) == (["z"], "")


def test_an_empty_store_has_one_page() -> None:
    assert [page.services for page in pages_of(Store("node-1"))] == [()]


def test_positions_are_strictly_increasing() -> None:
    services = [make_service("a"), make_service("a-b"), make_service("a.b")]
    slices = [each for service in services for each in make_slices(service.name, PAGE_ENDPOINTS * 2)]
    pages = list(pages_of(store_of(services, slices)))
    found = [each.name for page in pages for each in page.slices]
    assert len(found) == len(set(found)) == len(slices)
    assert all(before.following != after.following for before, after in pairwise(pages))
