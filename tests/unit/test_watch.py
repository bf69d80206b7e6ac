"""The list/watch state machine, fed with what a real API server was recorded to say."""

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
from kproxy.kube.codec.watch_events import UndecodableObject
from kproxy.kube.listwatch.list_watch import IgnoredFields, InvalidObject, ListWatch, ListWatchRequest, ListWatchStep
from kproxy.model.delta import Delete, Kind, Object, Replace, Upsert
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

RECORDED = Path(__file__).parent.parent / "watch"
Key = tuple[str, str]
OLD_ETCD = (RECORDED / "watchlist-unsupported-by-old-etcd.jsonl").read_bytes().strip()
BOOKMARK = b'{"type":"BOOKMARK","object":{"kind":"Service","metadata":{"resourceVersion":"%d"%b}}}'


def lines_of(name: str) -> list[bytes]:
    return (RECORDED / name).read_bytes().splitlines()


def answer_of(name: str) -> tuple[int, dict[str, str], bytes]:
    head, _, body = (RECORDED / name).read_text().partition("\n\n")
    first, *rest = head.splitlines()
    return int(first.split()[1]), dict(line.split(": ", 1) for line in rest), body.encode()


class JsonWatch(ListWatch):
    """The machine, fed with the lines of a watch."""

    def line(self, raw: bytes) -> ListWatchStep:
        return self.handle_event(read_line(self._kind, raw))


def machine(kind: Kind = Service, chance: float = 0.5) -> JsonWatch:
    return JsonWatch(kind, "node-1", lambda: chance)


@dataclass
class Folded:
    """What a consumer knows after the messages it got."""

    objects: dict[Key, Object] = field(default_factory=dict)
    problems: list[InvalidObject] = field(default_factory=list)
    replaces: int = 0

    def take(self, step: ListWatchStep) -> ListWatchStep:
        for message in step.messages:
            if isinstance(message, InvalidObject):
                self.problems.append(message)
            elif isinstance(message, Upsert):
                self.objects[key_of(message.object)] = message.object
            elif isinstance(message, Delete):
                self.objects.pop((message.namespace, message.name), None)
            else:
                assert isinstance(message, Replace)
                self.replaces += 1
                kept = {key: self.objects[key] for key in message.unreadable if key in self.objects}
                self.objects = kept | {key_of(item): item for item in message.objects}
        return step


def key_of(item: Object) -> Key:
    return ("" if isinstance(item, Node | ServiceCIDR) else item.namespace), item.name


def truth(kind: Kind, items: Iterable[Any], events: Iterable[bytes]) -> dict[Key, Object]:
    """Fold a recording in the plainest way."""
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
def test_recorded_list_by_watch(kind: Kind, name: str) -> None:
    watch, folded, lines = machine(kind), Folded(), lines_of(f"{name}.watchlist.jsonl")
    end = next(number for number, line in enumerate(lines) if b"initial-events-end" in line)
    assert watch.next_request().params["sendInitialEvents"] == "true"
    for number, line in enumerate(lines):
        assert folded.take(watch.line(line)).reconnect_after is None
        assert folded.replaces == (1 if number >= end else 0)
        if number == end:
            assert folded.objects == truth(kind, [], lines[: end + 1])
    assert folded.objects == truth(kind, [], lines)
    assert not folded.problems
    assert watch.handle_close(75.0) == ListWatchStep(reconnect_after=0.0)
    last = json.loads(lines[-1])["object"]["metadata"]["resourceVersion"]
    params = watch.next_request().params
    assert params["resourceVersion"] == last
    assert "sendInitialEvents" not in params


def test_recorded_pages() -> None:
    watch, folded = machine(), Folded()
    watch.line(OLD_ETCD)
    first = watch.next_request()
    assert (first.watch, first.params["limit"], "continue" in first.params) == (False, "500", False)
    page_1, page_2 = answer_of("list-page-1.txt")[2], answer_of("list-page-2.txt")[2]
    assert folded.take(watch.handle_page(page_1)) == ListWatchStep(reconnect_after=0.0)
    token = json.loads(page_1)["metadata"]["continue"]
    assert watch.next_request().params["continue"] == token
    folded.take(watch.handle_page(page_2))
    items = json.loads(page_1)["items"] + json.loads(page_2)["items"]
    assert (folded.replaces, folded.objects) == (1, truth(Service, items, []))
    assert len(folded.objects) == 4
    following = watch.next_request()
    assert (following.watch, following.params["resourceVersion"]) == (True, "2695")


def test_list_by_watch_refused_with_one_error_event_is_remembered() -> None:
    watch = machine()
    assert watch.line(OLD_ETCD) == ListWatchStep(reconnect_after=0.0)
    assert not watch.next_request().watch
    watch.handle_page(b'{"metadata":{"resourceVersion":"7"},"items":[]}')
    watch.line((RECORDED / "watch-too-old.txt").read_bytes().splitlines()[-1])
    assert not watch.next_request().watch


@pytest.mark.parametrize(("status", "reason"), [(422, "Invalid"), (400, "BadRequest"), (403, "Invalid")])
def test_list_by_watch_refused_with_a_status(status: int, reason: str) -> None:
    watch = machine()
    text = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
    body = json.dumps({"kind": "Status", "code": status, "reason": reason, "message": text}).encode()
    assert watch.handle_status(status, {}, body) == ListWatchStep(reconnect_after=0.0)
    request = watch.next_request()
    assert not request.watch
    assert "fieldSelector" in request.params


def test_a_server_that_ignores_initial_events_is_listed_by_pages() -> None:
    watch, folded = machine(), Folded()
    line = lines_of("services.watchlist.jsonl")[0]
    assert folded.take(watch.line(line)) == ListWatchStep()
    assert folded.take(watch.line(BOOKMARK % (9, b""))) == ListWatchStep(reconnect_after=0.0)
    assert not watch.next_request().watch


def test_a_server_that_ignores_initial_events_and_sends_no_bookmarks() -> None:
    watch = machine()
    watch.line(lines_of("services.watchlist.jsonl")[0])
    assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
    assert not watch.next_request().watch


def test_a_server_known_to_list_by_watch_may_be_silent() -> None:
    watch = following()
    watch.line(ERROR_410)
    assert watch.handle_inactivity().reconnect_after == pytest.approx(0.8)
    assert watch.next_request().params["sendInitialEvents"] == "true"


ERROR_410 = (RECORDED / "watch-too-old.txt").read_bytes().splitlines()[-1]


def following(kind: Kind = Service, chance: float = 0.5) -> JsonWatch:
    """Return a machine that has its list, at resourceVersion 96."""
    watch = machine(kind, chance)
    for line in lines_of("services.watchlist.jsonl")[:9] if kind is Service else []:
        watch.line(line)
    if kind is not Service:
        watch.line(BOOKMARK % (96, b',"annotations":{"k8s.io/initial-events-end":"true"}'))
    watch.handle_open()
    return watch


BOTH = "application/vnd.kubernetes.protobuf;stream=watch,application/json"


def test_requests_of_each_kind() -> None:
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
            "/api/v1/services", {"labelSelector": ours, "fieldSelector": fields} | common, True, BOTH
        ),
        EndpointSlice: ListWatchRequest(
            "/apis/discovery.k8s.io/v1/endpointslices", {"labelSelector": ours_with_ip} | common, True, BOTH
        ),
        Node: ListWatchRequest("/api/v1/nodes", {"fieldSelector": "metadata.name=node-1"} | common, True, BOTH),
        ServiceCIDR: ListWatchRequest("/apis/networking.k8s.io/v1/servicecidrs", common, True, BOTH),
    }
    for kind, request in expected.items():
        for chance, seconds in ((0.0, "300"), (0.999999, "600")):
            found = machine(kind, chance).next_request()
            assert found == ListWatchRequest(request.path, request.params | {"timeoutSeconds": seconds}, True, BOTH)


@pytest.mark.parametrize("refused", [ERROR_410, (410, b"{}")])
def test_410_lists_anew_at_first_at_once_then_slower(refused: Any) -> None:
    watch = following()

    def expire() -> ListWatchStep:
        return watch.line(refused) if isinstance(refused, bytes) else watch.handle_status(refused[0], {}, refused[1])

    delays = []
    for _ in range(3):
        delays.append(expire().reconnect_after)
        assert watch.next_request().params["sendInitialEvents"] == "true"
        watch.line(BOOKMARK % (200, b',"annotations":{"k8s.io/initial-events-end":"true"}'))
    assert delays == [0.0, pytest.approx(1.6), pytest.approx(3.2)]
    watch.line(lines_of("services.watchlist.jsonl")[9])
    assert expire().reconnect_after == 0.0


@pytest.mark.parametrize("recording", ["list-continue-too-old.txt", "list-bad-continue.txt"])
def test_a_refused_continuation_starts_the_list_over(recording: str) -> None:
    watch, folded = machine(), Folded()
    watch.line(OLD_ETCD)
    watch.handle_page(answer_of("list-page-1.txt")[2])
    assert watch.handle_status(*answer_of(recording)).reconnect_after == 0.0
    request = watch.next_request()
    assert "continue" not in request.params
    assert "fieldSelector" in request.params
    folded.take(watch.handle_page(answer_of("list-page-2.txt")[2]))
    assert len(folded.objects) == 2


def test_other_errors_list_anew_after_a_pause() -> None:
    watch, delays = following(), []
    error = b'{"type":"ERROR","object":{"kind":"Status","code":500,"reason":"InternalError","message":"etcd"}}'
    for _ in range(3):
        delays.append(watch.line(error).reconnect_after)
        assert watch.error == "must relist services: 500 InternalError: etcd"
        assert watch.next_request().params["sendInitialEvents"] == "true"
        assert watch.line(END_OF_LIST).reconnect_after is None
    assert delays == [pytest.approx(0.8), pytest.approx(1.6), pytest.approx(3.2)]
    watch.line(lines_of("services.watchlist.jsonl")[9])
    assert watch.line(error).reconnect_after == pytest.approx(0.8)


def test_an_error_that_says_when_to_come_back_lists_anew_then() -> None:
    error = b'{"type":"ERROR","object":{"code":500,"message":"x","details":{"retryAfterSeconds":9}}}'
    assert following().line(error).reconnect_after == 9.0


@pytest.mark.parametrize("code", [401, 429, 503, 504])
def test_a_passing_error_resumes_after_a_pause(code: int) -> None:
    watch = following()
    step = watch.line(b'{"type":"ERROR","object":{"code":%d,"message":"x"}}' % code)
    assert step.reconnect_after == pytest.approx(0.8)
    assert step.renew_credentials == (code == 401)
    assert watch.next_request().params["resourceVersion"] == "96"


def test_failures_back_off_with_jitter_until_something_arrives() -> None:
    for chance, factor in ((0.0, 0.75), (1.0, 1.25)):
        watch = following(chance=chance)
        delays = [watch.handle_failure("reset by peer").reconnect_after for _ in range(8)]
        expected = [0.8, 1.6, 3.2, 6.4, 12.8, 24.0, 24.0, 24.0]
        assert delays == [pytest.approx(seconds * factor) for seconds in expected]
        watch.handle_open()
        assert watch.handle_failure("again").reconnect_after == pytest.approx(24.0 * factor)
        watch.line(BOOKMARK % (97, b""))
        assert watch.handle_failure("again").reconnect_after == pytest.approx(0.8 * factor)
        assert watch.next_request().params["resourceVersion"] == "97"


def test_a_watch_that_ends_as_soon_as_it_began_backs_off() -> None:
    watch = following()
    assert watch.handle_close(0.2).reconnect_after == pytest.approx(0.8)
    assert watch.handle_close(0.2).reconnect_after == pytest.approx(1.6)
    assert watch.handle_close(300.0).reconnect_after == 0.0


def test_silence_resumes_at_once() -> None:
    watch = following()
    assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
    assert watch.error == "cannot watch services: no data received for 90 s"
    assert watch.next_request().params["resourceVersion"] == "96"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "body", "least"),
    [
        ({"Retry-After": "7"}, b"", 7.0),
        ({"retry-after": "7"}, b"{}", 7.0),
        ({}, b'{"details":{"retryAfterSeconds":9}}', 9.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"", 0.8),
        ({}, b"<html>Bad gateway</html>", 0.8),
    ],
)
def test_retry_after(status: int, headers: dict[str, str], body: bytes, least: float) -> None:
    for watch in (machine(), following()):
        assert watch.handle_status(status, headers, body).reconnect_after == pytest.approx(least)


def test_401_asks_for_new_credentials() -> None:
    step = following().handle_status(401, {}, b"")
    assert step.reconnect_after == pytest.approx(0.8)
    assert step.renew_credentials


def test_403_says_what_is_not_allowed() -> None:
    watch = machine()
    step = watch.handle_status(*answer_of("unauthorized.txt"))
    assert step.reconnect_after == pytest.approx(0.8)
    assert not step.renew_credentials
    assert watch.error.startswith("cannot watch services: the API server returned 403 Forbidden: services is forbid")
    assert watch.next_request().watch, "a missing permission is no reason to list by pages"


KINDS_AND_NAMES = [
    (Service, "services"),
    (EndpointSlice, "endpointslices.discovery.k8s.io"),
    (Node, "nodes"),
    (ServiceCIDR, "servicecidrs.networking.k8s.io"),
]


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
def test_a_second_silence_in_a_row_leads_to_a_new_list(kind: Kind, name: str) -> None:
    watch = following(kind)
    for _ in range(3):
        assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
        assert watch.next_request().params["resourceVersion"] == "96"
        watch.handle_open()
        assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
        assert watch.error == f"must relist {name}: no event or bookmark for too long"
        request = watch.next_request()
        assert (request.params["sendInitialEvents"], request.params["resourceVersionMatch"]) == ("true", "NotOlderThan")
        assert "resourceVersion" not in request.params, "the version of before is what the server may never reach"
        watch.handle_open()
        listed = watch.line(BOOKMARK % (96, b',"annotations":{"k8s.io/initial-events-end":"true"}'))
        assert listed.messages == (Replace(kind, ()),)
        assert watch.error == ""


def test_a_second_silence_in_a_row_leads_to_new_pages_where_lists_are_in_pages() -> None:
    watch = machine()
    watch.line(OLD_ETCD)
    watch.handle_page(b'{"metadata":{"resourceVersion":"96"},"items":[]}')
    for _ in range(2):
        watch.next_request()
        watch.handle_open()
        assert watch.handle_inactivity() == ListWatchStep(reconnect_after=0.0)
    request = watch.next_request()
    assert (request.watch, request.params.keys() & {"resourceVersion", "continue"}) == (False, set())


@pytest.mark.parametrize("said", [BOOKMARK % (96, b""), BOOKMARK % (97, b""), lines_of("services.watchlist.jsonl")[0]])
def test_whatever_is_heard_between_two_silences_keeps_the_watch(said: bytes) -> None:
    watch = following()
    for _ in range(5):
        watch.handle_inactivity()
        watch.next_request()
        watch.handle_open()
        watch.line(said)
    assert "sendInitialEvents" not in watch.next_request().params


def test_silence_counts_over_connections_that_end_before_it_is_noticed() -> None:
    watch = following()
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
def test_connections_too_short_for_a_bookmark_lead_to_a_list_no_more_than_every_hour(lasted: float) -> None:
    """A load balancer that cuts quiet connections is no reason to list everything every few minutes."""
    watch = following()
    passed = 0.0
    while watch.next_request().params.get("resourceVersion") == "96":
        watch.handle_open()
        watch.handle_close(lasted)
        passed += lasted
    assert passed == pytest.approx(3600.0, abs=lasted)


def test_failures_to_connect_are_no_silence() -> None:
    watch = following()
    for _ in range(50):
        watch.handle_failure("connection refused")
    assert watch.next_request().params["resourceVersion"] == "96"


NO_RESOURCE = b'{"code":404,"reason":"NotFound","message":"the server could not find the requested resource"}'
FORBIDDEN = b'{"code":403,"reason":"Forbidden","message":"User \\"kube-proxy\\" cannot watch resource"}'
NOT_DROPPED = "servicecidrs.networking.k8s.io: packets to unallocated service addresses are not dropped"
WITHHELD = [
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
LEFT_OUT = IgnoredFields(
    EndpointSlice, "ns", "web-1", 'endpoints[1].addresses[0] must be an IPv4 address, not "fd00::1"'
)


def test_what_is_left_out_of_an_object_is_said_beside_it() -> None:
    watch = machine(EndpointSlice)
    event = json.dumps({"type": "ADDED", "object": BAD_SLICE}).encode()
    assert watch.line(event).messages == (LEFT_OUT,)
    (listed,) = watch.line(BOOKMARK % (8, b',"annotations":{"k8s.io/initial-events-end":"true"}')).messages
    assert isinstance(listed, Replace)
    found, left_out = watch.line(event).messages
    assert isinstance(found, Upsert)
    assert left_out == LEFT_OUT


def test_what_is_left_out_of_an_object_of_a_page_is_said_before_the_list() -> None:
    watch = machine(EndpointSlice)
    watch.line(OLD_ETCD)
    body = {"metadata": {"resourceVersion": "9"}, "items": [BAD_SLICE]}
    left_out, listed = watch.handle_page(json.dumps(body).encode()).messages
    assert left_out == LEFT_OUT
    assert isinstance(listed, Replace)


@pytest.mark.parametrize("by_watch", [True, False])
@pytest.mark.parametrize(("status", "body", "said"), WITHHELD)
def test_service_cidrs_that_the_server_withholds_count_as_listed_and_empty(
    status: int, body: bytes, said: str, by_watch: bool
) -> None:
    watch = machine(ServiceCIDR)
    assert not watch.unavailable
    if not by_watch:
        watch.line(OLD_ETCD)
    step = watch.handle_status(status, {}, body)
    assert step.messages == (Replace(ServiceCIDR, ()),)
    assert step.reconnect_after == pytest.approx(0.8)
    assert watch.error.startswith(said)
    assert watch.unavailable
    assert watch.next_request().watch is by_watch
    assert "resourceVersion" not in watch.next_request().params


def test_service_cidrs_that_the_server_withholds_are_asked_for_ever_more_rarely() -> None:
    for chance, factor in ((0.0, 0.75), (1.0, 1.25)):
        watch = machine(ServiceCIDR, chance)
        delays = [watch.handle_status(404, {}, NO_RESOURCE).reconnect_after for _ in range(11)]
        expected = [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 240.0, 240.0]
        assert delays == [pytest.approx(seconds * factor) for seconds in expected]
        assert watch.handle_failure("connection refused").reconnect_after == pytest.approx(24.0 * factor)


def test_service_cidrs_that_the_server_gets_later_end_the_absence() -> None:
    watch = machine(ServiceCIDR)
    watch.handle_status(404, {}, NO_RESOURCE)
    watch.handle_open()
    assert watch.unavailable, "no list yet"
    line = b'{"type":"ADDED","object":{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16"]}}}'
    watch.line(line)
    expected = ServiceCIDR("kubernetes", ("10.96.0.0/16",))
    assert watch.line(END_OF_LIST).messages == (Replace(ServiceCIDR, (expected,)),)
    assert (watch.unavailable, watch.error) == (False, "")
    assert watch.handle_failure("reset by peer").reconnect_after == pytest.approx(0.8)
    assert not watch.unavailable


@pytest.mark.parametrize(("status", "body"), [(404, NO_RESOURCE), (403, FORBIDDEN)])
def test_service_cidrs_that_are_known_stay_when_the_server_withholds_them(status: int, body: bytes) -> None:
    watch = following(ServiceCIDR)
    step = watch.handle_status(status, {}, body)
    assert step.messages == ()
    assert step.reconnect_after == pytest.approx(0.8)
    assert "servicecidrs.networking.k8s.io: keeping the last known objects (40" in watch.error
    assert watch.unavailable
    assert watch.next_request().params["resourceVersion"] == "96"
    watch.line(ERROR_410)
    assert not watch.unavailable
    assert watch.handle_status(status, {}, body).messages == ()


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_service_cidrs_are_waited_for_whatever_else_is_wrong(status: int) -> None:
    watch = machine(ServiceCIDR)
    for _ in range(8):
        assert watch.handle_status(status, {}, b"").messages == ()
        assert watch.handle_failure("connection refused").messages == ()
        assert watch.handle_inactivity().messages == ()
        assert not watch.unavailable


@pytest.mark.parametrize("kind", [Service, EndpointSlice, Node])
@pytest.mark.parametrize(("status", "body"), [(404, NO_RESOURCE), (403, FORBIDDEN)])
def test_no_other_kind_is_done_without(kind: Kind, status: int, body: bytes) -> None:
    watch = machine(kind)
    steps = [watch.handle_status(status, {}, body) for _ in range(8)]
    assert [step.messages for step in steps] == [()] * 8
    assert steps[-1].reconnect_after == pytest.approx(24.0)
    assert not watch.unavailable


def test_trouble_ends_when_the_watch_is_open_again() -> None:
    watch = following()
    watch.handle_failure("connection refused")
    assert watch.error == "cannot watch services: connection refused"
    watch.handle_open()
    assert not watch.error


def test_a_refused_field_selector_is_dropped_for_good() -> None:
    watch = machine()
    body = b'{"code":400,"reason":"BadRequest","message":"field label not supported: spec.type"}'
    assert watch.handle_status(400, {}, body) == ListWatchStep(reconnect_after=0.0)
    request = watch.next_request()
    assert request.params["sendInitialEvents"] == "true"
    assert "fieldSelector" not in request.params
    assert "labelSelector" in request.params


def test_a_bad_request_for_no_said_reason_gives_up_what_can_be_given_up() -> None:
    watch = machine()
    delays = [watch.handle_status(400, {}, b"").reconnect_after for _ in range(3)]
    assert delays == [0.0, 0.0, pytest.approx(0.8)]
    assert watch.next_request() == ListWatchRequest(
        "/api/v1/services", {"labelSelector": watch.next_request().params["labelSelector"], "limit": "500"}, False
    )


def test_the_selector_of_the_node_is_never_dropped() -> None:
    watch = machine(Node)
    for _ in range(4):
        watch.handle_status(400, {}, b'{"message":"field label not supported"}')
    assert watch.next_request().params["fieldSelector"] == "metadata.name=node-1"


def test_a_server_whose_past_was_replaced_is_listed_anew() -> None:
    watch = following()
    watch.handle_status(504, {}, b'{"reason":"Timeout","message":"Too large resource version: 96, current: 12"}')
    assert watch.next_request().params.get("resourceVersion") is None


def bad(name: str = "web", kind: str = "MODIFIED") -> bytes:
    spec = b'{"clusterIP":"10.96.0.300"}'
    metadata = b'{"name":"%b","namespace":"demo","resourceVersion":"500"}' % name.encode()
    return b'{"type":"%b","object":{"metadata":%b,"spec":%b}}' % (kind.encode(), metadata, spec)


def test_an_unreadable_object_keeps_its_last_state() -> None:
    watch, folded = machine(), Folded()
    lines = lines_of("services.watchlist.jsonl")
    for line in lines[:9]:
        folded.take(watch.line(line))
    before = dict(folded.objects)
    assert folded.take(watch.line(bad())).reconnect_after is None
    assert folded.objects == before
    (problem,) = folded.problems
    assert (problem.kind, problem.namespace, problem.name) == (Service, "demo", "web")
    assert "10.96.0.300" in problem.text
    assert watch.next_request().params["resourceVersion"] == "500"
    folded.take(watch.line(bad(kind="DELETED")))
    assert set(before) - set(folded.objects) == {("demo", "web")}


@pytest.mark.parametrize("by_watch", [True, False])
def test_an_unreadable_object_in_a_list_keeps_its_last_state(by_watch: bool) -> None:
    watch, folded = machine(), Folded()
    for line in lines_of("services.watchlist.jsonl")[:9]:
        folded.take(watch.line(line))
    before = dict(folded.objects)
    watch.line(ERROR_410)
    if by_watch:
        folded.take(watch.line(bad(kind="ADDED")))
        folded.take(watch.line(BOOKMARK % (200, b',"annotations":{"k8s.io/initial-events-end":"true"}')))
    else:
        watch.line(OLD_ETCD)
        item = json.loads(bad())["object"]
        folded.take(watch.handle_page(json.dumps({"metadata": {"resourceVersion": "7"}, "items": [item]}).encode()))
    assert folded.objects == {("demo", "web"): before["demo", "web"]}
    assert len(folded.problems) == 1


GARBAGE = [
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


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_reported_and_the_stream_goes_on(garbage: bytes) -> None:
    watch = following()
    step = watch.line(garbage)
    assert step.reconnect_after is None
    assert [type(message) for message in step.messages] == [InvalidObject]
    assert len(watch.line(lines_of("services.watchlist.jsonl")[9]).messages) == 1
    assert watch.handle_close(300.0) == ListWatchStep(reconnect_after=0.0)
    assert watch.next_request().params.get("resourceVersion") is None, "what was missed, only a list can tell"


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
def test_what_is_wrong_with_an_event_is_said_in_the_terms_of_the_api(line: bytes, text: str) -> None:
    assert following().line(line).messages == (InvalidObject(Service, "", "", text),)


def test_an_invalid_field_of_an_object_is_named() -> None:
    body = b'{"metadata":{"name":"web","namespace":"shop"},"spec":{"ports":[{"port":"http"}]}}'
    line = b'{"type":"MODIFIED","object":%b}' % body
    expected = InvalidObject(Service, "shop", "web", 'spec.ports[0].port must be an integer, not "http"')
    assert following().line(line).messages == (expected,)


END_OF_LIST = BOOKMARK % (200, b',"annotations":{"k8s.io/initial-events-end":"true"}')
HEADLESS = b"""{"type":"MODIFIED","object":{"metadata":{"name":"web","namespace":"demo","resourceVersion":"500"},
"spec":{"clusterIP":"None"}}}"""


def test_an_object_without_rules_any_more_is_gone() -> None:
    assert following().line(HEADLESS) == ListWatchStep((Delete(Service, "demo", "web"),))


@pytest.mark.parametrize("change", [HEADLESS, bad(kind="DELETED")])
def test_changes_among_the_initial_events_count(change: bytes) -> None:
    watch, folded = machine(), Folded()
    for line in [*lines_of("services.watchlist.jsonl")[:8], change, END_OF_LIST]:
        folded.take(watch.line(line))
    assert len(folded.objects) == 7
    assert ("demo", "web") not in folded.objects


@pytest.mark.parametrize("code", [401, 429, 503, 504])
def test_a_passing_error_is_no_reason_to_list_by_pages(code: int) -> None:
    watch = machine()
    step = watch.line(b'{"type":"ERROR","object":{"code":%d,"message":"x"}}' % code)
    assert step.reconnect_after == pytest.approx(0.8)
    assert watch.next_request().watch


def test_an_error_after_objects_discards_them_and_tries_again() -> None:
    watch, folded = machine(), Folded()
    lines = lines_of("services.watchlist.jsonl")
    watch.line(lines[0])
    assert watch.line(OLD_ETCD).reconnect_after == pytest.approx(0.8)
    assert watch.next_request().watch
    folded.take(watch.line(lines[1]))
    folded.take(watch.line(END_OF_LIST))
    assert len(folded.objects) == 1


def test_a_complete_list_forgets_earlier_failures() -> None:
    watch = machine()
    for _ in range(5):
        watch.handle_failure("connection refused")
    watch.line(END_OF_LIST)
    assert watch.handle_failure("reset by peer").reconnect_after == pytest.approx(0.8)


@pytest.mark.parametrize("ending", ["silent", "failed", "closed"])
def test_what_was_missed_is_listed_however_the_watch_ends(ending: str) -> None:
    watch = following()
    watch.line(GARBAGE[0])
    if ending == "silent":
        watch.handle_inactivity()
    elif ending == "failed":
        watch.handle_failure("reset by peer")
    else:
        watch.handle_close(0.0)
    assert watch.next_request().params["sendInitialEvents"] == "true"


def test_a_list_without_a_version_is_no_list() -> None:
    watch = machine()
    watch.line(OLD_ETCD)
    assert not watch.handle_page(b'{"metadata":{},"items":[]}').messages
    assert not watch.next_request().watch


@pytest.mark.parametrize("status", [400, 422])
def test_a_version_that_the_server_calls_invalid_is_given_up(status: int) -> None:
    watch = following(EndpointSlice)
    assert watch.handle_status(status, {}, b'{"message":"Invalid value: \\"96\\""}').reconnect_after == 0.0
    assert watch.next_request().params["sendInitialEvents"] == "true"


def test_garbage_in_every_list_does_not_keep_the_rest_away() -> None:
    watch, folded, delays = machine(), Folded(), []
    while not folded.replaces:
        folded.take(watch.line(GARBAGE[0]))
        for line in lines_of("services.watchlist.jsonl")[:9]:
            step = folded.take(watch.line(line))
        delays.append(step.reconnect_after)
    assert delays == [pytest.approx(0.8), pytest.approx(1.6), None]
    assert len(folded.objects) == 8
    assert watch.next_request().params.get("resourceVersion")
    watch.handle_close(300.0)
    assert watch.next_request().params.get("resourceVersion") is None, "a later list may have what is missing"


def test_an_unreadable_page_is_asked_for_again() -> None:
    watch = machine()
    watch.line(OLD_ETCD)
    watch.handle_page(answer_of("list-page-1.txt")[2])
    asked = watch.next_request()
    assert watch.handle_page(b'{"metadata":{"resourceVersion":"2695"},"items":[{').reconnect_after == pytest.approx(0.8)
    assert watch.next_request() == asked
    assert watch.handle_page(b"{}").reconnect_after == pytest.approx(1.6)


@dataclass
class Replayed:
    """A server whose life is a recording: a list, then events, of which it has reached `now`."""

    kind: Kind
    items: list[Any]
    start: int
    events: list[bytes]
    by_watch: bool
    now: int = 0
    compacted: int = 0

    def version(self, upto: int) -> str:
        return (
            str(self.start) if not upto else json.loads(self.events[upto - 1])["object"]["metadata"]["resourceVersion"]
        )

    def present(self) -> list[Any]:
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
        """Return the lines a watch gets up to now."""
        given = request.params.get("resourceVersion")
        if given is None and not self.by_watch:
            return [OLD_ETCD]
        if given is None:
            lines = [json.dumps({"type": "ADDED", "object": item}).encode() for item in self.present()]
            end = b',"annotations":{"k8s.io/initial-events-end":"true"}'
            return [*lines, BOOKMARK % (int(self.version(self.now)), end)]
        seen = next(upto for upto in reversed(range(self.now + 1)) if self.version(upto) == given)
        return [ERROR_410] if seen < self.compacted else self.events[seen : self.now]

    def page(self, request: ListWatchRequest) -> bytes | None:
        version, offset = self.version(self.now), 0
        if token := request.params.get("continue"):
            version, text = token.split("/")
            offset = int(text)
            if version != self.version(self.now):
                return None
        items = self.present()
        metadata = {"resourceVersion": version}
        if offset + 3 < len(items):
            metadata["continue"] = f"{version}/{offset + 3}"
        return json.dumps({"metadata": metadata, "items": items[offset : offset + 3]}).encode()


def replayed(kind: Kind, name: str, by_watch: bool) -> Replayed:
    found = json.loads((RECORDED / f"{name}.list.json").read_bytes())
    version = int(found["metadata"]["resourceVersion"])
    return Replayed(kind, found["items"], version, lines_of(f"{name}.watch.jsonl"), by_watch)


def converse(server: Replayed, watch: JsonWatch, folded: Folded, fault: str, cut: int) -> None:
    """Make one request, and let the fault end it after `cut` lines."""
    request = watch.next_request()
    if fault == "connect":
        folded.take(watch.handle_failure("connection refused"))
    elif fault in {"429", "500", "503", "410", "403", "401"}:
        folded.take(watch.handle_status(int(fault), {}, b""))
    elif not request.watch:
        page = server.page(request)
        if page is None:
            folded.take(watch.handle_status(*answer_of("list-continue-too-old.txt")))
        elif fault in {"none", "clean"}:
            folded.take(watch.handle_page(page))
        else:
            folded.take(watch.handle_page(page[:cut]) if fault == "garbage" else watch.handle_failure("reset"))
    else:
        watch.handle_open()
        read_stream(server.stream(request), watch, folded, fault, cut)


def read_stream(lines: list[bytes], watch: JsonWatch, folded: Folded, fault: str, cut: int) -> None:
    if fault not in {"none", "garbage"}:
        lines = lines[: cut % (len(lines) + 1)]
    for number, line in enumerate(lines):
        garbled = fault == "garbage" and number == cut % len(lines)
        if folded.take(watch.line(line[: 1 + cut % (len(line) - 1)] if garbled else line)).reconnect_after is not None:
            return
    endings: dict[str, Callable[[], ListWatchStep]] = {
        "clean": lambda: watch.handle_close(300.0),
        "none": lambda: watch.handle_close(300.0),
        "short": lambda: watch.handle_close(0.1),
        "silent": watch.handle_inactivity,
        "error": lambda: watch.line(b'{"type":"ERROR","object":{"code":500,"message":"x"}}'),
        "expired": lambda: watch.line(ERROR_410),
    }
    if fault in endings:
        folded.take(endings[fault]())
    else:
        folded.take(watch.handle_failure("reset by peer"))


FAULTS = (
    *("none", "clean", "short", "silent", "error", "expired", "drop", "garbage", "connect"),
    *("429", "500", "503", "410", "403", "401"),
)
turns = st.tuples(st.sampled_from(FAULTS), st.integers(0, 4000), st.integers(0, 40), st.booleans())


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(KINDS), by_watch=st.booleans(), script=st.lists(turns, max_size=25))
def test_whatever_goes_wrong_the_result_is_the_truth(
    which: tuple[Kind, str], by_watch: bool, script: list[tuple[str, int, int, bool]]
) -> None:
    kind, name = which
    server = replayed(kind, name, by_watch)
    watch, folded = machine(kind), Folded()
    for fault, cut, progress, compact in script:
        converse(server, watch, folded, fault, cut)
        server.now = min(len(server.events), server.now + progress)
        if compact:
            server.compacted = server.now
    server.now = len(server.events)
    for _ in range(60):
        converse(server, watch, folded, "none", 0)
    assert folded.replaces
    assert folded.objects == truth(kind, server.items, server.events)


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=300), listed=st.booleans())
def test_no_line_ever_raises(text: bytes, listed: bool) -> None:
    watch = following() if listed else machine()
    watch.line(text)
    watch.handle_status(500, {}, text)
    watch.line(OLD_ETCD)
    watch.handle_page(text)
    assert watch.next_request().path == "/api/v1/services"


def test_406_asks_for_json_from_then_on() -> None:
    watch = machine()
    assert watch.handle_status(406, {}, b"").reconnect_after == pytest.approx(0.8)
    assert watch.next_request().accept == "application/json"
    assert watch.next_request().params["sendInitialEvents"] == "true", "no reason to list by pages"
    watch.handle_status(503, {}, b"")
    assert watch.next_request().accept == "application/json"


def test_what_is_unreadable_without_a_name_asks_for_json_from_then_on() -> None:
    watch = following()
    watch.handle_event(UndecodableObject("demo", "web", "97", "spec.ports[0].port must be from 1 to 65535, not 0"))
    assert watch.next_request().accept == BOTH
    watch.handle_event(UndecodableObject("", "", "", "a message is truncated"))
    assert watch.next_request().accept == "application/json"


def test_pages_are_asked_for_in_json() -> None:
    watch = machine()
    watch.line(OLD_ETCD)
    assert watch.next_request().accept == "application/json"
