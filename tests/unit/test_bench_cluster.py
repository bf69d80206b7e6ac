"""The benchmark's clusters: the requested numbers of Services and endpoints, unique addresses, and real changes."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network
from itertools import pairwise

import msgspec
import pytest

from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_page
from kproxy.model.types import EndpointSlice
from tests.bench import cluster as objects
from tests.bench.cluster import MAX_ENDPOINTS, SERVICE_CIDR, Cluster, Object, cluster_ip
from tests.bench.measurements import changed_slices, unconnected_services
from tests.bench.sizes import MODES, SIZES
from tests.bench.testbed import SERVER_ADDRESSES, server_addresses


def addresses(endpoint_slice: Object) -> list[str]:
    return [item for endpoint in endpoint_slice["endpoints"] for item in endpoint["addresses"]]


def decoded(endpoint_slice: Object) -> object:
    (item,) = read_page(EndpointSlice, msgspec.json.encode({"metadata": {}, "items": [endpoint_slice]})).items
    assert isinstance(item, DecodedObject)
    assert item.object is not None
    return item.object


def test_largest_cluster_has_unique_addresses() -> None:
    cluster = Cluster(20_000, 10)
    endpoints = [item for number in range(20_000) for item in addresses(cluster.endpoint_slice(number))]
    assert len(set(endpoints)) == 200_000
    vips = {cluster_ip(number) for number in range(20_000)}
    assert len(vips) == 20_000
    assert all(ip_address(item) in ip_network(SERVICE_CIDR) for item in (min(vips), max(vips), cluster_ip(20_100)))


def test_cluster_has_all_kinds_of_objects() -> None:
    kinds = [item["kind"] for item in Cluster(3, 2).objects()]
    assert sorted(kinds) == ["EndpointSlice"] * 3 + ["Node"] + ["Service"] * 3 + ["ServiceCIDR"]


@pytest.mark.parametrize(("services", "connected"), [(1, (0,)), (2, (0, 1)), (20, (0, 4, 9, 14, 19))])
def test_connected_services_are_spread_over_all_services(services: int, connected: tuple[int, ...]) -> None:
    cluster = Cluster(services, 2, SERVER_ADDRESSES)
    assert cluster.connected == connected
    assert all(addresses(cluster.endpoint_slice(number)) == list(SERVER_ADDRESSES[:2]) for number in connected)
    assert Cluster(services, 2).connected == ()


def test_variant_changes_one_endpoint() -> None:
    before, after = (addresses(Cluster(3, 4).endpoint_slice(1, variant=variant)) for variant in (0, 7))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False]


def test_annotation_does_not_change_the_decoded_object() -> None:
    cluster = Cluster(3, 4)
    assert cluster.endpoint_slice(1) != cluster.endpoint_slice(1, annotation="x")
    assert decoded(cluster.endpoint_slice(1)) == decoded(cluster.endpoint_slice(1, annotation="x"))


def test_rolling_update_replaces_one_endpoint_per_step() -> None:
    states = [set(addresses(objects.rolling_slice(5, step))) for step in range(6)]
    assert [len(before - after) for before, after in pairwise(states)] == [1] * 5
    assert not states[0] & states[-1]


def test_burst_changes_different_services_without_connections() -> None:
    cluster = Cluster(30, 2, SERVER_ADDRESSES)
    slices = changed_slices(cluster, 20)
    assert len({item["metadata"]["name"] for item in slices}) == 20
    assert all(
        decoded(item) != decoded(cluster.endpoint_slice(number))
        for number, item in zip(unconnected_services(cluster), slices, strict=False)
    )
    assert not set(unconnected_services(cluster)) & set(cluster.connected)


def test_burst_larger_than_the_cluster_changes_services_repeatedly() -> None:
    slices = changed_slices(Cluster(3, 2), 5)
    assert len({item["metadata"]["name"] for item in slices}) == 3
    assert len({tuple(addresses(item)) for item in slices}) == 5


@pytest.mark.parametrize("size", SIZES)
def test_each_mode_starts_with_one_service(size: str) -> None:
    tasks = list(SIZES[size].tasks(MODES))
    for mode in MODES:
        shapes = [(task.services, task.endpoints) for task in tasks if task.mode == mode]
        assert shapes[0][0] == 1
        assert shapes == sorted(set(shapes))


def test_custom_sizes_are_measured_completely() -> None:
    tasks = list(SIZES["medium"].tasks(["nftables"], [300, 200]))
    assert [(task.services, bool(task.repetitions.endpoint_changes)) for task in tasks] == [
        (1, False),
        (200, True),
        (300, True),
    ]


def test_huge_clusters_have_44_000_services_and_250_000_endpoints() -> None:
    shapes = {(task.mode, task.services, task.endpoints) for task in SIZES["huge"].tasks(MODES)}
    assert shapes >= {
        (mode, services, endpoints) for mode in MODES for services, endpoints in [(44_000, 1), (5000, 50)]
    }
    assert all(services * endpoints <= MAX_ENDPOINTS for _, services, endpoints in shapes)


def test_endpoints_override_those_of_the_size() -> None:
    tasks = list(SIZES["huge"].tasks(["nftables"], endpoints=7))
    assert {task.endpoints for task in tasks} == {7}
    assert [task.services for task in tasks] == [1, 5000, 10_000, 44_000]


@pytest.mark.parametrize(("endpoints", "sizes"), [(1, [1]), (100, [100]), (101, [100, 1]), (1000, [100] * 10)])
def test_large_services_have_several_slices(endpoints: int, sizes: list[int]) -> None:
    cluster = Cluster(20, endpoints, server_addresses(endpoints))
    assert cluster.slices == len(sizes)
    for number in (0, 1):  # one with the server's addresses, and one without
        slices = cluster.endpoint_slices(number)
        assert [len(addresses(each)) for each in slices] == sizes
        assert len({each["metadata"]["name"] for each in slices}) == len(sizes)
        everything = [item for each in slices for item in addresses(each)]
        assert len(set(everything)) == endpoints
        assert slices[-1] == cluster.endpoint_slice(number)
        changed = addresses(cluster.endpoint_slice(number, variant=3))
        assert set(changed) - set(everything) == {changed[-1]}
    pods = [endpoint["targetRef"]["name"] for each in cluster.endpoint_slices(1) for endpoint in each["endpoints"]]
    assert len(set(pods)) == endpoints
    kinds = Counter(item["kind"] for item in cluster.objects())
    assert kinds["EndpointSlice"] == 20 * len(sizes)
