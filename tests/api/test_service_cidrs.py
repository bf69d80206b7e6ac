"""ServiceCIDRs over real HTTP: followed where the server has them, done without where it does not."""

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
from tests.api.conftest import Cluster, Follow, Received
from tests.apiserver import ApiServer, NotFoundError, SeenRequest
from tests.apiserver.objects import service, service_cidr

PATH = "/apis/networking.k8s.io/v1/servicecidrs"
KINDS = (*BASIC_KINDS, ServiceCIDR)


@pytest.fixture
def received() -> Received:
    return Received(KINDS)


def is_asked_for(request: SeenRequest) -> bool:
    return request.path == PATH


def ranges(received: Received) -> dict[str, tuple[str, ...]]:
    """Return the ranges of each ServiceCIDR but the cluster's own."""
    found: Any = received.objects[ServiceCIDR].values()
    return {item.name: item.cidrs for item in found if item.name != "kubernetes"}


def test_created_and_deleted_ones_arrive(cluster: Cluster, follow: Follow, received: Received) -> None:
    try:
        cluster.create(service_cidr("first", "10.97.0.0/16"))
    except NotFoundError:
        pytest.skip("this server is older than ServiceCIDRs")
    follow(cluster, kinds=KINDS)
    received.until_listed()
    assert ranges(received) == {"first": ("10.97.0.0/16",)}
    cluster.create(service_cidr("second", "10.98.0.0/16", "fd00:10:98::/112"))
    received.until(lambda _: len(ranges(received)) == 2)
    assert ranges(received)["second"] == ("10.98.0.0/16", "fd00:10:98::/112")
    cluster.delete(service_cidr("first"))
    received.until(lambda _: ranges(received).keys() == {"second"})
    assert received.lists(ServiceCIDR) == 1


@pytest.mark.parametrize("watch_list", ["supported", "forbidden"])
def test_a_changed_one_arrives(
    server: ApiServer, follow: Follow, received: Received, watch_list: Literal["supported", "forbidden"]
) -> None:
    server.set_watch_list(watch_list)
    server.create(service_cidr("more", "10.97.0.0/16"))
    follow(server, kinds=KINDS)
    received.until_listed()
    server.update(service_cidr("more", "10.97.0.0/16", "fd00:10:97::/112"))
    received.until(lambda _: ranges(received) == {"more": ("10.97.0.0/16", "fd00:10:97::/112")})


def test_a_bad_one_is_said_and_keeps_its_last_good_state(
    server: ApiServer, follow: Follow, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    server.create(service_cidr("more", "10.97.0.0/16"))
    follow(server, kinds=KINDS)
    received.until_listed()
    server.update(service_cidr("more", "10.97.0.0/99"))
    server.create(service_cidr("last", "10.98.0.0/16"))
    received.until(lambda _: "last" in ranges(received))
    assert ranges(received) == {"more": ("10.97.0.0/16",), "last": ("10.98.0.0/16",)}
    problem = 'spec.cidrs[0] must be a CIDR (such as 10.0.0.0/8), not "10.97.0.0/99"'
    assert f"ServiceCIDR more is invalid: {problem}; keeping its last valid state" in caplog.text


SAID = {404: "the API server does not serve", 403: "no permission to list and watch"}


@pytest.fixture
def every_complaint_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_source, "REPEAT_PERIOD", 0.0)


@pytest.mark.usefixtures("every_complaint_is_news")
@pytest.mark.parametrize("status", [404, 403])
def test_a_server_that_withholds_them_blocks_nothing_and_may_have_them_later(
    server: ApiServer,
    follow: Follow,
    received: Received,
    caplog: pytest.LogCaptureFixture,
    status: Literal[403, 404],
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    server.withhold("servicecidrs", status)
    server.create(service("web", "10.96.7.1"))
    server.create(service_cidr("more", "10.97.0.0/16"))
    follow(server, kinds=KINDS)
    received.until_listed()
    assert received.names(Service) == {"web"}
    assert ranges(received) == {}
    server.requests.wait_for(is_asked_for, 2)
    server.show("servicecidrs")
    received.until(lambda _: ranges(received) == {"more": ("10.97.0.0/16",)})
    server.create(service_cidr("last", "10.98.0.0/16"))
    received.until(lambda _: "last" in ranges(received))
    lines = [record.getMessage() for record in caplog.records if "servicecidrs" in record.getMessage()]
    assert len(lines) == 2
    effect = "packets to unallocated service addresses are not dropped"
    assert lines[0].startswith(f"{SAID[status]} servicecidrs.networking.k8s.io: {effect} ({status}")
    assert lines[1] == "watching servicecidrs.networking.k8s.io again"


@pytest.mark.parametrize("status", [404, 403])
def test_a_server_that_withholds_them_counts_as_no_error(
    server: ApiServer, received: Received, tmp_path: Path, status: Literal[403, 404]
) -> None:
    server.withhold("servicecidrs", status)
    client = ApiClient.from_config(str(server.kubeconfig(tmp_path / "kubeconfig")))
    counted: SimpleQueue[str] = SimpleQueue()
    client.observe_request = lambda _method, _host, code, _seconds: counted.put(code)
    source = ApiSource(client, "node-1", received.put, kinds=KINDS)
    source.start()
    received.until_listed()
    server.requests.wait_for(is_asked_for, 2)
    server.show("servicecidrs")
    server.withhold("nodes", status)
    server.drop_watches()
    server.requests.wait_for(lambda request: request.path == "/api/v1/nodes", 3)
    source.stop()
    codes = [counted.get() for _ in range(counted.qsize())]
    for_nodes = len([each for each in server.requests.all() if each.path == "/api/v1/nodes"]) - 1
    assert "200" in codes
    assert 0 < codes.count(str(status)) <= for_nodes, "only what kproxy cannot do without is an error"


@pytest.mark.parametrize("status", [404, 403])
def test_known_ones_stay_while_the_server_withholds_them(
    server: ApiServer, follow: Follow, received: Received, status: Literal[403, 404]
) -> None:
    server.create(service_cidr("more", "10.97.0.0/16"))
    follow(server, kinds=KINDS)
    received.until_listed()
    server.requests.wait_for(is_asked_for)
    server.withhold("servicecidrs", status)
    server.drop_watches()
    server.requests.wait_for(is_asked_for, 2)
    server.show("servicecidrs")
    server.create(service_cidr("last", "10.98.0.0/16"))
    received.until(lambda _: len(ranges(received)) == 2)
    assert received.lists(ServiceCIDR) == 1


@pytest.mark.parametrize("withheld", BASIC_KINDS)
@pytest.mark.parametrize("status", [404, 403])
def test_no_other_kind_is_done_without(
    server: ApiServer, follow: Follow, received: Received, status: Literal[403, 404], withheld: Kind
) -> None:
    plural = f"{withheld.__name__.lower()}s"
    server.withhold(plural, status)
    source = follow(server, kinds=KINDS)
    received.until(lambda _: all(received.lists(kind) for kind in KINDS if kind is not withheld))
    server.requests.wait_for(lambda request: request.path.endswith(f"/{plural}"), 3)
    source.stop()
    assert received.is_empty()
    assert not received.lists(withheld)


def test_they_are_not_asked_for_unless_wanted(server: ApiServer, follow: Follow, received: Received) -> None:
    source = follow(server)
    received.until(lambda _: all(received.lists(kind) for kind in BASIC_KINDS))
    source.stop()
    assert not any(map(is_asked_for, server.requests.all()))
