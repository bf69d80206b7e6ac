"""Session affinity in nftables mode: which clients keep their endpoint, for how long, and across which changes."""

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
"""Enough that one of three endpoints gets no client by chance only once in 10^8 runs."""

LONG_TIMEOUT = 10_800
Program = Callable[..., None]


class AffinityClients:
    """A host with many addresses. Session affinity treats each address as a client."""

    def __init__(self, web: WebService, host: Host) -> None:
        self._web = web
        self._host = host

    def pods_by_client(self, version: int, address: str = "", port: int = 80) -> dict[str, str]:
        """Send one request from each address; return the names of the pods that answered by address."""
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
def clients(lab: Lab, web: WebService) -> AffinityClients:
    numbers = range(100, 100 + CLIENTS)
    sources = [f"10.244.1.{n}" for n in numbers] + [f"fd00:10:244:1::{n}" for n in numbers]
    return AffinityClients(web, lab.add_pod("clients", *sources))


@pytest.fixture
def external_clients(lab: Lab, web: WebService) -> AffinityClients:
    numbers = range(100, 100 + CLIENTS)
    sources = [f"198.51.100.{n}" for n in numbers] + [f"2001:db8:51::{n}" for n in numbers]
    return AffinityClients(web, lab.add_client("visitors", *sources))


def nft_family(version: int) -> str:
    return "ip6" if version == 6 else "ip"


@pytest.fixture(params=["apply", "daemon"])
def program(request: pytest.FixtureRequest, lab: Lab, web: WebService, tmp_path: Path) -> Iterator[Program]:
    """Program objects with a new `kproxy apply` each time or with one running daemon."""
    if request.param != "daemon":
        yield web.apply
        return
    web.write([])
    numbers = count(1000)

    def marker(port: int) -> objects.Object:
        return objects.service("marker", "10.96.255.1", "fd00:10:96::ff01", port=port)

    def is_programmed(port: int) -> bool:
        shown = [
            lab.node.namespace.run(["nft", "list", "map", family, "kube-proxy", "no-endpoint-services"]).stdout
            for family in ("ip", "ip6")
        ]
        return all(f" . tcp . {port} comment" in each for each in shown)

    def write(found: Sequence[objects.Object]) -> None:
        port = next(numbers)
        web.write([*found, marker(port)])
        wait_until(lambda: is_programmed(port), "kproxy to program the objects")

    quick = "--iptables-min-sync-period=10ms"
    with Daemon(lab, web.folder, tmp_path / "kproxy.log", mode_flag("nftables"), quick) as daemon:
        daemon.wait_until_synced()
        yield write


def service(web: WebService, pods: Sequence[Host], seconds: int = LONG_TIMEOUT, **spec: Any) -> list[objects.Object]:
    """Return a Service with session affinity and its slices."""
    affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}
    return [web.service("web", *CLUSTER_IPS.values(), **(affinity | spec)), *web.slices("web", pods)]


def other(web: WebService, pods: Sequence[Host]) -> list[objects.Object]:
    """Return another Service, without session affinity, and its slices."""
    return [web.service("other", "10.96.0.90", "fd00:10:96::90"), *web.slices("other", pods)]


@PROTOCOLS
@VERSIONS
def test_clients_keep_their_endpoint_when_others_change(
    web: WebService, clients: AffinityClients, program: Program, version: int, protocol: str
) -> None:
    pods = [web.pod(number) for number in range(1, 14)]
    program([*service(web, pods[:3]), *other(web, pods[:2])])
    first = clients.pods_by_client(version)
    assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
    steps = {
        "one endpoint more": (pods[:4], pods[:2]),
        "many endpoints more": (pods, pods[:2]),
        "only the first endpoints": (pods[:3], pods[:2]),
        "another Service grows": (pods[:3], pods),
        "another Service has no endpoints": (pods[:3], []),
        "endpoints in another order": (pods[2::-1], pods[:1]),
        "other endpoints first": ([*pods[5:], *pods[:3]], pods[:1]),
    }
    for step, (own, others) in steps.items():
        program([*service(web, own), *other(web, others)])
        assert clients.pods_by_client(version) == first, step
    program([*service(web, [*pods[5:], *pods[:2]]), *other(web, pods[:1])])
    last = clients.pods_by_client(version)
    assert "pod-3" not in last.values()
    staying = {client: pod for client, pod in first.items() if pod != "pod-3"}
    assert {client: last[client] for client in staying} == staying


@VERSIONS
def test_returning_endpoint_does_not_get_its_former_clients(
    lab: Lab, web: WebService, clients: AffinityClients, program: Program, version: int
) -> None:
    pods = [web.pod(1), web.pod(2)]
    program(service(web, pods))
    clients.pods_by_client(version)
    program(service(web, pods[1:]))
    assert set(clients.pods_by_client(version).values()) == {"pod-2"}
    program(service(web, pods))
    assert set(clients.pods_by_client(version).values()) == {"pod-2"}
    sizes = sorted(len(each) for each in affinity_clients(lab.node.namespace, nft_family(version)).values())
    assert sizes == [0, CLIENTS]


@VERSIONS
def test_affinity_applies_across_frontends_of_a_service(
    web: WebService, external_clients: AffinityClients, version: int
) -> None:
    spec: dict[str, Any] = {"type": "LoadBalancer", "externalIPs": [*EXTERNAL_IPS.values()]}
    web.apply(service(web, [web.pod(1), web.pod(2), web.pod(3)], **spec))
    first = external_clients.pods_by_client(version)
    assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
    assert external_clients.pods_by_client(version, web.node.address(version), NODE_PORT) == first
    assert external_clients.pods_by_client(version, EXTERNAL_IPS[version]) == first


@VERSIONS
def test_policy_local_overrides_affinity_to_a_remote_endpoint(
    web: WebService, external_clients: AffinityClients, version: int
) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3, "node-2")]
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "externalIPs": [*EXTERNAL_IPS.values()],
        "externalTrafficPolicy": "Local",
    }
    web.apply(service(web, pods, **spec))
    first = external_clients.pods_by_client(version)
    assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
    local = external_clients.pods_by_client(version, EXTERNAL_IPS[version])
    assert set(local.values()) == {"pod-1", "pod-2"}
    assert all(local[client] == pod for client, pod in first.items() if pod != "pod-3")


@PROTOCOLS
@VERSIONS
def test_affinity_ends_after_the_timeout(
    lab: Lab, web: WebService, clients: AffinityClients, version: int, protocol: str
) -> None:
    web.apply(service(web, [web.pod(1), web.pod(2), web.pod(3)], seconds=1))
    first = clients.pods_by_client(version)
    node = lab.node.namespace
    wait_until(lambda: not any(affinity_clients(node, nft_family(version)).values()), "all clients to expire")
    assert clients.pods_by_client(version) != first


@VERSIONS
def test_each_connection_restarts_the_timeout(
    lab: Lab, web: WebService, clients: AffinityClients, version: int
) -> None:
    web.apply(service(web, [web.pod(1), web.pod(2), web.pod(3)], seconds=30))

    def remaining() -> int:
        sets = affinity_clients(lab.node.namespace, nft_family(version)).values()
        return min(seconds for members in sets for seconds in members.values())

    first = clients.pods_by_client(version)
    wait_until(lambda: remaining() <= 27, "some of the timeout to pass")
    before = remaining()
    assert clients.pods_by_client(version) == first
    assert remaining() > before


@VERSIONS
def test_each_service_has_its_own_timeout(lab: Lab, web: WebService, clients: AffinityClients, version: int) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    affinity: dict[str, Any] = {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}},
    }
    short = [web.service("short", "10.96.0.91", "fd00:10:96::91", **affinity), *web.slices("short", pods)]
    web.apply([*service(web, pods), *short])
    first = clients.pods_by_client(version)
    clients.pods_by_client(version, {4: "10.96.0.91", 6: "fd00:10:96::91"}[version])

    def known(name: str) -> int:
        found = affinity_clients(lab.node.namespace, nft_family(version))
        return sum(len(members) for owner, members in found.items() if f"-demo/{name}/" in owner)

    assert known("web") == CLIENTS
    wait_until(lambda: not known("short"), "the clients of the Service with the short timeout to expire")
    assert known("web") == CLIENTS
    assert clients.pods_by_client(version) == first


@VERSIONS
def test_changed_timeout_applies_to_new_connections(
    lab: Lab, web: WebService, clients: AffinityClients, program: Program, version: int
) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    node = lab.node.namespace

    def remaining() -> list[int]:
        sets = affinity_clients(node, nft_family(version)).values()
        return [seconds for members in sets for seconds in members.values()]

    program(service(web, pods, seconds=LONG_TIMEOUT))
    clients.pods_by_client(version)
    assert min(remaining()) > 10_000
    program(service(web, pods, seconds=1))
    clients.pods_by_client(version)
    wait_until(lambda: not remaining(), "all clients to expire")
    program(service(web, pods, seconds=LONG_TIMEOUT))
    first = clients.pods_by_client(version)
    assert min(remaining()) > 10_000
    assert clients.pods_by_client(version) == first


@VERSIONS
def test_affinity_is_disabled_and_enabled(
    lab: Lab, web: WebService, clients: AffinityClients, program: Program, version: int
) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    program(service(web, pods))
    clients.pods_by_client(version)
    program(service(web, pods, sessionAffinity="None"))
    assert affinity_clients(lab.node.namespace, nft_family(version)) == {}
    assert clients.pods_by_client(version) != clients.pods_by_client(version)
    program(service(web, pods))
    assert clients.pods_by_client(version) == clients.pods_by_client(version)


@VERSIONS
def test_restart_keeps_all_clients(
    lab: Lab, web: WebService, clients: AffinityClients, tmp_path: Path, version: int
) -> None:
    pods = [web.pod(1), web.pod(2), web.pod(3)]
    web.write(service(web, pods))

    def known() -> dict[str, set[str]]:
        return {
            name: set(members) for name, members in affinity_clients(lab.node.namespace, nft_family(version)).items()
        }

    def daemon() -> Daemon:
        return Daemon(lab, web.folder, tmp_path / "kproxy.log", mode_flag("nftables"))

    with daemon() as running:
        running.wait_until_synced()
        first, before = clients.pods_by_client(version), known()
        assert set(first.values()) == {"pod-1", "pod-2", "pod-3"}
        running.kill()
        assert (clients.pods_by_client(version), known()) == (first, before)
    with daemon() as running:
        running.wait_until_synced()
        assert (clients.pods_by_client(version), known()) == (first, before)
        assert running.terminate() == 0
        assert (clients.pods_by_client(version), known()) == (first, before)
    with daemon() as running:
        running.wait_until_synced()
        assert (clients.pods_by_client(version), known()) == (first, before)
