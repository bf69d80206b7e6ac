"""The cost of kproxy for API servers: measured with the real client, computed for many nodes."""

from __future__ import annotations

import msgspec
import pytest

from tests.api_cost.measure import Costs, Start, measure, node
from tests.api_cost.model import LOADS, Load, row, rows
from tests.bench.cluster import Cluster

COSTS = Costs("JSON", Start(4, 1000), Start(9, 500), reconnect=100.0, bookmarks=40, service=7, endpoint_slice=5, node=3)


@pytest.fixture(scope="module")
def measured() -> dict[str, Costs]:
    """The costs of a cluster of 500 Services in both encodings."""
    return {encoding: measure(Cluster(500, 2), encoding) for encoding in ("protobuf", "JSON")}


def test_start_takes_one_request_for_each_kind_or_one_for_each_page(measured: dict[str, Costs]) -> None:
    for costs in measured.values():
        assert costs.watch_list.requests == 4
        assert costs.pages.requests == 4 + 4  # a rejected watch list and one page for each kind


def test_bytes_grow_with_the_cluster(measured: dict[str, Costs]) -> None:
    larger = measure(Cluster(1000, 2), "protobuf")
    first = measured["protobuf"]
    assert 1.9 < larger.watch_list.bytes / first.watch_list.bytes < 2.1
    assert larger.pages.requests == first.pages.requests + 2
    assert 1.3 < larger.pages.bytes / first.pages.bytes < 2.1  # compressed; the Node is a constant part
    assert larger.service == pytest.approx(first.service, abs=20)


def test_protobuf_is_smaller_than_json_and_pages_are_compressed(measured: dict[str, Costs]) -> None:
    protobuf, json = measured["protobuf"], measured["JSON"]
    assert protobuf.watch_list.bytes < 0.8 * json.watch_list.bytes
    assert json.pages.bytes < 0.2 * json.watch_list.bytes
    for name in ("service", "endpoint_slice", "node"):
        assert 0 < getattr(protobuf, name) < getattr(json, name)
    assert 4 * 20 < protobuf.bookmarks < json.bookmarks < 4 * 600
    assert 300 < protobuf.reconnect < 1500


def test_events_have_the_size_of_their_objects(measured: dict[str, Costs]) -> None:
    cluster = Cluster(500, 2)
    for size, body in (
        (measured["JSON"].endpoint_slice, cluster.endpoint_slice(0, variant=1)),
        (measured["JSON"].node, node(1)),
    ):
        assert 0 < size - len(msgspec.json.encode(body)) < 250  # type of the event, uid and resourceVersion


def test_hourly_cost_is_the_sum_of_its_parts() -> None:
    found = row(COSTS, Load("test", services=2, endpoint_slices=10, node=4))
    assert found.requests == 32  # 4 watches of 7.5 minutes
    assert (found.reconnects, found.bookmarks, found.events) == (3200.0, 2400.0, 2 * 7 + 10 * 5 + 4 * 3)
    assert found.bytes == found.reconnects + found.bookmarks + found.events


def test_every_load_has_a_row() -> None:
    assert [each.load for each in rows(COSTS)] == [load.name for load in LOADS]
