"""Real traffic through rules that kproxy programmed in the kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects, proxy
from tests.lab.client import Answered, Outcome, Refused, complete_request, open_connection, send_request
from tests.lab.connection_stream import FIRST_SOURCE_PORT
from tests.lab.continuous_requests import ContinuousRequests, count_by_pod, failures
from tests.lab.modes import mode_flag
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import wait_until

VIPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
FAMILIES = {4: "IPv4", 6: "IPv6"}
CONNECTIONS = 300
FAIR_SHARE = range(60, 142)
"""20% to 47% of the connections: a third, plus or minus five standard deviations."""

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])


class Web:
    """A dual-stack Service in a lab, its pods, and the files that describe it."""

    def __init__(self, lab: Lab, servers: Servers, folder: Path, mode: str) -> None:
        self._lab = lab
        self._servers = servers
        self.folder = folder
        self.mode = mode_flag(mode)

    def pod(self, number: int, protocol: str = "TCP") -> Host:
        """Add a pod with a server."""
        name, addresses = f"pod-{number}", (f"10.244.1.{number}", f"fd00:10:244:1::{number}")
        pod = self._lab.add_pod(name, *addresses)
        self._servers.serve(pod, 8080, protocol)
        return pod

    def write(
        self,
        pods: Sequence[Host],
        protocol: str = "TCP",
        terminating: Sequence[Host] = (),
        affinity: bool = False,
    ) -> None:
        """Write the Service and its slices. Terminating pods still serve."""
        spec: dict[str, Any] = {"sessionAffinity": "ClientIP"} if affinity else {}
        found = [objects.node(), objects.service("web", *VIPS.values(), protocol=protocol, **spec)]
        for version, family in FAMILIES.items():
            endpoints = [objects.endpoint(pod.address(version)) for pod in pods]
            endpoints += [objects.endpoint(pod.address(version), ready=False, terminating=True) for pod in terminating]
            found.append(objects.endpoint_slice("web", endpoints, family=family, protocol=protocol))
        objects.write(self.folder / "web.yaml", found)

    def apply(self, pods: Sequence[Host], protocol: str = "TCP", affinity: bool = False) -> None:
        """Write the files and run `kproxy apply`."""
        self.write(pods, protocol, affinity=affinity)
        proxy.apply(self._lab, self.folder, self.mode)


@pytest.fixture(params=["iptables", "nftables"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> Web:
    folder = tmp_path / "objects"
    folder.mkdir()
    return Web(lab, servers, folder, mode)


def in_cluster_client(lab: Lab) -> Host:
    return lab.add_pod("client", "10.244.1.99", "fd00:10:244:1::99")


def outside_client(lab: Lab) -> Host:
    return lab.add_client("client", "198.51.100.10", "2001:db8:51::10")


@VERSIONS
def test_three_endpoints_share_the_connections(lab: Lab, web: Web, version: int) -> None:
    web.apply([web.pod(1), web.pod(2), web.pod(3)])
    client = in_cluster_client(lab)
    outcomes = [send_request(client, VIPS[version], 80) for _ in range(CONNECTIONS)]
    assert not failures(outcomes)
    shares = count_by_pod(outcomes)
    assert set(shares) == {"pod-1", "pod-2", "pod-3"}
    assert all(share in FAIR_SHARE for share in shares.values()), shares


@PROTOCOLS
@VERSIONS
def test_all_protocols_reach_their_endpoint(lab: Lab, web: Web, version: int, protocol: str) -> None:
    missing = missing_protocol(protocol)
    if missing:
        pytest.skip(missing)
    web.apply([web.pod(1, protocol)], protocol)
    client = in_cluster_client(lab)
    answer = send_request(client, VIPS[version], 80, protocol)
    assert answer == Answered("pod-1", client.address(version))


@PROTOCOLS
@VERSIONS
def test_service_without_endpoints_rejects(lab: Lab, web: Web, version: int, protocol: str) -> None:
    missing = missing_protocol(protocol)
    if missing:
        pytest.skip(missing)
    web.apply([], protocol)
    assert send_request(in_cluster_client(lab), VIPS[version], 80, protocol) == Refused()


@VERSIONS
def test_service_that_loses_its_last_endpoint_rejects(lab: Lab, web: Web, version: int) -> None:
    client, pod = in_cluster_client(lab), web.pod(1)
    web.apply([pod])
    assert send_request(client, VIPS[version], 80) == Answered("pod-1", client.address(version))
    web.apply([])
    assert send_request(client, VIPS[version], 80) == Refused()
    web.apply([pod])
    assert send_request(client, VIPS[version], 80) == Answered("pod-1", client.address(version))


@VERSIONS
def test_session_affinity_keeps_a_client_on_its_endpoint(lab: Lab, web: Web, version: int) -> None:
    web.apply([web.pod(1), web.pod(2), web.pod(3)], affinity=True)
    sources = [f"10.244.1.{number}" if version == 4 else f"fd00:10:244:1::{number}" for number in range(90, 150)]
    client = lab.add_pod("client", *sources)
    chosen = Counter[str]()
    for source in sources:
        pods = count_by_pod([send_request(client, VIPS[version], 80, source=source) for _ in range(5)])
        assert list(pods.values()) == [5], f"{source} was sent to {dict(pods)}"
        chosen += Counter(pods.keys())
    assert set(chosen) == {"pod-1", "pod-2", "pod-3"}


@VERSIONS
def test_session_affinity_survives_a_change_of_other_endpoints(lab: Lab, web: Web, version: int) -> None:
    pods = {pod.name: pod for pod in (web.pod(1), web.pod(2), web.pod(3))}
    client = in_cluster_client(lab)
    web.apply(list(pods.values()), affinity=True)
    first = send_request(client, VIPS[version], 80)
    assert isinstance(first, Answered)
    others = [pod for name, pod in pods.items() if name != first.pod]
    web.apply([others[0], pods[first.pod], web.pod(4)], affinity=True)
    assert {send_request(client, VIPS[version], 80) for _ in range(30)} == {first}


@VERSIONS
def test_session_affinity_ends_with_the_endpoint(lab: Lab, web: Web, version: int) -> None:
    pods = {pod.name: pod for pod in (web.pod(1), web.pod(2))}
    client = in_cluster_client(lab)
    web.apply(list(pods.values()), affinity=True)
    first = send_request(client, VIPS[version], 80)
    assert isinstance(first, Answered)
    other = next(pod for name, pod in pods.items() if name != first.pod)
    web.apply([other], affinity=True)
    assert send_request(client, VIPS[version], 80) == Answered(other.name, client.address(version))


@VERSIONS
def test_hairpin_traffic_is_masqueraded(lab: Lab, web: Web, version: int) -> None:
    pod = web.pod(1)
    web.apply([pod])
    assert send_request(pod, VIPS[version], 80) == Answered("pod-1", lab.node.address(version))


@VERSIONS
def test_pod_traffic_is_not_masqueraded(lab: Lab, web: Web, version: int) -> None:
    client = in_cluster_client(lab)
    web.apply([web.pod(1)])
    assert send_request(client, VIPS[version], 80) == Answered("pod-1", client.address(version))


@VERSIONS
def test_traffic_from_outside_the_cluster_is_masqueraded(lab: Lab, web: Web, version: int) -> None:
    client = outside_client(lab)
    web.apply([web.pod(1)])
    for origin in (client, lab.node):
        assert send_request(origin, VIPS[version], 80) == Answered("pod-1", lab.node.address(version))


@VERSIONS
def test_nothing_is_masqueraded_without_a_cluster_cidr(lab: Lab, web: Web, version: int) -> None:
    client = outside_client(lab)
    web.write([web.pod(1)])
    proxy.apply(lab, web.folder, web.mode, "--cluster-cidr=")
    assert send_request(client, VIPS[version], 80) == Answered("pod-1", client.address(version))


@VERSIONS
def test_endpoint_on_another_node_is_reachable(lab: Lab, servers: Servers, web: Web, version: int) -> None:
    far = lab.add_pod("far", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    servers.serve(far, 8080)
    near, away = in_cluster_client(lab), lab.add_client("away", "198.51.100.20", "2001:db8:51::20")
    web.apply([far])
    assert send_request(near, VIPS[version], 80) == Answered("far", near.address(version))
    assert send_request(away, VIPS[version], 80) == Answered("far", lab.node.address(version))


@VERSIONS
def test_open_connection_outlives_the_rules_of_its_endpoint(lab: Lab, web: Web, version: int) -> None:
    old, client = web.pod(1), in_cluster_client(lab)
    web.apply([old])
    with open_connection(client, VIPS[version], 80) as connection:
        web.apply([web.pod(2)])
        assert send_request(client, VIPS[version], 80) == Answered("pod-2", client.address(version))
        assert complete_request(connection) == Answered("pod-1", client.address(version))


@VERSIONS
def test_no_request_fails_while_endpoints_change(
    lab: Lab, servers: Servers, web: Web, tmp_path: Path, version: int
) -> None:
    client = in_cluster_client(lab)
    one, two, three = web.pod(1), web.pod(2), web.pod(3)
    web.write([one, two, three])

    ports = count(FIRST_SOURCE_PORT)

    def request() -> Outcome:
        return send_request(client, VIPS[version], 80, source_port=next(ports))

    with proxy.Daemon(lab, web.folder, tmp_path / "kproxy.log", web.mode) as daemon:
        wait_until(lambda: daemon.is_up() and isinstance(request(), Answered), "an answer of the Service")
        with ContinuousRequests(request) as flow:
            assert set(flow.take(100)) == {"pod-1", "pod-2", "pod-3"}

            web.write([two, three], terminating=[one])
            wait_until(lambda: "pod-1" not in flow.take(60), "no new requests to pod-1")
            flow.settle()
            servers.stop(one)
            web.write([two, three])
            assert set(flow.take(100)) == {"pod-2", "pod-3"}

            web.write([two, three, web.pod(4)])
            wait_until(lambda: "pod-4" in flow.take(10), "requests to pod-4")
            assert set(flow.take(100)) == {"pod-2", "pod-3", "pod-4"}
        assert daemon.is_up()
    assert not failures(flow.outcomes)
