"""Session affinity in nftables mode: who stays with an endpoint, for how long, and what does not matter to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects
from tests.lab.client import Answered
from tests.lab.modes import affinity_clients, mode_flag
from tests.lab.proxy import Daemon
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import wait_until
from tests.lab.web_service import CLUSTER_IPS, EXTERNAL_IPS, NODE_PORT, WebService

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["TCP", "UDP"])
CLIENTS = 48
"""Three endpoints share them out: one of them gets none by chance once in a hundred million times."""

LONG = 10_800
Program = Callable[..., None]


class Clients:
    """A machine with many addresses, each of them a client to session affinity."""

    def __init__(self, web: WebService, host: Host) -> None:
        self._web = web
        self._host = host

    def chosen(self, version: int, address: str = "", port: int = 80) -> dict[str, str]:
        """Return which pod answers each of them; they all ask once."""
        found = {}
        for source in self._host.addresses:
            if (":" in source) == (version == 6):
                answer = self._web.send_request(self._host, address or CLUSTER_IPS[version], port, source=source)
                assert isinstance(answer, Answered)
                found[source] = answer.pod
        return found


@pytest.fixture
def protocol() -> str:
    return "TCP"


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path, protocol: str) -> WebService:
    folder = tmp_path / "objects"
    folder.mkdir()
    return WebService(lab, servers, folder, protocol)


@pytest.fixture
def clients(lab: Lab, web: WebService) -> Clients:
    numbers = range(100, 100 + CLIENTS)
    sources = [f"10.244.1.{n}" for n in numbers] + [f"fd00:10:244:1::{n}" for n in numbers]
    return Clients(web, lab.add_pod("clients", *sources))


@pytest.fixture
def visitors(lab: Lab, web: WebService) -> Clients:
    numbers = range(100, 100 + CLIENTS)
    sources = [f"198.51.100.{n}" for n in numbers] + [f"2001:db8:51::{n}" for n in numbers]
    return Clients(web, lab.add_client("visitors", *sources))


def families(version: int) -> str:
    return "ip6" if version == 6 else "ip"


@pytest.fixture(params=["one start for each", "running"])
def program(request: pytest.FixtureRequest, lab: Lab, web: WebService, tmp_path: Path) -> Iterator[Program]:
    """Programs objects: by a kproxy that is started for it, or by one that runs all the time."""
    if request.param != "running":
        yield web.apply
        return
    web.write([])
    numbers = count(1000)

    def marker(port: int) -> objects.Object:
        return objects.service("marker", "10.96.255.1", "fd00:10:96::ff01", port=port)

    def is_there(port: int) -> bool:
        shown = [
            lab.node.namespace.run(["nft", "list", "map", family, "kube-proxy", "no-endpoint-services"]).stdout
            for family in ("ip", "ip6")
        ]
        return all(f" . tcp . {port} comment" in each for each in shown)

    def write(found: Sequence[objects.Object]) -> None:
        port = next(numbers)
        web.write([*found, marker(port)])
        wait_until(lambda: is_there(port), "kproxy programs what was written")

    quick = "--iptables-min-sync-period=10ms"
    with Daemon(lab, web.folder, tmp_path / "kproxy.log", mode_flag("nftables"), quick) as daemon:
        daemon.wait_until_synced()
        yield write


def service(web: WebService, pods: Sequence[Host], seconds: int = LONG, **spec: Any) -> list[objects.Object]:
    """Return a Service with session affinity, and its slices."""
    affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}
    return [web.service("web", *CLUSTER_IPS.values(), **(affinity | spec)), *web.slices("web", pods)]


def other(web: WebService, pods: Sequence[Host]) -> list[objects.Object]:
    """Return another Service, without affinity."""
    return [web.service("other", "10.96.0.90", "fd00:10:96::90"), *web.slices("other", pods)]


@PROTOCOLS
@VERSIONS
def test_clients_stay_whatever_becomes_of_others(
    web: WebService, clients: Clients, program: Program, version: int, protocol: str
) -> None:
    pods = [web.pod(number) for number in range(1, 14)]
    program([*service(web, pods[:3]), *other(web, pods[:2])])
    first = clients.chosen(version)
    assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
    steps = {
        "one more": (pods[:4], pods[:2]),
        "many more": (pods, pods[:2]),
        "the first ones alone": (pods[:3], pods[:2]),
        "another Service grows": (pods[:3], pods),
        "another Service has none": (pods[:3], []),
        "in another order": (pods[2::-1], pods[:1]),
        "with others before": ([*pods[5:], *pods[:3]], pods[:1]),
    }
    for step, (own, others) in steps.items():
        program([*service(web, own), *other(web, others)])
        assert clients.chosen(version) == first, step
    program([*service(web, [*pods[5:], *pods[:2]]), *other(web, pods[:1])])
    last = clients.chosen(version)
    assert "pod-3" not in last.values()
    staying = {client: pod for client, pod in first.items() if pod != "pod-3"}
    assert {client: last[client] for client in staying} == staying


@VERSIONS
def test_who_comes_back_is_not_given_its_former_clients(
    lab: Lab, web: WebService, clients: Clients, program: Program, version: int
) -> None:
    pods = [web.pod(1), web.pod(2)]
    program(service(web, pods))
    clients.chosen(version)
    program(service(web, pods[1:]))
    assert set(clients.chosen(version).values()) == {"pod-2"}
    program(service(web, pods))
    assert set(clients.chosen(version).values()) == {"pod-2"}
    sizes = sorted(len(each) for each in affinity_clients(lab.node.namespace, families(version)).values())
    assert sizes == [0, CLIENTS]


@VERSIONS
def test_affinity_holds_across_the_frontends_of_a_service(web: WebService, visitors: Clients, version: int) -> None:
    spec: dict[str, Any] = {"type": "LoadBalancer", "externalIPs": [*EXTERNAL_IPS.values()]}
    web.apply(service(web, [web.pod(1), web.pod(2), web.pod(3)], **spec))
    first = visitors.chosen(version)
    assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
    assert visitors.chosen(version, web.node.address(version), NODE_PORT) == first
    assert visitors.chosen(version, EXTERNAL_IPS[version]) == first


@VERSIONS
def test_policy_local_overrules_an_endpoint_elsewhere(web: WebService, visitors: Clients, version: int) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3, "node-2")]
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "externalIPs": [*EXTERNAL_IPS.values()],
        "externalTrafficPolicy": "Local",
    }
    web.apply(service(web, pods, **spec))
    first = visitors.chosen(version)
    assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
    local = visitors.chosen(version, EXTERNAL_IPS[version])
    assert set(local.values()) == {"pod-1", "pod-2"}
    assert all(local[client] == pod for client, pod in first.items() if pod != "pod-3")


@PROTOCOLS
@VERSIONS
def test_affinity_ends_when_its_time_is_over(
    lab: Lab, web: WebService, clients: Clients, version: int, protocol: str
) -> None:
    web.apply(service(web, [web.pod(1), web.pod(2), web.pod(3)], seconds=1))
    first = clients.chosen(version)
    node = lab.node.namespace
    wait_until(lambda: not any(affinity_clients(node, families(version)).values()), "all clients are forgotten")
    assert clients.chosen(version) != first


@VERSIONS
def test_each_use_prolongs_it(lab: Lab, web: WebService, clients: Clients, version: int) -> None:
    web.apply(service(web, [web.pod(1), web.pod(2), web.pod(3)], seconds=30))

    def left() -> int:
        sets = affinity_clients(lab.node.namespace, families(version)).values()
        return min(seconds for members in sets for seconds in members.values())

    first = clients.chosen(version)
    wait_until(lambda: left() <= 27, "some of the time passes")
    before = left()
    assert clients.chosen(version) == first
    assert left() > before


@VERSIONS
def test_each_service_has_its_own_time(lab: Lab, web: WebService, clients: Clients, version: int) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    affinity: dict[str, Any] = {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}},
    }
    brief = [web.service("brief", "10.96.0.91", "fd00:10:96::91", **affinity), *web.slices("brief", pods)]
    web.apply([*service(web, pods), *brief])
    first = clients.chosen(version)
    clients.chosen(version, {4: "10.96.0.91", 6: "fd00:10:96::91"}[version])

    def known(name: str) -> int:
        found = affinity_clients(lab.node.namespace, families(version))
        return sum(len(members) for owner, members in found.items() if f"-demo/{name}/" in owner)

    assert known("web") == CLIENTS
    wait_until(lambda: not known("brief"), "the clients of the Service with the brief time are forgotten")
    assert known("web") == CLIENTS
    assert clients.chosen(version) == first


@VERSIONS
def test_a_changed_time_is_that_of_all_who_come_then(
    lab: Lab, web: WebService, clients: Clients, program: Program, version: int
) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    node = lab.node.namespace

    def left() -> list[int]:
        sets = affinity_clients(node, families(version)).values()
        return [seconds for members in sets for seconds in members.values()]

    program(service(web, pods, seconds=LONG))
    clients.chosen(version)
    assert min(left()) > 10_000
    program(service(web, pods, seconds=1))
    clients.chosen(version)
    wait_until(lambda: not left(), "all clients are forgotten")
    program(service(web, pods, seconds=LONG))
    first = clients.chosen(version)
    assert min(left()) > 10_000
    assert clients.chosen(version) == first


@VERSIONS
def test_affinity_is_switched_off_and_on(
    lab: Lab, web: WebService, clients: Clients, program: Program, version: int
) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    program(service(web, pods))
    clients.chosen(version)
    program(service(web, pods, sessionAffinity="None"))
    assert affinity_clients(lab.node.namespace, families(version)) == {}
    assert clients.chosen(version) != clients.chosen(version)
    program(service(web, pods))
    assert clients.chosen(version) == clients.chosen(version)


@VERSIONS
def test_a_restart_forgets_nobody(lab: Lab, web: WebService, clients: Clients, tmp_path: Path, version: int) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    web.write(service(web, pods))

    def known() -> dict[str, set[str]]:
        return {name: set(members) for name, members in affinity_clients(lab.node.namespace, families(version)).items()}

    def daemon() -> Daemon:
        return Daemon(lab, web.folder, tmp_path / "kproxy.log", mode_flag("nftables"))

    with daemon() as running:
        running.wait_until_synced()
        first, before = clients.chosen(version), known()
        assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
        running.kill()
        assert (clients.chosen(version), known()) == (first, before)
    with daemon() as running:
        running.wait_until_synced()
        assert (clients.chosen(version), known()) == (first, before)
        assert running.terminate() == 0
        assert (clients.chosen(version), known()) == (first, before)
    with daemon() as running:
        running.wait_until_synced()
        assert (clients.chosen(version), known()) == (first, before)
