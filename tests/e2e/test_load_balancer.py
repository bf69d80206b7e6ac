"""Load balancer IPs and external IPs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import Cluster, IpFamily, Object
from tests.e2e.manifests import UNSERVED_CLASS, labels, service
from tests.e2e.needs import needs
from tests.e2e.target import Target

VIPS: dict[IpFamily, str] = {"IPv4": "203.0.113.80", "IPv6": "2001:db8:113::80"}
"""Documentation addresses (RFC 5737, RFC 3849): no host has them, only kproxy handles them."""

EXTERNAL_IPS: dict[IpFamily, str] = {"IPv4": "203.0.113.81", "IPv6": "2001:db8:113::81"}


def load_load_balancer(family: IpFamily, **spec: Any) -> Object:
    """A Service `web` of type LoadBalancer whose address the test sets."""
    return service("web", family, type="LoadBalancer", loadBalancerClass=UNSERVED_CLASS, **spec)


@needs("load balancer address")
def test_pods_reach_a_load_balancer_ip_inside_the_cluster(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    cluster.apply(load_load_balancer(family))
    clients = [cluster.pod(f"client-{number}", node.name) for number, node in enumerate(cluster.nodes)]
    cluster.set_load_balancer_ip("web", VIPS[family])
    for client in clients:
        target = Target(cluster, client, VIPS[family])
        target.wait_for_pods(pods)
        assert target.answering_pods(20) == {"web"}


@needs("load balancer address")
def test_ip_mode_proxy_leaves_the_address_to_the_load_balancer(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    cluster.apply(load_load_balancer(family))
    target = Target(cluster, cluster.pod("client", cluster.nodes[-1].name), VIPS[family])
    cluster.set_load_balancer_ip("web", VIPS[family])
    target.wait_for_pods(pods)
    cluster.set_load_balancer_ip("web", VIPS[family], "Proxy")
    (ingress,) = cluster.get("Service", "web")["status"]["loadBalancer"]["ingress"]
    if ingress.get("ipMode") != "Proxy":
        pytest.skip("the API server drops ipMode")
    target.wait_until_unanswered()


@needs("load balancer address")
def test_only_source_ranges_reach_a_load_balancer_ip(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    allowed, denied = (cluster.pod(name, cluster.nodes[-1].name) for name in ("allowed", "denied"))
    bits = 32 if family == "IPv4" else 128
    made = cluster.apply(load_load_balancer(family, loadBalancerSourceRanges=[f"{allowed.addresses[family]}/{bits}"]))
    cluster.set_load_balancer_ip("web", VIPS[family])
    Target(cluster, allowed, VIPS[family]).wait_for_pods(pods)
    (outcome,) = Target(cluster, denied, VIPS[family]).request()
    assert getattr(outcome, "kind", outcome) == "no answer"
    # The source ranges apply to the load balancer IP only.
    assert Target(cluster, denied, made["spec"]["clusterIP"]).answering_pods(20) == {"web"}
    cluster.apply(load_load_balancer(family, loadBalancerSourceRanges=[f"{denied.addresses[family]}/{bits}"]))
    Target(cluster, denied, VIPS[family]).wait_for_pods(pods)
    Target(cluster, allowed, VIPS[family]).wait_until_unanswered()


def test_pods_reach_an_external_ip(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    cluster.apply(service("web", family, externalIPs=[EXTERNAL_IPS[family]]))
    target = Target(cluster, cluster.pod("client", cluster.nodes[-1].name), EXTERNAL_IPS[family])
    target.wait_for_pods(pods)
    assert target.answering_pods(20) == {"web"}
    cluster.apply(service("web", family))
    target.wait_until_unanswered()
