"""NodePorts: at every node's address, from everywhere, and whose address the pods see under each policy."""

from __future__ import annotations

import json

from tests.e2e.cluster import Cluster, Failure, IpFamily, Object
from tests.e2e.manifests import NOBODYS_CLASS, labels, service, url
from tests.e2e.needs import needs
from tests.e2e.waiting import until
from tests.e2e.way import Way, node_port


def test_every_node_answers_pods_at_its_address(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort")))
    client = cluster.pod("client", cluster.nodes[-1].name)
    for node in cluster.nodes:
        way = Way(cluster, client, node.addresses[family], port)
        way.settle_on(pods)
        assert way.pods(20) == {"web"}


def test_every_node_answers_every_node_at_its_address(cluster: Cluster, family: IpFamily) -> None:
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    pods = [cluster.pod("web", first, labels("web")), cluster.pod("far", last, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort")))
    for number, origin in enumerate(cluster.nodes):
        client = cluster.pod(f"on-node-{number}", origin.name, host_network=True)
        for node in cluster.nodes:
            way = Way(cluster, client, node.addresses[family], port)
            way.settle_on(pods)
            assert way.pods() == {"web", "far"}


@needs("outside")
def test_every_node_answers_outside_at_its_address(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    for protocol in ("TCP", "UDP"):
        made = cluster.apply(
            service(f"web-{protocol.lower()}", family, protocol, type="NodePort", selector=labels("web"))
        )
        for node in cluster.nodes:
            way = Way(cluster, None, node.addresses[family], node_port(made), protocol)
            way.settle_on(pods)
            assert way.pods(20) == {"web"}


def of_policy(policy: str, family: IpFamily) -> Object:
    """A Service of its own for each policy, with the pods of `web`."""
    name = f"policy-{policy.lower()}"
    return service(name, family, type="NodePort", externalTrafficPolicy=policy, selector=labels("web"))


@needs("two nodes")
def test_under_policy_cluster_the_pods_see_a_node_and_under_local_the_client(
    cluster: Cluster, family: IpFamily
) -> None:
    """The client is the second node itself, whose address no network between pods and nodes translates."""
    serving, asking = cluster.nodes[0], cluster.nodes[1]
    pods = [cluster.pod("web", serving.name, labels("web"))]
    client = cluster.pod("client", asking.name, host_network=True)
    for policy in ("Cluster", "Local"):
        port = node_port(cluster.apply(of_policy(policy, family)))
        way = Way(cluster, client, serving.addresses[family], port)
        way.settle_on(pods)
        seen = {answer.client for answer in way.answers(20)}
        if policy == "Local":
            assert seen == {asking.addresses[family]}
        else:
            assert len(seen) == 1
            assert seen.isdisjoint({asking.addresses[family]})


@needs("two nodes", "outside")
def test_outside_the_same_holds_and_other_nodes_do_not_answer_under_local(cluster: Cluster, family: IpFamily) -> None:
    serving, other = cluster.nodes[0], cluster.nodes[1]
    pods = [cluster.pod("web", serving.name, labels("web"))]
    seen = {}
    for policy in ("Cluster", "Local"):
        port = node_port(cluster.apply(of_policy(policy, family)))
        way = Way(cluster, None, serving.addresses[family], port)
        way.settle_on(pods)
        seen[policy] = {answer.client for answer in way.answers(20)}
        elsewhere = Way(cluster, None, other.addresses[family], port)
        if policy == "Local":
            elsewhere.unanswered()
        else:
            elsewhere.settle_on(pods)
    # What a node has for an address towards its pods is the network's affair; it is not the client's.
    assert len(seen["Local"]) == 1
    assert seen["Local"].isdisjoint(seen["Cluster"])


@needs("two nodes")
def test_under_policy_local_only_nodes_with_endpoints_answer(cluster: Cluster, family: IpFamily) -> None:
    first, second = cluster.nodes[:2]
    client = cluster.pod("client", second.name, host_network=True)
    far_client = cluster.pod("far-client", first.name, host_network=True)
    port = node_port(cluster.apply(service("web", family, type="NodePort", externalTrafficPolicy="Local")))
    with_pod = [cluster.pod("web", first.name, labels("web"))]
    Way(cluster, client, first.addresses[family], port).settle_on(with_pod)
    none_there = Way(cluster, far_client, second.addresses[family], port)
    none_there.unanswered()
    with_other = [cluster.pod("other", second.name, labels("web"))]
    none_there.settle_on(with_other)
    assert none_there.pods(20) == {"other"}
    assert Way(cluster, client, first.addresses[family], port).pods(20) == {"web"}


@needs("two nodes")
def test_a_node_reaches_endpoints_elsewhere_at_its_own_address_under_policy_local(
    cluster: Cluster, family: IpFamily
) -> None:
    """What a node sends to its own NodePort is of the cluster, and the policy is for what comes from outside."""
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort", externalTrafficPolicy="Local")))
    client = cluster.pod("client", cluster.nodes[1].name, host_network=True)
    way = Way(cluster, client, cluster.nodes[1].addresses[family], port)
    way.settle_on(pods)
    assert way.pods(20) == {"web"}


@needs("two nodes", "load balancer address")
def test_the_health_check_port_counts_the_endpoints_of_each_node(cluster: Cluster, family: IpFamily) -> None:
    first, second = cluster.nodes[:2]
    pods = cluster.pods("web", first.name, labels("web"), 2)
    balanced = service(
        "web", family, type="LoadBalancer", externalTrafficPolicy="Local", loadBalancerClass=NOBODYS_CLASS
    )
    port = cluster.apply(balanced)["spec"]["healthCheckNodePort"]

    def check(number: int) -> tuple[int, int]:
        """Status, and the endpoints on the node that the body tells of; 0 and 0 without an answer."""
        node = cluster.nodes[number]
        try:
            status, body = cluster.get_from_node(node.name, url(node.addresses[family], port))
        except OSError:
            return 0, 0
        return status, local_endpoints(body)

    until(lambda: check(0) == (200, 2), f"node {first.name} says 200 and 2 endpoints")
    until(lambda: check(1) == (503, 0), f"node {second.name} says 503 and no endpoints")
    cluster.make_unready(pods[0])
    until(lambda: check(0) == (200, 1), f"node {first.name} says 200 and 1 endpoint")
    cluster.delete_pod(pods[1])
    until(lambda: check(0) == (503, 0), f"node {first.name} says 503 and no endpoints")


def local_endpoints(body: str) -> int:
    """Return what the body of a health check says of the endpoints on its node."""
    count: int = json.loads(body)["localEndpoints"]
    return count


@needs("two nodes")
def test_a_node_port_goes_with_its_type(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    port = node_port(cluster.apply(service("web", family, type="NodePort")))
    client = cluster.pod("client", cluster.nodes[1].name, host_network=True)
    way = Way(cluster, client, cluster.nodes[0].addresses[family], port)
    way.settle_on(pods)
    cluster.apply(service("web", family))
    way.unanswered()
    assert all(isinstance(outcome, Failure) for outcome in way.ask(3))
