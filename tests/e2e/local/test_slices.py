"""The emulated EndpointSlice controller follows the rules that Kubernetes documents."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import Object
from tests.e2e.local.slices import PodState, slices_of

ZONES = {"node-1": "zone-a", "node-2": "zone-b"}
READY = PodState("ready", "node-1", {"app": "web", "tier": "front"}, {"IPv4": "10.244.0.1", "IPv6": "fd00::1"})
UNREADY = PodState("unready", "node-1", {"app": "web"}, {"IPv4": "10.244.0.2", "IPv6": "fd00::2"}, ready=False)
TERMINATING = PodState(
    "terminating", "node-2", {"app": "web"}, {"IPv4": "10.244.0.3", "IPv6": "fd00::3"}, terminating=True
)
TERMINATING_UNREADY = PodState(
    "terminating-unready", "node-2", {"app": "web"}, {"IPv4": "10.244.0.4"}, ready=False, terminating=True
)
OTHER = PodState("other", "node-2", {"app": "other"}, {"IPv4": "10.244.0.5", "IPv6": "fd00::5"})
PODS = (READY, UNREADY, TERMINATING, TERMINATING_UNREADY, OTHER)
MAIN = {"name": "main", "protocol": "TCP", "port": 80, "targetPort": 8080}


def service(**spec: Any) -> Object:
    own = {"type": "ClusterIP", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "selector": {"app": "web"}}
    metadata = {"name": "web", "namespace": "demo", "uid": "1"}
    return {"metadata": metadata, "spec": own | {"ports": [MAIN]} | spec}


def slices(*pods: PodState, **spec: Any) -> list[Object]:
    return slices_of(service(**spec), pods, ZONES)


def conditions(*pods: PodState, **spec: Any) -> dict[str, tuple[bool, bool, bool]]:
    """Return ready, serving and terminating of each endpoint."""
    (found,) = slices(*pods, **spec)
    return {each["targetRef"]["name"]: tuple(each["conditions"].values()) for each in found["endpoints"]}


def test_complete_slice() -> None:
    owner = {"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "1"}
    assert slices(READY, OTHER) == [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "web-ipv4",
                "namespace": "demo",
                "labels": {
                    "kubernetes.io/service-name": "web",
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
                "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
            },
            "addressType": "IPv4",
            "endpoints": [
                {
                    "addresses": ["10.244.0.1"],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "targetRef": {"kind": "Pod", "name": "ready"},
                    "nodeName": "node-1",
                    "zone": "zone-a",
                }
            ],
            "ports": [{"name": "main", "protocol": "TCP", "port": 8080}],
        }
    ]


def test_terminating_pod_is_never_ready_but_may_be_serving() -> None:
    assert conditions(*PODS) == {
        "ready": (True, True, False),
        "unready": (False, False, False),
        "terminating": (False, True, True),
        "terminating-unready": (False, False, True),
    }


def test_publish_not_ready_addresses_makes_every_endpoint_ready() -> None:
    assert conditions(*PODS, publishNotReadyAddresses=True) == {
        "ready": (True, True, False),
        "unready": (True, False, False),
        "terminating": (True, True, True),
        "terminating-unready": (True, False, True),
    }


def test_one_slice_per_family_with_the_pods_of_that_family() -> None:
    four, six = slices(TERMINATING, TERMINATING_UNREADY, ipFamilies=["IPv4", "IPv6"])
    assert [each["addresses"] for each in four["endpoints"]] == [["10.244.0.3"], ["10.244.0.4"]]
    assert [each["addresses"] for each in six["endpoints"]] == [["fd00::3"]]
    assert (four["addressType"], six["addressType"]) == ("IPv4", "IPv6")
    assert four["metadata"]["name"] != six["metadata"]["name"]


def test_selector_requires_all_labels() -> None:
    (found,) = slices(*PODS, selector={"app": "web", "tier": "front"})
    assert [each["targetRef"]["name"] for each in found["endpoints"]] == ["ready"]


@pytest.mark.parametrize("spec", [{"selector": {}}, {"type": "ExternalName"}])
def test_no_slices_without_selector_or_for_external_name(spec: Object) -> None:
    assert slices(*PODS, **spec) == []


def test_slices_of_headless_services_are_labeled() -> None:
    (found,) = slices(READY, clusterIP="None")
    assert found["metadata"]["labels"]["service.kubernetes.io/headless"] == ""
    assert len(found["endpoints"]) == 1


def test_named_target_port_matches_name_and_protocol() -> None:
    ports = [
        {"name": "a", "protocol": "TCP", "port": 80, "targetPort": "http"},
        {"name": "b", "protocol": "UDP", "port": 80, "targetPort": "udp"},
        {"name": "c", "protocol": "UDP", "port": 81, "targetPort": "http"},
        {"name": "d", "protocol": "TCP", "port": 82, "targetPort": 9},
    ]
    (found,) = slices(READY, ports=ports)
    assert [(each["name"], each["protocol"], each["port"]) for each in found["ports"]] == [
        ("a", "TCP", 8080),
        ("b", "UDP", 8081),
        ("d", "TCP", 9),
    ]


@pytest.mark.parametrize("distribution", ["PreferClose", "PreferSameZone"])
def test_ready_endpoints_get_zone_hints(distribution: str) -> None:
    (found,) = slices(READY, UNREADY, trafficDistribution=distribution)
    assert [each.get("hints") for each in found["endpoints"]] == [{"forZones": [{"name": "zone-a"}]}, None]


def test_prefer_same_node_adds_node_and_zone_hints() -> None:
    (found,) = slices(READY, trafficDistribution="PreferSameNode")
    assert found["endpoints"][0]["hints"] == {"forZones": [{"name": "zone-a"}], "forNodes": [{"name": "node-1"}]}
