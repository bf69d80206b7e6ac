"""The emulated control plane: allocation for Services, load balancer routes, and failure kinds."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.e2e.cluster import Object
from tests.e2e.local.balancer import next_hops
from tests.e2e.local.requests import failure
from tests.e2e.local.services import AFFINITY_SECONDS, Allocator


def service(**spec: Any) -> Object:
    return {"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}], **spec}}


def completed(**spec: Any) -> Object:
    found: Object = Allocator().complete(service(**spec))["spec"]
    return found


def test_service_defaults() -> None:
    spec = completed()
    assert spec["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    assert (spec["type"], spec["sessionAffinity"], spec["internalTrafficPolicy"]) == ("ClusterIP", "None", "Cluster")
    assert spec["ipFamilies"] == ["IPv4"]
    assert spec["clusterIPs"] == [spec["clusterIP"]]
    assert "externalTrafficPolicy" not in spec


def test_default_session_affinity_timeout_is_three_hours() -> None:
    assert completed(sessionAffinity="ClientIP")["sessionAffinityConfig"] == {
        "clientIP": {"timeoutSeconds": AFFINITY_SECONDS}
    }


@pytest.mark.parametrize(
    ("policy", "given", "families"),
    [
        ("SingleStack", ["IPv6"], ["IPv6"]),
        ("PreferDualStack", [], ["IPv4", "IPv6"]),
        ("RequireDualStack", ["IPv6"], ["IPv6", "IPv4"]),
    ],
)
def test_one_cluster_ip_per_family(policy: str, given: list[str], families: list[str]) -> None:
    spec = completed(ipFamilyPolicy=policy, ipFamilies=given)
    assert spec["ipFamilies"] == families
    assert ["IPv6" if ":" in address else "IPv4" for address in spec["clusterIPs"]] == families


def test_headless_and_external_name_services_get_no_cluster_ip() -> None:
    assert completed(clusterIP="None")["clusterIPs"] == ["None"]
    assert "clusterIP" not in completed(type="ExternalName", externalName="elsewhere.example")


def test_node_ports_and_health_check_node_port() -> None:
    assert "healthCheckNodePort" not in completed(type="NodePort", externalTrafficPolicy="Local")
    spec = completed(type="LoadBalancer", externalTrafficPolicy="Local")
    assert len({spec["ports"][0]["nodePort"], spec["healthCheckNodePort"]}) == 2
    assert "nodePort" not in completed(type="LoadBalancer", allocateLoadBalancerNodePorts=False)["ports"][0]


def test_update_keeps_allocations_and_other_services_get_their_own() -> None:
    allocator = Allocator()
    load_balancer = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    first = allocator.complete(service(**load_balancer))
    first["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.8"}]}}
    assert allocator.complete(service(**load_balancer), first) == first

    dual = allocator.complete(service(ipFamilyPolicy="PreferDualStack"), first)
    assert dual["spec"]["clusterIP"] == first["spec"]["clusterIP"]
    assert dual["status"] == {"loadBalancer": {}}
    assert "nodePort" not in dual["spec"]["ports"][0]

    other = allocator.complete(service(**load_balancer))["spec"]
    assert other["clusterIP"] != first["spec"]["clusterIP"]
    assert other["ports"][0]["nodePort"] != first["spec"]["ports"][0]["nodePort"]


@pytest.mark.parametrize(
    ("policy", "ready", "node"),
    [
        ("Cluster", "node-1", "node-2"),
        ("Local", "node-1", "node-1"),
        ("Local", "node-2", "node-2"),
        ("Local", "", "node-2"),
    ],
)
def test_external_addresses_are_routed_to_a_node_that_accepts_them(policy: str, ready: str, node: str) -> None:
    load_balancer = service(externalTrafficPolicy=policy, externalIPs=["203.0.113.9"])
    ingress = [{"ip": "203.0.113.7", "ipMode": "Proxy"}, {"ip": "203.0.113.8"}]
    load_balancer["status"] = {"loadBalancer": {"ingress": ingress}}
    endpoints = [{"conditions": {"ready": name == ready}, "nodeName": name} for name in ("node-1", "node-2")]
    slices = [{"metadata": {"labels": {"kubernetes.io/service-name": "web"}}, "endpoints": endpoints}]
    assert next_hops([load_balancer], slices, ["node-1", "node-2"]) == {"203.0.113.8": node, "203.0.113.9": node}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ECONNREFUSED, ""), "refused"),
        (OSError(errno.ECONNRESET, ""), "refused"),
        (OSError(errno.EPERM, ""), "refused"),
        (TimeoutError(), "no answer"),
        (OSError(errno.EHOSTUNREACH, ""), "other"),
        (ValueError("garbage"), "other"),
    ],
)
def test_failure_kind_of_each_error(error: Exception, kind: str) -> None:
    assert failure(error).kind == kind
