"""Health check ports of Services: kube-proxy's answers, on the right addresses, for as long as they are wanted."""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
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
from tests.lab.waiting import HANG_GUARD
from tests.ports import free_port, get
from tests.recordings import GOLDEN, store
from tests.reports import PlansByService, failed, succeeded

V4, V6 = Family.IPV4, Family.IPV6
RECORDED = sorted(GOLDEN.glob("*/healthcheck-*.txt"))
Updates = dict[str, ServiceHealth | None]


def report(family: Family, plans: PlansByService, *, complete: bool = True, **more: Any) -> SyncReport:
    return succeeded(family, plans, complete=complete, context=Context(family, "node-1", **more))


def plans_of(found: Store, family: Family) -> PlansByService:
    context = Context(family, "node-1")
    services = {key: found.service(key) for key in found.service_keys()}
    return {key: plan_service(each, found.slices(key), context) for key, each in services.items() if each}


class Follower:
    """An observer, and what it has passed on."""

    def __init__(self) -> None:
        self.updates: list[Updates] = []
        self.observer = ServiceHealthTracker((V4, V6), lambda changes: self.updates.append(dict(changes)))

    @property
    def state(self) -> dict[str, ServiceHealth]:
        known: Updates = {}
        for update in self.updates:
            known |= update
        return {key: health for key, health in known.items() if health}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_answers_are_kube_proxys(path: Path) -> None:
    follower = Follower()
    for family in Family:
        follower.observer.on_sync(report(family, plans_of(store(path.parent.name), family)))
    port = int(path.stem.rpartition("-")[2])
    ((key, health),) = [(k, h) for k, h in follower.state.items() if {each.port for each in h.endpoints} == {port}]
    # Recorded by IPv4.
    (count,) = [found for address, found in health.endpoints.items() if address.host in {"", "0.0.0.0"}]
    answer = encode(service_response(key, count, healthy=True), 0.0, head_only=False, close=False)
    head, _, body = answer.decode().partition("\r\n\r\n")
    recorded = path.read_bytes().decode().replace("\r\n", "\n")
    recorded_head, _, recorded_body = recorded.partition("\n\n")
    assert body == recorded_body
    assert dateless(head.split("\r\n")) == dateless(recorded_head.split("\n"))


def dateless(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if not line.startswith("Date: ")]


def test_there_are_recordings_of_both_answers() -> None:
    statuses = {path.read_text().split()[1] for path in RECORDED}
    assert statuses == {"200", "503"}


@pytest.mark.parametrize("scenario", ["clusterip", "nodeport-external-local", "loadbalancer"])
def test_other_services_have_none(scenario: str) -> None:
    follower = Follower()
    for family in Family:
        follower.observer.on_sync(report(family, plans_of(store(scenario), family)))
    assert follower.updates == []


PORTS = (ServicePort("http", 80, "TCP", 30080), ServicePort("dns", 53, "UDP", 30053))


def here(address: str, **more: bool) -> Endpoint:
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


def counted(*endpoints: Endpoint) -> int:
    follower = Follower()
    follower.observer.on_sync(report(V4, plans(*endpoints)))
    (count,) = follower.state["ns/web"].endpoints.values()
    return count


def test_what_counts() -> None:
    ready = here("10.244.1.1")
    leaving = {"ready": False, "serving": True, "terminating": True}
    assert counted() == 0
    assert counted(ready) == 1  # though it serves two ports
    assert counted(ready, here("10.244.1.2")) == 2
    assert counted(ready, Endpoint("10.244.2.1", node="node-2"), Endpoint("10.244.3.1")) == 1
    assert counted(here("10.244.1.1", ready=False)) == 0
    assert counted(here("10.244.1.1", **leaving)) == 0
    assert counted(ready, here("10.244.1.2", **leaving)) == 1


def test_only_changes_are_passed_on() -> None:
    follower = Follower()
    one, two = here("10.244.1.1"), here("10.244.1.2")
    where = ListenAddress("", 32000)
    observer = follower.observer
    observer.on_sync(report(V4, plans(one)))
    observer.on_sync(report(V4, plans(one)))
    observer.on_sync(failed(V4))
    observer.on_sync(report(V4, {"ns/other": ()}, complete=False))
    observer.on_sync(report(V4, plans(one, two), complete=False))
    observer.on_sync(report(V4, plans(one, two, port=32001), complete=False))
    observer.on_sync(report(V4, {"ns/web": ()}, complete=False))
    observer.on_sync(report(V4, plans(one), complete=False))
    observer.on_sync(report(V4, {}))
    assert follower.updates == [
        {"ns/web": ServiceHealth({where: 1})},
        {"ns/web": ServiceHealth({where: 2})},
        {"ns/web": ServiceHealth({ListenAddress("", 32001): 2})},
        {"ns/web": None},
        {"ns/web": ServiceHealth({where: 1})},
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
def test_it_listens_where_node_ports_do(ipv4: Any, ipv6: Any, addresses: set[ListenAddress]) -> None:
    follower = Follower()
    for family, hosts in ((V4, ipv4), (V6, ipv6)):
        dual_stack = None not in {ipv4, ipv6}
        found = plans(family=family, dual_stack=dual_stack) if hosts is not None else {"ns/web": ()}
        restricted = None if hosts == "all" else hosts
        follower.observer.on_sync(report(family, found, node_port_addresses=restricted))
    assert follower.state["ns/web"].endpoints.keys() == addresses


def test_each_family_answers_for_itself() -> None:
    follower = Follower()
    v4, v6 = here("10.244.1.1"), [here(f"fd00::{number}") for number in (1, 2)]
    four, six = ListenAddress("0.0.0.0", 32000, one_family=True), ListenAddress("::", 32000, one_family=True)
    follower.observer.on_sync(report(V4, plans(v4, dual_stack=True)))
    assert follower.state["ns/web"].endpoints == {four: 1}, "nothing is known of IPv6 yet"
    follower.observer.on_sync(report(V6, plans(*v6, family=V6, dual_stack=True)))
    assert follower.state["ns/web"].endpoints == {four: 1, six: 2}
    follower.observer.on_sync(report(V6, plans(family=V6, dual_stack=True)))
    assert follower.state["ns/web"].endpoints == {four: 1, six: 0}
    follower.observer.on_sync(report(V6, {"ns/web": ()}))
    assert follower.state["ns/web"].endpoints == {four: 1}, "IPv4 has not heard of it yet"
    follower.observer.on_sync(report(V4, plans(v4)))
    assert follower.state["ns/web"].endpoints == {ListenAddress("", 32000): 1}, "a Service of one family by now"
    follower.observer.on_sync(report(V4, {"ns/web": ()}))
    assert follower.state == {}


class Ports:
    """Health ports on real sockets; `failures` is what was reported."""

    def __init__(self) -> None:
        self.healthy = True
        self.failures: queue.SimpleQueue[tuple[str, int, str]] = queue.SimpleQueue()
        self.later = 0.0
        self._server = HttpServer(clock=lambda: monotonic() + self.later, wall=time)
        self._ports = HealthCheckNodePorts(
            self._server, lambda: self.healthy, lambda *failure: self.failures.put(failure)
        )
        self._server.start()

    def update(self, **services: ServiceHealth | None) -> None:
        """Return once the update is made."""
        self._server.call(lambda: self._ports.update({f"ns/{name}": health for name, health in services.items()}))
        self.settle()

    def settle(self) -> None:
        done = threading.Event()
        self._server.call(done.set)
        assert done.wait(HANG_GUARD)

    def stop(self) -> None:
        self._server.stop(HANG_GUARD)


@pytest.fixture
def ports() -> Iterator[Ports]:
    found = Ports()
    yield found
    found.stop()


def at(port: int, endpoints: int = 1, host: str = "127.0.0.1") -> ServiceHealth:
    return ServiceHealth({ListenAddress(host, port): endpoints})


def status(port: int, host: str = "127.0.0.1") -> int | None:
    try:
        return get(port, host=host)[0].status
    except ConnectionRefusedError:
        return None


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/any/path?x"), ("HEAD", "/"), ("OPTIONS", "/")])
def test_every_path_and_method_is_answered(ports: Ports, method: str, path: str) -> None:
    port = free_port()
    ports.update(web=at(port, 2))
    response, body = get(port, path, method=method)
    assert response.status == 200
    assert response.headers["X-Load-Balancing-Endpoint-Weight"] == "2"
    assert (b'"localEndpoints": 2' in body) == (method != "HEAD")


def test_the_answer_follows_the_endpoints_and_the_proxy(ports: Ports) -> None:
    port = free_port()
    ports.update(web=at(port, 1))
    assert status(port) == 200
    ports.healthy = False
    response, body = get(port)
    assert (response.status, response.headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "1")
    assert b'"serviceProxyHealthy": false' in body
    ports.healthy = True
    ports.update(web=at(port, 0))
    assert status(port) == 503
    ports.update(web=at(port, 3))
    assert status(port) == 200


def test_a_count_that_changes_leaves_connections_alone(ports: Ports) -> None:
    port = free_port()
    ports.update(web=at(port, 1))
    connection = HTTPConnection("127.0.0.1", port, timeout=HANG_GUARD)
    for number in (1, 2):
        ports.update(web=at(port, number))
        connection.request("GET", "/")
        if number == 1:
            used = connection.sock
        assert connection.getresponse().read().count(b'"localEndpoints": %d' % number) == 1
    assert connection.sock is used
    connection.close()


def test_the_port_comes_moves_and_goes(ports: Ports) -> None:
    first, second = free_port(), free_port()
    ports.update(web=at(first))
    ports.update(web=at(second))
    assert (status(first), status(second)) == (None, 200)
    ports.update(web=None)
    assert (status(first), status(second)) == (None, None)
    assert ports.failures.empty()


def test_a_port_may_pass_to_another_service_at_once(ports: Ports) -> None:
    port = free_port()
    ports.update(web=at(port), old=at(free_port()))
    ports.update(web=None, new=at(port))
    assert b'"name": "new"' in get(port)[1]
    assert ports.failures.empty()


def test_all_addresses_of_a_service_are_served(ports: Ports) -> None:
    port = free_port()
    ports.update(web=ServiceHealth({ListenAddress("127.0.0.1", port): 1, ListenAddress("127.0.0.2", port): 1}))
    for host in ("127.0.0.1", "127.0.0.2"):
        socket.create_connection((host, port), timeout=HANG_GUARD).close()
    assert ports.failures.empty()


def test_both_families_of_a_port_have_answers_of_their_own(ports: Ports) -> None:
    """As load balancers ask them: by IPv4 and by IPv6, on the same port."""
    port = free_port()
    four, six = ListenAddress("0.0.0.0", port, one_family=True), ListenAddress("::", port, one_family=True)
    ports.update(web=ServiceHealth({ListenAddress("", port): 1}))
    assert [status(port, host) for host in ("127.0.0.1", "::1")] == [200, 200]
    ports.update(web=ServiceHealth({four: 1, six: 0}))
    assert [status(port, host) for host in ("127.0.0.1", "::1")] == [200, 503]
    ports.update(web=ServiceHealth({four: 0, six: 2}))
    assert [status(port, host) for host in ("127.0.0.1", "::1")] == [503, 200]
    assert ports.failures.empty()


def test_a_taken_port_is_reported_once_and_served_when_it_is_free(
    ports: Ports, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kproxy.serve.service_health.RETRY_SECONDS", 0.01)
    good = free_port()
    with listen(ListenAddress("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports.update(web=at(port), other=at(good))
        reason = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        assert ports.failures.get(timeout=HANG_GUARD) == ("ns/web", port, reason)
        assert status(good) == 200  # others are not held up
        ports.update(third=at(free_port()))
    until(lambda: status(port) == 200)
    assert ports.failures.empty()
    assert caplog.messages == [
        f"Service ns/web: health check node port: cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


def test_a_taken_port_is_said_ever_more_rarely_and_when_it_is_served(
    ports: Ports, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kproxy")
    attempts = ListenAttempts(monkeypatch, "kproxy.serve.service_health")
    with listen(ListenAddress("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = f"Service ns/web: health check node port: cannot listen on 127.0.0.1:{port}: Address already in use"
        ports.update(web=at(port))
        assert attempts.wait_for_many()
        assert caplog.messages == [said]
        for lines in (2, 2, 3):
            ports.later += 60.0
            assert attempts.wait_for_many()
            assert caplog.messages == [said] * lines
    until(lambda: len(caplog.messages) > 3)
    assert caplog.messages[3:] == [f"Service ns/web: health check node port: listening on 127.0.0.1:{port}"]
    assert status(port) == 200
    assert ports.failures.qsize() == 1, "one event will do"


def until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + HANG_GUARD
    while not condition():
        assert monotonic() < deadline


def test_of_two_services_with_one_port_the_first_has_it(ports: Ports) -> None:
    port = free_port()
    ports.update(b=at(port))
    ports.update(a=at(port))
    assert b'"name": "a"' in get(port)[1]
    failure = ports.failures.get(timeout=HANG_GUARD)
    assert failure == ("ns/b", port, f"cannot listen on 127.0.0.1:{port}: Service ns/a has the same port")
    ports.update(a=None)
    assert b'"name": "b"' in get(port)[1]


def test_one_bad_address_does_not_hold_up_the_others(ports: Ports) -> None:
    port = free_port()
    ports.update(web=ServiceHealth({ListenAddress("192.0.2.1", port): 1, ListenAddress("127.0.0.1", port): 1}))
    assert status(port) == 200
    assert ports.failures.get(timeout=HANG_GUARD)[2].startswith(f"cannot listen on 192.0.2.1:{port}: ")
