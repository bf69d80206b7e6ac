"""UDP: Services by datagrams, and flows that have to move when their pod is gone."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.cluster import Answer, Cluster, IpFamily, Pod
from tests.e2e.manifests import PORT, labels, service
from tests.e2e.waiting import until
from tests.e2e.way import Way, cluster_ip, node_port


def test_pods_and_nodes_reach_a_service_by_datagrams(cluster: Cluster, family: IpFamily) -> None:
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    pods = [*cluster.pods("web", first, labels("web"), 2), cluster.pod("far", last, labels("web"))]
    made = cluster.apply(service("web", family, "UDP", type="NodePort"))
    client = cluster.pod("client", last)
    way = Way(cluster, client, cluster_ip(made), PORT, "UDP")
    way.settle_on(pods)
    answers = way.answers(60)
    assert {answer.pod for answer in answers} == {pod.name for pod in pods}
    assert {answer.client for answer in answers} == {client.addresses[family]}
    on_node = cluster.pod("on-node", last, host_network=True)
    for node in cluster.nodes:
        Way(cluster, on_node, node.addresses[family], node_port(made), "UDP").settle_on(pods)


def test_no_endpoints_refuse_datagrams(cluster: Cluster, family: IpFamily) -> None:
    address = cluster_ip(cluster.apply(service("web", family, "UDP")))
    Way(cluster, cluster.pod("client", cluster.nodes[0].name), address, PORT, "UDP").refused()


def test_a_client_on_one_socket_moves_on_when_its_pod_is_replaced(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("old", cluster.nodes[0].name, labels("web"))
    address = cluster_ip(cluster.apply(service("web", family, "UDP")))
    client = cluster.pod("client", cluster.nodes[-1].name)
    Way(cluster, client, address, PORT, "UDP").settle_on([pod])
    assert one_socket(cluster, client, address, 5) == ["old"] * 5
    for number in range(2):
        pod, replaced = cluster.pod(f"new-{number}", cluster.nodes[-1].name, labels("web")), pod
        cluster.delete_pod(replaced, grace=1)
        until(reached(cluster, client, address, pod), f"the flow of {replaced.name} moves on to {pod.name}")
        assert one_socket(cluster, client, address, 5) == [pod.name] * 5


def test_udp_and_tcp_of_one_port_are_two_services(cluster: Cluster, family: IpFamily) -> None:
    """As those of DNS are: one name and number, and each protocol with a target of its own."""
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    ports = [
        {"name": "tcp", "protocol": "TCP", "port": 53, "targetPort": "http"},
        {"name": "udp", "protocol": "UDP", "port": 53, "targetPort": "udp"},
    ]
    address = cluster_ip(cluster.apply(service("web", family, ports=ports)))
    client = cluster.pod("client", cluster.nodes[-1].name)
    for protocol in ("TCP", "UDP"):
        Way(cluster, client, address, 53, protocol).settle_on([pod])


def reached(cluster: Cluster, client: Pod, address: str, pod: Pod) -> Callable[[], bool]:
    """Return what tells whether the client's one socket gets to a pod."""
    return lambda: one_socket(cluster, client, address, 1) == [pod.name]


def one_socket(cluster: Cluster, client: Pod, address: str, times: int) -> list[str]:
    """Return who answered each request of the client's one socket, "" for nobody."""
    outcomes = cluster.ask_from_one_socket(client, address, PORT, times=times)
    return [outcome.pod if isinstance(outcome, Answer) else "" for outcome in outcomes]
