"""NodePorts: reachable on every node from every client, and the source address under each traffic policy."""

from __future__ import annotations

import json

from tests.e2e.cluster import Cluster, Failure, IpFamily, Object
from tests.e2e.manifests import UNSERVED_CLASS, labels, service, url
from tests.e2e.needs import needs
from tests.e2e.target import Target, node_port
from tests.e2e.waiting import until


def test_pods_reach_the_node_port_of_every_node(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort")))
    client = cluster.pod("client", cluster.nodes[-1].name)
    for node in cluster.nodes:
        target = Target(cluster, client, node.addresses[family], port)
        target.wait_for_pods(pods)
        assert target.answering_pods(20) == {"web"}


def test_nodes_reach_the_node_port_of_every_node(cluster: Cluster, family: IpFamily) -> None:
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    pods = [cluster.pod("web", first, labels("web")), cluster.pod("far", last, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort")))
    for number, origin in enumerate(cluster.nodes):
        client = cluster.pod(f"on-node-{number}", origin.name, host_network=True)
        for node in cluster.nodes:
            target = Target(cluster, client, node.addresses[family], port)
            target.wait_for_pods(pods)
            assert target.answering_pods() == {"web", "far"}


@needs("outside")
def test_outside_clients_reach_the_node_port_of_every_node(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    for protocol in ("TCP", "UDP"):
        made = cluster.apply(
            service(f"web-{protocol.lower()}", family, protocol, type="NodePort", selector=labels("web"))
        )
        for node in cluster.nodes:
            target = Target(cluster, None, node.addresses[family], node_port(made), protocol)
            target.wait_for_pods(pods)
            assert target.answering_pods(20) == {"web"}


def service_with_policy(policy: str, family: IpFamily) -> Object:
    """A NodePort Service with this externalTrafficPolicy for the pods of `web`."""
    name = f"policy-{policy.lower()}"
    return service(name, family, type="NodePort", externalTrafficPolicy=policy, selector=labels("web"))


@needs("two nodes")
def test_policy_local_preserves_the_source_address_and_cluster_does_not(cluster: Cluster, family: IpFamily) -> None:
    """The client is the second node, whose address no pod network translates."""
    serving, asking = cluster.nodes[0], cluster.nodes[1]
    pods = [cluster.pod("web", serving.name, labels("web"))]
    client = cluster.pod("client", asking.name, host_network=True)
    for policy in ("Cluster", "Local"):
        port = node_port(cluster.apply(service_with_policy(policy, family)))
        target = Target(cluster, client, serving.addresses[family], port)
        target.wait_for_pods(pods)
        seen = {answer.client for answer in target.answers(20)}
        if policy == "Local":
            assert seen == {asking.addresses[family]}
        else:
            assert len(seen) == 1
            assert seen.isdisjoint({asking.addresses[family]})


@needs("two nodes", "outside")
def test_policies_for_outside_clients(cluster: Cluster, family: IpFamily) -> None:
    serving, other = cluster.nodes[0], cluster.nodes[1]
    pods = [cluster.pod("web", serving.name, labels("web"))]
    seen = {}
    for policy in ("Cluster", "Local"):
        port = node_port(cluster.apply(service_with_policy(policy, family)))
        target = Target(cluster, None, serving.addresses[family], port)
        target.wait_for_pods(pods)
        seen[policy] = {answer.client for answer in target.answers(20)}
        elsewhere = Target(cluster, None, other.addresses[family], port)
        if policy == "Local":
            elsewhere.wait_until_unanswered()
        else:
            elsewhere.wait_for_pods(pods)
    # With policy Cluster, the source is an address of a node. Which one depends on the pod network.
    assert len(seen["Local"]) == 1
    assert seen["Local"].isdisjoint(seen["Cluster"])


@needs("two nodes")
def test_policy_local_answers_only_on_nodes_with_endpoints(cluster: Cluster, family: IpFamily) -> None:
    first, second = cluster.nodes[:2]
    client = cluster.pod("client", second.name, host_network=True)
    far_client = cluster.pod("far-client", first.name, host_network=True)
    port = node_port(cluster.apply(service("web", family, type="NodePort", externalTrafficPolicy="Local")))
    with_pod = [cluster.pod("web", first.name, labels("web"))]
    Target(cluster, client, first.addresses[family], port).wait_for_pods(with_pod)
    without_pod = Target(cluster, far_client, second.addresses[family], port)
    without_pod.wait_until_unanswered()
    with_other = [cluster.pod("other", second.name, labels("web"))]
    without_pod.wait_for_pods(with_other)
    assert without_pod.answering_pods(20) == {"other"}
    assert Target(cluster, client, first.addresses[family], port).answering_pods(20) == {"web"}


@needs("two nodes")
def test_policy_local_lets_a_node_reach_remote_endpoints_through_its_own_node_port(
    cluster: Cluster, family: IpFamily
) -> None:
    """A node's traffic to its own NodePort counts as internal; the policy is for external traffic."""
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort", externalTrafficPolicy="Local")))
    client = cluster.pod("client", cluster.nodes[1].name, host_network=True)
    target = Target(cluster, client, cluster.nodes[1].addresses[family], port)
    target.wait_for_pods(pods)
    assert target.answering_pods(20) == {"web"}


@needs("two nodes", "load balancer address")
def test_health_check_node_port_counts_the_endpoints_of_each_node(cluster: Cluster, family: IpFamily) -> None:
    first, second = cluster.nodes[:2]
    pods = cluster.pods("web", first.name, labels("web"), 2)
    balanced = service(
        "web", family, type="LoadBalancer", externalTrafficPolicy="Local", loadBalancerClass=UNSERVED_CLASS
    )
    port = cluster.apply(balanced)["spec"]["healthCheckNodePort"]

    def check(number: int) -> tuple[int, int]:
        """Return the status and the number of local endpoints in the body; 0 and 0 without an answer."""
        node = cluster.nodes[number]
        try:
            status, body = cluster.get_from_node(node.name, url(node.addresses[family], port))
        except OSError:
            return 0, 0
        return status, local_endpoints(body)

    until(lambda: check(0) == (200, 2), f"node {first.name} reports 200 and 2 endpoints")
    until(lambda: check(1) == (503, 0), f"node {second.name} reports 503 and no endpoints")
    cluster.make_unready(pods[0])
    until(lambda: check(0) == (200, 1), f"node {first.name} reports 200 and 1 endpoint")
    cluster.delete_pod(pods[1])
    until(lambda: check(0) == (503, 0), f"node {first.name} reports 503 and no endpoints")


def local_endpoints(body: str) -> int:
    """Return the number of local endpoints in the body of a health check."""
    count: int = json.loads(body)["localEndpoints"]
    return count


@needs("two nodes")
def test_node_port_is_closed_when_the_service_becomes_cluster_ip(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort")))
    client = cluster.pod("client", cluster.nodes[1].name, host_network=True)
    target = Target(cluster, client, cluster.nodes[0].addresses[family], port)
    target.wait_for_pods(pods)
    cluster.apply(service("web", family))
    target.wait_until_unanswered()
    assert all(isinstance(outcome, Failure) for outcome in target.request(3))
