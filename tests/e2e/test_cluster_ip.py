"""ClusterIPs: reachability, source addresses, and changes of Services and endpoints."""

from __future__ import annotations

from tests.e2e.cluster import HTTP_PORT, Cluster, IpFamily, Pod
from tests.e2e.manifests import PORT, endpoint, endpoint_slice, labels, service
from tests.e2e.needs import needs
from tests.e2e.target import Target, cluster_ip


def three_pods(cluster: Cluster) -> list[Pod]:
    """Pods labeled `app: web`: two on the first node, one on the last."""
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    return [*cluster.pods("web", first, labels("web"), 2), cluster.pod("far", last, labels("web"))]


def target_of_new_service(cluster: Cluster, family: IpFamily, node: str, *, host_network: bool = False) -> Target:
    """Create the Service `web` and a client on a node; return its ClusterIP as target."""
    address = cluster_ip(cluster.apply(service("web", family)))
    return Target(cluster, cluster.pod("client", node, host_network=host_network), address)


def test_pod_reaches_all_endpoints_with_its_own_source_address(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    target = target_of_new_service(cluster, family, cluster.nodes[0].name)
    target.wait_for_pods(pods)
    answers = target.answers(60)
    assert {answer.pod for answer in answers} == {pod.name for pod in pods}
    assert target.client is not None
    assert {answer.client for answer in answers} == {target.client.addresses[family]}


@needs("two nodes")
def test_pod_reaches_endpoints_on_another_node(cluster: Cluster, family: IpFamily) -> None:
    pods = cluster.pods("web", cluster.nodes[1].name, labels("web"), 2)
    target = target_of_new_service(cluster, family, cluster.nodes[0].name)
    target.wait_for_pods(pods)
    assert target.client is not None
    assert {answer.client for answer in target.answers(20)} == {target.client.addresses[family]}


def test_every_node_reaches_all_endpoints(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    address = cluster_ip(cluster.apply(service("web", family)))
    for number, node in enumerate(cluster.nodes):
        target = Target(cluster, cluster.pod(f"on-node-{number}", node.name, host_network=True), address)
        target.wait_for_pods(pods)
        assert target.answering_pods() == {pod.name for pod in pods}


def test_pod_reaches_itself_through_its_service(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    address = cluster_ip(cluster.apply(service("web", family)))
    target = Target(cluster, pod, address)
    target.wait_for_pods([pod])
    assert target.answering_pods(20) == {"web"}


def test_service_rejects_requests_while_it_has_no_endpoints(cluster: Cluster, family: IpFamily) -> None:
    target = target_of_new_service(cluster, family, cluster.nodes[0].name)
    target.wait_until_rejected()
    pod = cluster.pod("web", cluster.nodes[-1].name, labels("web"))
    target.wait_for_pods([pod])
    assert target.answering_pods(20) == {"web"}
    cluster.delete_pod(pod, grace=1)
    target.wait_until_rejected()


def test_unready_pod_gets_no_requests(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    target = target_of_new_service(cluster, family, cluster.nodes[0].name)
    target.wait_for_pods(pods)
    cluster.make_unready(pods[0])
    target.wait_for_pods(pods[1:])
    assert target.answering_pods() == {pod.name for pod in pods[1:]}


def test_publish_not_ready_addresses_sends_requests_to_unready_pods(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    client = cluster.pod("client", cluster.nodes[-1].name)
    published = cluster.apply(service("web", family, publishNotReadyAddresses=True))
    usual = cluster.apply(service("usual", family, selector=labels("web")))
    target, usual_target = (Target(cluster, client, cluster_ip(each)) for each in (published, usual))
    for each in (target, usual_target):
        each.wait_for_pods([pod])
    cluster.make_unready(pod)
    usual_target.wait_until_rejected()
    assert target.answering_pods(20) == {"web"}


def test_deleted_service_no_longer_answers(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    target = target_of_new_service(cluster, family, cluster.nodes[-1].name)
    target.wait_for_pods([pod])
    cluster.delete("Service", "web")
    target.wait_until_unanswered()


def test_changed_selector_changes_the_endpoints(cluster: Cluster, family: IpFamily) -> None:
    blue = cluster.pod("blue", cluster.nodes[0].name, labels("blue"))
    green = cluster.pod("green", cluster.nodes[-1].name, labels("green"))
    target = target_of_new_service(cluster, family, cluster.nodes[0].name)
    for pod in (blue, green, blue):
        cluster.apply(service("web", family, selector=labels(pod.name)))
        target.wait_for_pods([pod])
        assert target.answering_pods(20) == {pod.name}


def test_each_port_reaches_its_target_port_by_number_or_name(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    ports = [
        {"name": "number", "protocol": "TCP", "port": 80, "targetPort": HTTP_PORT},
        {"name": "name", "protocol": "TCP", "port": 81, "targetPort": "http"},
        {"name": "udp", "protocol": "UDP", "port": 82, "targetPort": "udp"},
        {"name": "closed", "protocol": "TCP", "port": 83, "targetPort": 9},
    ]
    address = cluster_ip(cluster.apply(service("web", family, ports=ports)))
    client = cluster.pod("client", cluster.nodes[-1].name)
    for port, protocol in ((80, "TCP"), (81, "TCP"), (82, "UDP")):
        target = Target(cluster, client, address, port, protocol)
        target.wait_for_pods([pod])
        assert target.answering_pods(10) == {"web"}
    Target(cluster, client, address, 83).wait_until_rejected()


def test_manually_written_slice_of_a_service_without_selector(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    target = target_of_new_service(cluster, family, cluster.nodes[0].name)
    address = cluster_ip(cluster.apply(service("by-hand", family, selector=None)))
    target = Target(cluster, target.client, address)
    target.wait_until_rejected()
    for chosen in (pods[:2], pods[1:]):
        endpoints = [endpoint(pod.addresses[family], pod.node) for pod in chosen]
        cluster.apply(endpoint_slice("by-hand", family, endpoints))
        target.wait_for_pods(chosen)
        assert target.answering_pods() == {pod.name for pod in chosen}
    cluster.delete("EndpointSlice", "by-hand-by-hand")
    target.wait_until_rejected()


def test_headless_service_adds_no_frontend(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    headless = cluster.apply(service("web", family, clusterIP="None"))
    assert cluster_ip(headless) == "None"
    # Once a second Service of the same pod works, the proxies have seen the first one too.
    other = cluster.apply(service("other", family, selector=labels("web")))
    client = cluster.pod("client", cluster.nodes[-1].name)
    Target(cluster, client, cluster_ip(other)).wait_for_pods([pod])
    assert Target(cluster, client, pod.addresses[family], HTTP_PORT).answering_pods(5) == {"web"}
    Target(cluster, client, pod.addresses[family], PORT).wait_until_rejected()


def test_service_that_becomes_external_name_loses_its_cluster_ip(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    target = target_of_new_service(cluster, family, cluster.nodes[-1].name)
    target.wait_for_pods([pod])
    name = {"type": "ExternalName", "externalName": "example.com"}
    cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": name})
    target.wait_until_unanswered()
    cluster.apply(service("other", family, selector=labels("web")))
    Target(cluster, target.client, cluster_ip(cluster.get("Service", "other"))).wait_for_pods([pod])
