"""Protobuf and JSON over real HTTP: which requests use which encoding, and both decode to the same objects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_page
from kproxy.kube.codec.streams import ACCEPT_JSON, ACCEPT_WATCH, read_events
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR
from tests.api.conftest import Cluster, Received, StartSource
from tests.apiserver import ApiServer, Relay, SeenRequest, protobuf
from tests.apiserver.objects import endpoint_slice, labeled, node, service, service_cidr
from tests.apiserver.resources import ENDPOINT_SLICES, NODES, SERVICE_CIDRS, SERVICES, Resource
from tests.lab.waiting import HANG_GUARD

SERVED: list[tuple[Kind, Resource]] = [
    (Service, SERVICES),
    (EndpointSlice, ENDPOINT_SLICES),
    (Node, NODES),
    (ServiceCIDR, SERVICE_CIDRS),
]


def is_service_watch(request: SeenRequest) -> bool:
    return request.is_watch and request.path == SERVICES.path


def fill(cluster: Cluster) -> None:
    cluster.create(labeled(service("web", "10.96.7.1"), app="web"))
    cluster.create(service("affine", "10.96.7.2", sessionAffinity="ClientIP", internalTrafficPolicy="Local"))
    cluster.create(service("outside", "10.96.7.3", type="NodePort", externalTrafficPolicy="Local"))
    web = endpoint_slice("web-1", "web", ["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    web["endpoints"][0] |= {
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": "node-1",
    }
    web["endpoints"][1] |= {"conditions": {"ready": False, "serving": True, "terminating": True}, "zone": "zone-a"}
    web["endpoints"][2] |= {"conditions": {"ready": True}, "hints": {"forZones": [{"name": "zone-a"}]}}
    cluster.create(web)
    cluster.create(node("node-1"))
    cluster.create(service_cidr("more", "10.97.0.0/16"))


def read(client: ApiClient, kind: Kind, resource: Resource, accept: str) -> tuple[str, set[DecodedObject]]:
    """Return the media type of a new watch and its initial objects."""
    with client.get(resource.path, {}, HANG_GUARD) as listed:
        count = len(read_page(kind, listed.read()).items)
    objects: set[DecodedObject] = set()
    with client.get(resource.path, {"watch": "1"}, HANG_GUARD, accept) as watch:
        for event in read_events(kind, watch):
            assert isinstance(event, DecodedObject)
            objects.add(event)
            if len(objects) == count:
                break
        return watch.media_type, objects


@pytest.mark.parametrize(("kind", "resource"), SERVED)
def test_both_encodings_decode_to_the_same_objects(
    cluster: Cluster, tmp_path: Path, kind: Kind, resource: Resource
) -> None:
    fill(cluster)
    client = ApiClient.from_config(str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    json_type, plain = read(client, kind, resource, ACCEPT_JSON)
    framed_type, framed = read(client, kind, resource, ACCEPT_WATCH)
    assert (json_type, framed_type) == (ACCEPT_JSON, protobuf.MEDIA_TYPE)
    assert plain == framed
    assert plain


def test_watches_use_protobuf_and_lists_compressed_json(
    server: ApiServer, start_source: StartSource, received: Received
) -> None:
    server.set_watch_list("forbidden")
    for number in range(600):
        server.create(service(f"web-{number}", f"10.96.{8 + number // 250}.{number % 250 + 1}"))
    start_source(server)
    received.until_listed()
    assert len(received.names(Service)) == 600
    server.create(service("late", "10.96.7.1"))
    received.until(lambda _: "late" in received.names(Service))
    for request in server.requests.all():
        assert request.headers["Accept"] == (ACCEPT_WATCH if request.is_watch else ACCEPT_JSON)
        assert request.headers["Accept-Encoding"] == ("identity" if request.is_watch else "gzip")


def test_event_takes_at_most_5_percent_more_bytes_than_its_frame(
    server: ApiServer, start_source: StartSource, received: Received
) -> None:
    slices = [slice_of_ten(number, "10.1.0") for number in range(100)]
    for item in slices:
        server.create(item)
    with Relay(server.address) as relay:
        start_source(server, port=relay.port)
        received.until_listed()
        before = relay.bytes_to_clients
        changed = [server.update(slice_of_ten(number, "10.1.1")) for number in range(100)]
        received.until(lambda _: all_begin_with(received.objects[EndpointSlice].values(), "10.1.1."))
        read = relay.bytes_to_clients - before
    frames = sum(len(protobuf.frame("MODIFIED", item)) for item in changed)
    assert frames < read <= 1.05 * frames


def slice_of_ten(number: int, prefix: str) -> dict[str, Any]:
    return endpoint_slice(f"web-{number}", f"web-{number}", [f"{prefix}.{last}" for last in range(1, 11)])


def all_begin_with(slices: Iterable[object], prefix: str) -> bool:
    endpoints = [item.endpoints for item in slices if isinstance(item, EndpointSlice)]
    return len(endpoints) == 100 and all(e.address.startswith(prefix) for of_slice in endpoints for e in of_slice)


@pytest.mark.parametrize("support", ["ignored", "refused"])
def test_server_without_protobuf_is_watched_in_json(
    server: ApiServer, start_source: StartSource, received: Received, support: Literal["ignored", "refused"]
) -> None:
    server.faults.protobuf = support
    server.create(service("web", "10.96.7.1"))
    start_source(server)
    received.until_listed()
    server.create(service("db", "10.96.7.2"))
    received.until(lambda _: received.names(Service) == {"web", "db"})
    if support == "refused":
        server.drop_watches()
        asked = [request.headers["Accept"] for request in server.requests.wait_for(is_service_watch, 3)]
        assert asked[:3] == [ACCEPT_WATCH, ACCEPT_JSON, ACCEPT_JSON]


def test_list_after_undecodable_frames_is_in_json(
    server: ApiServer, start_source: StartSource, received: Received
) -> None:
    start_source(server)
    received.until_listed()
    server.requests.wait_for(is_service_watch)
    server.inject(b"no protobuf")
    server.create(service("web", "10.96.7.1"))
    received.until(lambda _: received.names(Service) == {"web"})
    server.drop_watches()
    asked = server.requests.wait_for(is_service_watch, 2)
    assert [request.headers["Accept"] for request in asked] == [ACCEPT_WATCH, ACCEPT_JSON]
    assert "sendInitialEvents" in asked[1].query, "only a list can recover the missed events"
    server.create(service("db", "10.96.7.2"))
    received.until(lambda _: received.names(Service) == {"web", "db"})
