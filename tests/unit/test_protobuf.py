"""Protobuf against JSON: the same objects, written by another package's encoder, must read as the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_line, read_refusal
from kproxy.kube.codec.protobuf import (
    KEPT_ENDPOINTS,
    FrameReader,
    ProtobufError,
    boolean,
    integer,
    message,
    octets,
    read_status,
    text,
)
from kproxy.kube.codec.watch_events import Bookmark, Deleted, ErrorStatus, Event, UndecodableObject
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR
from tests.apiserver import protobuf
from tests.apiserver.objects import endpoint_slice, labeled, node, service, service_cidr
from tests.apiserver.statuses import error, expired_continue

TESTS = Path(__file__).parent.parent
KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node, ServiceCIDR)
HEADS: dict[Kind, dict[str, str]] = {
    Service: {"kind": "Service", "apiVersion": "v1"},
    EndpointSlice: {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1"},
    Node: {"kind": "Node", "apiVersion": "v1"},
    ServiceCIDR: {"kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1"},
}


def from_json(kind: Kind, change: str, body: Any) -> Event:
    return read_line(kind, json.dumps({"type": change, "object": body}).encode())


def from_frame(kind: Kind, change: str, body: Any) -> Event:
    return FrameReader(kind).read(protobuf.frame(change, body)[4:])


def assert_same(plain: Event, framed: Event) -> None:
    if isinstance(plain, UndecodableObject):  # what is wrong is worded by whoever found it
        assert isinstance(framed, UndecodableObject)
        assert (plain.namespace, plain.name) == (framed.namespace, framed.name)
        assert plain.resource_version == framed.resource_version
    else:
        assert plain == framed


@pytest.mark.parametrize("kind", [Service, EndpointSlice])
@pytest.mark.parametrize("recording", ["watch", "watchlist"])
def test_recorded_watches(kind: Kind, recording: str) -> None:
    path = TESTS / "watch" / f"{kind.__name__.lower()}s.{recording}.jsonl"
    reader, seen = FrameReader(kind), 0
    for line in path.read_bytes().splitlines():
        plain = read_line(kind, line)
        assert not isinstance(plain, UndecodableObject)
        assert reader.read(protobuf.frame_of_line(line)[4:]) == plain
        seen += 1
    assert seen > 10


@pytest.mark.parametrize(("kind", "file"), [(Service, "services"), (EndpointSlice, "endpointslices"), (Node, "nodes")])
def test_recorded_objects(kind: Kind, file: str) -> None:
    reader, seen = FrameReader(kind), 0
    for path in sorted((TESTS / "golden").glob(f"*/{file}.json")):
        for item in json.loads(path.read_bytes())["items"]:
            plain = from_json(kind, "ADDED", item)
            assert isinstance(plain, DecodedObject)
            assert reader.read(protobuf.frame("ADDED", HEADS[kind] | item)[4:]) == plain
            seen += 1
    assert seen > 30


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


def some(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


managed = some(
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
service_ports = some(
    name=names, protocol=protocols, port=numbers, targetPort=st.one_of(st.integers(0, 65535), texts), nodePort=numbers
)
service_specs = some(
    type=st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]),
    clusterIP=st.one_of(addresses, st.just("None")),
    clusterIPs=st.lists(addresses, max_size=2),
    ports=st.lists(service_ports, max_size=3),
    selector=st.dictionaries(texts, texts, max_size=2),
    sessionAffinity=st.sampled_from(["None", "ClientIP"]),
    sessionAffinityConfig=some(clientIP=some(timeoutSeconds=st.sampled_from([0, 1, 10800, 86400, 86401, -5]))),
    internalTrafficPolicy=policies,
    externalTrafficPolicy=policies,
    externalIPs=st.lists(addresses, max_size=2),
    loadBalancerSourceRanges=st.lists(st.sampled_from(["10.0.0.0/8", " 192.0.2.1/24 ", "nonsense"]), max_size=2),
    healthCheckNodePort=numbers,
    publishNotReadyAddresses=st.booleans(),
    ipFamilies=st.lists(st.just("IPv4"), max_size=2),
    trafficDistribution=texts,
)
services = some(
    spec=service_specs,
    status=some(
        loadBalancer=some(
            ingress=st.lists(some(ip=addresses, ipMode=st.sampled_from(["VIP", "Proxy"]), hostname=texts), max_size=2)
        )
    ),
)
named = some(name=names)
endpoints = some(
    addresses=st.lists(addresses, max_size=2),
    conditions=some(ready=st.booleans(), serving=st.booleans(), terminating=st.booleans()),
    hostname=texts,
    nodeName=names,
    zone=names,
    targetRef=some(kind=texts, name=texts, uid=texts),
    hints=some(forZones=st.lists(named, max_size=2), forNodes=st.lists(named, max_size=2)),
)
endpoint_slices = some(
    addressType=st.sampled_from(["IPv4", "IPv6", "FQDN"]),
    endpoints=st.lists(endpoints, max_size=4),
    ports=st.lists(some(name=names, protocol=protocols, port=numbers, appProtocol=texts), max_size=2),
)
nodes = some(
    spec=some(
        podCIDR=st.sampled_from(["10.0.0.0/24", "nonsense"]),
        podCIDRs=st.lists(st.sampled_from(["10.0.0.0/24", "fd00::/64"]), max_size=2),
        taints=st.lists(some(key=st.sampled_from(["ToBeDeletedByClusterAutoscaler", "x"]), effect=texts), max_size=2),
        unschedulable=st.booleans(),
    ),
    status=some(
        addresses=st.lists(
            some(type=st.sampled_from(["InternalIP", "ExternalIP", "Hostname"]), address=addresses), max_size=3
        ),
        capacity=st.dictionaries(texts, texts, max_size=2),
        images=st.lists(some(names=st.lists(texts, max_size=2), sizeBytes=st.integers(0, 2**40)), max_size=2),
    ),
)
service_cidrs = some(spec=some(cidrs=st.lists(st.sampled_from(["10.96.0.0/16", "fd00::/112", "x"]), max_size=2)))
BODIES = {Service: services, EndpointSlice: endpoint_slices, Node: nodes, ServiceCIDR: service_cidrs}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_object_reads_the_same_as_its_json(kind: Kind, data: st.DataObject) -> None:
    body = HEADS[kind] | {"metadata": data.draw(metadata)} | data.draw(BODIES[kind])
    change = data.draw(st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]))
    assert_same(from_json(kind, change, body), from_frame(kind, change, body))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_endpoints_that_come_again_are_as_they_would_be_read_anew(data: st.DataObject) -> None:
    reader = FrameReader(EndpointSlice)
    pool = data.draw(st.lists(endpoints, min_size=1, max_size=4))
    for _ in range(4):
        body: dict[str, Any] = HEADS[EndpointSlice] | endpoint_slice("web-1", "web", [])
        body["addressType"] = data.draw(st.sampled_from(["IPv4", "IPv6"]))
        body["endpoints"] = data.draw(st.lists(st.sampled_from(pool), max_size=4))
        assert_same(from_json(EndpointSlice, "MODIFIED", body), reader.read(protobuf.frame("MODIFIED", body)[4:]))


def test_an_endpoint_that_comes_again_is_the_very_same_value() -> None:
    reader = FrameReader(EndpointSlice)

    def read(*addresses: str) -> EndpointSlice:
        event = reader.read(protobuf.frame("MODIFIED", endpoint_slice("web-1", "web", addresses))[4:])
        assert isinstance(event, DecodedObject)
        assert isinstance(event.object, EndpointSlice)
        return event.object

    first, second = read("10.0.0.1", "10.0.0.2"), read("10.0.0.2", "10.0.0.3")
    assert first.endpoints[1] is second.endpoints[0]
    read(*(f"10.{number >> 8}.{number & 255}.9" for number in range(KEPT_ENDPOINTS)))
    assert read("10.0.0.1").endpoints[0] is not first.endpoints[0], "what is remembered has a bound"


def test_bookmarks() -> None:
    body: dict[str, Any] = {"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "96"}}
    assert from_frame(Service, "BOOKMARK", body) == Bookmark("96", ends_initial=False)
    body["metadata"] |= {"annotations": {"k8s.io/initial-events-end": "true"}}
    assert from_frame(Service, "BOOKMARK", body) == Bookmark("96", ends_initial=True)


def test_a_deletion() -> None:
    assert from_frame(Node, "DELETED", node("node-1")) == Deleted("", "node-1", "")


STATUSES = [error(429, 7), error(410, None), expired_continue("token"), error(503, None)]


@pytest.mark.parametrize("body", STATUSES)
def test_errors_and_refusals(body: dict[str, Any]) -> None:
    plain = from_json(Service, "ERROR", body)
    assert isinstance(plain, ErrorStatus)
    assert from_frame(Service, "ERROR", body) == plain
    text = json.dumps(body).encode()
    assert read_refusal(body["code"], {}, protobuf.enveloped(body)) == read_refusal(body["code"], {}, text)


def test_a_refusal_in_broken_protobuf_is_still_one() -> None:
    found = read_refusal(503, {"Retry-After": "3"}, protobuf.enveloped(error(503, None))[:-3])
    assert (found.code, found.retry_after) == (503, 3.0)


def test_an_error_that_is_no_status_is_unreadable() -> None:
    assert isinstance(from_frame(Service, "ERROR", service("web", "10.96.7.1")), UndecodableObject)


def test_what_is_wrong_is_said_with_the_name() -> None:
    event = from_frame(Service, "ADDED", service("web", "10.96.7.1", port=70_000))
    assert event == UndecodableObject(
        "demo", "web", "", "Expected a port from 1 to 65535, got 70000 - at `$.spec.ports[...].port`"
    )
    body = service("web", "10.96.7.1")
    body["spec"]["ports"][0]["protocol"] = "ICMP"
    event = from_frame(Service, "ADDED", body)
    assert event == UndecodableObject(
        "demo", "web", "", "Expected TCP, UDP or SCTP, got 'ICMP' - at `ports[...].protocol`"
    )


GOOD: dict[Kind, dict[str, Any]] = {
    Service: labeled(service("web", "10.96.7.1"), app="web"),
    EndpointSlice: endpoint_slice("web-1", "web", ["10.0.0.1", "10.0.0.2"]),
    Node: node("node-1"),
    ServiceCIDR: service_cidr("kubernetes", "10.96.0.0/16"),
}


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"", "a message is cut off"),
        (protobuf.encode("WatchEvent", {"type": "ADDED"}), "a message is cut off"),
        (
            protobuf.encode("WatchEvent", {"type": "ADDED", "object": {"raw": b"{}"}}),
            "begins with b'k8s\\x00', got b'{}'",
        ),
        (protobuf.frame("ADDED", GOOD[Node])[4:], "Expected a Service, got 'Node'"),
        (protobuf.frame("SYNC", GOOD[Service])[4:], "got 'SYNC'"),
        (protobuf.frame("ADDED", GOOD[Service])[4:-1], "a field is longer than its message"),
        (b"\n" + b"\xff" * 40, "a number of more than 64 bits"),
        (b"\x12\0\n\5ADDED", "Expected field 1, got 0x12"),
        (b"\x0a", "a message is cut off"),
        (b'{"type":"ADDED"}', "Expected field 1, got 0x7b"),
    ],
)
def test_frames_that_are_none(frame: bytes, said: str) -> None:
    event = FrameReader(Service).read(frame)
    assert isinstance(event, UndecodableObject)
    assert (event.namespace, event.name) == ("", "")
    assert said in event.text


@pytest.mark.parametrize("odd", [{"contentEncoding": "gzip"}, {"contentType": "application/json"}])
def test_an_object_in_another_form_is_unreadable(odd: dict[str, str]) -> None:
    head = {"typeMeta": {"kind": "Service"}, "raw": b"\n\0"}
    raw = protobuf.MAGIC + protobuf.encode("Unknown", head | odd)
    event = FrameReader(Service).read(protobuf.encode("WatchEvent", {"type": "ADDED", "object": {"raw": raw}}))
    assert isinstance(event, UndecodableObject)
    assert next(iter(odd.values())) in event.text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_garbage_never_raises(kind: Kind, data: st.DataObject) -> None:
    frame = bytearray(protobuf.frame("MODIFIED", GOOD[kind])[4:])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        how = data.draw(st.sampled_from(["change", "cut", "insert", "delete"]))
        if how == "change":
            frame[place] = data.draw(st.integers(0, 255))
        elif how == "insert":
            frame[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(frame) > 9:
            del frame[place : None if how == "cut" and place > 8 else place + 1]
    event = FrameReader(kind).read(bytes(frame))
    assert isinstance(event, DecodedObject | Deleted | Bookmark | UndecodableObject | ErrorStatus)


@given(frame=st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
@example(frame=b"\n\x05ADDED\x12\x06\n\x04k8s\0")
def test_random_bytes_never_raise(frame: bytes) -> None:
    for kind in KINDS:
        assert isinstance(FrameReader(kind).read(frame), UndecodableObject | Bookmark | ErrorStatus)


@given(body=st.binary(max_size=100))
def test_no_body_of_a_refusal_raises_anything_else(body: bytes) -> None:
    assert read_refusal(500, {}, protobuf.MAGIC + body).code == 500
    with pytest.raises(ProtobufError):
        read_status(body)


def test_fields_are_found_whatever_is_between_them() -> None:
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
