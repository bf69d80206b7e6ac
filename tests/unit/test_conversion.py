"""Decoding of API objects: which are used or ignored, which fields are kept, and what is reported as invalid."""

from __future__ import annotations

import json
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.kube.codec.conversion import DecodedObject, IgnoredField, ignored_fields_text
from kproxy.kube.codec.json_codec import decode_object
from kproxy.kube.codec.object_error import ObjectError
from kproxy.model.addresses import canonical_address, canonical_cidr, special_range
from kproxy.model.delta import Kind
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServiceCIDR, ServicePort
from tests.recordings import items

KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node, ServiceCIDR)


def decode(kind: Kind, data: dict[str, Any]) -> DecodedObject:
    """Decode an object both from JSON text (API server) and from parsed data (YAML), with the same result."""
    from_text, from_data = outcome(kind, json.dumps(data).encode()), outcome(kind, data)
    if isinstance(from_text, ObjectError):
        assert isinstance(from_data, ObjectError)
        assert (str(from_data), from_data.field) == (str(from_text), from_text.field)
        raise from_text
    assert from_data == from_text
    return from_text


def outcome(kind: Kind, raw: Any) -> DecodedObject | ObjectError:
    try:
        return decode_object(kind, raw)
    except ObjectError as error:
        return error


def service(labels: dict[str, str] | None = None, status: Any = None, **spec: Any) -> Service | None:
    metadata = {"namespace": "ns", "name": "web", "labels": labels}
    data = {"metadata": metadata, "spec": {"clusterIP": "10.96.0.1", **spec}, "status": status}
    decoded = decode(Service, data).object
    assert decoded is None or isinstance(decoded, Service)
    return decoded


def valid_service(**spec: Any) -> Service:
    decoded = service(**spec)
    assert decoded is not None
    return decoded


def endpoint_slice(labels: dict[str, str] | None = None, **content: Any) -> EndpointSlice | None:
    metadata = {"namespace": "ns", "name": "web-1", "labels": {"kubernetes.io/service-name": "web", **(labels or {})}}
    decoded = decode(EndpointSlice, {"metadata": metadata, "addressType": "IPv4", **content}).object
    assert decoded is None or isinstance(decoded, EndpointSlice)
    return decoded


def endpoint(**content: Any) -> Endpoint:
    decoded = endpoint_slice(endpoints=[{"addresses": ["10.244.0.1"], **content}])
    assert decoded is not None
    (only,) = decoded.endpoints
    return only


def node(**content: Any) -> Node:
    decoded = decode(Node, {"metadata": {"name": "node-1"}, **content}).object
    assert isinstance(decoded, Node)
    return decoded


# Services.


def test_service_defaults() -> None:
    assert service() == Service("ns", "web", ("10.96.0.1",), ())


def test_all_service_fields() -> None:
    decoded = service(
        status={"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
        type="LoadBalancer",
        clusterIPs=["10.96.0.1", "FD00::0:1"],
        ports=[{"name": "http", "port": 80, "protocol": "UDP", "nodePort": 30080, "targetPort": "x"}, {"port": 81}],
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 60}},
        internalTrafficPolicy="Local",
        externalTrafficPolicy="Local",
        externalIPs=["192.0.2.1"],
        loadBalancerSourceRanges=["198.51.100.7/24"],
        healthCheckNodePort=32000,
    )
    assert decoded == Service(
        "ns",
        "web",
        ("10.96.0.1", "fd00::1"),
        (ServicePort("http", 80, "UDP", 30080), ServicePort("", 81, "TCP")),
        affinity_seconds=60,
        internal_local=True,
        external_local=True,
        external_ips=("192.0.2.1",),
        vips=("203.0.113.1",),
        source_ranges=("198.51.100.0/24",),
        health_check_node_port=32000,
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None"},
        {"clusterIP": ""},
        {"type": "ExternalName"},
        {"type": "ExternalName", "externalIPs": ["192.0.2.1"]},
    ],
)
def test_headless_and_external_name_services_are_ignored(spec: dict[str, Any]) -> None:
    assert service(**spec) is None


def test_service_without_a_spec_is_ignored() -> None:
    assert decode(Service, {"metadata": {"namespace": "ns", "name": "web"}}).object is None


@pytest.mark.parametrize("value", ["", "another"])
def test_service_of_another_proxy_is_ignored(value: str) -> None:
    assert service(labels={"service.kubernetes.io/service-proxy-name": value}) is None


def test_service_labeled_headless_is_used_if_it_has_a_cluster_ip() -> None:
    assert service(labels={"service.kubernetes.io/headless": ""}) is not None


def test_ignored_object_still_has_a_name_and_version() -> None:
    metadata = {"namespace": "ns", "name": "web", "resourceVersion": "7"}
    decoded = decode(Service, {"metadata": metadata, "spec": {"clusterIP": "None"}})
    assert decoded == DecodedObject("ns", "web", "7", None)


def test_ignored_objects_of_the_recording() -> None:
    def used(kind: Kind, name: str) -> set[str]:
        decoded = (decode(kind, item) for item in items("ignored-services", name))
        return {result.name for result in decoded if result.object}

    assert used(Service, "services") == {"kubernetes", "headless-label"}
    assert used(EndpointSlice, "endpointslices") == {"kubernetes", "headless-a"}


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": None}}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {}}}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}}}, 86400),
    ],
)
def test_session_affinity(spec: dict[str, Any], seconds: int) -> None:
    assert valid_service(**spec).affinity_seconds == seconds


@pytest.mark.parametrize(
    ("spec", "local", "health_check"),
    [
        ({"type": "ClusterIP"}, False, 0),
        ({"type": "ClusterIP", "externalIPs": ["192.0.2.1"]}, True, 0),
        ({"type": "NodePort"}, True, 0),
        ({"type": "LoadBalancer"}, True, 32000),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}, False, 0),
        ({"type": "LoadBalancer", "externalTrafficPolicy": None}, False, 0),
    ],
)
def test_external_policy_and_health_check_port_apply_to_their_service_types_only(
    spec: dict[str, Any], local: bool, health_check: int
) -> None:
    decoded = valid_service(**{"externalTrafficPolicy": "Local", "healthCheckNodePort": 32000, **spec})
    assert (decoded.external_local, decoded.health_check_node_port) == (local, health_check)


@pytest.mark.parametrize(
    ("policy", "local"),
    [({}, False), ({"internalTrafficPolicy": None}, False), ({"internalTrafficPolicy": "X"}, False)],
)
def test_internal_policy_defaults_to_cluster(policy: dict[str, Any], local: bool) -> None:
    assert valid_service(**policy).internal_local is local


def test_only_load_balancer_addresses_with_ip_mode_vip_are_used() -> None:
    ingress = [
        {"ip": "203.0.113.1", "ipMode": "VIP"},
        {"ip": "203.0.113.2", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"},
        {"ip": "203.0.113.3"},
        {"ip": "203.0.113.1"},
    ]
    assert valid_service(status={"loadBalancer": {"ingress": ingress}}).vips == ("203.0.113.1", "203.0.113.3")


@pytest.mark.parametrize("status", [None, {}, {"loadBalancer": None}, {"loadBalancer": {"ingress": None}}])
def test_service_without_a_load_balancer_has_no_vips(status: Any) -> None:
    assert valid_service(status=status).vips == ()


# Addresses.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("010.001.000.09", "10.1.0.9"),
        ("000.0.0.0", "0.0.0.0"),
        ("FD00:0:0:0::1", "fd00::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("::", "::"),
    ],
)
def test_canonical_addresses(text: str, expected: str) -> None:
    assert canonical_address(text) == expected


octets = st.sampled_from(["0", "00", "1", "01", "010", "255", "256", "1e1", " 1", "1 ", "0x1", "", "\u0661"])


@given(st.one_of(st.lists(octets, min_size=3, max_size=5).map(".".join), st.text("0123456789.: x", max_size=16)))
@settings(max_examples=1000)
def test_result_is_what_the_kernel_prints(text: str) -> None:
    address = canonical_address(text)
    if address is not None:
        assert str(ip_address(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0",
        "10.0.0.256",
        "10.0.0.1.2",
        "10.0.0.1/32",
        " 10.0.0.1",
        "0x0a.0.0.1",
        "fe80::1%eth0",
        "a",
        ":",
        "\0",
        "٣.1.1.1",
    ],
)
def test_invalid_addresses(text: str) -> None:
    assert canonical_address(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        (" 10.1.0.0/16\t", "10.1.0.0/16"),
        ("010.1.0.0/16", "10.1.0.0/16"),
        ("10.1.2.3/32", "10.1.2.3/32"),
        ("10.1.2.3/0", "0.0.0.0/0"),
        ("FD00::1/64", "fd00::/64"),
        ("fd00::1/128", "fd00::1/128"),
        ("fd00::1/0", "::/0"),
    ],
)
def test_canonical_cidrs(text: str, expected: str) -> None:
    assert canonical_cidr(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "/8", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/8/8", "fd00::/129", "10.0.0.0/٨"],
)
def test_invalid_cidrs(text: str) -> None:
    assert canonical_cidr(text) is None


def test_cidr_with_a_prefix_length_of_thousands_of_digits_is_invalid() -> None:
    assert canonical_cidr("10.0.0.0/" + "1" * 5000) is None


@given(st.ip_addresses())
def test_canonical_address_is_idempotent(address: Any) -> None:
    canonical = canonical_address(str(address))
    assert canonical is not None
    assert canonical_address(canonical) == canonical


SPECIAL_ADDRESSES = {
    "unspecified": ("0.0.0.0", "000.0.0.0", "::", "0::0"),
    "loopback": ("127.0.0.1", "127.255.255.255", "::1", "0:0:0:0:0:0:0:1", "127.000.0.1"),
    "link-local": ("169.254.0.0", "169.254.169.254", "fe80::1", "FEBF:ffff::1"),
    "link-local multicast": ("224.0.0.0", "224.0.0.255", "ff02::1", "ff12::1", "FFF2::1"),
}
"""Addresses that kube-apiserver's ValidateNonSpecialIP refuses."""
ORDINARY_ADDRESSES = (
    *("0.0.0.1", "126.255.255.255", "128.0.0.1", "169.253.0.1", "169.255.0.1", "224.0.1.1", "239.1.1.1", "10.0.0.1"),
    *("255.255.255.255", "::2", "::127.0.0.1", "fe8::1", "fe7f::1", "fec0::1", "ff01::1", "ff05::2", "ff0::2", "1::"),
)
"""Addresses that ValidateNonSpecialIP accepts."""


@pytest.mark.parametrize(
    ("special", "text"), [(name, text) for name in SPECIAL_ADDRESSES for text in SPECIAL_ADDRESSES[name]]
)
def test_special_endpoint_is_ignored_alone(special: str, text: str) -> None:
    family, other = ("IPv6", "fd00::2") if ":" in text else ("IPv4", "10.244.0.2")
    decoded = endpoint_slice(
        addressType=family, endpoints=[{"addresses": [text]}, {"addresses": [other]}], ports=[{"port": 80}]
    )
    assert decoded is not None
    assert [item.address for item in decoded.endpoints] == [other]
    assert decoded.invalid == 1
    assert special_range(canonical_address(text) or "") == special
    with pytest.raises(ObjectError, match=rf"^spec.externalIPs\[0\] must not be an? {special} address, but is "):
        service(externalIPs=[text])


@pytest.mark.parametrize("text", ORDINARY_ADDRESSES)
def test_address_that_the_api_server_accepts_is_used(text: str) -> None:
    decoded = endpoint_slice(addressType="IPv6" if ":" in text else "IPv4", endpoints=[{"addresses": [text]}])
    assert decoded is not None
    assert [item.address for item in decoded.endpoints] == [text]
    assert valid_service(externalIPs=[text]).external_ips == (text,)


@given(st.ip_addresses())
def test_special_ranges_are_those_of_the_ipaddress_module(address: Any) -> None:
    packed = address.packed
    scope = packed[:3] == bytes([224, 0, 0]) if address.version == 4 else packed[0] == 0xFF and packed[1] & 15 == 2
    if canonical_address(str(address)) == str(address):  # not an IPv4-mapped address
        expected = address.is_unspecified or address.is_loopback or address.is_link_local or scope
        assert bool(special_range(str(address))) == expected


def test_load_balancer_address_on_loopback_is_ignored_alone() -> None:
    ingress = [{"ip": "127.0.0.1"}, {"ip": "203.0.113.1"}, {"ip": "169.254.1.1"}]
    data = {
        "metadata": {"namespace": "ns", "name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    decoded = decode(Service, data)
    assert isinstance(decoded.object, Service)
    assert decoded.object.vips == ("203.0.113.1", "169.254.1.1")
    assert decoded.ignored_fields == (
        IgnoredField(
            ("status", "loadBalancer", "ingress", 0, "ip"), 'must not be a loopback address, but is "127.0.0.1"'
        ),
    )


# EndpointSlices.


def test_all_endpoint_slice_fields() -> None:
    decoded = endpoint_slice(
        endpoints=[
            {
                "addresses": ["10.244.0.1", "10.244.0.2"],
                "conditions": {"ready": False, "serving": False, "terminating": True},
                "nodeName": "node-1",
                "hints": {"forZones": [{"name": "zone-a"}, {"name": "zone-b"}], "forNodes": [{"name": "node-1"}]},
            }
        ],
        ports=[{"name": "http", "port": 8080, "protocol": "UDP"}, {"port": 53}],
    )
    assert decoded == EndpointSlice(
        "ns",
        "web-1",
        "ns/web",
        Family.IPV4,
        (Endpoint("10.244.0.1", "node-1", False, False, True, ("zone-a", "zone-b"), ("node-1",)),),
        (EndpointPort("http", 8080, "UDP"), EndpointPort("", 53, "TCP")),
    )


@pytest.mark.parametrize(
    "labels",
    [
        {"kubernetes.io/service-name": ""},
        {"kubernetes.io/service-name": "Web"},
        {"kubernetes.io/service-name": "web\n"},
        {"service.kubernetes.io/headless": ""},
        {"service.kubernetes.io/service-proxy-name": "another"},
    ],
)
def test_ignored_endpoint_slices(labels: dict[str, str]) -> None:
    assert endpoint_slice(labels=labels) is None


def test_endpoint_slice_without_labels_is_ignored() -> None:
    assert decode(EndpointSlice, {"metadata": {"name": "a", "namespace": "ns"}, "addressType": "IPv4"}).object is None


@pytest.mark.parametrize("kind", ["FQDN", "", "ipv4"])
def test_endpoint_slice_with_another_address_type_is_ignored(kind: str) -> None:
    assert endpoint_slice(addressType=kind) is None


def test_ipv6_endpoint_slice() -> None:
    decoded = endpoint_slice(addressType="IPv6", endpoints=[{"addresses": ["FD00::1"]}, {"addresses": ["10.0.0.1"]}])
    assert decoded is not None
    assert decoded.family is Family.IPV6
    assert [item.address for item in decoded.endpoints] == ["fd00::1"]


@pytest.mark.parametrize("addresses", [None, [], ["fd00::1"], ["example.com"], ["example.com", "10.0.0.1"]])
def test_endpoint_whose_first_address_has_another_family_is_ignored(addresses: Any) -> None:
    decoded = endpoint_slice(endpoints=[{"addresses": addresses}])
    assert decoded is not None
    assert decoded.endpoints == ()


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, (True, True, False)),
        ({}, (True, True, False)),
        ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
        ({"ready": False}, (False, True, False)),
        ({"serving": False}, (True, False, False)),
        ({"terminating": True}, (True, True, True)),
    ],
)
def test_defaults_of_endpoint_conditions(conditions: Any, expected: tuple[bool, bool, bool]) -> None:
    decoded = endpoint(conditions=conditions)
    assert (decoded.ready, decoded.serving, decoded.terminating) == expected


def test_null_endpoint_fields_count_as_unset() -> None:
    assert endpoint(nodeName=None, hints=None) == Endpoint("10.244.0.1")
    assert endpoint(hints={"forZones": None, "forNodes": None}) == Endpoint("10.244.0.1")


@pytest.mark.parametrize("port", [{}, {"port": None}, {"port": 0}])
def test_endpoint_port_without_a_number_is_skipped(port: dict[str, Any]) -> None:
    decoded = endpoint_slice(ports=[{"name": "a", **port}, {"name": None, "port": 80, "protocol": None}])
    assert decoded is not None
    assert decoded.ports == (EndpointPort("", 80, "TCP"),)


def test_unusable_endpoints_and_ports_are_reported() -> None:
    metadata = {"namespace": "ns", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}
    endpoints = [
        {"addresses": ["10.244.0.1"]},
        {"addresses": []},
        {"addresses": ["fd00::1"]},
        {"addresses": ["db.example.org", "10.244.0.2"]},
        {"addresses": ["127.0.0.1"]},
        {"addresses": ["10.244.0.3"], "nodeName": "a b"},
    ]
    ports = [
        {"name": "http", "port": 80},
        {"name": "all"},
        {"port": None},
        {"port": -1},
        {"port": 65536},
        {"port": 1, "protocol": "tcp"},
        {"port": 1, "protocol": ""},
        {"port": 1, "name": "a\nb"},
    ]
    data = {"metadata": metadata, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
    assert decode(EndpointSlice, data).ignored_fields == (
        IgnoredField(("endpoints", 1, "addresses"), "is empty"),
        IgnoredField(("endpoints", 2, "addresses", 0), 'must be an IPv4 address, not "fd00::1"'),
        IgnoredField(("endpoints", 3, "addresses", 0), 'must be an IPv4 address, not "db.example.org"'),
        IgnoredField(("endpoints", 4, "addresses", 0), 'must not be a loopback address, but is "127.0.0.1"'),
        IgnoredField(
            ("endpoints", 5, "nodeName"),
            "must be a lowercase RFC 1123 subdomain (up to 253 letters, digits, '-' and '.'), not \"a b\"",
        ),
        IgnoredField(("ports", 1, "port"), "is missing"),
        IgnoredField(("ports", 2, "port"), "is missing"),
        IgnoredField(("ports", 3, "port"), "must be from 1 to 65535, not -1"),
        IgnoredField(("ports", 4, "port"), "must be from 1 to 65535, not 65536"),
        IgnoredField(("ports", 5, "protocol"), 'must be one of TCP, UDP, SCTP, not "tcp"'),
        IgnoredField(("ports", 6, "protocol"), 'must be one of TCP, UDP, SCTP, not ""'),
        IgnoredField(
            ("ports", 7, "name"),
            "must be a lowercase RFC 1123 label (up to 63 letters, digits and '-'), not \"a\\nb\"",
        ),
    )
    decoded = decode(EndpointSlice, data).object
    assert isinstance(decoded, EndpointSlice)
    assert (len(decoded.endpoints), len(decoded.ports), decoded.invalid) == (1, 1, 12)
    assert decode(EndpointSlice, data | {"endpoints": endpoints[:1], "ports": ports[:1]}).ignored_fields == ()
    other = {"service.kubernetes.io/service-proxy-name": "another"}
    assert decode(EndpointSlice, data | {"metadata": metadata | {"labels": other}}).ignored_fields == ()


def test_ignored_fields_text_names_three_fields_and_counts_the_rest() -> None:
    ignored = [IgnoredField(("endpoints", number, "addresses"), "is empty") for number in range(5)]
    assert ignored_fields_text(ignored[:1]) == "endpoints[0].addresses is empty"
    assert ignored_fields_text(ignored) == "; ".join(
        [*(f"endpoints[{number}].addresses is empty" for number in range(3)), "and 2 more"]
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2026-11-20T23:47:40Z", 1795218460.0), ("2026-11-20T23:47:40.5Z", 1795218460.5), ("", 0.0), ("yesterday", 0.0)],
)
def test_last_change_trigger_time(text: str, seconds: float) -> None:
    labels = {"kubernetes.io/service-name": "web"}
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": text}
    metadata = {"namespace": "ns", "name": "web-1", "labels": labels, "annotations": annotations}
    decoded = decode(EndpointSlice, {"metadata": metadata, "addressType": "IPv4"}).object
    assert isinstance(decoded, EndpointSlice)
    assert decoded.last_change == seconds


# Nodes.


def test_all_node_fields() -> None:
    decoded = decode(
        Node,
        {
            "metadata": {"name": "node-1", "uid": "u", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
            "spec": {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.1.7/24", "FD00:1::/64"]},
            "status": {
                "addresses": [
                    {"type": "ExternalIP", "address": "192.0.2.9"},
                    {"type": "InternalIP", "address": "10.99.0.2"},
                    {"type": "Hostname", "address": "10.0.0.9"},
                    {"type": "InternalIP", "address": "FD00:99::2"},
                    {"type": "InternalIP", "address": "nonsense"},
                ]
            },
        },
    )
    addresses = ("10.99.0.2", "fd00:99::2", "192.0.2.9")
    assert decoded.object == Node("node-1", "u", addresses, "zone-a", ("10.244.1.0/24", "fd00:1::/64"))


def test_node_defaults() -> None:
    assert node() == Node("node-1")
    assert node(spec={"podCIDR": "10.244.1.0/24"}) == Node("node-1", pod_cidrs=("10.244.1.0/24",))


@pytest.mark.parametrize(
    ("metadata", "spec", "expected"),
    [
        ({}, {}, False),
        ({"deletionTimestamp": "2026-11-20T23:47:40Z"}, {}, True),
        ({}, {"taints": [{"key": "a"}, {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}, True),
        ({}, {"taints": [{"key": "node.kubernetes.io/not-ready"}]}, False),
        ({}, {"taints": None}, False),
    ],
)
def test_node_that_is_being_deleted(metadata: dict[str, str], spec: dict[str, Any], expected: bool) -> None:
    assert node(metadata={"name": "node-1", **metadata}, spec=spec).being_deleted is expected


# ServiceCIDRs.


@pytest.mark.parametrize(
    ("content", "cidrs"),
    [
        ({"spec": {"cidrs": ["10.96.0.0/16", "FD00:10:96:0::/112"]}}, ("10.96.0.0/16", "fd00:10:96::/112")),
        ({"spec": {"cidrs": ["010.96.1.7/16"]}, "status": {"conditions": 7}}, ("10.96.0.0/16",)),
        ({"spec": {"cidrs": ["10.96.0.0/16", "10.96.0.0/16"]}}, ("10.96.0.0/16",)),
        ({"spec": {"cidrs": None}}, ()),
        ({"spec": {}}, ()),
        ({}, ()),
    ],
)
def test_service_cidr_ranges(content: dict[str, Any], cidrs: tuple[str, ...]) -> None:
    metadata = {"name": "kubernetes", "resourceVersion": "7"}
    expected = DecodedObject("", "kubernetes", "7", ServiceCIDR("kubernetes", cidrs))
    assert decode(ServiceCIDR, {"metadata": metadata, **content}) == expected


# Rejected objects and the error messages.


LONG = "10.0.0.0/8, " * 20


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"clusterIP": "10.96.0.300"}, 'spec.clusterIP must be an IP address, not "10.96.0.300"'),
        ({"clusterIPs": ["10.96.0.1", "x"]}, 'spec.clusterIPs[1] must be an IP address, not "x"'),
        ({"clusterIP": 7}, "spec.clusterIP must be a string, not 7"),
        ({"clusterIP": None}, "spec.clusterIP must be a string, not null"),
        ({"type": ["NodePort"]}, 'spec.type must be a string, not ["NodePort"]'),
        ({"externalIPs": ["10.0.0.1/32"]}, 'spec.externalIPs[0] must be an IP address, not "10.0.0.1/32"'),
        ({"externalIPs": "10.0.0.1"}, 'spec.externalIPs must be a list, not "10.0.0.1"'),
        ({"externalIPs": [None]}, "spec.externalIPs[0] must be a string, not null"),
        (
            {"loadBalancerSourceRanges": ["10.0.0.0"]},
            'spec.loadBalancerSourceRanges[0] must be a CIDR (such as 10.0.0.0/8), not "10.0.0.0"',
        ),
        (
            {"loadBalancerSourceRanges": [LONG]},
            f'spec.loadBalancerSourceRanges[0] must be a CIDR (such as 10.0.0.0/8), not "{LONG[:76]}...',
        ),
        (
            {"status": {"loadBalancer": {"ingress": [{"hostname": "a"}, {"ip": "x"}]}}},
            'status.loadBalancer.ingress[1].ip must be an IP address, not "x"',
        ),
        ({"ports": {"http": 80}}, 'spec.ports must be a list, not {"http":80}'),
        ({"ports": [80]}, "spec.ports[0] must be a mapping, not 80"),
        ({"ports": [{"port": 0}]}, "spec.ports[0].port must be from 1 to 65535, not 0"),
        ({"ports": [{"port": 80}, {}]}, "spec.ports[1].port is missing"),
        ({"ports": [{"port": 80}, {"port": 65536}]}, "spec.ports[1].port must be from 1 to 65535, not 65536"),
        ({"ports": [{"port": "http"}]}, 'spec.ports[0].port must be an integer, not "http"'),
        ({"ports": [{"port": 80.5}]}, "spec.ports[0].port must be an integer, not 80.5"),
        ({"ports": [{"port": True}]}, "spec.ports[0].port must be an integer, not true"),
        ({"ports": [{"port": 80, "nodePort": -1}]}, "spec.ports[0].nodePort must be from 0 to 65535, not -1"),
        ({"ports": [{"port": 80, "nodePort": 65536}]}, "spec.ports[0].nodePort must be from 0 to 65535, not 65536"),
        ({"ports": [{"port": 80, "name": 5}]}, "spec.ports[0].name must be a string, not 5"),
        ({"ports": [{"port": 80, "protocol": 5}]}, "spec.ports[0].protocol must be a string, not 5"),
        (
            {"ports": [{"port": 80, "protocol": "tcp"}]},
            'spec.ports[0].protocol must be one of TCP, UDP, SCTP, not "tcp"',
        ),
        (
            {"ports": [{"port": 80, "name": "a"}, {"port": 81}, {"port": 82, "name": "a"}]},
            'spec.ports[2].name must be unique among the Service\'s TCP ports, but "a" is used twice',
        ),
        (
            {"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]},
            "spec.ports[1].port must be unique among the Service's TCP ports, but 80 is used twice",
        ),
        (
            {"ports": [{"port": 80, "name": "a", "nodePort": 30000}, {"port": 81, "name": "b", "nodePort": 30000}]},
            "spec.ports[1].nodePort must be unique among the Service's TCP ports, but 30000 is used twice",
        ),
        (
            {"clusterIPs": ["10.96.0.1", "10.96.0.2"]},
            'spec.clusterIPs must be at most one address of each IP family, not ["10.96.0.1","10.96.0.2"]',
        ),
        ({"clusterIP": "127.0.0.1"}, 'spec.clusterIP must not be a loopback address, but is "127.0.0.1"'),
        (
            {"clusterIPs": ["10.96.0.1", "FF02::1"]},
            'spec.clusterIPs[1] must not be a link-local multicast address, but is "FF02::1"',
        ),
        (
            {"externalIPs": ["192.0.2.1", "169.254.169.254"]},
            'spec.externalIPs[1] must not be a link-local address, but is "169.254.169.254"',
        ),
        ({"externalIPs": ["0.0.0.0"]}, 'spec.externalIPs[0] must not be an unspecified address, but is "0.0.0.0"'),
        (
            {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": "5"}}},
            'spec.sessionAffinityConfig.clientIP.timeoutSeconds must be an integer, not "5"',
        ),
        ({"labels": {"good": "a", "bad": 1}}, "metadata.labels.bad must be a string, not 1"),
        ({"labels": ["app"]}, 'metadata.labels must be a mapping, not ["app"]'),
    ],
)
def test_invalid_service_field_is_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        service(**spec)
    assert str(caught.value) == message


@pytest.mark.parametrize("seconds", [-1, 0, 86401, 1 << 40])
def test_affinity_timeout_out_of_range_is_named(seconds: int) -> None:
    config = {"clientIP": {"timeoutSeconds": seconds}}
    with pytest.raises(ObjectError, match=f"clientIP.timeoutSeconds must be from 1 to 86400, not {seconds}$"):
        service(sessionAffinity="ClientIP", sessionAffinityConfig=config)


@pytest.mark.parametrize("port", [-1, 65536])
def test_health_check_port_out_of_range_is_named(port: int) -> None:
    with pytest.raises(ObjectError, match=f"^spec.healthCheckNodePort must be from 0 to 65535, not {port}$"):
        service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=port)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"endpoints": [{"addresses": "10.0.0.1"}]}, 'endpoints[0].addresses must be a list, not "10.0.0.1"'),
        (
            {"endpoints": [{}, {"conditions": {"ready": "yes"}}]},
            'endpoints[1].conditions.ready must be true or false, not "yes"',
        ),
        ({"ports": [{"port": "http"}]}, 'ports[0].port must be an integer, not "http"'),
    ],
)
def test_invalid_endpoint_slice_field_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        endpoint_slice(**content)
    assert str(caught.value) == message


def test_invalid_node_field_is_named() -> None:
    with pytest.raises(
        ObjectError, match=r"^spec.podCIDRs\[0\] must be a CIDR \(such as 10.0.0.0/8\), not \"10.0.0.0\"$"
    ):
        node(spec={"podCIDRs": ["10.0.0.0"]})
    with pytest.raises(ObjectError, match=r"^spec.podCIDR must be a CIDR"):
        node(spec={"podCIDR": "10.0.0.0"})


@pytest.mark.parametrize(
    ("cidrs", "field"),
    [
        (["10.96.0.0"], "spec.cidrs[0]"),
        (["10.96.0.0/16", "x"], "spec.cidrs[1]"),
        (["10.96.0.0/33"], "spec.cidrs[0]"),
        (["fd00::/129"], "spec.cidrs[0]"),
        ([""], "spec.cidrs[0]"),
        ([7], "spec.cidrs[0]"),
        ("10.96.0.0/16", "spec.cidrs"),
    ],
)
def test_invalid_service_cidr_field_is_named(cidrs: Any, field: str) -> None:
    with pytest.raises(ObjectError) as caught:
        decode(ServiceCIDR, {"metadata": {"name": "a"}, "spec": {"cidrs": cidrs}})
    assert str(caught.value).startswith(f"{field} must be a ")


@pytest.mark.parametrize("name", ["a.b", "a" * 64])
def test_names_of_services_and_namespaces_are_labels(name: str) -> None:
    for metadata in ({"namespace": "ns", "name": name}, {"namespace": name, "name": "web"}):
        with pytest.raises(ObjectError, match="must be a lowercase RFC 1123 label"):
            decode(Service, {"metadata": metadata, "spec": {"clusterIP": "10.96.0.1"}})


@pytest.mark.parametrize("name", ["a..b", ".a", "a.", "a.-b", "a-.b"])
def test_each_part_of_a_subdomain_is_a_label(name: str) -> None:
    with pytest.raises(ObjectError, match="must be a lowercase RFC 1123 subdomain"):
        decode(Node, {"metadata": {"name": name}})


BAD_NAMES = ("", 'a"b', "a\nb", "a b", "A", "a\\", "-a", "a-", "a" * 254, "a;b", "ä", "a/b", "a\0")


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_could_break_rules_are_rejected(kind: Kind, name: str) -> None:
    expected = "label" if kind is Service else "subdomain"
    with pytest.raises(ObjectError, match=rf"^metadata\.name (is missing|must be a lowercase RFC 1123 {expected} .*)"):
        decode(kind, {"metadata": {"namespace": "ns", "name": name}})


@pytest.mark.parametrize("name", BAD_NAMES)
def test_namespaces_that_could_break_rules_are_rejected(name: str) -> None:
    with pytest.raises(ObjectError, match=r"^metadata\.namespace (is missing|must be a lowercase RFC 1123 label .*)"):
        decode(Service, {"metadata": {"namespace": name, "name": "web"}, "spec": {"clusterIP": "10.96.0.1"}})


@pytest.mark.parametrize("name", ['"', "a\n", "a b", "A", "a.b", "a" * 64])
def test_port_names_that_could_break_rules_are_rejected(name: str) -> None:
    with pytest.raises(ObjectError, match=r"^spec\.ports\[0\]\.name must be a lowercase RFC 1123 label"):
        service(ports=[{"port": 80, "name": name}])


def test_names_of_the_maximum_length() -> None:
    assert decode(Node, {"metadata": {"name": "a" * 253}}).name == "a" * 253
    assert valid_service(ports=[{"port": 80, "name": "a" * 63}]).ports[0].name == "a" * 63


@pytest.mark.parametrize("raw", [b"", b"{", b"null", b"[]", b"{}", b'"x"', b'{"metadata": []}', b'{"metadata": null}'])
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_an_object_is_rejected(kind: Kind, raw: bytes) -> None:
    with pytest.raises(ObjectError):
        decode_object(kind, raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON: input data was truncated"),
        (b"x", "not valid JSON: invalid character (byte 0)"),
        (b"7", "must be a mapping, not 7"),
        (b"{}", "metadata is missing"),
        (b'{"metadata":{"name":"\xff"}}', "not valid UTF-8"),
        (b'{"metadata":[', "metadata must be a mapping"),
        (b'{"metadata":{"name":"a"},"spec":[],"x":1e999}', "spec must be a mapping"),
    ],
)
def test_syntax_and_type_errors_name_the_api_field(raw: bytes, message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        decode_object(ServiceCIDR, raw)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b'{"metadata":{"name":"a"},"spec":{"ports":[{"port":' + b"9" * 5000 + b"}]}}",
            "spec.ports[0].port is out of range",
        ),
        (b'{"metadata":{"name":"a"},"spec":{"ports":[{"port":1e999}]}}', "spec.ports[0].port is out of range"),
    ],
)
def test_number_out_of_range_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        decode_object(Service, raw)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_not_utf8_is_rejected(kind: Kind) -> None:
    with pytest.raises(ObjectError, match=r"^not valid UTF-8$"):
        decode_object(kind, b'{"metadata": {"name": "\xff"}}')


@pytest.mark.parametrize("kind", KINDS)
def test_text_nested_too_deeply_is_rejected(kind: Kind) -> None:
    with pytest.raises(ObjectError, match=r"^nested too deeply$"):
        decode_object(kind, b'{"metadata": {"name": "a"}, "x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({1: 2}, "must have only strings as keys, not 1"),
        ({"metadata": {"name": "a", "labels": {1: "x"}}}, "metadata.labels must have only strings as keys, not 1"),
        ({"metadata": {"name": b"a"}}, 'metadata.name must be a string, not "YQ=="'),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_data_that_json_cannot_represent_is_rejected(kind: Kind, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        decode_object(kind, data)
    assert str(caught.value) == message


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        ("10.0.0.1", "fd00::1", "10.0.0.0/8", "Local", "TCP", "ClientIP", "None", "a", "IPv4", "IPv6", "VIP")
    ),
)
KEYS = st.sampled_from(
    (
        "metadata",
        "name",
        "namespace",
        "labels",
        "annotations",
        "spec",
        "status",
        "type",
        "clusterIP",
        "clusterIPs",
        "ports",
        "port",
        "protocol",
        "nodePort",
        "externalIPs",
        "sessionAffinity",
        "sessionAffinityConfig",
        "clientIP",
        "timeoutSeconds",
        "loadBalancer",
        "ingress",
        "ip",
        "ipMode",
        "loadBalancerSourceRanges",
        "healthCheckNodePort",
        "addressType",
        "endpoints",
        "addresses",
        "conditions",
        "ready",
        "hints",
        "forZones",
        "nodeName",
        "podCIDRs",
        "cidrs",
        "taints",
        "address",
        "key",
        "kubernetes.io/service-name",
        "endpoints.kubernetes.io/last-change-trigger-time",
    )
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=15
)
METADATA = st.fixed_dictionaries(
    {"name": st.just("a"), "namespace": st.just("ns")},
    optional={
        "labels": st.just({"kubernetes.io/service-name": "web"}),
        "annotations": st.text().map(lambda text: {"endpoints.kubernetes.io/last-change-trigger-time": text}),
    },
)
OBJECTS = st.one_of(
    st.dictionaries(KEYS, JSON, max_size=5),
    st.fixed_dictionaries(
        {"metadata": METADATA},
        optional={"spec": st.dictionaries(KEYS, JSON, max_size=8), "status": JSON, "endpoints": JSON, "ports": JSON},
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), OBJECTS)
def test_any_json_is_decoded_or_rejected(kind: Kind, data: dict[str, Any]) -> None:
    from_text, from_data = outcome(kind, json.dumps(data).encode()), outcome(kind, data)
    assert str(from_text) == str(from_data)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.binary(max_size=40) | st.text(max_size=40).map(lambda text: b'{"metadata":' + text.encode()),
)
def test_any_bytes_are_decoded_or_rejected(kind: Kind, raw: bytes) -> None:
    with suppress(ObjectError):
        assert decode_object(kind, raw).name
