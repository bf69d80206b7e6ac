"""`ApiSource` over real HTTP, against the test server and, where installed, a real kube-apiserver."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Literal, TypeAlias

import pytest

from kproxy.kube.listwatch.api_source import REPEAT_PERIOD, LogDeduplicator
from kproxy.model.delta import Delta, Invalid, Replace, Upsert
from kproxy.model.types import EndpointSlice, Node, Service
from tests.api.conftest import Cluster, Received, StartSource
from tests.apiserver import ApiServer, Relay, SeenRequest
from tests.apiserver.objects import endpoint_slice, labeled, node, service
from tests.lab.waiting import HANG_GUARD

Support: TypeAlias = Literal["supported", "ignored"]
PROXY_NAME = "service.kubernetes.io/service-proxy-name"


def is_service_watch(request: SeenRequest) -> bool:
    return request.is_watch and request.path == "/api/v1/services"


def services_only(path: str, _query: dict[str, str]) -> bool:
    return path == "/api/v1/services"


def port_of(received: Received, name: str) -> int:
    current = received.objects[Service].get(f"demo/{name}")
    return current.ports[0].port if isinstance(current, Service) else 0


def test_every_kind_is_listed_and_watched(cluster: Cluster, start_source: StartSource, received: Received) -> None:
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-1", "web", ["10.0.0.1", "10.0.0.2"]))
    cluster.create(node("node-1"))
    cluster.create(node("node-2"))
    start_source(cluster)
    received.until_listed()
    assert [received.names(kind) for kind in (Service, EndpointSlice, Node)] == [{"web"}, {"web-1"}, {"node-1"}]

    cluster.create(service("db", "10.96.7.2"))
    cluster.update(service("web", "10.96.7.1", port=81))
    cluster.delete(endpoint_slice("web-1", "web", []))
    cluster.update(node("node-1", zone="zone-b"))
    received.until(lambda _: port_of(received, "web") == 81 and received.names(Service) == {"web", "db"})
    received.until(lambda _: not received.names(EndpointSlice))
    received.until(lambda _: [item.zone for item in received.objects[Node].values()] == ["zone-b"])  # type: ignore[union-attr]
    assert sum(isinstance(delta, Replace) for delta in received.deltas) == 3


def test_objects_of_other_proxies_are_filtered_and_removed_when_relabeled(
    cluster: Cluster, start_source: StartSource, received: Received
) -> None:
    cluster.create(service("mine", "10.96.7.1"))
    other = service("other", "10.96.7.2")
    other["metadata"]["labels"] = {PROXY_NAME: "another"}
    cluster.create(other)
    cluster.create(service("headless", "None"))
    start_source(cluster)
    received.until_listed()
    assert received.names(Service) == {"mine"}
    taken = service("mine", "10.96.7.1")
    taken["metadata"]["labels"] = {PROXY_NAME: "another"}
    cluster.update(taken)
    cluster.create(labeled(service("last", "10.96.7.3"), app="demo"))
    received.until(lambda _: received.names(Service) == {"last"})


def test_catches_up_after_a_broken_connection(
    cluster: Cluster, relay: Relay, start_source: StartSource, received: Received
) -> None:
    cluster.create(service("web", "10.96.7.1"))
    start_source(cluster, port=relay.port)
    received.until_listed()
    relay.refuse()
    cluster.delete(service("web", "10.96.7.1"))
    cluster.create(service("db", "10.96.7.2"))
    relay.allow()
    received.until(lambda _: received.names(Service) == {"db"})
    assert received.lists(Service) == 1


def test_stalled_connection_is_replaced(
    cluster: Cluster, relay: Relay, start_source: StartSource, received: Received
) -> None:
    start_source(cluster, port=relay.port, inactivity=1.0)
    received.until_listed()
    relay.stall()  # never resumed: only a new connection delivers the change
    cluster.create(service("web", "10.96.7.1"))
    received.until(lambda _: received.names(Service) == {"web"})


@pytest.mark.parametrize("watch_list", ["supported", "forbidden"])
def test_etcd_restored_from_an_older_backup_is_listed_again(
    server: ApiServer, start_source: StartSource, received: Received, watch_list: Literal["supported", "forbidden"]
) -> None:
    server.bookmark_interval = 0.1
    server.set_watch_list(watch_list)
    for number in range(40):
        server.create(service(f"lost-{number}", f"10.96.7.{number + 1}"))
    server.create(endpoint_slice("lost-x", "lost-1", ["10.244.1.1"]))
    server.create(node("node-1"))
    start_source(server, inactivity=1.0)
    received.until_listed()
    assert received.lists(Service) == 1
    server.restore_backup(service("web", "10.96.8.1"))
    server.create(endpoint_slice("web-x", "web", ["10.244.1.2"]))
    received.until(lambda _: received.names(Service) == {"web"} and received.names(EndpointSlice) == {"web-x"})
    received.until(lambda _: received.names(Node) == set())
    server.create(service("new", "10.96.8.2"))
    received.until(lambda _: received.names(Service) == {"web", "new"})


def test_compacted_history_is_listed_again(
    cluster: Cluster, relay: Relay, start_source: StartSource, received: Received
) -> None:
    cluster.create(service("gone", "10.96.7.1"))
    cluster.create(service("kept", "10.96.7.2"))
    start_source(cluster, port=relay.port)
    received.until_listed()
    relay.refuse()
    cluster.delete(service("gone", "10.96.7.1"))
    cluster.compact()
    relay.allow()
    received.until(lambda _: received.names(Service) == {"kept"})
    assert received.lists(Service) == 2


def test_survives_a_server_restart(cluster: Cluster, start_source: StartSource, received: Received) -> None:
    cluster.create(service("web", "10.96.7.1"))
    start_source(cluster)
    received.until_listed()
    cluster.stop()
    cluster.start()
    cluster.create(service("db", "10.96.7.2"))
    received.until(lambda _: received.names(Service) == {"web", "db"})


@pytest.mark.parametrize("protobuf", ["supported", "ignored"])
@pytest.mark.parametrize("fault", ["drop", "end", "cut_mid_line", "expire", "fail", "silence"])
def test_watch_is_resumed_after_every_kind_of_end(
    server: ApiServer, start_source: StartSource, received: Received, fault: str, protobuf: Support
) -> None:
    server.faults.protobuf = protobuf
    server.create(service("web", "10.96.7.1"))
    start_source(server, inactivity=1.0 if fault == "silence" else 90.0)
    received.until_listed()
    faults = {
        "drop": server.drop_watches,
        "end": server.end_watches,
        "cut_mid_line": server.cut_watches_mid_line,
        "expire": server.expire_watches,
        "fail": server.fail_watches,
        "silence": server.silence_watches,
    }
    faults[fault]()
    server.apply(service("web", "10.96.7.1", port=82))
    received.until(lambda _: port_of(received, "web") == 82)
    assert received.lists(Service) == (2 if fault in {"expire", "fail"} else 1)


@pytest.mark.parametrize("support", ["old-etcd", "forbidden", "ignored"])
def test_lists_in_pages_without_watch_list_support(
    server: ApiServer, start_source: StartSource, received: Received, support: str
) -> None:
    server.faults.watch_list = support  # type: ignore[assignment]
    server.bookmark_interval = 0.2
    for number in range(1201):
        server.create(service(f"web-{number}", f"10.96.{8 + number // 250}.{number % 250 + 1}"))
    start_source(server)
    received.until_listed()
    assert len(received.names(Service)) == 1201
    pages = server.requests.wait_for(lambda seen: "limit" in seen.query and "services" in seen.path, 3)
    assert [page.query["limit"] for page in pages] == ["500"] * 3
    assert [("continue" in page.query) for page in pages] == [False, True, True]
    server.create(service("late", "10.96.7.1"))
    received.until(lambda _: "late" in received.names(Service))
    server.drop_watches()
    watches = server.requests.wait_for(is_service_watch, 3)
    assert sum("sendInitialEvents" in request.query for request in watches) == 1


def test_expired_continue_token_restarts_the_list(
    server: ApiServer, start_source: StartSource, received: Received
) -> None:
    server.set_watch_list("forbidden")
    for number in range(700):
        server.create(service(f"web-{number}", f"10.96.{8 + number // 250}.{number % 250 + 1}"))
    server.fail_requests(410, matches=lambda path, query: "continue" in query and path == "/api/v1/services")
    start_source(server)
    received.until_listed()
    pages = server.requests.wait_for(lambda seen: "limit" in seen.query and "services" in seen.path, 4)
    assert [("continue" in page.query) for page in pages] == [False, True, False, True]
    assert len(received.names(Service)) == 700
    assert received.lists(Service) == 1


def test_rejected_field_selector_is_dropped(server: ApiServer, start_source: StartSource, received: Received) -> None:
    server.faults.service_fields = False
    server.create(service("web", "10.96.7.1"))
    server.create(service("headless", "None"))
    start_source(server)
    received.until_listed()
    assert received.names(Service) == {"web"}
    assert ["fieldSelector" in request.query for request in server.requests.wait_for(is_service_watch, 2)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_rejected_requests_are_logged_and_retried(
    server: ApiServer, start_source: StartSource, received: Received, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    server.create(service("web", "10.96.7.1"))
    server.fail_requests(status, retry_after=1 if status == 429 else None, matches=services_only)
    start_source(server)
    received.until_listed()
    assert received.names(Service) == {"web"}
    lines = [
        entry.getMessage()
        for entry in caplog.records
        if "cannot watch services: the API server returned" in entry.getMessage()
    ]
    assert len(lines) == 1
    assert str(status) in lines[0]
    assert [entry.getMessage() for entry in caplog.records if "watching services again" in entry.getMessage()]


@pytest.mark.parametrize("protobuf", ["supported", "ignored"])
def test_undecodable_event_is_logged_and_skipped(
    server: ApiServer,
    start_source: StartSource,
    received: Received,
    caplog: pytest.LogCaptureFixture,
    protobuf: Support,
) -> None:
    server.faults.protobuf = protobuf
    server.create(service("web", "10.96.7.1"))
    start_source(server)
    received.until_listed()
    server.requests.wait_for(is_service_watch)
    invalid = service("web", "10.96.7.1", port=70_000)
    server.inject(json.dumps({"type": "MODIFIED", "object": invalid}).encode())
    server.inject(b"\xff\x00 neither JSON nor protobuf")
    server.create(service("db", "10.96.7.2"))
    received.until(lambda _: received.names(Service) == {"web", "db"})
    text = caplog.text
    assert (
        "Service demo/web is invalid: spec.ports[0].port must be from 1 to 65535, not 70000; keeping its last valid"
        in text
    )
    assert "cannot decode a Service: " in text


@pytest.mark.parametrize("protobuf", ["supported", "ignored"])
def test_events_in_many_small_pieces(
    server: ApiServer, start_source: StartSource, received: Received, protobuf: Support
) -> None:
    server.faults.protobuf = protobuf
    server.faults.piece = 3
    server.create(labeled(service("web", "10.96.7.1"), app="größe-名"))
    start_source(server)
    received.until_listed()
    server.create(service("db", "10.96.7.2"))
    received.until(lambda _: received.names(Service) == {"web", "db"})


@pytest.mark.parametrize("moment", ["watching", "before the headers", "between attempts"])
def test_stop_ends_threads_and_delivery(
    server: ApiServer, start_source: StartSource, received: Received, moment: str
) -> None:
    relay = Relay(server.address)
    if moment == "before the headers":
        relay.stall(new=True)
    elif moment == "between attempts":
        relay.refuse()
    with relay:
        source = start_source(server, port=relay.port)
        if moment == "watching":
            received.until_listed()
        before = {thread for thread in threading.enumerate() if thread.name.startswith("api-")}
        assert len(before) == 3
        source.stop(0.5)
        server.create(service("late", "10.96.7.9"))
        relay.resume()
        for thread in before:
            thread.join(HANG_GUARD)
        assert not any(thread.is_alive() for thread in before)
        assert received.is_empty()


def test_failing_sink_does_not_stop_the_source(
    server: ApiServer, received: Received, start_source: StartSource, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [RuntimeError("sink failed")]
    put = received.put

    def sink(delta: Delta) -> None:
        if failures and isinstance(delta, Replace) and delta.kind is Service:
            raise failures.pop()
        put(delta)

    received.put = sink
    server.create(service("web", "10.96.7.1"))
    start_source(server)
    received.until_listed()
    assert received.names(Service) == {"web"}
    assert "watch of services: unexpected RuntimeError('sink failed'); trying again" in caplog.text


def test_ignored_endpoints_of_a_slice_are_logged_once(
    server: ApiServer, start_source: StartSource, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    server.create(endpoint_slice("web-1", "web", ["10.0.0.1", "fd00::1"]))
    reported = []
    start_source(server, on_invalid=lambda *report: reported.append(report))
    received.until_listed()
    server.update(endpoint_slice("web-1", "web", ["10.0.0.2", "fd00::1"]))
    received.until(lambda _: [len(item.endpoints) for item in received.objects[EndpointSlice].values()] == [1])  # type: ignore[union-attr]
    server.update(endpoint_slice("web-1", "web", ["10.0.0.2"]))
    received.until(lambda _: sum(isinstance(delta, Upsert) for delta in received.deltas) == 2)
    text = (
        "EndpointSlice demo/web-1: ignoring unusable addresses and ports: "
        'endpoints[1].addresses[0] must be an IPv4 address, not "fd00::1"'
    )
    assert [entry.getMessage() for entry in caplog.records if "unusable" in entry.getMessage()] == [text]
    assert reported == [(EndpointSlice, "demo", "web-1", text)]


def test_invalid_service_is_delivered_as_invalid(
    server: ApiServer, start_source: StartSource, received: Received
) -> None:
    server.create(service("web", "10.96.7.1"))
    reported = []
    start_source(server, on_invalid=lambda *report: reported.append(report))
    received.until_listed()
    server.update(service("web", "10.96.7.1", port=99999))
    received.until(lambda _: Invalid(Service, "demo", "web") in received.deltas)
    text = "spec.ports[0].port must be from 1 to 65535, not 99999"
    text = f"Service demo/web is invalid: {text}; keeping its last valid state"
    assert reported == [(Service, "demo", "web", text)]
    assert port_of(received, "web") == 80


def test_repeated_errors_are_logged_once_a_minute_and_recovery_once() -> None:
    deduplicator = LogDeduplicator(REPEAT_PERIOD)
    assert deduplicator.should_log_error("refused", 0.0)
    assert not deduplicator.should_log_error("refused", REPEAT_PERIOD - 1)
    assert deduplicator.should_log_error("refused", REPEAT_PERIOD)
    assert deduplicator.should_log_error("", REPEAT_PERIOD + 1)
    assert not deduplicator.should_log_error("", REPEAT_PERIOD + 2)
    assert not deduplicator.should_log_error("refused", REPEAT_PERIOD + 3)
    assert not deduplicator.should_log_error("", REPEAT_PERIOD + 4)


def test_lasting_error_is_logged_once_until_another_error() -> None:
    deduplicator = LogDeduplicator(REPEAT_PERIOD)
    assert deduplicator.should_log_error("no such thing", 0.0, lasting=True)
    assert not deduplicator.should_log_error("no such thing", 10 * REPEAT_PERIOD, lasting=True)
    assert deduplicator.should_log_error("connection refused", 10 * REPEAT_PERIOD)
    assert deduplicator.should_log_error("no such thing", 10 * REPEAT_PERIOD, lasting=True)
    assert deduplicator.should_log_error("", 10 * REPEAT_PERIOD)


def test_ten_thousand_slices(server: ApiServer, start_source: StartSource, received: Received) -> None:
    addresses = [f"10.1.0.{number}" for number in range(10)]
    for number in range(10_000):
        server.create(endpoint_slice(f"web-{number}", "web", addresses))
    start_source(server)
    received.until_listed()
    assert len(received.objects[EndpointSlice]) == 10_000


def test_credentials_are_reloaded_after_status_401(
    server: ApiServer, start_source: StartSource, received: Received, tmp_path: Path
) -> None:
    start_source(server)
    received.until_listed()
    server.tokens = {"new"}
    server.kubeconfig(tmp_path / "kubeconfig")
    server.drop_watches()
    server.create(service("web", "10.96.7.1"))
    received.until(lambda _: received.names(Service) == {"web"})
    assert received.lists(Service) == 1
