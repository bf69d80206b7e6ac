"""The list/watch state machine, fed with recorded responses of a real API server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.kube.codec.json_codec import decode_object, read_line
from kproxy.kube.codec.watch_events import Unchanged, UndecodableObject
from kproxy.kube.listwatch.protocol import IgnoredFields, InvalidObject, ListWatch, ListWatchRequest, ListWatchStep
from kproxy.model.delta import Delete, Kind, Object, Replace, Upsert
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

RECORDED = Path(__file__).parent.parent / "watch"
Key = tuple[str, str]
STREAMING_LIST_UNSUPPORTED = (RECORDED / "watchlist-unsupported-by-old-etcd.jsonl").read_bytes().strip()
BOOKMARK = b'{"type":"BOOKMARK","object":{"kind":"Service","metadata":{"resourceVersion":"%d"%b}}}'


def end_of_list(version: int) -> bytes:
    """Return the bookmark that ends the initial events of a streaming list."""
    return BOOKMARK % (version, b',"annotations":{"k8s.io/initial-events-end":"true"}')


END_OF_LIST = end_of_list(200)


def recorded_lines(name: str) -> list[bytes]:
    return (RECORDED / name).read_bytes().splitlines()


def recorded_response(name: str) -> tuple[int, dict[str, str], bytes]:
    head, _, body = (RECORDED / name).read_text().partition("\n\n")
    first, *rest = head.splitlines()
    return int(first.split()[1]), dict(line.split(": ", 1) for line in rest), body.encode()


class JsonListWatch(ListWatch):
    """A list/watch state machine that is fed with the JSON lines of a watch."""

    def handle_line(self, raw: bytes) -> ListWatchStep:
        return self.handle_event(read_line(self._kind, raw))


def new_watch(kind: Kind = Service, random: float = 0.5) -> JsonListWatch:
    return JsonListWatch(kind, "node-1", lambda: random)


@dataclass
class Consumer:
    """A consumer of the messages: the objects that it knows, and the problems that were reported to it."""

    objects: dict[Key, Object] = field(default_factory=dict)
    problems: list[InvalidObject] = field(default_factory=list)
    replaces: int = 0

    def consume(self, step: ListWatchStep) -> ListWatchStep:
        for message in step.messages:
            if isinstance(message, InvalidObject):
                self.problems.append(message)
            elif isinstance(message, Upsert):
                self.objects[object_key(message.object)] = message.object
            elif isinstance(message, Delete):
                self.objects.pop((message.namespace, message.name), None)
            else:
                assert isinstance(message, Replace)
                self.replaces += 1
                kept = {key: self.objects[key] for key in message.unreadable if key in self.objects}
                self.objects = kept | {object_key(item): item for item in message.objects}
        return step


def object_key(item: Object) -> Key:
    return ("" if isinstance(item, Node | ServiceCIDR) else item.namespace), item.name


def expected_objects(kind: Kind, items: Iterable[Any], events: Iterable[bytes]) -> dict[Key, Object]:
    """Return the objects that exist at the end of a recording, by the simplest possible replay."""
    known: dict[Key, Object] = {}
    changes = [("ADDED", item) for item in items]
    for line in events:
        event = json.loads(line)
        changes.append((event["type"], event["object"]))
    for change, body in changes:
        if change == "BOOKMARK":
            continue
        decoded = decode_object(kind, body)
        known.pop((decoded.namespace, decoded.name), None)
        if change != "DELETED" and decoded.object is not None:
            known[decoded.namespace, decoded.name] = decoded.object
    return known


KINDS = [(Service, "services"), (EndpointSlice, "endpointslices")]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_recorded_streaming_list(kind: Kind, name: str) -> None:
    watch, consumer, lines = new_watch(kind), Consumer(), recorded_lines(f"{name}.watchlist.jsonl")
    end = next(number for number, line in enumerate(lines) if b"initial-events-end" in line)
    assert watch.next_request().params["sendInitialEvents"] == "true"
    for number, line in enumerate(lines):
        assert consumer.consume(watch.handle_line(line)).reconnect_after is None
        assert consumer.replaces == (1 if number >= end else 0)
        if number == end:
            assert consumer.objects == expected_objects(kind, [], lines[: end + 1])
    assert consumer.objects == expected_objects(kind, [], lines)
    assert not consumer.problems
    assert watch.handle_close(75.0) == ListWatchStep(reconnect_after=0.0)
    last = json.loads(lines[-1])["object"]["metadata"]["resourceVersion"]
    params = watch.next_request().params
    assert params["resourceVersion"] == last
    assert "sendInitialEvents" not in params


def test_recorded_paginated_list() -> None:
    watch, consumer = new_watch(), Consumer()
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    first = watch.next_request()
    assert (first.watch, first.params["limit"], "continue" in first.params) == (False, "500", False)
    page_1, page_2 = recorded_response("list-page-1.txt")[2], recorded_response("list-page-2.txt")[2]
    assert consumer.consume(watch.handle_page(page_1)) == ListWatchStep(reconnect_after=0.0)
    token = json.loads(page_1)["metadata"]["continue"]
    assert watch.next_request().params["continue"] == token
    consumer.consume(watch.handle_page(page_2))
    items = json.loads(page_1)["items"] + json.loads(page_2)["items"]
    assert (consumer.replaces, consumer.objects) == (1, expected_objects(Service, items, []))
    assert len(consumer.objects) == 4
    request = watch.next_request()
    assert (request.watch, request.params["resourceVersion"]) == (True, "2695")


def test_rejected_streaming_list_is_never_requested_again() -> None:
    watch = new_watch()
    assert watch.handle_line(STREAMING_LIST_UNSUPPORTED) == ListWatchStep(reconnect_after=0.0)
    assert not watch.next_request().watch
    watch.handle_page(b'{"metadata":{"resourceVersion":"7"},"items":[]}')
    watch.handle_line((RECORDED / "watch-too-old.txt").read_bytes().splitlines()[-1])
    assert not watch.next_request().watch


@pytest.mark.parametrize(("status", "reason"), [(422, "Invalid"), (400, "BadRequest"), (403, "Invalid")])
def test_streaming_list_rejected_with_a_status_falls_back_to_paging(status: int, reason: str) -> None:
    watch = new_watch()
    text = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
    body = json.dumps({"kind": "Status", "code": status, "reason": reason, "message": text}).encode()
    assert watch.handle_status(status, {}, body) == ListWatchStep(reconnect_after=0.0)
    request = watch.next_request()
    assert not request.watch
    assert "fieldSelector" in request.params


def test_falls_back_to_paging_if_the_server_ignores_send_initial_events() -> None:
    watch, consumer = new_watch(), Consumer()
    line = recorded_lines("services.watchlist.jsonl")[0]
    assert consumer.consume(watch.handle_line(line)) == ListWatchStep()
    assert consumer.consume(watch.handle_line(BOOKMARK % (9, b""))) == ListWatchStep(reconnect_after=0.0)
    assert not watch.next_request().watch


def test_falls_back_to_paging_if_the_server_sends_no_bookmark_either() -> None:
    watch = new_watch()
    watch.handle_line(recorded_lines("services.watchlist.jsonl")[0])
    assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
    assert not watch.next_request().watch


def test_inactivity_does_not_fall_back_to_paging_once_a_streaming_list_worked() -> None:
    watch = synced_watch()
    watch.handle_line(ERROR_410)
    assert watch.handle_inactivity().reconnect_after == pytest.approx(0.8)
    assert watch.next_request().params["sendInitialEvents"] == "true"


ERROR_410 = (RECORDED / "watch-too-old.txt").read_bytes().splitlines()[-1]


def synced_watch(kind: Kind = Service, random: float = 0.5) -> JsonListWatch:
    """Return a state machine that has completed its list, at resourceVersion 96."""
    watch = new_watch(kind, random)
    for line in recorded_lines("services.watchlist.jsonl")[:9] if kind is Service else []:
        watch.handle_line(line)
    if kind is not Service:
        watch.handle_line(end_of_list(96))
    watch.handle_open()
    return watch


PROTOBUF_OR_JSON = "application/vnd.kubernetes.protobuf;stream=watch,application/json"


def test_request_of_each_kind() -> None:
    ours = "!service.kubernetes.io/service-proxy-name"
    ours_with_ip = f"{ours},!service.kubernetes.io/headless"
    common = {
        "watch": "1",
        "allowWatchBookmarks": "true",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
    }
    fields = "spec.clusterIP!=None,spec.type!=ExternalName"
    expected: dict[Kind, ListWatchRequest] = {
        Service: ListWatchRequest(
            "/api/v1/services", {"labelSelector": ours, "fieldSelector": fields} | common, True, PROTOBUF_OR_JSON
        ),
        EndpointSlice: ListWatchRequest(
            "/apis/discovery.k8s.io/v1/endpointslices", {"labelSelector": ours_with_ip} | common, True, PROTOBUF_OR_JSON
        ),
        Node: ListWatchRequest(
            "/api/v1/nodes", {"fieldSelector": "metadata.name=node-1"} | common, True, PROTOBUF_OR_JSON
        ),
        ServiceCIDR: ListWatchRequest("/apis/networking.k8s.io/v1/servicecidrs", common, True, PROTOBUF_OR_JSON),
    }
    for kind, request in expected.items():
        for random, seconds in ((0.0, "300"), (0.999999, "600")):
            actual = new_watch(kind, random).next_request()
            assert actual == ListWatchRequest(
                request.path, request.params | {"timeoutSeconds": seconds}, True, PROTOBUF_OR_JSON
            )


@pytest.mark.parametrize("response", [ERROR_410, (410, b"{}")])
def test_410_relists_at_once_then_with_backoff(response: Any) -> None:
    watch = synced_watch()

    def expire() -> ListWatchStep:
        if isinstance(response, bytes):
            return watch.handle_line(response)
        return watch.handle_status(response[0], {}, response[1])

    delays = []
    for _ in range(3):
        delays.append(expire().reconnect_after)
        assert watch.next_request().params["sendInitialEvents"] == "true"
        watch.handle_line(END_OF_LIST)
    assert delays == [0.0, pytest.approx(1.6), pytest.approx(3.2)]
    watch.handle_line(recorded_lines("services.watchlist.jsonl")[9])
    assert expire().reconnect_after == 0.0


@pytest.mark.parametrize("recording", ["list-continue-too-old.txt", "list-bad-continue.txt"])
def test_rejected_continue_token_restarts_the_list(recording: str) -> None:
    watch, consumer = new_watch(), Consumer()
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    watch.handle_page(recorded_response("list-page-1.txt")[2])
    assert watch.handle_status(*recorded_response(recording)).reconnect_after == 0.0
    request = watch.next_request()
    assert "continue" not in request.params
    assert "fieldSelector" in request.params
    consumer.consume(watch.handle_page(recorded_response("list-page-2.txt")[2]))
    assert len(consumer.objects) == 2


def test_other_errors_relist_with_backoff() -> None:
    watch, delays = synced_watch(), []
    error = b'{"type":"ERROR","object":{"kind":"Status","code":500,"reason":"InternalError","message":"etcd"}}'
    for _ in range(3):
        delays.append(watch.handle_line(error).reconnect_after)
        assert watch.error == "must relist services: 500 InternalError: etcd"
        assert watch.next_request().params["sendInitialEvents"] == "true"
        assert watch.handle_line(END_OF_LIST).reconnect_after is None
    assert delays == [pytest.approx(0.8), pytest.approx(1.6), pytest.approx(3.2)]
    watch.handle_line(recorded_lines("services.watchlist.jsonl")[9])
    assert watch.handle_line(error).reconnect_after == pytest.approx(0.8)


def test_error_event_with_retry_after_delays_the_relist() -> None:
    error = b'{"type":"ERROR","object":{"code":500,"message":"x","details":{"retryAfterSeconds":9}}}'
    assert synced_watch(random=0.0).handle_line(error).reconnect_after == 9.0


@pytest.mark.parametrize("code", [401, 429, 503, 504])
def test_transient_error_resumes_the_watch_after_backoff(code: int) -> None:
    watch = synced_watch()
    step = watch.handle_line(b'{"type":"ERROR","object":{"code":%d,"message":"x"}}' % code)
    assert step.reconnect_after == pytest.approx(0.8)
    assert step.renew_credentials == (code == 401)
    assert watch.next_request().params["resourceVersion"] == "96"


def test_failures_back_off_with_jitter_until_an_event_arrives() -> None:
    for random, factor in ((0.0, 0.75), (1.0, 1.25)):
        watch = synced_watch(random=random)
        delays = [watch.handle_failure("reset by peer").reconnect_after for _ in range(8)]
        expected = [0.8, 1.6, 3.2, 6.4, 12.8, 24.0, 24.0, 24.0]
        assert delays == [pytest.approx(seconds * factor) for seconds in expected]
        watch.handle_open()
        assert watch.handle_failure("again").reconnect_after == pytest.approx(24.0 * factor)
        watch.handle_line(BOOKMARK % (97, b""))
        assert watch.handle_failure("again").reconnect_after == pytest.approx(0.8 * factor)
        assert watch.next_request().params["resourceVersion"] == "97"


def test_short_lived_watches_back_off() -> None:
    watch = synced_watch()
    assert watch.handle_close(0.2).reconnect_after == pytest.approx(0.8)
    assert watch.handle_close(0.2).reconnect_after == pytest.approx(1.6)
    assert watch.handle_close(300.0).reconnect_after == 0.0


def test_inactive_watch_is_resumed_at_once() -> None:
    watch = synced_watch()
    assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
    assert watch.error == "cannot watch services: no data received for 90 s"
    assert watch.next_request().params["resourceVersion"] == "96"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "body", "delay"),
    [
        ({"Retry-After": "7"}, b"", 7.0),
        ({"retry-after": "7"}, b"{}", 7.0),
        ({}, b'{"details":{"retryAfterSeconds":9}}', 9.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"", 0.6),
        ({}, b"<html>Bad gateway</html>", 0.6),
    ],
)
def test_retry_after_is_honored(status: int, headers: dict[str, str], body: bytes, delay: float) -> None:
    for watch in (new_watch(random=0.0), synced_watch(random=0.0)):
        assert watch.handle_status(status, headers, body).reconnect_after == pytest.approx(delay)


def test_clients_that_wait_for_the_same_time_come_back_at_different_times() -> None:
    for random, delay in ((0.0, 8.0), (0.5, 10.0), (1.0, 12.0)):
        watch = synced_watch(random=random)
        assert watch.handle_status(503, {"Retry-After": "8"}, b"").reconnect_after == pytest.approx(delay)
        watch = synced_watch(random=random)
        event = b'{"type":"ERROR","object":{"code":500,"message":"x","details":{"retryAfterSeconds":8}}}'
        assert watch.handle_line(event).reconnect_after == pytest.approx(delay)


ABSURD = [
    ({"Retry-After": "86400"}, b"", "86400"),
    ({"Retry-After": "99999999999"}, b"", "1e+11"),
    ({"Retry-After": "9" * 400}, b"", "inf"),
    ({}, b'{"details":{"retryAfterSeconds":1e300}}', "1e+300"),
]


@pytest.mark.parametrize(("headers", "body", "shown"), ABSURD)
def test_retry_after_is_limited_and_logged(headers: dict[str, str], body: bytes, shown: str) -> None:
    for random, delay in ((0.0, 60.0), (1.0, 90.0)):
        for watch in (new_watch(random=random), synced_watch(random=random)):
            assert watch.handle_status(429, headers, body).reconnect_after == delay
            assert watch.error.endswith(f" (it asked to wait {shown} s, but kproxy waits at most 90 s)")
    event = b'{"type":"ERROR","object":{"code":%d,"message":"x","details":{"retryAfterSeconds":1e300}}}'
    for code in (410, 429, 500):
        watch = synced_watch()
        watch.handle_line(event % code)
        assert (watch.handle_line(event % code).reconnect_after or 0.0) <= 90.0


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Retry-After": "-5"}, b""),
        ({"Retry-After": "nan"}, b""),
        ({"Retry-After": "1e11"}, b""),
        ({"Retry-After": "²"}, b""),
        ({"Retry-After": "\x00\xff"}, b""),
        ({}, b'{"details":{"retryAfterSeconds":-1e300}}'),
        ({}, b'{"details":{"retryAfterSeconds":1e999}}'),
        ({}, b'{"details":{"retryAfterSeconds":"soon"}}'),
        ({}, b'{"details":{"retryAfterSeconds":NaN}}'),
    ],
)
def test_unusable_retry_after_is_ignored(headers: dict[str, str], body: bytes) -> None:
    assert new_watch().handle_status(429, headers, body).reconnect_after == pytest.approx(0.8)


def test_event_that_is_too_large_makes_the_watch_list_in_pages() -> None:
    for watch in (synced_watch(), new_watch()):
        step = watch.handle_oversize("an event exceeds the maximum of 5000 bytes")
        assert step.reconnect_after == pytest.approx(0.8)
        assert watch.error == "must relist services in pages: an event exceeds the maximum of 5000 bytes"
        assert watch.next_request().params["limit"] == "500"


def test_pages_that_are_too_large_become_smaller() -> None:
    watch, consumer = synced_watch(), Consumer()
    watch.handle_oversize("too large")
    sizes, delays = [], []
    for _ in range(7):
        sizes.append(watch.next_request().params["limit"])
        delays.append(watch.handle_oversize("too large").reconnect_after)
    assert sizes == ["500", "100", "20", "4", "1", "1", "1"]
    assert delays == [pytest.approx(seconds) for seconds in (0.8, 1.6, 3.2, 6.4, 12.8, 24.0, 24.0)]
    assert watch.error == "cannot list services: too large, although it has only one object"
    consumer.consume(watch.handle_page(recorded_response("list-page-1.txt")[2]))
    assert watch.next_request().params["limit"] == "1"
    consumer.consume(watch.handle_page(recorded_response("list-page-2.txt")[2]))
    assert len(consumer.objects) == 4
    assert watch.next_request().watch
    watch.handle_oversize("too large")
    assert watch.next_request().params["limit"] == "500"


def test_repeated_large_events_relist_with_backoff() -> None:
    watch, delays = synced_watch(), []
    for _ in range(3):
        delays.append(watch.handle_oversize("too large").reconnect_after)
        watch.handle_page(recorded_response("list-page-2.txt")[2])
        assert watch.next_request().watch
    assert delays == [pytest.approx(0.8), pytest.approx(1.6), pytest.approx(3.2)]


def test_401_renews_the_credentials() -> None:
    step = synced_watch().handle_status(401, {}, b"")
    assert step.reconnect_after == pytest.approx(0.8)
    assert step.renew_credentials


def test_403_reports_the_missing_permission() -> None:
    watch = new_watch()
    step = watch.handle_status(*recorded_response("unauthorized.txt"))
    assert step.reconnect_after == pytest.approx(0.8)
    assert not step.renew_credentials
    assert watch.error.startswith("cannot watch services: the API server returned 403 Forbidden: services is forbid")
    assert watch.next_request().watch, "a missing permission must not cause a fallback to paging"


KINDS_AND_NAMES = [
    (Service, "services"),
    (EndpointSlice, "endpointslices.discovery.k8s.io"),
    (Node, "nodes"),
    (ServiceCIDR, "servicecidrs.networking.k8s.io"),
]


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
def test_second_inactivity_in_a_row_relists(kind: Kind, name: str) -> None:
    watch = synced_watch(kind)
    for _ in range(3):
        assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
        assert watch.next_request().params["resourceVersion"] == "96"
        watch.handle_open()
        assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
        assert watch.error == f"must relist {name}: no event or bookmark for too long"
        request = watch.next_request()
        assert (request.params["sendInitialEvents"], request.params["resourceVersionMatch"]) == ("true", "NotOlderThan")
        assert "resourceVersion" not in request.params, "the server may never reach the previous version"
        watch.handle_open()
        listed = watch.handle_line(end_of_list(96))
        assert listed.messages == (Replace(kind, ()),)
        assert watch.error == ""


def test_second_inactivity_in_a_row_restarts_a_paginated_list() -> None:
    watch = new_watch()
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    watch.handle_page(b'{"metadata":{"resourceVersion":"96"},"items":[]}')
    for _ in range(2):
        watch.next_request()
        watch.handle_open()
        assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
    request = watch.next_request()
    assert (request.watch, request.params.keys() & {"resourceVersion", "continue"}) == (False, set())


@pytest.mark.parametrize(
    "event", [BOOKMARK % (96, b""), BOOKMARK % (97, b""), recorded_lines("services.watchlist.jsonl")[0]]
)
def test_any_event_between_inactivities_keeps_the_watch(event: bytes) -> None:
    watch = synced_watch()
    for _ in range(5):
        watch.handle_inactivity()
        watch.next_request()
        watch.handle_open()
        watch.handle_line(event)
    assert "sendInitialEvents" not in watch.next_request().params


def test_inactivity_adds_up_across_connections() -> None:
    watch = synced_watch()
    for lasted in (100.0, 75.0):
        watch.handle_open()
        assert watch.handle_close(lasted) == ListWatchStep(reconnect_after=0.0)
        assert watch.next_request().params["resourceVersion"] == "96"
    watch.handle_open()
    assert watch.handle_failure("reset by peer", 9.0).reconnect_after == pytest.approx(0.8)
    assert watch.next_request().params["resourceVersion"] == "96"
    watch.handle_open()
    assert watch.handle_failure("reset by peer", 80.0).reconnect_after == pytest.approx(1.6)
    assert watch.next_request().params["sendInitialEvents"] == "true"


@pytest.mark.parametrize("lasted", [5.0, 35.0, 65.0])
def test_connections_too_short_for_a_bookmark_relist_at_most_hourly(lasted: float) -> None:
    """A load balancer that closes idle connections must not cause a full list every few minutes."""
    watch = synced_watch()
    passed = 0.0
    while watch.next_request().params.get("resourceVersion") == "96":
        watch.handle_open()
        watch.handle_close(lasted)
        passed += lasted
    assert passed == pytest.approx(3600.0, abs=lasted)


def test_failed_connections_do_not_count_as_inactivity() -> None:
    watch = synced_watch()
    for _ in range(50):
        watch.handle_failure("connection refused")
    assert watch.next_request().params["resourceVersion"] == "96"


NO_RESOURCE = b'{"code":404,"reason":"NotFound","message":"the server could not find the requested resource"}'
FORBIDDEN = b'{"code":403,"reason":"Forbidden","message":"User \\"kube-proxy\\" cannot watch resource"}'
NOT_DROPPED = "servicecidrs.networking.k8s.io: packets to unallocated service addresses are not dropped"
UNAVAILABLE = [
    (404, NO_RESOURCE, f"the API server does not serve {NOT_DROPPED} (404 NotFound: the server could not find the"),
    (404, b"404 page not found\n", f"the API server does not serve {NOT_DROPPED} (404: 404 page not found)"),
    (403, FORBIDDEN, f'no permission to list and watch {NOT_DROPPED} (403 Forbidden: User "kube-proxy" cannot'),
]


BAD_SLICE = {
    "metadata": {
        "namespace": "ns",
        "name": "web-1",
        "resourceVersion": "7",
        "labels": {"kubernetes.io/service-name": "web"},
    },
    "addressType": "IPv4",
    "endpoints": [{"addresses": ["10.244.0.1"]}, {"addresses": ["fd00::1"]}],
    "ports": [{"port": 80}],
}
IGNORED_ADDRESS = IgnoredFields(
    EndpointSlice, "ns", "web-1", 'endpoints[1].addresses[0] must be an IPv4 address, not "fd00::1"'
)


def test_ignored_fields_are_reported_with_the_object() -> None:
    watch = new_watch(EndpointSlice)
    event = json.dumps({"type": "ADDED", "object": BAD_SLICE}).encode()
    assert watch.handle_line(event).messages == (IGNORED_ADDRESS,)
    (listed,) = watch.handle_line(end_of_list(8)).messages
    assert isinstance(listed, Replace)
    upsert, ignored = watch.handle_line(event).messages
    assert isinstance(upsert, Upsert)
    assert ignored == IGNORED_ADDRESS


def test_ignored_fields_in_a_page_are_reported_before_the_list() -> None:
    watch = new_watch(EndpointSlice)
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    body = {"metadata": {"resourceVersion": "9"}, "items": [BAD_SLICE]}
    ignored, listed = watch.handle_page(json.dumps(body).encode()).messages
    assert ignored == IGNORED_ADDRESS
    assert isinstance(listed, Replace)


@pytest.mark.parametrize("streaming_list", [True, False])
@pytest.mark.parametrize(("status", "body", "message"), UNAVAILABLE)
def test_unavailable_service_cidrs_count_as_an_empty_list(
    status: int, body: bytes, message: str, streaming_list: bool
) -> None:
    watch = new_watch(ServiceCIDR)
    assert not watch.unavailable
    if not streaming_list:
        watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    step = watch.handle_status(status, {}, body)
    assert step.messages == (Replace(ServiceCIDR, ()),)
    assert step.reconnect_after == pytest.approx(0.8)
    assert watch.error.startswith(message)
    assert watch.unavailable
    assert watch.next_request().watch is streaming_list
    assert "resourceVersion" not in watch.next_request().params


def test_unavailable_service_cidrs_are_retried_with_a_longer_backoff() -> None:
    for random, factor in ((0.0, 0.75), (1.0, 1.25)):
        watch = new_watch(ServiceCIDR, random)
        delays = [watch.handle_status(404, {}, NO_RESOURCE).reconnect_after for _ in range(11)]
        expected = [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 240.0, 240.0]
        assert delays == [pytest.approx(seconds * factor) for seconds in expected]
        assert watch.handle_failure("connection refused").reconnect_after == pytest.approx(24.0 * factor)


def test_service_cidrs_that_become_available_are_listed() -> None:
    watch = new_watch(ServiceCIDR)
    watch.handle_status(404, {}, NO_RESOURCE)
    watch.handle_open()
    assert watch.unavailable, "not listed yet"
    line = b'{"type":"ADDED","object":{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16"]}}}'
    watch.handle_line(line)
    expected = ServiceCIDR("kubernetes", ("10.96.0.0/16",))
    assert watch.handle_line(END_OF_LIST).messages == (Replace(ServiceCIDR, (expected,)),)
    assert (watch.unavailable, watch.error) == (False, "")
    assert watch.handle_failure("reset by peer").reconnect_after == pytest.approx(0.8)
    assert not watch.unavailable


@pytest.mark.parametrize(("status", "body"), [(404, NO_RESOURCE), (403, FORBIDDEN)])
def test_known_service_cidrs_are_kept_when_they_become_unavailable(status: int, body: bytes) -> None:
    watch = synced_watch(ServiceCIDR)
    step = watch.handle_status(status, {}, body)
    assert step.messages == ()
    assert step.reconnect_after == pytest.approx(0.8)
    assert "servicecidrs.networking.k8s.io: keeping the last known objects (40" in watch.error
    assert watch.unavailable
    assert watch.next_request().params["resourceVersion"] == "96"
    watch.handle_line(ERROR_410)
    assert not watch.unavailable
    assert watch.handle_status(status, {}, body).messages == ()


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_other_errors_do_not_make_service_cidrs_unavailable(status: int) -> None:
    watch = new_watch(ServiceCIDR)
    for _ in range(8):
        assert watch.handle_status(status, {}, b"").messages == ()
        assert watch.handle_failure("connection refused").messages == ()
        assert watch.handle_inactivity().messages == ()
        assert not watch.unavailable


@pytest.mark.parametrize("kind", [Service, EndpointSlice, Node])
@pytest.mark.parametrize(("status", "body"), [(404, NO_RESOURCE), (403, FORBIDDEN)])
def test_every_other_kind_is_required(kind: Kind, status: int, body: bytes) -> None:
    watch = new_watch(kind)
    steps = [watch.handle_status(status, {}, body) for _ in range(8)]
    assert [step.messages for step in steps] == [()] * 8
    assert steps[-1].reconnect_after == pytest.approx(24.0)
    assert not watch.unavailable


def test_error_is_cleared_when_the_watch_opens_again() -> None:
    watch = synced_watch()
    watch.handle_failure("connection refused")
    assert watch.error == "cannot watch services: connection refused"
    watch.handle_open()
    assert not watch.error


def test_rejected_field_selector_is_never_sent_again() -> None:
    watch = new_watch()
    body = b'{"code":400,"reason":"BadRequest","message":"field label not supported: spec.type"}'
    assert watch.handle_status(400, {}, body) == ListWatchStep(reconnect_after=0.0)
    request = watch.next_request()
    assert request.params["sendInitialEvents"] == "true"
    assert "fieldSelector" not in request.params
    assert "labelSelector" in request.params


def test_400_without_a_reason_drops_every_optional_parameter() -> None:
    watch = new_watch()
    delays = [watch.handle_status(400, {}, b"").reconnect_after for _ in range(3)]
    assert delays == [0.0, 0.0, pytest.approx(0.8)]
    assert watch.next_request() == ListWatchRequest(
        "/api/v1/services", {"labelSelector": watch.next_request().params["labelSelector"], "limit": "500"}, False
    )


def test_node_field_selector_is_never_dropped() -> None:
    watch = new_watch(Node)
    for _ in range(4):
        watch.handle_status(400, {}, b'{"message":"field label not supported"}')
    assert watch.next_request().params["fieldSelector"] == "metadata.name=node-1"


def test_too_large_resource_version_causes_a_relist() -> None:
    watch = synced_watch()
    watch.handle_status(504, {}, b'{"reason":"Timeout","message":"Too large resource version: 96, current: 12"}')
    assert watch.next_request().params.get("resourceVersion") is None


def invalid_service(name: str = "web", kind: str = "MODIFIED") -> bytes:
    spec = b'{"clusterIP":"10.96.0.300"}'
    metadata = b'{"name":"%b","namespace":"demo","resourceVersion":"500"}' % name.encode()
    return b'{"type":"%b","object":{"metadata":%b,"spec":%b}}' % (kind.encode(), metadata, spec)


def test_invalid_object_keeps_its_last_state() -> None:
    watch, consumer = new_watch(), Consumer()
    lines = recorded_lines("services.watchlist.jsonl")
    for line in lines[:9]:
        consumer.consume(watch.handle_line(line))
    before = dict(consumer.objects)
    assert consumer.consume(watch.handle_line(invalid_service())).reconnect_after is None
    assert consumer.objects == before
    (problem,) = consumer.problems
    assert (problem.kind, problem.namespace, problem.name) == (Service, "demo", "web")
    assert "10.96.0.300" in problem.text
    assert watch.next_request().params["resourceVersion"] == "500"
    consumer.consume(watch.handle_line(invalid_service(kind="DELETED")))
    assert set(before) - set(consumer.objects) == {("demo", "web")}


@pytest.mark.parametrize("streaming_list", [True, False])
def test_invalid_object_in_a_list_keeps_its_last_state(streaming_list: bool) -> None:
    watch, consumer = new_watch(), Consumer()
    for line in recorded_lines("services.watchlist.jsonl")[:9]:
        consumer.consume(watch.handle_line(line))
    before = dict(consumer.objects)
    watch.handle_line(ERROR_410)
    if streaming_list:
        consumer.consume(watch.handle_line(invalid_service(kind="ADDED")))
        consumer.consume(watch.handle_line(END_OF_LIST))
    else:
        watch.handle_line(STREAMING_LIST_UNSUPPORTED)
        item = json.loads(invalid_service())["object"]
        consumer.consume(
            watch.handle_page(json.dumps({"metadata": {"resourceVersion": "7"}, "items": [item]}).encode())
        )
    assert consumer.objects == {("demo", "web"): before["demo", "web"]}
    assert len(consumer.problems) == 1


MALFORMED = [
    b"\xff\xfe",
    b"{",
    b"null",
    b"[]",
    b'{"type":"ADDED"}',
    b'{"type":"ADDED","object":{"metadata":{}}}',
    b'{"type":"ADDED","object":{"metadata":{"name":"\xff"}}}',
    b'{"type":"MODIFIED","object":{"metadata":{"name":7}}}',
    b'{"type":"DELETED","object":{"metadata":{}}}',
    b'{"type":"BOOKMARK","object":7}',
    b'{"type":"RENAMED","object":{"metadata":{"name":"web"}}}',
    b'{"type":"ADDED","object":' + b"[" * 100_000,
]


@pytest.mark.parametrize("event", MALFORMED)
def test_malformed_event_is_reported_and_the_watch_continues(event: bytes) -> None:
    watch = synced_watch()
    step = watch.handle_line(event)
    assert step.reconnect_after is None
    assert [type(message) for message in step.messages] == [InvalidObject]
    assert len(watch.handle_line(recorded_lines("services.watchlist.jsonl")[9]).messages) == 1
    assert watch.handle_close(300.0) == ListWatchStep(reconnect_after=0.0)
    assert watch.next_request().params.get("resourceVersion") is None, "only a list can recover the missed event"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{", "not valid JSON: input data was truncated"),
        (b"null", "must be a mapping, not null"),
        (b'{"type":"ADDED"}', "object is missing"),
        (b'{"type":5,"object":{}}', "type must be a string, not 5"),
        (b'{"type":"ADDED","object":{"metadata":{}}}', "metadata.name is missing"),
        (b'{"type":"ADDED","object":{"metadata":{"name":7}}}', "metadata.name must be a string, not 7"),
        (b'{"type":"DELETED","object":{"metadata":{}}}', "object.metadata.name is missing"),
        (b'{"type":"BOOKMARK","object":7}', "must be a mapping, not 7"),
        (
            b'{"type":"RENAMED","object":{"metadata":{"name":"web"}}}',
            'type must be one of ADDED, MODIFIED, DELETED, BOOKMARK, ERROR, not "RENAMED"',
        ),
    ],
)
def test_event_errors_name_the_api_field(line: bytes, text: str) -> None:
    assert synced_watch().handle_line(line).messages == (InvalidObject(Service, "", "", text),)


def test_invalid_object_field_is_named() -> None:
    body = b'{"metadata":{"name":"web","namespace":"shop"},"spec":{"ports":[{"port":"http"}]}}'
    line = b'{"type":"MODIFIED","object":%b}' % body
    expected = InvalidObject(Service, "shop", "web", 'spec.ports[0].port must be an integer, not "http"')
    assert synced_watch().handle_line(line).messages == (expected,)


HEADLESS = b"""{"type":"MODIFIED","object":{"metadata":{"name":"web","namespace":"demo","resourceVersion":"500"},
"spec":{"clusterIP":"None"}}}"""


def test_service_that_becomes_headless_is_deleted() -> None:
    assert synced_watch().handle_line(HEADLESS) == ListWatchStep((Delete(Service, "demo", "web"),))


def test_event_that_changes_nothing_counts_as_activity_and_has_no_messages() -> None:
    watch = synced_watch()
    first = watch.handle_failure("reset by peer").reconnect_after
    assert watch.handle_event(Unchanged("97")) == ListWatchStep()
    assert watch.next_request().params["resourceVersion"] == "97"
    assert watch.handle_failure("reset by peer").reconnect_after == first
    watch = new_watch()
    assert watch.handle_event(Unchanged("97")) == ListWatchStep()
    assert "sendInitialEvents" in watch.next_request().params


@pytest.mark.parametrize("change", [HEADLESS, invalid_service(kind="DELETED")])
def test_initial_events_may_include_changes(change: bytes) -> None:
    watch, consumer = new_watch(), Consumer()
    for line in [*recorded_lines("services.watchlist.jsonl")[:8], change, END_OF_LIST]:
        consumer.consume(watch.handle_line(line))
    assert len(consumer.objects) == 7
    assert ("demo", "web") not in consumer.objects


@pytest.mark.parametrize("code", [401, 429, 503, 504])
def test_transient_error_does_not_fall_back_to_paging(code: int) -> None:
    watch = new_watch()
    step = watch.handle_line(b'{"type":"ERROR","object":{"code":%d,"message":"x"}}' % code)
    assert step.reconnect_after == pytest.approx(0.8)
    assert watch.next_request().watch


def test_error_during_the_initial_events_restarts_the_list() -> None:
    watch, consumer = new_watch(), Consumer()
    lines = recorded_lines("services.watchlist.jsonl")
    watch.handle_line(lines[0])
    assert watch.handle_line(STREAMING_LIST_UNSUPPORTED).reconnect_after == pytest.approx(0.8)
    assert watch.next_request().watch
    consumer.consume(watch.handle_line(lines[1]))
    consumer.consume(watch.handle_line(END_OF_LIST))
    assert len(consumer.objects) == 1


def test_complete_list_resets_the_backoff() -> None:
    watch = new_watch()
    for _ in range(5):
        watch.handle_failure("connection refused")
    watch.handle_line(END_OF_LIST)
    assert watch.handle_failure("reset by peer").reconnect_after == pytest.approx(0.8)


@pytest.mark.parametrize("end", ["inactive", "failed", "closed"])
def test_missed_event_causes_a_relist_however_the_watch_ends(end: str) -> None:
    watch = synced_watch()
    watch.handle_line(MALFORMED[0])
    if end == "inactive":
        watch.handle_inactivity()
    elif end == "failed":
        watch.handle_failure("reset by peer")
    else:
        watch.handle_close(0.0)
    assert watch.next_request().params["sendInitialEvents"] == "true"


def test_list_without_a_resource_version_is_ignored() -> None:
    watch = new_watch()
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    assert not watch.handle_page(b'{"metadata":{},"items":[]}').messages
    assert not watch.next_request().watch


@pytest.mark.parametrize("status", [400, 422])
def test_rejected_resource_version_causes_a_relist(status: int) -> None:
    watch = synced_watch(EndpointSlice)
    assert watch.handle_status(status, {}, b'{"message":"Invalid value: \\"96\\""}').reconnect_after == 0.0
    assert watch.next_request().params["sendInitialEvents"] == "true"


def test_malformed_events_in_every_list_do_not_block_the_other_objects() -> None:
    watch, consumer, delays = new_watch(), Consumer(), []
    while not consumer.replaces:
        consumer.consume(watch.handle_line(MALFORMED[0]))
        for line in recorded_lines("services.watchlist.jsonl")[:9]:
            step = consumer.consume(watch.handle_line(line))
        delays.append(step.reconnect_after)
    assert delays == [pytest.approx(0.8), pytest.approx(1.6), None]
    assert len(consumer.objects) == 8
    assert watch.next_request().params.get("resourceVersion")
    watch.handle_close(300.0)
    assert watch.next_request().params.get("resourceVersion") is None, "a later list may include the missing object"


def test_malformed_page_is_requested_again() -> None:
    watch = new_watch()
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    watch.handle_page(recorded_response("list-page-1.txt")[2])
    first = watch.next_request()
    assert watch.handle_page(b'{"metadata":{"resourceVersion":"2695"},"items":[{').reconnect_after == pytest.approx(0.8)
    assert watch.next_request() == first
    assert watch.handle_page(b"{}").reconnect_after == pytest.approx(1.6)


@dataclass
class ReplayServer:
    """An API server that replays a recording: a list, then events, the first `now` of which have happened."""

    kind: Kind
    items: list[Any]
    start: int
    events: list[bytes]
    streaming_list: bool
    now: int = 0
    compacted: int = 0

    def version(self, upto: int) -> str:
        return (
            str(self.start) if not upto else json.loads(self.events[upto - 1])["object"]["metadata"]["resourceVersion"]
        )

    def current_items(self) -> list[Any]:
        known = {(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in self.items}
        for line in self.events[: self.now]:
            event = json.loads(line)
            if event["type"] == "BOOKMARK":
                continue
            key = (event["object"]["metadata"]["namespace"], event["object"]["metadata"]["name"])
            known.pop(key, None)
            if event["type"] != "DELETED":
                known[key] = event["object"]
        return [known[key] for key in sorted(known)]

    def stream(self, request: ListWatchRequest) -> list[bytes]:
        """Return the lines of a watch up to now."""
        given = request.params.get("resourceVersion")
        if given is None and not self.streaming_list:
            return [STREAMING_LIST_UNSUPPORTED]
        if given is None:
            lines = [json.dumps({"type": "ADDED", "object": item}).encode() for item in self.current_items()]
            return [*lines, end_of_list(int(self.version(self.now)))]
        seen = next(upto for upto in reversed(range(self.now + 1)) if self.version(upto) == given)
        return [ERROR_410] if seen < self.compacted else self.events[seen : self.now]

    def page(self, request: ListWatchRequest) -> bytes | None:
        version, offset = self.version(self.now), 0
        if token := request.params.get("continue"):
            version, text = token.split("/")
            offset = int(text)
            if version != self.version(self.now):
                return None
        items = self.current_items()
        metadata = {"resourceVersion": version}
        if offset + 3 < len(items):
            metadata["continue"] = f"{version}/{offset + 3}"
        return json.dumps({"metadata": metadata, "items": items[offset : offset + 3]}).encode()


def replay_server(kind: Kind, name: str, streaming_list: bool) -> ReplayServer:
    listed = json.loads((RECORDED / f"{name}.list.json").read_bytes())
    version = int(listed["metadata"]["resourceVersion"])
    return ReplayServer(kind, listed["items"], version, recorded_lines(f"{name}.watch.jsonl"), streaming_list)


def make_request(server: ReplayServer, watch: JsonListWatch, consumer: Consumer, fault: str, cut: int) -> None:
    """Make one request, and inject the fault after `cut` lines."""
    request = watch.next_request()
    if fault == "connect":
        consumer.consume(watch.handle_failure("connection refused"))
    elif fault in {"429", "500", "503", "410", "403", "401"}:
        consumer.consume(watch.handle_status(int(fault), {}, b""))
    elif not request.watch:
        page = server.page(request)
        if page is None:
            consumer.consume(watch.handle_status(*recorded_response("list-continue-too-old.txt")))
        elif fault in {"none", "clean"}:
            consumer.consume(watch.handle_page(page))
        else:
            consumer.consume(watch.handle_page(page[:cut]) if fault == "malformed" else watch.handle_failure("reset"))
    else:
        watch.handle_open()
        read_stream(server.stream(request), watch, consumer, fault, cut)


def read_stream(lines: list[bytes], watch: JsonListWatch, consumer: Consumer, fault: str, cut: int) -> None:
    if fault not in {"none", "malformed"}:
        lines = lines[: cut % (len(lines) + 1)]
    for number, line in enumerate(lines):
        malformed = fault == "malformed" and number == cut % len(lines)
        step = watch.handle_line(line[: 1 + cut % (len(line) - 1)] if malformed else line)
        if consumer.consume(step).reconnect_after is not None:
            return
    endings: dict[str, Callable[[], ListWatchStep]] = {
        "clean": lambda: watch.handle_close(300.0),
        "none": lambda: watch.handle_close(300.0),
        "short": lambda: watch.handle_close(0.1),
        "inactive": watch.handle_inactivity,
        "error": lambda: watch.handle_line(b'{"type":"ERROR","object":{"code":500,"message":"x"}}'),
        "expired": lambda: watch.handle_line(ERROR_410),
    }
    if fault in endings:
        consumer.consume(endings[fault]())
    else:
        consumer.consume(watch.handle_failure("reset by peer"))


FAULTS = (
    *("none", "clean", "short", "inactive", "error", "expired", "drop", "malformed", "connect"),
    *("429", "500", "503", "410", "403", "401"),
)
fault_steps = st.tuples(st.sampled_from(FAULTS), st.integers(0, 4000), st.integers(0, 40), st.booleans())


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(KINDS), streaming_list=st.booleans(), script=st.lists(fault_steps, max_size=25))
def test_objects_match_the_server_after_any_sequence_of_faults(
    which: tuple[Kind, str], streaming_list: bool, script: list[tuple[str, int, int, bool]]
) -> None:
    kind, name = which
    server = replay_server(kind, name, streaming_list)
    watch, consumer = new_watch(kind), Consumer()
    for fault, cut, progress, compact in script:
        make_request(server, watch, consumer, fault, cut)
        server.now = min(len(server.events), server.now + progress)
        if compact:
            server.compacted = server.now
    server.now = len(server.events)
    for _ in range(60):
        make_request(server, watch, consumer, "none", 0)
    assert consumer.replaces
    assert consumer.objects == expected_objects(kind, server.items, server.events)


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=300), listed=st.booleans())
def test_no_input_raises(text: bytes, listed: bool) -> None:
    watch = synced_watch() if listed else new_watch()
    watch.handle_line(text)
    watch.handle_status(500, {}, text)
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    watch.handle_page(text)
    assert watch.next_request().path == "/api/v1/services"


def test_406_switches_to_json_for_good() -> None:
    watch = new_watch()
    assert watch.handle_status(406, {}, b"").reconnect_after == pytest.approx(0.8)
    assert watch.next_request().accept == "application/json"
    assert watch.next_request().params["sendInitialEvents"] == "true", "must not fall back to paging"
    watch.handle_status(503, {}, b"")
    assert watch.next_request().accept == "application/json"


def test_undecodable_object_without_a_name_switches_to_json_for_good() -> None:
    watch = synced_watch()
    watch.handle_event(UndecodableObject("demo", "web", "97", "spec.ports[0].port must be from 1 to 65535, not 0"))
    assert watch.next_request().accept == PROTOBUF_OR_JSON
    watch.handle_event(UndecodableObject("", "", "", "a message is truncated"))
    assert watch.next_request().accept == "application/json"


def test_pages_are_requested_as_json() -> None:
    watch = new_watch()
    watch.handle_line(STREAMING_LIST_UNSUPPORTED)
    assert watch.next_request().accept == "application/json"
