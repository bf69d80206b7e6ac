"""The emulated cluster itself: network, pods, proxies, and cleanup after a test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.cluster import HTTP_PORT, UDP_PORT, Answer, Cluster, IpFamily, Mode, Object, Pod
from tests.e2e.local import unavailable
from tests.e2e.local.cluster import LocalCluster, LocalClusters
from tests.e2e.local.requests import send_from_one_port
from tests.lab import links
from tests.lab.namespace import Namespace
from tests.lab.topology import Host
from tests.lab.waiting import wait_until

FAMILIES = pytest.mark.parametrize("family", ["IPv4", "IPv6"])
LABELS = {"app": "web"}
LOAD_BALANCER_IPS: dict[IpFamily, str] = {"IPv4": "203.0.113.8", "IPv6": "2001:db8:7::8"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalClusters]:
    if reason := unavailable():
        pytest.skip(reason)
    with LocalClusters(tmp_path_factory.mktemp("local")) as local:
        yield local


@pytest.fixture
def cluster(local: LocalClusters) -> Iterator[LocalCluster]:
    with local.test("local") as cluster:
        yield cluster


def web(family: IpFamily = "IPv4") -> Object:
    ports = [{"name": "main", "port": 80, "targetPort": "http"}]
    spec = {"ipFamilies": [family], "selector": LABELS, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec}


def endpoints(cluster: Cluster, family: IpFamily = "IPv4") -> list[tuple[str, bool]]:
    """Return the name and readiness of each endpoint of `web`."""
    found = cluster.get("EndpointSlice", f"web-{family.lower()}")["endpoints"]
    return [(each["targetRef"]["name"], each["conditions"]["ready"]) for each in found]


def start_time(cluster: Cluster, node: str) -> str:
    """Return the start time of a node's proxy, as a metric line."""
    text = cluster.get_from_node(node, "http://127.0.0.1:10249/metrics")[1]
    return next(line for line in text.splitlines() if line.startswith("process_start_time_seconds"))


@FAMILIES
@pytest.mark.parametrize(("port", "protocol"), [(HTTP_PORT, "TCP"), (UDP_PORT, "UDP")])
def test_every_client_reaches_every_pod_with_its_own_address(
    cluster: LocalCluster, family: IpFamily, port: int, protocol: str
) -> None:
    pods = [cluster.pod(f"pod-{node.name}", node.name, LABELS) for node in cluster.nodes]
    clients = [*pods, *(cluster.pod(f"host-{node.name}", node.name, host_network=True) for node in cluster.nodes)]
    for pod in pods:
        for client in clients:
            expected = Answer(pod.name, client.addresses[family])
            assert cluster.request(client, pod.addresses[family], port, protocol) == [expected]
        answers = cluster.request_from_outside(pod.addresses[family], port, protocol, times=2)
        assert [answer.pod for answer in answers if isinstance(answer, Answer)] == [pod.name] * 2


@FAMILIES
def test_closed_port_is_refused_and_deleted_pod_is_unreachable(cluster: LocalCluster, family: IpFamily) -> None:
    client, pod = cluster.pod("client", "node-1"), cluster.pod("web", "node-2", LABELS)
    assert kinds(cluster, client, pod.addresses[family], 9) == ["refused"]
    cluster.delete_pod(pod, 0)
    wait_until(lambda: kinds(cluster, client, pod.addresses[family], HTTP_PORT) == ["other"], "the pod is unreachable")


def kinds(cluster: Cluster, client: Pod, address: str, port: int) -> list[str]:
    return [getattr(outcome, "kind", "answered") for outcome in cluster.request(client, address, port)]


@FAMILIES
def test_icmp_error_counts_as_refused_at_once(cluster: LocalCluster, family: IpFamily) -> None:
    """kproxy rejects requests to Services without endpoints with an ICMP error."""
    client = cluster.pod("client", "node-1")
    address = cluster.apply(web(family))["spec"]["clusterIP"]
    wait_until(lambda: kinds(cluster, client, address, 80) == ["refused"], "requests are refused")
    assert kinds(cluster, client, address, 80) == ["refused"]


def test_one_socket_keeps_its_source_port() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    namespace = Namespace("alone")
    links.configure(namespace, forwards=False)
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", UDP_PORT))
        for _ in range(2):
            outcomes = send_from_one_port(Host("alone", namespace, ("127.0.0.1",)), "127.0.0.1", UDP_PORT, times=1)
            assert [getattr(each, "kind", "answered") for each in outcomes] == ["no answer"]
        assert receiver.recvfrom(100)[1] == receiver.recvfrom(100)[1]
    namespace.close()


def test_one_socket_gets_answers_and_rejections(cluster: LocalCluster) -> None:
    client, pod = cluster.pod("client", "node-1"), cluster.pod("web", "node-2", LABELS)
    address, own = pod.addresses["IPv4"], client.addresses["IPv4"]
    assert cluster.request_from_one_socket(client, address, UDP_PORT, times=2) == [Answer("web", own)] * 2
    (outcome,) = cluster.request_from_one_socket(client, address, 9, times=1)
    assert getattr(outcome, "kind", "answered") == "refused"


def test_slices_follow_the_pods(cluster: LocalCluster) -> None:
    cluster.apply(web())
    pods = cluster.pods("web", "node-1", LABELS, 3)
    assert endpoints(cluster) == [("web-0", True), ("web-1", True), ("web-2", True)]
    cluster.make_unready(pods[0])
    cluster.delete_pod(pods[1], 1000)
    assert endpoints(cluster) == [("web-0", False), ("web-1", False), ("web-2", True)]
    assert cluster.request(pods[2], pods[1].addresses["IPv4"], HTTP_PORT) == [
        Answer("web-1", pods[2].addresses["IPv4"])
    ]
    cluster.delete_pod(pods[2], 0)
    wait_until(lambda: endpoints(cluster) == [("web-0", False), ("web-1", False)], "the end of the third pod")
    other = web()
    other["spec"]["selector"] = {"app": "other"}
    cluster.apply(other)
    assert endpoints(cluster) == []


def test_load_counts_answers_and_failures(cluster: LocalCluster) -> None:
    client, pod = cluster.pod("client", "node-1"), cluster.pod("web", "node-2", LABELS)
    with cluster.load(client, pod.addresses["IPv4"], HTTP_PORT) as load:
        wait_until(lambda: load.answers > 20, "answers")
        assert load.failures() == []
        cluster.delete_pod(pod, 0)
        wait_until(load.failures, "failures")
    answers, failures = load.answers, len(load.failures())
    assert cluster.request(client, pod.addresses["IPv4"], HTTP_PORT) != []
    assert (load.answers, len(load.failures())) == (answers, failures)


@FAMILIES
def test_load_balancer_ip_is_routed_to_a_node_with_endpoints(cluster: LocalCluster, family: IpFamily) -> None:
    manifest = web(family)
    manifest["spec"] |= {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    cluster.apply(manifest)
    address = LOAD_BALANCER_IPS[family]
    cluster.set_load_balancer_ip("web", address)
    for node in cluster.nodes:
        pod = cluster.pod(f"web-{node.name}", node.name, LABELS)
        wait_until(partial(is_answered_by, cluster, address, pod), f"{address} is routed to {node.name}")
        cluster.delete_pod(pod, 0)
    cluster.set_load_balancer_ip("web", address, "Proxy")
    wait_until(partial(is_answered_by, cluster, address), "the address no longer answers")


def is_answered_by(cluster: Cluster, address: str, *pods: Pod) -> bool:
    outcomes = cluster.request_from_outside(address, 80, times=3)
    return {each.pod for each in outcomes if isinstance(each, Answer)} == {pod.name for pod in pods}


def test_restart_and_kill_start_a_new_proxy(cluster: LocalCluster) -> None:
    before = {node.name: start_time(cluster, node.name) for node in cluster.nodes}
    cluster.proxies.restart("node-1")
    restarted = start_time(cluster, "node-1")
    assert restarted != before["node-1"]
    cluster.proxies.kill("node-1")
    assert start_time(cluster, "node-1") != restarted
    assert start_time(cluster, "node-2") == before["node-2"]


def test_mode_switch_of_all_nodes_and_back(cluster: LocalCluster) -> None:
    before = cluster.proxies.mode()
    other: Mode = "iptables" if before == "nftables" else "nftables"
    with cluster.proxies.in_mode(other):
        assert cluster.proxies.mode() == other
    assert cluster.proxies.mode() == before


def test_everything_is_deleted_after_a_test(local: LocalClusters) -> None:
    with local.test("first") as cluster:
        first = cluster.pod("web", "node-1", LABELS)
        cluster.delete_pod(first, 1000)
        address = cluster.apply(web())["spec"]["clusterIP"]
        cluster.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": "by-hand", "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": "IPv4",
                "endpoints": [],
                "ports": [],
            }
        )
        assert cluster.get("EndpointSlice", "by-hand")["addressType"] == "IPv4"
    with local.test("first") as cluster:
        assert cluster.diagnose().endswith("--- objects\n{}\n")
        second = cluster.pod("web", "node-1", LABELS)
        assert second.addresses != first.addresses
        assert kinds(cluster, second, first.addresses["IPv4"], HTTP_PORT) == ["other"]
        assert cluster.apply(web())["spec"]["clusterIP"] != address
