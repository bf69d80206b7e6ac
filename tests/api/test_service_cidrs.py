"""ServiceCIDRs over real HTTP: watched where the server has them, optional where it does not."""

from __future__ import annotations

import logging
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.listwatch import reflector as api_source
from kproxy.kube.listwatch.reflector import ApiSource
from kproxy.model.delta import BASIC_KINDS, Kind
from kproxy.model.types import Service, ServiceCIDR
from tests.api.conftest import Cluster, Received, StartSource
from tests.apiserver import ApiServer, NotFoundError, SeenRequest
from tests.apiserver.objects import service, service_cidr
from tests.lab.waiting import HANG_GUARD

PATH = "/apis/networking.k8s.io/v1/servicecidrs"
KINDS = (*BASIC_KINDS, ServiceCIDR)


@pytest.fixture
def received() -> Received:
    return Received(KINDS)


def is_for_service_cidrs(request: SeenRequest) -> bool:
    return request.path == PATH


def ranges(received: Received) -> dict[str, tuple[str, ...]]:
    """Return the ranges of each ServiceCIDR except the cluster's own."""
    objects: Any = received.objects[ServiceCIDR].values()
    return {item.name: item.cidrs for item in objects if item.name != "kubernetes"}


def test_created_and_deleted_service_cidrs_are_received(
    cluster: Cluster, start_source: StartSource, received: Received
) -> None:
    try:
        cluster.create(service_cidr("first", "10.97.0.0/16"))
    except NotFoundError:
        pytest.skip("this server has no ServiceCIDRs")
    start_source(cluster, kinds=KINDS)
    received.until_listed()
    assert ranges(received) == {"first": ("10.97.0.0/16",)}
    cluster.create(service_cidr("second", "10.98.0.0/16", "fd00:10:98::/112"))
    received.until(lambda _: len(ranges(received)) == 2)
    assert ranges(received)["second"] == ("10.98.0.0/16", "fd00:10:98::/112")
    cluster.delete(service_cidr("first"))
    received.until(lambda _: ranges(received).keys() == {"second"})
    assert received.lists(ServiceCIDR) == 1


@pytest.mark.parametrize("watch_list", ["supported", "forbidden"])
def test_changed_service_cidr_is_received(
    server: ApiServer, start_source: StartSource, received: Received, watch_list: Literal["supported", "forbidden"]
) -> None:
    server.set_watch_list(watch_list)
    server.create(service_cidr("more", "10.97.0.0/16"))
    start_source(server, kinds=KINDS)
    received.until_listed()
    server.update(service_cidr("more", "10.97.0.0/16", "fd00:10:97::/112"))
    received.until(lambda _: ranges(received) == {"more": ("10.97.0.0/16", "fd00:10:97::/112")})


def test_invalid_service_cidr_is_logged_and_keeps_its_last_good_state(
    server: ApiServer, start_source: StartSource, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    server.create(service_cidr("more", "10.97.0.0/16"))
    start_source(server, kinds=KINDS)
    received.until_listed()
    server.update(service_cidr("more", "10.97.0.0/99"))
    server.create(service_cidr("last", "10.98.0.0/16"))
    received.until(lambda _: "last" in ranges(received))
    assert ranges(received) == {"more": ("10.97.0.0/16",), "last": ("10.98.0.0/16",)}
    problem = 'spec.cidrs[0] must be a CIDR (such as 10.0.0.0/8), not "10.97.0.0/99"'
    assert f"ServiceCIDR more is invalid: {problem}; keeping its last valid state" in caplog.text


MESSAGES = {404: "the API server does not serve", 403: "no permission to list and watch"}


@pytest.fixture
def repeat_every_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_source, "REPEAT_PERIOD", 0.0)


@pytest.mark.usefixtures("repeat_every_message")
@pytest.mark.parametrize("status", [404, 403])
def test_missing_service_cidrs_block_nothing_and_may_appear_later(
    server: ApiServer,
    start_source: StartSource,
    received: Received,
    caplog: pytest.LogCaptureFixture,
    status: Literal[403, 404],
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    server.hide("servicecidrs", status)
    server.create(service("web", "10.96.7.1"))
    server.create(service_cidr("more", "10.97.0.0/16"))
    start_source(server, kinds=KINDS)
    received.until_listed()
    assert received.names(Service) == {"web"}
    assert ranges(received) == {}
    server.requests.wait_for(is_for_service_cidrs, 2)
    server.show("servicecidrs")
    received.until(lambda _: ranges(received) == {"more": ("10.97.0.0/16",)})
    server.create(service_cidr("last", "10.98.0.0/16"))
    received.until(lambda _: "last" in ranges(received))
    lines = [record.getMessage() for record in caplog.records if "servicecidrs" in record.getMessage()]
    assert len(lines) == 2
    effect = "packets to unallocated service addresses are not dropped"
    assert lines[0].startswith(f"{MESSAGES[status]} servicecidrs.networking.k8s.io: {effect} ({status}")
    assert lines[1] == "watching servicecidrs.networking.k8s.io again"


@pytest.mark.parametrize("status", [404, 403])
def test_missing_service_cidrs_are_not_counted_as_errors(
    server: ApiServer, received: Received, tmp_path: Path, status: Literal[403, 404]
) -> None:
    server.hide("servicecidrs", status)
    client = ApiClient.from_config(str(server.kubeconfig(tmp_path / "kubeconfig")))
    counted: SimpleQueue[str] = SimpleQueue()
    client.observe_request = lambda _method, _host, code, _seconds: counted.put(code)
    source = ApiSource(client, "node-1", received.put, kinds=KINDS)
    source.start()
    received.until_listed()
    server.requests.wait_for(is_for_service_cidrs, 2)
    server.show("servicecidrs")
    server.hide("nodes", status)
    server.drop_watches()
    server.requests.wait_for(lambda request: request.path == "/api/v1/nodes", 3)
    source.stop(HANG_GUARD)
    codes = [counted.get() for _ in range(counted.qsize())]
    for_nodes = len([item for item in server.requests.all() if item.path == "/api/v1/nodes"]) - 1
    assert "200" in codes
    assert 0 < codes.count(str(status)) <= for_nodes, "only kinds that kproxy requires are counted as errors"


@pytest.mark.parametrize("status", [404, 403])
def test_known_service_cidrs_stay_while_they_are_unavailable(
    server: ApiServer, start_source: StartSource, received: Received, status: Literal[403, 404]
) -> None:
    server.create(service_cidr("more", "10.97.0.0/16"))
    start_source(server, kinds=KINDS)
    received.until_listed()
    server.requests.wait_for(is_for_service_cidrs)
    server.hide("servicecidrs", status)
    server.drop_watches()
    server.requests.wait_for(is_for_service_cidrs, 2)
    server.show("servicecidrs")
    server.create(service_cidr("last", "10.98.0.0/16"))
    received.until(lambda _: len(ranges(received)) == 2)
    assert received.lists(ServiceCIDR) == 1


@pytest.mark.parametrize("hidden", BASIC_KINDS)
@pytest.mark.parametrize("status", [404, 403])
def test_all_other_kinds_are_required(
    server: ApiServer, start_source: StartSource, received: Received, status: Literal[403, 404], hidden: Kind
) -> None:
    plural = f"{hidden.__name__.lower()}s"
    server.hide(plural, status)
    source = start_source(server, kinds=KINDS)
    received.until(lambda _: all(received.lists(kind) for kind in KINDS if kind is not hidden))
    server.requests.wait_for(lambda request: request.path.endswith(f"/{plural}"), 3)
    source.stop(HANG_GUARD)
    assert received.is_empty()
    assert not received.lists(hidden)


def test_service_cidrs_are_not_requested_unless_configured(
    server: ApiServer, start_source: StartSource, received: Received
) -> None:
    source = start_source(server)
    received.until(lambda _: all(received.lists(kind) for kind in BASIC_KINDS))
    source.stop(HANG_GUARD)
    assert not any(map(is_for_service_cidrs, server.requests.all()))
