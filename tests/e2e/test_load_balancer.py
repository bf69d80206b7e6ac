"""Addresses that are nobody's node: those of load balancers, and external IPs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import Cluster, IpFamily, Object
from tests.e2e.manifests import NOBODYS_CLASS, labels, service
from tests.e2e.needs import needs
from tests.e2e.way import Way

VIPS: dict[IpFamily, str] = {"IPv4": "203.0.113.80", "IPv6": "2001:db8:113::80"}
"""Addresses for documentation (RFC 5737, RFC 3849), which lead nowhere but where kproxy sends them."""

EXTERNAL: dict[IpFamily, str] = {"IPv4": "203.0.113.81", "IPv6": "2001:db8:113::81"}


def load_balancer(family: IpFamily, **spec: Any) -> Object:
    """A Service `web` of type LoadBalancer that waits for the test to give it an address."""
    return service("web", family, type="LoadBalancer", loadBalancerClass=NOBODYS_CLASS, **spec)


@needs("load balancer address")
def test_pods_reach_a_load_balancers_address_without_leaving_the_cluster(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    cluster.apply(load_balancer(family))
    clients = [cluster.pod(f"client-{number}", node.name) for number, node in enumerate(cluster.nodes)]
    cluster.give_address("web", VIPS[family])
    for client in clients:
        way = Way(cluster, client, VIPS[family])
        way.settle_on(pods)
        assert way.pods(20) == {"web"}


@needs("load balancer address")
def test_an_address_of_mode_proxy_is_left_to_the_load_balancer(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    cluster.apply(load_balancer(family))
    way = Way(cluster, cluster.pod("client", cluster.nodes[-1].name), VIPS[family])
    cluster.give_address("web", VIPS[family])
    way.settle_on(pods)
    cluster.give_address("web", VIPS[family], "Proxy")
    (ingress,) = cluster.get("Service", "web")["status"]["loadBalancer"]["ingress"]
    if ingress.get("ipMode") != "Proxy":
        pytest.skip("the API server does not keep ipMode")
    way.unanswered()


@needs("load balancer address")
def test_only_the_source_ranges_reach_a_load_balancers_address(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    allowed, denied = (cluster.pod(name, cluster.nodes[-1].name) for name in ("allowed", "denied"))
    bits = 32 if family == "IPv4" else 128
    made = cluster.apply(load_balancer(family, loadBalancerSourceRanges=[f"{allowed.addresses[family]}/{bits}"]))
    cluster.give_address("web", VIPS[family])
    Way(cluster, allowed, VIPS[family]).settle_on(pods)
    (outcome,) = Way(cluster, denied, VIPS[family]).ask()
    assert getattr(outcome, "kind", outcome) == "no answer"
    # The ranges are for that address alone.
    assert Way(cluster, denied, made["spec"]["clusterIP"]).pods(20) == {"web"}
    cluster.apply(load_balancer(family, loadBalancerSourceRanges=[f"{denied.addresses[family]}/{bits}"]))
    Way(cluster, denied, VIPS[family]).settle_on(pods)
    Way(cluster, allowed, VIPS[family]).unanswered()


def test_pods_reach_an_external_ip(cluster: Cluster, family: IpFamily) -> None:
    pods = [cluster.pod("web", cluster.nodes[0].name, labels("web"))]
    cluster.apply(service("web", family, externalIPs=[EXTERNAL[family]]))
    way = Way(cluster, cluster.pod("client", cluster.nodes[-1].name), EXTERNAL[family])
    way.settle_on(pods)
    assert way.pods(20) == {"web"}
    cluster.apply(service("web", family))
    way.unanswered()
