"""UDP Services, and flows that must move when their pod is deleted."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.cluster import Answer, Cluster, IpFamily, Pod
from tests.e2e.manifests import PORT, labels, service
from tests.e2e.target import Target, cluster_ip, node_port
from tests.e2e.waiting import until


def test_pods_and_nodes_reach_a_udp_service(cluster: Cluster, family: IpFamily) -> None:
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    pods = [*cluster.pods("web", first, labels("web"), 2), cluster.pod("far", last, labels("web"))]
    made = cluster.apply(service("web", family, "UDP", type="NodePort"))
    client = cluster.pod("client", last)
    target = Target(cluster, client, cluster_ip(made), PORT, "UDP")
    target.wait_for_pods(pods)
    answers = target.answers(60)
    assert {answer.pod for answer in answers} == {pod.name for pod in pods}
    assert {answer.client for answer in answers} == {client.addresses[family]}
    on_node = cluster.pod("on-node", last, host_network=True)
    for node in cluster.nodes:
        Target(cluster, on_node, node.addresses[family], node_port(made), "UDP").wait_for_pods(pods)


def test_udp_service_without_endpoints_rejects_requests(cluster: Cluster, family: IpFamily) -> None:
    address = cluster_ip(cluster.apply(service("web", family, "UDP")))
    Target(cluster, cluster.pod("client", cluster.nodes[0].name), address, PORT, "UDP").wait_until_rejected()


def test_client_socket_moves_to_a_new_pod_when_its_pod_is_replaced(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("old", cluster.nodes[0].name, labels("web"))
    address = cluster_ip(cluster.apply(service("web", family, "UDP")))
    client = cluster.pod("client", cluster.nodes[-1].name)
    Target(cluster, client, address, PORT, "UDP").wait_for_pods([pod])
    assert one_socket(cluster, client, address, 5) == ["old"] * 5
    for number in range(2):
        pod, replaced = cluster.pod(f"new-{number}", cluster.nodes[-1].name, labels("web")), pod
        cluster.delete_pod(replaced, grace=1)
        until(reaches(cluster, client, address, pod), f"the flow of {replaced.name} moves to {pod.name}")
        assert one_socket(cluster, client, address, 5) == [pod.name] * 5


def test_udp_and_tcp_on_the_same_port_have_their_own_targets(cluster: Cluster, family: IpFamily) -> None:
    """As in the DNS Service: the same port number for both protocols, each with its own target."""
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    ports = [
        {"name": "tcp", "protocol": "TCP", "port": 53, "targetPort": "http"},
        {"name": "udp", "protocol": "UDP", "port": 53, "targetPort": "udp"},
    ]
    address = cluster_ip(cluster.apply(service("web", family, ports=ports)))
    client = cluster.pod("client", cluster.nodes[-1].name)
    for protocol in ("TCP", "UDP"):
        Target(cluster, client, address, 53, protocol).wait_for_pods([pod])


def reaches(cluster: Cluster, client: Pod, address: str, pod: Pod) -> Callable[[], bool]:
    """Return a condition: the client's one socket reaches this pod."""
    return lambda: one_socket(cluster, client, address, 1) == [pod.name]


def one_socket(cluster: Cluster, client: Pod, address: str, times: int) -> list[str]:
    """Send requests from the client's one socket; return the answering pods, "" for no answer."""
    outcomes = cluster.request_from_one_socket(client, address, PORT, times=times)
    return [outcome.pod if isinstance(outcome, Answer) else "" for outcome in outcomes]
