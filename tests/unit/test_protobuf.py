"""Protobuf decoding compared to JSON: objects from an independent encoder must decode to the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_error, read_line
from kproxy.kube.codec.protobuf import FrameReader, read_status
from kproxy.kube.codec.shapes import ENDPOINT_CACHE_SIZE
from kproxy.kube.codec.watch_events import Bookmark, Deleted, ErrorStatus, Event, Unchanged, UndecodableObject
from kproxy.kube.codec.wire_format import ProtobufError, boolean, integer, message, octets, text
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR
from tests.apiserver import protobuf
from tests.apiserver.objects import endpoint_slice, labeled, node, service, service_cidr
from tests.apiserver.statuses import error, expired_continue

TESTS = Path(__file__).parent.parent
KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node, ServiceCIDR)
TYPE_META: dict[Kind, dict[str, str]] = {
    Service: {"kind": "Service", "apiVersion": "v1"},
    EndpointSlice: {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1"},
    Node: {"kind": "Node", "apiVersion": "v1"},
    ServiceCIDR: {"kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1"},
}


def from_json(kind: Kind, change: str, body: Any) -> Event:
    return read_line(kind, json.dumps({"type": change, "object": body}).encode())


def from_frame(kind: Kind, change: str, body: Any) -> Event:
    return FrameReader(kind).read(protobuf.frame(change, body)[4:])


def assert_equal_events(plain: Event, framed: Event) -> None:
    if isinstance(plain, UndecodableObject):  # the wording of the error may differ
        assert isinstance(framed, UndecodableObject)
        assert (plain.namespace, plain.name) == (framed.namespace, framed.name)
        assert plain.resource_version == framed.resource_version
    else:
        assert plain == framed


def with_last_content(event: Event, last: Event | None) -> Event:
    """Return an event with the content of the last event of the object if the content is unchanged."""
    if not isinstance(event, Unchanged):
        return event
    assert isinstance(last, DecodedObject)
    return replace(last, resource_version=event.resource_version)


@pytest.mark.parametrize("kind", [Service, EndpointSlice])
@pytest.mark.parametrize("recording", ["watch", "watchlist"])
def test_recorded_watches(kind: Kind, recording: str) -> None:
    path = TESTS / "watch" / f"{kind.__name__.lower()}s.{recording}.jsonl"
    reader, count = FrameReader(kind), 0
    last: dict[tuple[str, str], Event] = {}
    for line in path.read_bytes().splitlines():
        plain = read_line(kind, line)
        assert not isinstance(plain, UndecodableObject)
        framed = reader.read(protobuf.frame_of_line(line)[4:])
        if isinstance(plain, DecodedObject):
            key = plain.namespace, plain.name
            assert with_last_content(framed, last.get(key)) == plain
            last[key] = plain
        else:
            assert framed == plain
        count += 1
    assert count > 10


@pytest.mark.parametrize(("kind", "file"), [(Service, "services"), (EndpointSlice, "endpointslices"), (Node, "nodes")])
def test_recorded_objects(kind: Kind, file: str) -> None:
    reader, count = FrameReader(kind), 0
    for path in sorted((TESTS / "golden").glob(f"*/{file}.json")):
        for item in json.loads(path.read_bytes())["items"]:
            plain = from_json(kind, "ADDED", item)
            assert isinstance(plain, DecodedObject)
            assert reader.read(protobuf.frame("ADDED", TYPE_META[kind] | item)[4:]) == plain
            count += 1
    assert count > 30


names = st.sampled_from(["web", "db-1", "a.b", "", "Not valid", "größe"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
addresses = st.sampled_from(["10.0.0.1", "10.0.0.02", "2001:db8::1", "::ffff:10.0.0.1", "db.example.org", ""])
numbers = st.sampled_from([1, 80, 300, 65535, 65536, 0, -1, 2**31 - 1])
protocols = st.sampled_from(["TCP", "UDP", "SCTP", "ICMP"])
policies = st.sampled_from(["Local", "Cluster"])
label_keys = st.sampled_from(
    [
        *(
            "kubernetes.io/service-name",
            "service.kubernetes.io/service-proxy-name",
            "app",
            "topology.kubernetes.io/zone",
        ),
        *("service.kubernetes.io/headless", "endpoints.kubernetes.io/last-change-trigger-time", "x" * 200),
    ]
)
labels = st.dictionaries(label_keys, st.one_of(names, st.just("2026-11-20T23:47:39Z"), st.just("y" * 200)), max_size=4)


def optional_fields(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


managed = optional_fields(
    manager=texts, operation=st.just("Update"), time=st.just("2026-11-20T23:47:39Z"), fieldsV1=st.just({"f:spec": {}})
)
metadata = st.fixed_dictionaries(
    {"name": names, "resourceVersion": st.sampled_from(["1", "12345"])},
    optional={
        "namespace": st.sampled_from(["demo", "default", "Not valid"]),
        "uid": texts,
        "generateName": texts,
        "generation": st.integers(-(2**63), 2**63 - 1),
        "creationTimestamp": st.just("2026-11-20T23:47:39Z"),
        "deletionTimestamp": st.just("2026-11-20T23:47:39Z"),
        "labels": labels,
        "annotations": labels,
        "finalizers": st.lists(texts, max_size=2),
        "managedFields": st.lists(managed, max_size=2),
    },
)
service_ports = optional_fields(
    name=names, protocol=protocols, port=numbers, targetPort=st.one_of(st.integers(0, 65535), texts), nodePort=numbers
)
service_specs = optional_fields(
    type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]),
    clusterIP=st.one_of(addresses, st.just("None")),
    clusterIPs=st.lists(addresses, max_size=2),
    ports=st.lists(service_ports, max_size=3),
    selector=st.dictionaries(texts, texts, max_size=2),
    sessionAffinity=st.sampled_from(["None", "ClientIP"]),
    sessionAffinityConfig=optional_fields(
        clientIP=optional_fields(timeoutSeconds=st.sampled_from([0, 1, 10800, 86400, 86401, -5]))
    ),
    internalTrafficPolicy=policies,
    externalTrafficPolicy=policies,
    externalIPs=st.lists(addresses, max_size=2),
    loadBalancerSourceRanges=st.lists(st.sampled_from(["10.0.0.0/8", " 192.0.2.1/24 ", "nonsense"]), max_size=2),
    healthCheckNodePort=numbers,
    publishNotReadyAddresses=st.booleans(),
    ipFamilies=st.lists(st.just("IPv4"), max_size=2),
    trafficDistribution=texts,
)
services = optional_fields(
    spec=service_specs,
    status=optional_fields(
        loadBalancer=optional_fields(
            ingress=st.lists(
                optional_fields(ip=addresses, ipMode=st.sampled_from(["VIP", "Proxy"]), hostname=texts), max_size=2
            )
        )
    ),
)
named = optional_fields(name=names)
endpoints = optional_fields(
    addresses=st.lists(addresses, max_size=2),
    conditions=optional_fields(ready=st.booleans(), serving=st.booleans(), terminating=st.booleans()),
    hostname=texts,
    nodeName=names,
    zone=names,
    targetRef=optional_fields(kind=texts, name=texts, uid=texts),
    hints=optional_fields(forZones=st.lists(named, max_size=2), forNodes=st.lists(named, max_size=2)),
)
endpoint_slices = optional_fields(
    addressType=st.sampled_from(["IPv4", "IPv6", "FQDN"]),
    endpoints=st.lists(endpoints, max_size=4),
    ports=st.lists(optional_fields(name=names, protocol=protocols, port=numbers, appProtocol=texts), max_size=2),
)
nodes = optional_fields(
    spec=optional_fields(
        podCIDR=st.sampled_from(["10.0.0.0/24", "nonsense"]),
        podCIDRs=st.lists(st.sampled_from(["10.0.0.0/24", "fd00::/64"]), max_size=2),
        taints=st.lists(
            optional_fields(key=st.sampled_from(["ToBeDeletedByClusterAutoscaler", "x"]), effect=texts), max_size=2
        ),
        unschedulable=st.booleans(),
    ),
    status=optional_fields(
        addresses=st.lists(
            optional_fields(type=st.sampled_from(["InternalIP", "ExternalIP", "Hostname"]), address=addresses),
            max_size=3,
        ),
        capacity=st.dictionaries(texts, texts, max_size=2),
        images=st.lists(
            optional_fields(names=st.lists(texts, max_size=2), sizeBytes=st.integers(0, 2**40)), max_size=2
        ),
    ),
)
service_cidrs = optional_fields(
    spec=optional_fields(cidrs=st.lists(st.sampled_from(["10.96.0.0/16", "fd00::/112", "x"]), max_size=2))
)
BODIES = {Service: services, EndpointSlice: endpoint_slices, Node: nodes, ServiceCIDR: service_cidrs}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_object_decodes_identically_from_protobuf_and_json(kind: Kind, data: st.DataObject) -> None:
    body = TYPE_META[kind] | {"metadata": data.draw(metadata)} | data.draw(BODIES[kind])
    change = data.draw(st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]))
    assert_equal_events(from_json(kind, change, body), from_frame(kind, change, body))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_cached_endpoints_equal_newly_decoded_ones(data: st.DataObject) -> None:
    reader = FrameReader(EndpointSlice)
    pool = data.draw(st.lists(endpoints, min_size=1, max_size=4))
    last: Event | None = None
    for version in range(4):
        body: dict[str, Any] = TYPE_META[EndpointSlice] | endpoint_slice("web-1", "web", [])
        body["addressType"] = data.draw(st.sampled_from(["IPv4", "IPv6"]))
        body["endpoints"] = data.draw(st.lists(st.sampled_from(pool), max_size=4))
        body["metadata"]["resourceVersion"] = f"{version + 1}"
        framed = with_last_content(reader.read(protobuf.frame("MODIFIED", body)[4:]), last)
        last = from_json(EndpointSlice, "MODIFIED", body)
        assert_equal_events(last, framed)


def test_repeated_endpoint_is_the_same_object() -> None:
    reader = FrameReader(EndpointSlice)

    def read(*addresses: str) -> EndpointSlice:
        body = endpoint_slice("web-1", "web", addresses)
        body["metadata"]["resourceVersion"] = "1"
        event = reader.read(protobuf.frame("MODIFIED", body)[4:])
        assert isinstance(event, DecodedObject)
        assert isinstance(event.object, EndpointSlice)
        return event.object

    read("10.0.0.9")  # the first slice is decoded field by field
    first, second = read("10.0.0.1", "10.0.0.2"), read("10.0.0.2", "10.0.0.3")
    assert first.endpoints[1] is second.endpoints[0]
    read(*(f"10.{number >> 8}.{number & 255}.9" for number in range(ENDPOINT_CACHE_SIZE)))
    assert read("10.0.0.1").endpoints[0] is not first.endpoints[0], "the cache has a maximum size"


def test_bookmark_events() -> None:
    body: dict[str, Any] = {"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "96"}}
    assert from_frame(Service, "BOOKMARK", body) == Bookmark("96", initial_events_end=False)
    body["metadata"] |= {"annotations": {"k8s.io/initial-events-end": "true"}}
    assert from_frame(Service, "BOOKMARK", body) == Bookmark("96", initial_events_end=True)


def test_deleted_event() -> None:
    assert from_frame(Node, "DELETED", node("node-1")) == Deleted("", "node-1", "")


STATUSES = [error(429, 7), error(410, None), expired_continue("token"), error(503, None)]


@pytest.mark.parametrize("body", STATUSES)
def test_error_events_and_error_responses(body: dict[str, Any]) -> None:
    plain = from_json(Service, "ERROR", body)
    assert isinstance(plain, ErrorStatus)
    assert from_frame(Service, "ERROR", body) == plain
    text = json.dumps(body).encode()
    assert read_error(body["code"], {}, protobuf.enveloped(body)) == read_error(body["code"], {}, text)


def test_error_response_with_malformed_protobuf_keeps_code_and_retry_after() -> None:
    status = read_error(503, {"Retry-After": "3"}, protobuf.enveloped(error(503, None))[:-3])
    assert (status.code, status.retry_after) == (503, 3.0)


def test_error_event_without_a_status_is_undecodable() -> None:
    assert isinstance(from_frame(Service, "ERROR", service("web", "10.96.7.1")), UndecodableObject)


def test_invalid_object_is_reported_with_its_name() -> None:
    event = from_frame(Service, "ADDED", service("web", "10.96.7.1", port=70_000))
    assert event == UndecodableObject("demo", "web", "", "spec.ports[0].port must be from 1 to 65535, not 70000")
    body = service("web", "10.96.7.1")
    body["spec"]["ports"][0]["protocol"] = "ICMP"
    event = from_frame(Service, "ADDED", body)
    assert event == UndecodableObject(
        "demo", "web", "", 'spec.ports[0].protocol must be one of TCP, UDP, SCTP, not "ICMP"'
    )


GOOD: dict[Kind, dict[str, Any]] = {
    Service: labeled(service("web", "10.96.7.1"), app="web"),
    EndpointSlice: endpoint_slice("web-1", "web", ["10.0.0.1", "10.0.0.2"]),
    Node: node("node-1"),
    ServiceCIDR: service_cidr("kubernetes", "10.96.0.0/16"),
}


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (b"", "a message is truncated"),
        (protobuf.encode("WatchEvent", {"type": "ADDED"}), "a message is truncated"),
        (
            protobuf.encode("WatchEvent", {"type": "ADDED", "object": {"raw": b"{}"}}),
            "must start with b'k8s\\x00', not b'{}'",
        ),
        (protobuf.frame("ADDED", GOOD[Node])[4:], 'kind must be Service, not "Node"'),
        (
            protobuf.frame("SYNC", GOOD[Service])[4:],
            'type must be one of ADDED, MODIFIED, DELETED, BOOKMARK, ERROR, not "SYNC"',
        ),
        (protobuf.frame("ADDED", GOOD[Service])[4:-1], "a field extends past the end of its message"),
        (b"\n" + b"\xff" * 40, "a varint is longer than 64 bits"),
        (b"\x12\0\n\5ADDED", "expected field 1, but found tag 0x12"),
        (b"\x0a", "a message is truncated"),
        (b'{"type":"ADDED"}', "expected field 1, but found tag 0x7b"),
    ],
)
def test_malformed_frames(frame: bytes, error: str) -> None:
    event = FrameReader(Service).read(frame)
    assert isinstance(event, UndecodableObject)
    assert (event.namespace, event.name) == ("", "")
    assert error in event.text


@pytest.mark.parametrize("encoding", [{"contentEncoding": "gzip"}, {"contentType": "application/json"}])
def test_object_in_another_encoding_is_undecodable(encoding: dict[str, str]) -> None:
    head = {"typeMeta": {"kind": "Service"}, "raw": b"\n\0"}
    raw = protobuf.MAGIC + protobuf.encode("Unknown", head | encoding)
    event = FrameReader(Service).read(protobuf.encode("WatchEvent", {"type": "ADDED", "object": {"raw": raw}}))
    assert isinstance(event, UndecodableObject)
    assert next(iter(encoding.values())) in event.text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_corrupted_frames_never_raise(kind: Kind, data: st.DataObject) -> None:
    frame = bytearray(protobuf.frame("MODIFIED", GOOD[kind])[4:])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(frame) - 1))
        mutation = data.draw(st.sampled_from(["change", "cut", "insert", "delete"]))
        if mutation == "change":
            frame[position] = data.draw(st.integers(0, 255))
        elif mutation == "insert":
            frame[position:position] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(frame) > 9:
            del frame[position : None if mutation == "cut" and position > 8 else position + 1]
    event = FrameReader(kind).read(bytes(frame))
    assert isinstance(event, DecodedObject | Deleted | Bookmark | UndecodableObject | ErrorStatus)


@given(frame=st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
@example(frame=b"\n\x05ADDED\x12\x06\n\x04k8s\0")
def test_random_bytes_never_raise(frame: bytes) -> None:
    for kind in KINDS:
        assert isinstance(FrameReader(kind).read(frame), UndecodableObject | Bookmark | ErrorStatus)


@given(body=st.binary(max_size=100))
def test_error_response_with_random_bytes_does_not_raise(body: bytes) -> None:
    assert read_error(500, {}, protobuf.MAGIC + body).code == 500
    with pytest.raises(ProtobufError):
        read_status(body)


def test_unknown_fields_are_skipped() -> None:
    read: Callable[[bytes], dict[str, Any]] = message(
        dict, name=text(1), number=integer(2), flag=boolean(3), far=text(300), all=octets(4, repeated=True)
    )
    fixed = b"\x51" + b"\xff" * 8 + b"\x5d" + b"\xff" * 4  # fields 10 and 11 of 64 and 32 bits
    unknown = b"\x62\x80\x01" + b"\x08" * 128 + b"\x68\x96\x01" + fixed
    far = b"\xe2\x12\x03far"
    with pytest.raises(ProtobufError, match="wire type 3"):
        read(b"\x0b\x0a\x01a")
    raw = b"\x0a\x01a" + unknown + b"\x10" + b"\xff" * 9 + b"\x01" + far + b"\x18\x00" + b"\x22\x00\x22\x01b"
    assert read(raw) == {"name": "a", "number": -1, "far": "far", "flag": False, "all": [b"", b"b"]}
    for size in range(1, len(fixed)):
        if size != 9:  # the first of the two is complete
            with pytest.raises((ProtobufError, IndexError)):
                read(fixed[:size])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_in_a_frame_must_fit_together(kind: Kind) -> None:
    frame = protobuf.frame("MODIFIED", GOOD[kind])[4:]
    assert isinstance(FrameReader(kind).read(frame), DecodedObject)
    event, envelope = frame.index(b"\x12"), frame.index(b"k8s\0")
    raw = frame.index(kind.__name__.encode(), envelope) + len(kind.__name__)
    for position in (event + 1, frame.index(b"\n", event + 1) + 1, raw + 1):
        for change in (1, -1):
            wrong = bytearray(frame)
            wrong[position] += change
            assert isinstance(FrameReader(kind).read(bytes(wrong)), UndecodableObject), (position, change)
    wrong = bytearray(frame.replace(b"MODIFIED", b"ADDED"))
    assert isinstance(FrameReader(kind).read(bytes(wrong)), UndecodableObject)
