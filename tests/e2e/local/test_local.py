"""The cluster of namespaces itself: its network, its pods' lives, its proxies' and what is left after a test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.cluster import HTTP_PORT, UDP_PORT, Answer, Cluster, IpFamily, Mode, Object, Pod
from tests.e2e.local import unavailable
from tests.e2e.local.asking import ask_from_one_port
from tests.e2e.local.cluster import LocalCluster, LocalClusters
from tests.lab import links
from tests.lab.namespace import Namespace
from tests.lab.topology import Host
from tests.lab.waiting import wait_until

FAMILIES = pytest.mark.parametrize("family", ["IPv4", "IPv6"])
LABELS = {"app": "web"}
BALANCED: dict[IpFamily, str] = {"IPv4": "203.0.113.8", "IPv6": "2001:db8:7::8"}


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
    """The name of each endpoint of `web`, and whether it is ready."""
    found = cluster.get("EndpointSlice", f"web-{family.lower()}")["endpoints"]
    return [(each["targetRef"]["name"], each["conditions"]["ready"]) for each in found]


def started(cluster: Cluster, node: str) -> str:
    """When a node's proxy was started."""
    text = cluster.get_from_node(node, "http://127.0.0.1:10249/metrics")[1]
    return next(line for line in text.splitlines() if line.startswith("process_start_time_seconds"))


@FAMILIES
@pytest.mark.parametrize(("port", "protocol"), [(HTTP_PORT, "TCP"), (UDP_PORT, "UDP")])
def test_everybody_reaches_every_pod_and_is_seen_as_itself(
    cluster: LocalCluster, family: IpFamily, port: int, protocol: str
) -> None:
    pods = [cluster.pod(f"pod-{node.name}", node.name, LABELS) for node in cluster.nodes]
    clients = [*pods, *(cluster.pod(f"host-{node.name}", node.name, host_network=True) for node in cluster.nodes)]
    for pod in pods:
        for client in clients:
            wanted = Answer(pod.name, client.addresses[family])
            assert cluster.ask(client, pod.addresses[family], port, protocol) == [wanted]
        answers = cluster.ask_from_outside(pod.addresses[family], port, protocol, times=2)
        assert [answer.pod for answer in answers if isinstance(answer, Answer)] == [pod.name] * 2


@FAMILIES
def test_a_port_that_nobody_has_is_refused_and_a_pod_that_is_gone_is_not_reached(
    cluster: LocalCluster, family: IpFamily
) -> None:
    client, pod = cluster.pod("client", "node-1"), cluster.pod("web", "node-2", LABELS)
    assert kinds(cluster, client, pod.addresses[family], 9) == ["refused"]
    cluster.delete_pod(pod, 0)
    wait_until(lambda: kinds(cluster, client, pod.addresses[family], HTTP_PORT) == ["other"], "the pod is gone")


def kinds(cluster: Cluster, client: Pod, address: str, port: int) -> list[str]:
    return [getattr(outcome, "kind", "answered") for outcome in cluster.ask(client, address, port)]


@FAMILIES
def test_an_icmp_error_is_a_refusal_at_once(cluster: LocalCluster, family: IpFamily) -> None:
    """kproxy refuses with one where there are no endpoints."""
    client = cluster.pod("client", "node-1")
    address = cluster.apply(web(family))["spec"]["clusterIP"]
    wait_until(lambda: kinds(cluster, client, address, 80) == ["refused"], "requests are refused")
    assert kinds(cluster, client, address, 80) == ["refused"]


def test_one_socket_keeps_its_port_from_call_to_call() -> None:
    if reason := unavailable():
        pytest.skip(reason)
    namespace = Namespace("alone")
    links.configure(namespace, forwards=False)
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", UDP_PORT))
        for _ in range(2):
            outcomes = ask_from_one_port(Host("alone", namespace, ("127.0.0.1",)), "127.0.0.1", UDP_PORT, times=1)
            assert [getattr(each, "kind", "answered") for each in outcomes] == ["no answer"]
        assert receiver.recvfrom(100)[1] == receiver.recvfrom(100)[1]
    namespace.close()


def test_a_client_on_one_socket_gets_answers_and_refusals(cluster: LocalCluster) -> None:
    client, pod = cluster.pod("client", "node-1"), cluster.pod("web", "node-2", LABELS)
    address, own = pod.addresses["IPv4"], client.addresses["IPv4"]
    assert cluster.ask_from_one_socket(client, address, UDP_PORT, times=2) == [Answer("web", own)] * 2
    (outcome,) = cluster.ask_from_one_socket(client, address, 9, times=1)
    assert getattr(outcome, "kind", "answered") == "refused"


def test_pods_that_come_change_and_leave_are_in_the_slices_at_once(cluster: LocalCluster) -> None:
    cluster.apply(web())
    pods = cluster.pods("web", "node-1", LABELS, 3)
    assert endpoints(cluster) == [("web-0", True), ("web-1", True), ("web-2", True)]
    cluster.make_unready(pods[0])
    cluster.delete_pod(pods[1], 1000)
    assert endpoints(cluster) == [("web-0", False), ("web-1", False), ("web-2", True)]
    assert cluster.ask(pods[2], pods[1].addresses["IPv4"], HTTP_PORT) == [Answer("web-1", pods[2].addresses["IPv4"])]
    cluster.delete_pod(pods[2], 0)
    wait_until(lambda: endpoints(cluster) == [("web-0", False), ("web-1", False)], "the end of the third pod")
    other = web()
    other["spec"]["selector"] = {"app": "other"}
    cluster.apply(other)
    assert endpoints(cluster) == []


def test_a_load_counts_each_answer_and_tells_of_each_failure(cluster: LocalCluster) -> None:
    client, pod = cluster.pod("client", "node-1"), cluster.pod("web", "node-2", LABELS)
    with cluster.load(client, pod.addresses["IPv4"], HTTP_PORT) as load:
        wait_until(lambda: load.answers > 20, "answers")
        assert load.failures() == []
        cluster.delete_pod(pod, 0)
        wait_until(load.failures, "failures")
    answers, failures = load.answers, len(load.failures())
    assert cluster.ask(client, pod.addresses["IPv4"], HTTP_PORT) != []
    assert (load.answers, len(load.failures())) == (answers, failures)


@FAMILIES
def test_a_load_balancers_address_leads_to_a_node_that_takes_it(cluster: LocalCluster, family: IpFamily) -> None:
    manifest = web(family)
    manifest["spec"] |= {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    cluster.apply(manifest)
    address = BALANCED[family]
    cluster.give_address("web", address)
    for node in cluster.nodes:
        pod = cluster.pod(f"web-{node.name}", node.name, LABELS)
        wait_until(partial(is_answered_by, cluster, address, pod), f"{address} leads to {node.name}")
        cluster.delete_pod(pod, 0)
    cluster.give_address("web", address, "Proxy")
    wait_until(partial(is_answered_by, cluster, address), "nobody answers at the address")


def is_answered_by(cluster: Cluster, address: str, *pods: Pod) -> bool:
    outcomes = cluster.ask_from_outside(address, 80, times=3)
    return {each.pod for each in outcomes if isinstance(each, Answer)} == {pod.name for pod in pods}


def test_a_new_proxy_takes_the_place_of_one_that_was_ended_or_killed(cluster: LocalCluster) -> None:
    before = {node.name: started(cluster, node.name) for node in cluster.nodes}
    cluster.proxies.restart("node-1")
    restarted = started(cluster, "node-1")
    assert restarted != before["node-1"]
    cluster.proxies.kill("node-1")
    assert started(cluster, "node-1") != restarted
    assert started(cluster, "node-2") == before["node-2"]


def test_all_nodes_change_their_mode_and_return(cluster: LocalCluster) -> None:
    before = cluster.proxies.mode()
    other: Mode = "iptables" if before == "nftables" else "nftables"
    with cluster.proxies.in_mode(other):
        assert cluster.proxies.mode() == other
    assert cluster.proxies.mode() == before


def test_a_test_leaves_nothing_to_the_next(local: LocalClusters) -> None:
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
