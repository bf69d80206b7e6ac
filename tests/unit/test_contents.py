"""Events that change nothing that kproxy uses, in both encodings."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeAlias

import msgspec
import pytest

from kproxy.kube.codec.contents import MAX_CONTENTS
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import LineReader
from kproxy.kube.codec.protobuf import FrameReader
from kproxy.kube.codec.watch_events import Deleted, Event, Unchanged, UndecodableObject
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Node, Service
from tests.apiserver import protobuf
from tests.bench.cluster import Cluster, node
from tests.unit.test_protobuf import from_json

CLUSTER = Cluster(400, 3)
Read: TypeAlias = Callable[[str, Any], Event]
MakeReader: TypeAlias = Callable[[Kind], Read]


def json_reader(kind: Kind) -> Read:
    reader = LineReader(kind)
    return lambda change, body: reader.read(msgspec.json.encode({"type": change, "object": body}))


def protobuf_reader(kind: Kind) -> Read:
    reader = FrameReader(kind)
    return lambda change, body: reader.read(protobuf.frame(change, body)[4:])


@pytest.fixture(params=[json_reader, protobuf_reader])
def make_reader(request: pytest.FixtureRequest) -> MakeReader:
    made: MakeReader = request.param
    return made


def with_version(body: Any, version: int = 1) -> Any:
    body["metadata"] |= {"resourceVersion": f"{version}", "uid": "0b6f8a54"}
    return body


def endpoint_slice(version: int = 1, *, annotation: str = "", variant: int = 0) -> Any:
    return with_version(CLUSTER.endpoint_slice(300, annotation=annotation, variant=variant), version)


def test_events_of_an_endpoint_slice(make_reader: MakeReader) -> None:
    read = make_reader(EndpointSlice)
    assert isinstance(read("ADDED", endpoint_slice()), DecodedObject)
    assert isinstance(read("MODIFIED", endpoint_slice(2, annotation="1")), DecodedObject), "the first one is decoded"
    assert read("MODIFIED", endpoint_slice(3, annotation="2")) == Unchanged("3")
    assert isinstance(read("MODIFIED", endpoint_slice(4, variant=1)), DecodedObject)
    assert isinstance(read("MODIFIED", endpoint_slice(5)), DecodedObject), "it differs from the last state"
    assert read("MODIFIED", endpoint_slice(6, annotation="3")) == Unchanged("6")


CHANGES: dict[str, tuple[Kind, Any]] = {
    "port of a Service": (Service, {"spec": {"ports": [{"name": "http", "port": 81, "protocol": "TCP"}]}}),
    "status of a Service": (Service, {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}),
    "proxy of a Service": (Service, {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}}),
    "port of a slice": (EndpointSlice, {"ports": [{"name": "http", "port": 81, "protocol": "TCP"}]}),
    "endpoints of a slice": (EndpointSlice, {"endpoints": []}),
    "address type of a slice": (EndpointSlice, {"addressType": "FQDN"}),
    "Service of a slice": (EndpointSlice, {"metadata": {"labels": {"kubernetes.io/service-name": "other"}}}),
    "headless slice": (
        EndpointSlice,
        {
            "metadata": {
                "labels": {"kubernetes.io/service-name": "service-300", "service.kubernetes.io/headless": ""},
            }
        },
    ),
    "proxy of a slice": (
        EndpointSlice,
        {
            "metadata": {
                "labels": {
                    "kubernetes.io/service-name": "service-300",
                    "service.kubernetes.io/service-proxy-name": "x",
                },
            }
        },
    ),
    "time of the last change": (
        EndpointSlice,
        {"metadata": {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-11-20T23:47:39Z"}}},
    ),
}


@pytest.mark.parametrize(("kind", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_every_change_that_matters_is_decoded(make_reader: MakeReader, kind: Kind, change: Any) -> None:
    read = make_reader(kind)
    before = with_version(CLUSTER.service(300)) if kind is Service else endpoint_slice()
    after = deepcopy(before)
    for part, value in change.items():
        after[part] = before[part] | value if isinstance(value, dict) else value
    for body in (before, after, before, after):
        event = read("MODIFIED", body)
        assert event == from_json(kind, "MODIFIED", body)
        assert isinstance(event, DecodedObject)
        assert isinstance(read("MODIFIED", body), Unchanged) or event.object is None
    assert from_json(kind, "MODIFIED", before) != from_json(kind, "MODIFIED", after)


@pytest.mark.parametrize("between", ["ADDED", "DELETED"])
def test_content_is_forgotten_with_the_object(make_reader: MakeReader, between: str) -> None:
    read = make_reader(EndpointSlice)
    read("MODIFIED", endpoint_slice())
    assert isinstance(read(between, endpoint_slice()), Deleted if between == "DELETED" else DecodedObject)
    assert isinstance(read("MODIFIED", endpoint_slice(annotation="1")), DecodedObject)


def test_content_is_forgotten_when_the_object_becomes_invalid(make_reader: MakeReader) -> None:
    read = make_reader(Service)
    good = with_version(CLUSTER.service(1))
    bad = good | {"spec": good["spec"] | {"clusterIP": "web", "clusterIPs": ["web"]}}
    assert isinstance(read("MODIFIED", good), DecodedObject)
    assert isinstance(read("MODIFIED", good), Unchanged)
    for _ in range(2):
        assert isinstance(read("MODIFIED", bad), UndecodableObject)
    assert isinstance(read("MODIFIED", good), DecodedObject)


def test_nodes_are_always_decoded(make_reader: MakeReader) -> None:
    read = make_reader(Node)
    for version in (1, 2):
        assert isinstance(read("MODIFIED", with_version(node(), version)), DecodedObject)


def test_number_of_remembered_contents_is_limited(make_reader: MakeReader) -> None:
    read = make_reader(Service)
    body = with_version(CLUSTER.service(0))

    def event(number: int) -> Event:
        body["metadata"]["name"] = f"service-{number}"
        return read("MODIFIED", body)

    for number in range(MAX_CONTENTS + 1):
        assert isinstance(event(number), DecodedObject)
    assert isinstance(event(0), DecodedObject)
    assert isinstance(event(MAX_CONTENTS), Unchanged)
