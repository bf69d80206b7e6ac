"""What every cluster needs of its proxy first: its own DNS, and its API server, at their ClusterIPs."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster, IpFamily
from tests.e2e.manifests import labels, service, url
from tests.e2e.needs import needs
from tests.e2e.waiting import until
from tests.e2e.way import cluster_ip

pytestmark = needs("DNS")


def test_pods_of_every_node_are_told_names_over_udp_and_tcp(cluster: Cluster, family: IpFamily) -> None:
    made = cluster.apply(service("web", family))
    name = f"web.{made['metadata']['namespace']}.svc"
    for number, node in enumerate(cluster.nodes):
        client = cluster.pod(f"client-{number}", node.name)
        until(lambda: cluster.resolve(client, name, family) == [cluster_ip(made)], f"{name} is known")  # noqa: B023
        for protocol in ("UDP", "TCP"):
            told = [cluster.resolve(client, name, family, protocol) for _ in range(10)]
            assert told == [[cluster_ip(made)]] * 10


def test_a_headless_services_name_leads_to_its_pods(cluster: Cluster, family: IpFamily) -> None:
    pods = cluster.pods("web", cluster.nodes[0].name, labels("web"), 2)
    made = cluster.apply(service("web", family, clusterIP="None"))
    name = f"web.{made['metadata']['namespace']}.svc"
    client = cluster.pod("client", cluster.nodes[-1].name)
    wanted = {pod.addresses[family] for pod in pods}
    until(lambda: set(cluster.resolve(client, name, family)) == wanted, f"{name} leads to {wanted}")


def test_pods_of_every_node_reach_the_api_server_at_its_cluster_ip(cluster: Cluster) -> None:
    for number, node in enumerate(cluster.nodes):
        client = cluster.pod(f"client-{number}", node.name)
        address = _kubernetes(cluster, number)
        answers = [cluster.get_from_pod(client, url(address, 443, "/version", "https"))[0] for _ in range(10)]
        # Without a token it may tell its version or not; either way it is the API server.
        assert set(answers) <= {200, 401, 403}
        assert len(answers) == 10


def _kubernetes(cluster: Cluster, number: int) -> str:
    """Return the address of `kubernetes.default`, which is of the cluster's default family alone."""
    client = cluster.pod(f"resolver-{number}", cluster.nodes[number].name)
    found = cluster.resolve(client, "kubernetes.default.svc", cluster.families[0])
    if not found:
        pytest.fail("the cluster's DNS does not know kubernetes.default.svc")
    return found[0]
