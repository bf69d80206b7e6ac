"""The ClusterIPs that every cluster depends on: DNS and the API server."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster, IpFamily
from tests.e2e.manifests import labels, service, url
from tests.e2e.needs import needs
from tests.e2e.target import cluster_ip
from tests.e2e.waiting import until

pytestmark = needs("DNS")


def test_pods_on_every_node_resolve_names_over_udp_and_tcp(cluster: Cluster, family: IpFamily) -> None:
    made = cluster.apply(service("web", family))
    name = f"web.{made['metadata']['namespace']}.svc"
    for number, node in enumerate(cluster.nodes):
        client = cluster.pod(f"client-{number}", node.name)
        # `until` returns before `client` changes.
        until(lambda: cluster.resolve(client, name, family) == [cluster_ip(made)], f"{name} resolves")  # noqa: B023
        for protocol in ("UDP", "TCP"):
            resolved = [cluster.resolve(client, name, family, protocol) for _ in range(10)]
            assert resolved == [[cluster_ip(made)]] * 10


def test_headless_service_name_resolves_to_its_pods(cluster: Cluster, family: IpFamily) -> None:
    pods = cluster.pods("web", cluster.nodes[0].name, labels("web"), 2)
    made = cluster.apply(service("web", family, clusterIP="None"))
    name = f"web.{made['metadata']['namespace']}.svc"
    client = cluster.pod("client", cluster.nodes[-1].name)
    expected = {pod.addresses[family] for pod in pods}
    until(lambda: set(cluster.resolve(client, name, family)) == expected, f"{name} resolves to {expected}")


def test_pods_on_every_node_reach_the_api_server_by_cluster_ip(cluster: Cluster) -> None:
    for number, node in enumerate(cluster.nodes):
        client = cluster.pod(f"client-{number}", node.name)
        address = _kubernetes(cluster, number)
        answers = [cluster.get_from_pod(client, url(address, 443, "/version", "https"))[0] for _ in range(10)]
        # Without a token, any of these statuses is an answer of the API server.
        assert set(answers) <= {200, 401, 403}
        assert len(answers) == 10


def _kubernetes(cluster: Cluster, number: int) -> str:
    """Return the ClusterIP of `kubernetes.default`, which has the cluster's default family only."""
    client = cluster.pod(f"resolver-{number}", cluster.nodes[number].name)
    found = cluster.resolve(client, "kubernetes.default.svc", cluster.families[0])
    if not found:
        pytest.fail("the cluster's DNS does not resolve kubernetes.default.svc")
    return found[0]
