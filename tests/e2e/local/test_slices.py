"""The slices that the stand-in of the EndpointSlice controller makes, against the rules that Kubernetes documents."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import Object
from tests.e2e.local.slices import PodState, slices_of

ZONES = {"node-1": "zone-a", "node-2": "zone-b"}
READY = PodState("ready", "node-1", {"app": "web", "tier": "front"}, {"IPv4": "10.244.0.1", "IPv6": "fd00::1"})
UNREADY = PodState("unready", "node-1", {"app": "web"}, {"IPv4": "10.244.0.2", "IPv6": "fd00::2"}, ready=False)
LEAVING = PodState("leaving", "node-2", {"app": "web"}, {"IPv4": "10.244.0.3", "IPv6": "fd00::3"}, terminating=True)
ENDING = PodState("ending", "node-2", {"app": "web"}, {"IPv4": "10.244.0.4"}, ready=False, terminating=True)
OTHER = PodState("other", "node-2", {"app": "other"}, {"IPv4": "10.244.0.5", "IPv6": "fd00::5"})
PODS = (READY, UNREADY, LEAVING, ENDING, OTHER)
MAIN = {"name": "main", "protocol": "TCP", "port": 80, "targetPort": 8080}


def service(**spec: Any) -> Object:
    own = {"type": "ClusterIP", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "selector": {"app": "web"}}
    metadata = {"name": "web", "namespace": "demo", "uid": "1"}
    return {"metadata": metadata, "spec": own | {"ports": [MAIN]} | spec}


def made(*pods: PodState, **spec: Any) -> list[Object]:
    return slices_of(service(**spec), pods, ZONES)


def conditions(*pods: PodState, **spec: Any) -> dict[str, tuple[bool, bool, bool]]:
    """Ready, serving and terminating of each endpoint."""
    (found,) = made(*pods, **spec)
    return {each["targetRef"]["name"]: tuple(each["conditions"].values()) for each in found["endpoints"]}


def test_a_whole_slice() -> None:
    owner = {"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "1"}
    assert made(READY, OTHER) == [
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


def test_a_pod_that_is_terminating_is_never_ready_but_may_serve() -> None:
    assert conditions(*PODS) == {
        "ready": (True, True, False),
        "unready": (False, False, False),
        "leaving": (False, True, True),
        "ending": (False, False, True),
    }


def test_published_addresses_are_ready_whatever_becomes_of_the_pod() -> None:
    assert conditions(*PODS, publishNotReadyAddresses=True) == {
        "ready": (True, True, False),
        "unready": (True, False, False),
        "leaving": (True, True, True),
        "ending": (True, False, True),
    }


def test_a_slice_for_each_family_with_the_pods_that_have_it() -> None:
    four, six = made(LEAVING, ENDING, ipFamilies=["IPv4", "IPv6"])
    assert [each["addresses"] for each in four["endpoints"]] == [["10.244.0.3"], ["10.244.0.4"]]
    assert [each["addresses"] for each in six["endpoints"]] == [["fd00::3"]]
    assert (four["addressType"], six["addressType"]) == ("IPv4", "IPv6")
    assert four["metadata"]["name"] != six["metadata"]["name"]


def test_a_selector_wants_all_of_its_labels() -> None:
    (found,) = made(*PODS, selector={"app": "web", "tier": "front"})
    assert [each["targetRef"]["name"] for each in found["endpoints"]] == ["ready"]


@pytest.mark.parametrize("spec", [{"selector": {}}, {"type": "ExternalName"}])
def test_slices_of_others_are_not_made(spec: Object) -> None:
    assert made(*PODS, **spec) == []


def test_a_headless_service_has_slices_that_say_so() -> None:
    (found,) = made(READY, clusterIP="None")
    assert found["metadata"]["labels"]["service.kubernetes.io/headless"] == ""
    assert len(found["endpoints"]) == 1


def test_a_target_by_name_is_the_port_of_that_name_and_protocol() -> None:
    ports = [
        {"name": "a", "protocol": "TCP", "port": 80, "targetPort": "http"},
        {"name": "b", "protocol": "UDP", "port": 80, "targetPort": "udp"},
        {"name": "c", "protocol": "UDP", "port": 81, "targetPort": "http"},
        {"name": "d", "protocol": "TCP", "port": 82, "targetPort": 9},
    ]
    (found,) = made(READY, ports=ports)
    assert [(each["name"], each["protocol"], each["port"]) for each in found["ports"]] == [
        ("a", "TCP", 8080),
        ("b", "UDP", 8081),
        ("d", "TCP", 9),
    ]


@pytest.mark.parametrize("distribution", ["PreferClose", "PreferSameZone"])
def test_hints_for_the_zone_are_given_to_ready_endpoints(distribution: str) -> None:
    (found,) = made(READY, UNREADY, trafficDistribution=distribution)
    assert [each.get("hints") for each in found["endpoints"]] == [{"forZones": [{"name": "zone-a"}]}, None]


def test_hints_for_the_node_come_with_those_for_the_zone() -> None:
    (found,) = made(READY, trafficDistribution="PreferSameNode")
    assert found["endpoints"][0]["hints"] == {"forZones": [{"name": "zone-a"}], "forNodes": [{"name": "node-1"}]}
