"""Objects of a known shape: they decode to the same values as field by field, and without doing that."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.kube.codec.conversion import DecodedObject, IgnoredField
from kproxy.kube.codec.protobuf import FrameReader, convert_raw_endpoint, decode_object
from kproxy.kube.codec.shapes import MAX_SHAPE_BYTES, MAX_SHAPES, ShapeReader
from kproxy.kube.codec.watch_events import Event, Unchanged
from kproxy.kube.codec.wire_format import DECODING_ERRORS, varint
from kproxy.model.types import Endpoint, EndpointSlice, Family, Service
from tests.apiserver import protobuf
from tests.bench.cluster import Cluster
from tests.unit.test_protobuf import assert_equal_events, from_json, with_last_content

CLUSTER = Cluster(400, 3)


class CountingReader:
    """A `ShapeReader` that counts what it decodes field by field."""

    def __init__(self, kind: type[Service | EndpointSlice]) -> None:
        self.objects = self.endpoints = 0
        self._kind = kind
        shapes = ShapeReader(self._decode, self._decode_endpoint)
        self._read = shapes.read_service if kind is Service else shapes.read_slice
        self._shapes = shapes

    def read(self, raw: bytes, *, modified: bool = False) -> DecodedObject | Unchanged:
        return self._read(raw, modified=modified)

    @property
    def cached_endpoints(self) -> int:
        return self._shapes._endpoint.cache_info().currsize

    def _decode(self, raw: bytes) -> DecodedObject:
        self.objects += 1
        return decode_object(self._kind, raw)

    def _decode_endpoint(self, raw: bytes, family: Family) -> Endpoint | IgnoredField:
        self.endpoints += 1
        return convert_raw_endpoint(raw, family)


def encoded(body: Any) -> bytes:
    """Return an object without its envelope."""
    return protobuf.encode(body["kind"], body)


def with_version(body: Any, version: int = 1) -> Any:
    body["metadata"] |= {"resourceVersion": f"{version}", "uid": f"0b6f8a54-{version}"}
    return body


def dual_stack(number: int) -> Any:
    body = CLUSTER.service(number)
    body["spec"] |= {"clusterIPs": [body["spec"]["clusterIP"], f"fd00::{number + 1:x}"], "ipFamilies": ["IPv4", "IPv6"]}
    return body


def bodies(kind: type[Service | EndpointSlice]) -> list[Any]:
    make = CLUSTER.service if kind is Service else CLUSTER.endpoint_slice
    return [with_version(make(number), number + 1) for number in range(CLUSTER.services)]


@pytest.mark.parametrize("kind", [Service, EndpointSlice])
def test_only_the_first_object_of_a_shape_is_decoded_field_by_field(kind: type[Service | EndpointSlice]) -> None:
    reader = CountingReader(kind)
    for body in bodies(kind):
        assert reader.read(encoded(body)) == from_json(kind, "ADDED", body)
    # Three endpoints of the connected Services are repeated.
    assert (reader.objects, reader.endpoints) == (1, 0 if kind is Service else 1)


def test_dual_stack_services_have_shapes_of_their_own() -> None:
    reader = CountingReader(Service)
    for number in range(20):
        for body in (with_version(CLUSTER.service(number)), with_version(dual_stack(number))):
            assert reader.read(encoded(body)) == from_json(Service, "ADDED", body)
    assert reader.objects == 2


def test_unusual_services_do_not_displace_the_others() -> None:
    reader = CountingReader(Service)
    for number in range(3 * MAX_SHAPES):
        usual, unusual = with_version(CLUSTER.service(number)), with_version(CLUSTER.service(number))
        unusual["spec"]["ports"][0]["port"] = 1000 + number
        for body in (usual, unusual):
            assert reader.read(encoded(body)) == from_json(Service, "ADDED", body)
    assert reader.objects < 3 * MAX_SHAPES + 10


VARIANTS: dict[str, Any] = {
    "headless": {"spec": {"clusterIP": "None", "clusterIPs": ["None"]}},
    "no address": {"spec": {"clusterIP": "", "clusterIPs": []}},
    "no list": {"spec": {"clusterIPs": []}},
    "different addresses": {"spec": {"clusterIPs": ["10.96.9.9"]}},
    "three addresses": {"spec": {"clusterIPs": ["10.96.0.9", "10.96.0.9", "fd00::1"]}},
    "same family": {"spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "10.96.0.8"]}},
    "leading zero": {"spec": {"clusterIP": "10.96.0.09", "clusterIPs": ["10.96.0.09"]}},
    "loopback": {"spec": {"clusterIP": "127.0.0.9", "clusterIPs": ["127.0.0.9"]}},
    "not an address": {"spec": {"clusterIP": "web", "clusterIPs": ["web"]}},
    "uppercase": {"spec": {"clusterIP": "FD00::1", "clusterIPs": ["FD00::1"]}},
    "another proxy": {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}},
    "label mentioned elsewhere": {"metadata": {"annotations": {"x": "service.kubernetes.io/service-proxy-name"}}},
    "name": {"metadata": {"name": "Not-valid"}},
    "long name": {"metadata": {"name": "a" * 140}},
    "namespace": {"metadata": {"namespace": "a.b"}},
    "no namespace": {"metadata": {"namespace": ""}},
    "deleted": {"metadata": {"deletionTimestamp": "2026-11-20T23:47:39Z", "deletionGracePeriodSeconds": 3}},
    "long port name": {"spec": {"ports": [{"name": "p" * 63, "port": 80, "protocol": "TCP"}]}},
    "long selector": {"spec": {"selector": {"a": "b" * 200, "c": "d"}}},
    "address in the selector": {"spec": {"selector": {"a": "\n\x0910.96.0.9", "c": "\x92\x01\x0910.96.0.9"}}},
    "affinity": {"spec": {"sessionAffinity": "ClientIP"}},
    "load balancer": {
        "spec": {"type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "VIP"}]}},
    },
    "external IPs": {"spec": {"externalIPs": ["192.0.2.7"]}},
}


def merged(body: Any, changes: Any) -> Any:
    result = deepcopy(body)
    for part, fields in changes.items():
        result[part] |= fields
    return result


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_unusual_services(change: Any) -> None:
    reader = FrameReader(Service)
    for number in range(3):
        for body in (CLUSTER.service(number), dual_stack(number)):
            for variant in (body, merged(body, change)):
                with_version(variant, number)
                framed = reader.read(protobuf.frame("ADDED", variant)[4:])
                assert_equal_events(from_json(Service, "ADDED", variant), framed)


texts = st.sampled_from(["", "a", "web", "10.96.0.9", "\x92\x01\x09", "\n\x03abc", "x" * 130])
addresses = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.03", "fd00::1", "127.0.0.1", "x"])
conditions = st.fixed_dictionaries({}, optional=dict.fromkeys(("ready", "serving", "terminating"), st.booleans()))
slice_ports = st.fixed_dictionaries(
    {"name": st.sampled_from(["http", "", "x" * 63]), "port": st.sampled_from([80, 0, 8080])}
)
usual_endpoints = st.fixed_dictionaries(
    {
        "addresses": st.lists(
            st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.03", "fd00::1", "127.0.0.1", "x"]), max_size=2
        )
    },
    optional={
        "conditions": st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("ready", "serving", "terminating"), st.booleans())
        ),
        "hostname": texts,
        "targetRef": st.fixed_dictionaries({"kind": st.just("Pod"), "name": texts, "uid": texts}),
        "nodeName": st.sampled_from(["node-1", "node-2", "Not valid"]),
        "zone": texts,
        "hints": st.fixed_dictionaries({"forZones": st.lists(st.fixed_dictionaries({"name": texts}), max_size=2)}),
        "deprecatedTopology": st.dictionaries(texts, texts, max_size=1),
    },
)
slice_labels = st.fixed_dictionaries(
    {},
    optional={
        "kubernetes.io/service-name": st.sampled_from(["web", "db", "Not valid", "w" * 63]),
        "service.kubernetes.io/headless": st.just(""),
        "service.kubernetes.io/service-proxy-name": st.just("other"),
        "app": texts,
        "a": texts,
    },
)
slice_metadata = st.fixed_dictionaries(
    {"name": st.sampled_from(["web-1", "web.2", "w" * 130]), "namespace": st.sampled_from(["demo", "bench", "a.b"])},
    optional={
        "generateName": texts,
        "generation": st.integers(0, 300),
        "creationTimestamp": st.just("2026-11-20T23:47:39Z"),
        "deletionTimestamp": st.just("2026-11-20T23:47:39Z"),
        "deletionGracePeriodSeconds": st.integers(0, 300),
        "labels": slice_labels,
        "annotations": st.fixed_dictionaries(
            {},
            optional={
                "endpoints.kubernetes.io/last-change-trigger-time": st.sampled_from(
                    ["2026-11-20T23:47:39Z", "2026-11-20T23:47:40Z", "never"]
                ),
                "note": texts,
            },
        ),
        "ownerReferences": st.lists(st.fixed_dictionaries({"name": texts}), max_size=1),
    },
)
slices = st.fixed_dictionaries(
    {
        "metadata": slice_metadata,
        "addressType": st.sampled_from(["IPv4", "IPv4", "IPv6"]),
        "endpoints": st.lists(usual_endpoints, max_size=3),
        "ports": st.lists(slice_ports, max_size=2),
    }
)
changes = st.sampled_from(["MODIFIED", "MODIFIED", "MODIFIED", "ADDED", "DELETED"])


@given(st.lists(st.tuples(changes, slices), min_size=1, max_size=2), st.lists(st.integers(0, 1), max_size=4))
@settings(max_examples=400, deadline=None)
def test_sequences_of_events(pool: list[tuple[str, Any]], order: list[int]) -> None:
    """The reader returns `Unchanged` only if decoding would return the same as for the object's previous event."""
    reader = FrameReader(EndpointSlice)
    last: dict[tuple[str, str], Event] = {}
    for version, turn in enumerate([0, *order]):
        change, content = pool[turn % len(pool)]
        body = {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1"} | deepcopy(content)
        body["metadata"] |= {"resourceVersion": f"{version + 1}", "uid": "0b6f8a54"}
        plain = from_json(EndpointSlice, change, body)
        key = body["metadata"]["namespace"], body["metadata"]["name"]
        framed = reader.read(protobuf.frame(change, body)[4:])
        if isinstance(framed, Unchanged):
            framed = with_last_content(framed, last[key])
            assert isinstance(plain, DecodedObject)
        assert_equal_events(plain, framed)
        last[key] = plain


@pytest.mark.parametrize("kind", [Service, EndpointSlice])
@given(data=st.data())
@settings(max_examples=600, deadline=None)
def test_corrupted_content_decodes_as_field_by_field(kind: type[Service | EndpointSlice], data: st.DataObject) -> None:
    reader = CountingReader(kind)
    raws = [encoded(body) for body in bodies(kind)[:3]]
    for raw in raws:
        reader.read(raw)
    corrupted = bytearray(raws[2])
    size, start = varint(raws[2], 1)
    start += size  # the end of the metadata
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(start, len(corrupted) - 1))
        if data.draw(st.booleans()):
            corrupted[position] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(corrupted)))
        else:
            corrupted[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    raw = bytes(corrupted)
    try:
        expected = decode_object(kind, raw)
    except DECODING_ERRORS:
        with pytest.raises(DECODING_ERRORS):
            reader.read(raw)
    else:
        assert reader.read(raw) == expected


def test_long_endpoints_are_not_cached() -> None:
    reader = CountingReader(EndpointSlice)
    body = with_version(CLUSTER.endpoint_slice(300))
    sizes = []
    for path in ("first", "short", "x" * MAX_SHAPE_BYTES):
        for each in body["endpoints"]:
            each["targetRef"]["fieldPath"] = path
        assert reader.read(encoded(body)) == from_json(EndpointSlice, "ADDED", body)
        sizes.append(reader.cached_endpoints)
    assert sizes == [3, 6, 6]
