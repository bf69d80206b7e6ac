"""ClusterIPs: who reaches them from where, whose address the pods see, and what follows when things change."""

from __future__ import annotations

from tests.e2e.cluster import HTTP_PORT, Cluster, IpFamily, Pod
from tests.e2e.manifests import PORT, endpoint, endpoint_slice, labels, service
from tests.e2e.needs import needs
from tests.e2e.way import Way, cluster_ip


def three_pods(cluster: Cluster) -> list[Pod]:
    """Pods labeled `app: web`: two on the first node, one on the last."""
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    return [*cluster.pods("web", first, labels("web"), 2), cluster.pod("far", last, labels("web"))]


def way_to(cluster: Cluster, family: IpFamily, node: str, *, host_network: bool = False) -> Way:
    """A way from a client on a node to the ClusterIP of a new Service `web`."""
    address = cluster_ip(cluster.apply(service("web", family)))
    return Way(cluster, cluster.pod("client", node, host_network=host_network), address)


def test_a_pod_reaches_all_pods_of_a_service_and_they_see_its_address(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    way = way_to(cluster, family, cluster.nodes[0].name)
    way.settle_on(pods)
    answers = way.answers(60)
    assert {answer.pod for answer in answers} == {pod.name for pod in pods}
    assert way.client is not None
    assert {answer.client for answer in answers} == {way.client.addresses[family]}


@needs("two nodes")
def test_a_pod_reaches_pods_that_are_all_on_another_node(cluster: Cluster, family: IpFamily) -> None:
    pods = cluster.pods("web", cluster.nodes[1].name, labels("web"), 2)
    way = way_to(cluster, family, cluster.nodes[0].name)
    way.settle_on(pods)
    assert way.client is not None
    assert {answer.client for answer in way.answers(20)} == {way.client.addresses[family]}


def test_the_network_of_each_node_reaches_all_pods(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    address = cluster_ip(cluster.apply(service("web", family)))
    for number, node in enumerate(cluster.nodes):
        way = Way(cluster, cluster.pod(f"on-node-{number}", node.name, host_network=True), address)
        way.settle_on(pods)
        assert way.pods() == {pod.name for pod in pods}


def test_a_pod_reaches_itself_through_its_service(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    address = cluster_ip(cluster.apply(service("web", family)))
    way = Way(cluster, pod, address)
    way.settle_on([pod])
    assert way.pods(20) == {"web"}


def test_no_endpoints_refuse_until_there_is_one_and_again_after_it(cluster: Cluster, family: IpFamily) -> None:
    way = way_to(cluster, family, cluster.nodes[0].name)
    way.refused()
    pod = cluster.pod("web", cluster.nodes[-1].name, labels("web"))
    way.settle_on([pod])
    assert way.pods(20) == {"web"}
    cluster.delete_pod(pod, grace=1)
    way.refused()


def test_an_unready_pod_gets_no_requests(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    way = way_to(cluster, family, cluster.nodes[0].name)
    way.settle_on(pods)
    cluster.make_unready(pods[0])
    way.settle_on(pods[1:])
    assert way.pods() == {pod.name for pod in pods[1:]}


def test_pods_that_are_not_ready_get_requests_where_the_service_publishes_them(
    cluster: Cluster, family: IpFamily
) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    client = cluster.pod("client", cluster.nodes[-1].name)
    published = cluster.apply(service("web", family, publishNotReadyAddresses=True))
    usual = cluster.apply(service("usual", family, selector=labels("web")))
    way, usual_way = (Way(cluster, client, cluster_ip(each)) for each in (published, usual))
    for each in (way, usual_way):
        each.settle_on([pod])
    cluster.make_unready(pod)
    usual_way.refused()
    assert way.pods(20) == {"web"}


def test_a_deleted_service_answers_no_more(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    way = way_to(cluster, family, cluster.nodes[-1].name)
    way.settle_on([pod])
    cluster.delete("Service", "web")
    way.unanswered()


def test_another_selector_leads_to_other_pods(cluster: Cluster, family: IpFamily) -> None:
    blue = cluster.pod("blue", cluster.nodes[0].name, labels("blue"))
    green = cluster.pod("green", cluster.nodes[-1].name, labels("green"))
    way = way_to(cluster, family, cluster.nodes[0].name)
    for pod in (blue, green, blue):
        cluster.apply(service("web", family, selector=labels(pod.name)))
        way.settle_on([pod])
        assert way.pods(20) == {pod.name}


def test_each_port_leads_to_its_own_target_by_number_or_name(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    ports = [
        {"name": "number", "protocol": "TCP", "port": 80, "targetPort": HTTP_PORT},
        {"name": "name", "protocol": "TCP", "port": 81, "targetPort": "http"},
        {"name": "datagrams", "protocol": "UDP", "port": 82, "targetPort": "udp"},
        {"name": "nowhere", "protocol": "TCP", "port": 83, "targetPort": 9},
    ]
    address = cluster_ip(cluster.apply(service("web", family, ports=ports)))
    client = cluster.pod("client", cluster.nodes[-1].name)
    for port, protocol in ((80, "TCP"), (81, "TCP"), (82, "UDP")):
        way = Way(cluster, client, address, port, protocol)
        way.settle_on([pod])
        assert way.pods(10) == {"web"}
    Way(cluster, client, address, 83).refused()


def test_a_slice_by_hand_leads_to_what_it_names(cluster: Cluster, family: IpFamily) -> None:
    """A Service without a selector: nobody but the test writes its slice."""
    pods = three_pods(cluster)
    way = way_to(cluster, family, cluster.nodes[0].name)
    address = cluster_ip(cluster.apply(service("by-hand", family, selector=None)))
    way = Way(cluster, way.client, address)
    way.refused()
    for chosen in (pods[:2], pods[1:]):
        endpoints = [endpoint(pod.addresses[family], pod.node) for pod in chosen]
        cluster.apply(endpoint_slice("by-hand", family, endpoints))
        way.settle_on(chosen)
        assert way.pods() == {pod.name for pod in chosen}
    cluster.delete("EndpointSlice", "by-hand-by-hand")
    way.refused()


def test_a_headless_service_adds_nothing_to_its_pods(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    headless = cluster.apply(service("web", family, clusterIP="None"))
    assert cluster_ip(headless) == "None"
    # Another Service of the same pod, so that it is known when the proxies have heard of both.
    other = cluster.apply(service("other", family, selector=labels("web")))
    client = cluster.pod("client", cluster.nodes[-1].name)
    Way(cluster, client, cluster_ip(other)).settle_on([pod])
    assert Way(cluster, client, pod.addresses[family], HTTP_PORT).pods(5) == {"web"}
    Way(cluster, client, pod.addresses[family], PORT).refused()


def test_a_service_that_becomes_an_external_name_loses_its_address(cluster: Cluster, family: IpFamily) -> None:
    pod = cluster.pod("web", cluster.nodes[0].name, labels("web"))
    way = way_to(cluster, family, cluster.nodes[-1].name)
    way.settle_on([pod])
    name = {"type": "ExternalName", "externalName": "example.com"}
    cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": name})
    way.unanswered()
    cluster.apply(service("other", family, selector=labels("web")))
    Way(cluster, way.client, cluster_ip(cluster.get("Service", "other"))).settle_on([pod])
