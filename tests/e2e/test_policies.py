"""The choice of endpoints: internalTrafficPolicy, trafficDistribution, hints."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster, IpFamily, Pod
from tests.e2e.manifests import endpoint, endpoint_slice, labels, service
from tests.e2e.needs import needs
from tests.e2e.target import Target, cluster_ip, node_of

pytestmark = needs("two nodes")


def pods_on_two_nodes(cluster: Cluster) -> list[Pod]:
    """One pod on each of the first two nodes, labeled `app: web`."""
    return [cluster.pod(f"web-on-{i}", cluster.nodes[i].name, labels("web")) for i in range(2)]


def clients_on_two_nodes(cluster: Cluster) -> list[Pod]:
    """One client on each of the first two nodes."""
    return [cluster.pod(f"client-on-{i}", cluster.nodes[i].name) for i in range(2)]


def test_internal_policy_local_keeps_pods_on_endpoints_of_their_node(cluster: Cluster, family: IpFamily) -> None:
    pods, clients = pods_on_two_nodes(cluster), clients_on_two_nodes(cluster)
    address = cluster_ip(cluster.apply(service("web", family, internalTrafficPolicy="Local")))
    for pod, client in zip(pods, clients, strict=True):
        target = Target(cluster, client, address)
        target.wait_for_pods([pod])
        assert target.answering_pods(20) == {pod.name}
    cluster.delete_pod(pods[0], grace=1)
    Target(cluster, clients[0], address).wait_until_unanswered()
    assert Target(cluster, clients[1], address).answering_pods(20) == {pods[1].name}


def test_node_hints_send_each_node_to_its_own_endpoints(cluster: Cluster, family: IpFamily) -> None:
    """The slice is written by the test: a controller may omit hints because of the nodes' load."""
    pods, clients = pods_on_two_nodes(cluster), clients_on_two_nodes(cluster)
    address = cluster_ip(cluster.apply(service("by-hand", family, selector=None)))
    hinted = [endpoint(pod.addresses[family], pod.node, hints={"forNodes": [{"name": pod.node}]}) for pod in pods]
    kept = cluster.apply(endpoint_slice("by-hand", family, hinted))
    if not kept["endpoints"][0].get("hints", {}).get("forNodes"):
        pytest.skip("the API server drops node hints (trafficDistribution: PreferSameNode)")
    for pod, client in zip(pods, clients, strict=True):
        target = Target(cluster, client, address)
        target.wait_for_pods([pod])
        assert target.answering_pods(20) == {pod.name}
    # Without a hint on every endpoint, all hints are ignored.
    cluster.apply(endpoint_slice("by-hand", family, [hinted[0], endpoint(pods[1].addresses[family], pods[1].node)]))
    for client in clients:
        Target(cluster, client, address).wait_for_pods(pods)


def test_traffic_distribution_prefers_endpoints_in_the_zone_of_the_client(cluster: Cluster, family: IpFamily) -> None:
    """If nodes have no zones or all the same zone, every endpoint is used."""
    pods, clients = pods_on_two_nodes(cluster), clients_on_two_nodes(cluster)
    made = cluster.apply(service("web", family, trafficDistribution="PreferClose"))
    if made["spec"].get("trafficDistribution") != "PreferClose":
        pytest.skip("the API server drops trafficDistribution")
    zones = {pod.name: node_of(pod, cluster).zone for pod in (*pods, *clients)}
    for client in clients:
        near = [pod for pod in pods if zones[pod.name] == zones[client.name]]
        target = Target(cluster, client, cluster_ip(made))
        target.wait_for_pods(near if all(zones.values()) else pods)
