"""Health check node ports of Services: responses as of kube-proxy, listen addresses, and the lifetime of ports."""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Iterable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from time import monotonic, time
from typing import Any

import pytest

from kproxy.model.context import Context
from kproxy.model.plan import plan_service
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.serve.http import encode
from kproxy.serve.server import HttpServer, ListenAddress, listen
from kproxy.serve.service_health import HealthCheckNodePorts, ServiceHealth, ServiceHealthTracker, service_response
from tests.lab.listen_attempts import ListenAttempts
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.ports import free_port, get
from tests.recordings import GOLDEN, store
from tests.reports import PlansByService, failed, succeeded

V4, V6 = Family.IPV4, Family.IPV6
RECORDED = sorted(GOLDEN.glob("*/healthcheck-*.txt"))
Updates = dict[str, ServiceHealth | None]


def report(family: Family, plans: PlansByService, *, complete: bool = True, **more: Any) -> SyncReport:
    return succeeded(family, plans, complete=complete, context=Context(family, "node-1", **more))


def plans_of(cluster: Store, family: Family) -> PlansByService:
    context = Context(family, "node-1")
    services = {key: cluster.service(key) for key in cluster.service_keys()}
    return {key: plan_service(service, cluster.slices(key), context) for key, service in services.items() if service}


class RecordedTracker:
    """A `ServiceHealthTracker` whose updates are recorded."""

    def __init__(self) -> None:
        self.updates: list[Updates] = []
        self.tracker = ServiceHealthTracker((V4, V6), lambda changes: self.updates.append(dict(changes)))

    @property
    def state(self) -> dict[str, ServiceHealth]:
        """All updates so far, merged; removed Services are omitted."""
        merged: Updates = {}
        for update in self.updates:
            merged |= update
        return {key: health for key, health in merged.items() if health}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_responses_match_kube_proxy(path: Path) -> None:
    recorded = RecordedTracker()
    for family in Family:
        recorded.tracker.on_sync(report(family, plans_of(store(path.parent.name), family)))
    port = int(path.stem.rpartition("-")[2])
    ((key, health),) = [
        (k, h) for k, h in recorded.state.items() if {address.port for address in h.endpoints} == {port}
    ]
    # kube-proxy's responses were recorded over IPv4.
    (count,) = [endpoints for address, endpoints in health.endpoints.items() if address.host in {"", "0.0.0.0"}]
    response = encode(service_response(key, count, healthy=True), 0.0, head_only=False, close=False)
    head, _, body = response.decode().partition("\r\n\r\n")
    expected_head, _, expected_body = path.read_bytes().decode().replace("\r\n", "\n").partition("\n\n")
    assert body == expected_body
    assert without_date(head.split("\r\n")) == without_date(expected_head.split("\n"))


def without_date(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if not line.startswith("Date: ")]


def test_recordings_cover_both_statuses() -> None:
    statuses = {path.read_text().split()[1] for path in RECORDED}
    assert statuses == {"200", "503"}


@pytest.mark.parametrize("scenario", ["clusterip", "nodeport-external-local", "loadbalancer"])
def test_services_without_a_health_check_node_port_are_ignored(scenario: str) -> None:
    recorded = RecordedTracker()
    for family in Family:
        recorded.tracker.on_sync(report(family, plans_of(store(scenario), family)))
    assert recorded.updates == []


PORTS = (ServicePort("http", 80, "TCP", 30080), ServicePort("dns", 53, "UDP", 30053))


def local(address: str, **more: bool) -> Endpoint:
    return Endpoint(address, "node-1", **more)  # type: ignore[arg-type]


def plans(
    *endpoints: Endpoint,
    port: int = 32000,
    family: Family = V4,
    key: str = "ns/web",
    cluster_ip: str = "",
    dual_stack: bool = False,
) -> PlansByService:
    namespace, _, name = key.partition("/")
    service = Service(
        namespace,
        name,
        ("10.96.0.1", "fd00::1") if dual_stack else (cluster_ip or {V4: "10.96.0.1", V6: "fd00::1"}[family],),
        PORTS,
        external_local=True,
        health_check_node_port=port,
    )
    ports = (EndpointPort("http", 8080, "TCP"), EndpointPort("dns", 5353, "UDP"))
    return {key: plan_service(service, [EndpointSlice("ns", "s", key, family, endpoints, ports)], context(family))}


def context(family: Family) -> Context:
    return Context(family, "node-1")


def local_endpoints(*endpoints: Endpoint) -> int:
    """Return the number of local endpoints that a Service with these endpoints reports."""
    recorded = RecordedTracker()
    recorded.tracker.on_sync(report(V4, plans(*endpoints)))
    (count,) = recorded.state["ns/web"].endpoints.values()
    return count


def test_ready_local_endpoints_are_counted() -> None:
    ready = local("10.244.1.1")
    terminating = {"ready": False, "serving": True, "terminating": True}
    assert local_endpoints() == 0
    assert local_endpoints(ready) == 1  # counted once although it serves two ports
    assert local_endpoints(ready, local("10.244.1.2")) == 2
    assert local_endpoints(ready, Endpoint("10.244.2.1", node="node-2"), Endpoint("10.244.3.1")) == 1
    assert local_endpoints(local("10.244.1.1", ready=False)) == 0
    assert local_endpoints(local("10.244.1.1", **terminating)) == 0
    assert local_endpoints(ready, local("10.244.1.2", **terminating)) == 1


def test_tracker_emits_only_changes() -> None:
    recorded = RecordedTracker()
    one, two = local("10.244.1.1"), local("10.244.1.2")
    address = ListenAddress("", 32000)
    tracker = recorded.tracker
    tracker.on_sync(report(V4, plans(one)))
    tracker.on_sync(report(V4, plans(one)))
    tracker.on_sync(failed(V4))
    tracker.on_sync(report(V4, {"ns/other": ()}, complete=False))
    tracker.on_sync(report(V4, plans(one, two), complete=False))
    tracker.on_sync(report(V4, plans(one, two, port=32001), complete=False))
    tracker.on_sync(report(V4, {"ns/web": ()}, complete=False))
    tracker.on_sync(report(V4, plans(one), complete=False))
    tracker.on_sync(report(V4, {}))
    assert recorded.updates == [
        {"ns/web": ServiceHealth({address: 1})},
        {"ns/web": ServiceHealth({address: 2})},
        {"ns/web": ServiceHealth({ListenAddress("", 32001): 2})},
        {"ns/web": None},
        {"ns/web": ServiceHealth({address: 1})},
        {"ns/web": None},
    ]


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "addresses"),
    [
        ("all", None, {ListenAddress("", 32000)}),
        ("all", "all", {ListenAddress("0.0.0.0", 32000, True), ListenAddress("::", 32000, True)}),
        (
            ("10.0.0.1", "10.0.0.2"),
            None,
            {ListenAddress("10.0.0.1", 32000, True), ListenAddress("10.0.0.2", 32000, True)},
        ),
        (("10.0.0.1",), "all", {ListenAddress("10.0.0.1", 32000, True), ListenAddress("::", 32000, True)}),
        ("all", ("fd00::1",), {ListenAddress("0.0.0.0", 32000, True), ListenAddress("fd00::1", 32000, True)}),
        ((), None, set()),
    ],
)
def test_listen_addresses_are_those_of_node_ports(ipv4: Any, ipv6: Any, addresses: set[ListenAddress]) -> None:
    recorded = RecordedTracker()
    for family, hosts in ((V4, ipv4), (V6, ipv6)):
        dual_stack = None not in {ipv4, ipv6}
        planned = plans(family=family, dual_stack=dual_stack) if hosts is not None else {"ns/web": ()}
        node_port_addresses = None if hosts == "all" else hosts
        recorded.tracker.on_sync(report(family, planned, node_port_addresses=node_port_addresses))
    assert recorded.state["ns/web"].endpoints.keys() == addresses


def test_each_family_counts_its_own_endpoints() -> None:
    recorded = RecordedTracker()
    v4, v6 = local("10.244.1.1"), [local(f"fd00::{number}") for number in (1, 2)]
    four, six = ListenAddress("0.0.0.0", 32000, one_family=True), ListenAddress("::", 32000, one_family=True)
    recorded.tracker.on_sync(report(V4, plans(v4, dual_stack=True)))
    assert recorded.state["ns/web"].endpoints == {four: 1}, "IPv6 is not synced yet"
    recorded.tracker.on_sync(report(V6, plans(*v6, family=V6, dual_stack=True)))
    assert recorded.state["ns/web"].endpoints == {four: 1, six: 2}
    recorded.tracker.on_sync(report(V6, plans(family=V6, dual_stack=True)))
    assert recorded.state["ns/web"].endpoints == {four: 1, six: 0}
    recorded.tracker.on_sync(report(V6, {"ns/web": ()}))
    assert recorded.state["ns/web"].endpoints == {four: 1}, "the change is not synced for IPv4 yet"
    recorded.tracker.on_sync(report(V4, plans(v4)))
    assert recorded.state["ns/web"].endpoints == {ListenAddress("", 32000): 1}, "the Service is single-stack now"
    recorded.tracker.on_sync(report(V4, {"ns/web": ()}))
    assert recorded.state == {}


class Ports:
    """Health check node ports on real sockets, with the failures that were reported."""

    def __init__(self) -> None:
        self.healthy = True
        self.failures: queue.SimpleQueue[tuple[str, int, str]] = queue.SimpleQueue()
        self.offset = 0.0
        self._server = HttpServer(clock=lambda: monotonic() + self.offset, wall=time)
        self._ports = HealthCheckNodePorts(
            self._server, lambda: self.healthy, lambda *failure: self.failures.put(failure)
        )
        self._server.start()

    def update(self, **services: ServiceHealth | None) -> None:
        """Update Services of namespace ns; return once the server has applied the update."""
        self._server.call(lambda: self._ports.update({f"ns/{name}": health for name, health in services.items()}))
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        done = threading.Event()
        self._server.call(done.set)
        assert done.wait(HANG_GUARD)

    def stop(self) -> None:
        self._server.stop(HANG_GUARD)


@pytest.fixture
def ports() -> Iterator[Ports]:
    opened = Ports()
    yield opened
    opened.stop()


def served_at(port: int, endpoints: int = 1, host: str = "127.0.0.1") -> ServiceHealth:
    return ServiceHealth({ListenAddress(host, port): endpoints})


def status(port: int, host: str = "127.0.0.1") -> int | None:
    try:
        return get(port, host=host)[0].status
    except ConnectionRefusedError:
        return None


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/any/path?x"), ("HEAD", "/"), ("OPTIONS", "/")])
def test_every_path_and_method_gets_a_response(ports: Ports, method: str, path: str) -> None:
    port = free_port()
    ports.update(web=served_at(port, 2))
    response, body = get(port, path, method=method)
    assert response.status == 200
    assert response.headers["X-Load-Balancing-Endpoint-Weight"] == "2"
    assert (b'"localEndpoints": 2' in body) == (method != "HEAD")


def test_status_depends_on_local_endpoints_and_proxy_health(ports: Ports) -> None:
    port = free_port()
    ports.update(web=served_at(port, 1))
    assert status(port) == 200
    ports.healthy = False
    response, body = get(port)
    assert (response.status, response.headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "1")
    assert b'"serviceProxyHealthy": false' in body
    ports.healthy = True
    ports.update(web=served_at(port, 0))
    assert status(port) == 503
    ports.update(web=served_at(port, 3))
    assert status(port) == 200


def test_endpoint_change_does_not_close_connections(ports: Ports) -> None:
    port = free_port()
    ports.update(web=served_at(port, 1))
    connection = HTTPConnection("127.0.0.1", port, timeout=HANG_GUARD)
    for number in (1, 2):
        ports.update(web=served_at(port, number))
        connection.request("GET", "/")
        if number == 1:
            first = connection.sock
        assert connection.getresponse().read().count(b'"localEndpoints": %d' % number) == 1
    assert connection.sock is first
    connection.close()


def test_port_is_opened_changed_and_closed(ports: Ports) -> None:
    first, second = free_port(), free_port()
    ports.update(web=served_at(first))
    ports.update(web=served_at(second))
    assert (status(first), status(second)) == (None, 200)
    ports.update(web=None)
    assert (status(first), status(second)) == (None, None)
    assert ports.failures.empty()


def test_port_can_move_to_another_service_in_one_update(ports: Ports) -> None:
    port = free_port()
    ports.update(web=served_at(port), old=served_at(free_port()))
    ports.update(web=None, new=served_at(port))
    assert b'"name": "new"' in get(port)[1]
    assert ports.failures.empty()


def test_all_addresses_of_a_service_are_served(ports: Ports) -> None:
    port = free_port()
    ports.update(web=ServiceHealth({ListenAddress("127.0.0.1", port): 1, ListenAddress("127.0.0.2", port): 1}))
    for host in ("127.0.0.1", "127.0.0.2"):
        socket.create_connection((host, port), timeout=HANG_GUARD).close()
    assert ports.failures.empty()


def test_each_family_of_a_port_has_its_own_response(ports: Ports) -> None:
    """A load balancer may probe the same port over IPv4 and over IPv6."""
    port = free_port()
    four, six = ListenAddress("0.0.0.0", port, one_family=True), ListenAddress("::", port, one_family=True)
    ports.update(web=ServiceHealth({ListenAddress("", port): 1}))
    assert [status(port, host) for host in ("127.0.0.1", "::1")] == [200, 200]
    ports.update(web=ServiceHealth({four: 1, six: 0}))
    assert [status(port, host) for host in ("127.0.0.1", "::1")] == [200, 503]
    ports.update(web=ServiceHealth({four: 0, six: 2}))
    assert [status(port, host) for host in ("127.0.0.1", "::1")] == [503, 200]
    assert ports.failures.empty()


def test_port_in_use_is_reported_once_and_served_once_it_is_free(
    ports: Ports, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kproxy.serve.service_health.RETRY_SECONDS", 0.01)
    available = free_port()
    with listen(ListenAddress("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        ports.update(web=served_at(port), other=served_at(available))
        reason = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        assert ports.failures.get(timeout=HANG_GUARD) == ("ns/web", port, reason)
        assert status(available) == 200
        ports.update(third=served_at(free_port()))
    wait_until(lambda: status(port) == 200, "the port is served")
    assert ports.failures.empty()
    assert caplog.messages == [
        f"Service ns/web: health check node port: cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


def test_port_in_use_is_logged_with_backoff(
    ports: Ports, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    attempts = ListenAttempts(monkeypatch, "kproxy.serve.service_health")
    with listen(ListenAddress("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        warning = f"Service ns/web: health check node port: cannot listen on 127.0.0.1:{port}: Address already in use"
        ports.update(web=served_at(port))
        assert attempts.wait_for_many()
        assert caplog.messages == [warning]
        for lines in (2, 2, 3):
            ports.offset += 60.0
            assert attempts.wait_for_many()
            assert caplog.messages == [warning] * lines
    wait_until(lambda: len(caplog.messages) > 3, "a log line when the port is served")
    assert caplog.messages[3:] == [f"Service ns/web: health check node port: listening on 127.0.0.1:{port}"]
    assert status(port) == 200
    assert ports.failures.qsize() == 1, "only one event is written"


def test_first_service_by_name_gets_a_port_that_two_services_claim(ports: Ports) -> None:
    port = free_port()
    ports.update(b=served_at(port))
    ports.update(a=served_at(port))
    assert b'"name": "a"' in get(port)[1]
    failure = ports.failures.get(timeout=HANG_GUARD)
    assert failure == ("ns/b", port, f"cannot listen on 127.0.0.1:{port}: Service ns/a has the same port")
    ports.update(a=None)
    assert b'"name": "b"' in get(port)[1]


def test_unavailable_address_does_not_affect_other_addresses(ports: Ports) -> None:
    port = free_port()
    ports.update(web=ServiceHealth({ListenAddress("192.0.2.1", port): 1, ListenAddress("127.0.0.1", port): 1}))
    assert status(port) == 200
    assert ports.failures.get(timeout=HANG_GUARD)[2].startswith(f"cannot listen on 192.0.2.1:{port}: ")
