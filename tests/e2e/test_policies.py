"""Which of several endpoints a client gets: internalTrafficPolicy, trafficDistribution, hints."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster, IpFamily, Pod
from tests.e2e.manifests import endpoint, endpoint_slice, labels, service
from tests.e2e.needs import needs
from tests.e2e.way import Way, cluster_ip, node_of

pytestmark = needs("two nodes")


def pods_on_two_nodes(cluster: Cluster) -> list[Pod]:
    """One pod on each of the first two nodes, labeled `app: web`."""
    return [cluster.pod(f"web-on-{i}", cluster.nodes[i].name, labels("web")) for i in range(2)]


def clients_on_two_nodes(cluster: Cluster) -> list[Pod]:
    """One client beside each of them."""
    return [cluster.pod(f"client-on-{i}", cluster.nodes[i].name) for i in range(2)]


def test_under_internal_policy_local_pods_reach_endpoints_of_their_own_node_alone(
    cluster: Cluster, family: IpFamily
) -> None:
    pods, clients = pods_on_two_nodes(cluster), clients_on_two_nodes(cluster)
    address = cluster_ip(cluster.apply(service("web", family, internalTrafficPolicy="Local")))
    for pod, client in zip(pods, clients, strict=True):
        way = Way(cluster, client, address)
        way.settle_on([pod])
        assert way.pods(20) == {pod.name}
    cluster.delete_pod(pods[0], grace=1)
    Way(cluster, clients[0], address).unanswered()
    assert Way(cluster, clients[1], address).pods(20) == {pods[1].name}


def test_hints_for_nodes_send_each_node_to_its_own_endpoints(cluster: Cluster, family: IpFamily) -> None:
    """By hand, so that no controller's opinion of the nodes' load counts."""
    pods, clients = pods_on_two_nodes(cluster), clients_on_two_nodes(cluster)
    address = cluster_ip(cluster.apply(service("by-hand", family, selector=None)))
    hinted = [endpoint(pod.addresses[family], pod.node, hints={"forNodes": [{"name": pod.node}]}) for pod in pods]
    kept = cluster.apply(endpoint_slice("by-hand", family, hinted))
    if not kept["endpoints"][0].get("hints", {}).get("forNodes"):
        pytest.skip("the API server does not keep hints for nodes (PreferSameNode of trafficDistribution)")
    for pod, client in zip(pods, clients, strict=True):
        way = Way(cluster, client, address)
        way.settle_on([pod])
        assert way.pods(20) == {pod.name}
    # One endpoint without the hint, and none of them counts.
    cluster.apply(endpoint_slice("by-hand", family, [hinted[0], endpoint(pods[1].addresses[family], pods[1].node)]))
    for client in clients:
        Way(cluster, client, address).settle_on(pods)


def test_traffic_distribution_prefers_endpoints_of_the_clients_zone(cluster: Cluster, family: IpFamily) -> None:
    """In nodes without zones, or all of one zone, that is every endpoint."""
    pods, clients = pods_on_two_nodes(cluster), clients_on_two_nodes(cluster)
    made = cluster.apply(service("web", family, trafficDistribution="PreferClose"))
    if made["spec"].get("trafficDistribution") != "PreferClose":
        pytest.skip("the API server does not keep trafficDistribution")
    zones = {pod.name: node_of(pod, cluster).zone for pod in (*pods, *clients)}
    for client in clients:
        near = [pod for pod in pods if zones[pod.name] == zones[client.name]]
        way = Way(cluster, client, cluster_ip(made))
        way.settle_on(near if all(zones.values()) else pods)
