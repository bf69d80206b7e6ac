"""The benchmark's clusters: the requested numbers of Services and endpoints, unique addresses, and real changes."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from itertools import pairwise

import msgspec
import pytest

from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_page
from kproxy.model.types import EndpointSlice
from tests.bench import cluster as objects
from tests.bench.cluster import SERVICE_CIDR, Cluster, Object, cluster_ip
from tests.bench.efforts import MODES, SIZES
from tests.bench.measured import changed_slices, spare
from tests.bench.scene import SERVED


def addresses(found: Object) -> list[str]:
    return [each for endpoint in found["endpoints"] for each in endpoint["addresses"]]


def decoded(found: Object) -> object:
    (item,) = read_page(EndpointSlice, msgspec.json.encode({"metadata": {}, "items": [found]})).items
    assert isinstance(item, DecodedObject)
    assert item.object is not None
    return item.object


def test_largest_cluster_has_unique_addresses() -> None:
    cluster = Cluster(20_000, 10)
    found = [each for number in range(20_000) for each in addresses(cluster.endpoint_slice(number))]
    assert len(set(found)) == 200_000
    vips = {cluster_ip(number) for number in range(20_000)}
    assert len(vips) == 20_000
    assert all(ip_address(each) in ip_network(SERVICE_CIDR) for each in (min(vips), max(vips), cluster_ip(20_100)))


def test_cluster_has_all_kinds_of_objects() -> None:
    kinds = [each["kind"] for each in Cluster(3, 2).objects()]
    assert sorted(kinds) == ["EndpointSlice"] * 3 + ["Node"] + ["Service"] * 3 + ["ServiceCIDR"]


@pytest.mark.parametrize(("services", "reached"), [(1, (0,)), (2, (0, 1)), (20, (0, 4, 9, 14, 19))])
def test_reachable_services_are_spread_over_all_services(services: int, reached: tuple[int, ...]) -> None:
    cluster = Cluster(services, 2, SERVED)
    assert cluster.reached == reached
    assert all(addresses(cluster.endpoint_slice(number)) == list(SERVED[:2]) for number in reached)
    assert Cluster(services, 2).reached == ()


def test_shift_changes_one_endpoint() -> None:
    before, after = (addresses(Cluster(3, 4).endpoint_slice(1, shift=shift)) for shift in (0, 7))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False]


def test_note_does_not_change_the_decoded_object() -> None:
    cluster = Cluster(3, 4)
    assert cluster.endpoint_slice(1) != cluster.endpoint_slice(1, note="x")
    assert decoded(cluster.endpoint_slice(1)) == decoded(cluster.endpoint_slice(1, note="x"))


def test_rolling_update_replaces_one_endpoint_per_step() -> None:
    states = [set(addresses(objects.rolling_slice(5, step))) for step in range(6)]
    assert [len(before - after) for before, after in pairwise(states)] == [1] * 5
    assert not states[0] & states[-1]


def test_burst_changes_different_services_without_connections() -> None:
    cluster = Cluster(30, 2, SERVED)
    slices = changed_slices(cluster, 20)
    assert len({each["metadata"]["name"] for each in slices}) == 20
    assert all(
        decoded(each) != decoded(cluster.endpoint_slice(number))
        for number, each in zip(spare(cluster), slices, strict=False)
    )
    assert not set(spare(cluster)) & set(cluster.reached)


def test_burst_larger_than_the_cluster_changes_services_repeatedly() -> None:
    slices = changed_slices(Cluster(3, 2), 5)
    assert len({each["metadata"]["name"] for each in slices}) == 3
    assert len({tuple(addresses(each)) for each in slices}) == 5


@pytest.mark.parametrize("size", SIZES)
def test_each_mode_starts_with_one_service(size: str) -> None:
    tasks = list(SIZES[size].tasks(MODES))
    for mode in MODES:
        services = [task.services for task in tasks if task.mode == mode]
        assert services[0] == 1
        assert services == sorted(set(services))


def test_custom_sizes_are_measured_completely() -> None:
    tasks = list(SIZES["medium"].tasks(["nftables"], [300, 200]))
    assert [(task.services, bool(task.effort.changes)) for task in tasks] == [(1, False), (200, True), (300, True)]
