"""From the API's shapes to the model: check the fields that decide rules, and keep nothing else. Pure.

Headless and ExternalName Services, objects of another proxy (`service.kubernetes.io/service-proxy-name`),
FQDN slices, slices without a Service and slices labelled `service.kubernetes.io/headless` get no rules: they reduce
to nothing. The label `headless` on a Service that has a ClusterIP hides its slices only (seen in kube-proxy 1.36).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from sys import intern
from typing import NamedTuple, TypeVar

from msgspec import Struct

from kproxy.documents.document import FieldPath, field_path_text
from kproxy.kube.codec import schema as wire
from kproxy.model.addresses import canonical_address, canonical_cidr, family_of
from kproxy.model.delta import Object
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServiceCIDR, ServicePort

SHOWN = 3
"""How many parts of one object are named on a line: a slice may have a hundred bad endpoints."""


class IgnoredField(NamedTuple):
    """A part of an object that is left out: where it is, and why."""

    field: FieldPath
    text: str


def ignored_fields_text(remarks: Sequence[IgnoredField]) -> str:
    """Return what is left out of one object, on a line."""
    parts = [f"{field_path_text(remark.field)}: {remark.text}" for remark in remarks[:SHOWN]]
    more = len(remarks) - SHOWN
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"
DEFAULT_AFFINITY_SECONDS = 10800
"""`sessionAffinityConfig.clientIP.timeoutSeconds` where it is unset: 3 hours (Service API)."""
LONGEST_AFFINITY_SECONDS = 86400


class ObjectError(ValueError):
    """An object that cannot be decoded; the message names the field and what it should hold."""


class DecodedObject(Struct, frozen=True, gc=False):
    """One object of the API: who it is, and what kproxy keeps of it (None: it has no rules for this one).

    `remarks` say which parts of it are left out although somebody may expect them to work.
    """

    namespace: str
    name: str
    resource_version: str
    object: Object | None
    remarks: tuple[IgnoredField, ...] = ()


_E = TypeVar("_E")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_PORT_NAME = re.compile(r"([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?")
"""DNS-1123 subdomains and labels, as the API server demands: names end up in rules, so files must obey them too."""


def _check_name(pattern: re.Pattern[str], text: str, field: str) -> None:
    if not pattern.fullmatch(text):
        raise ObjectError(f"Expected a name of lower case letters, digits, '-' and '.', got {text!r} - at `$.{field}`")


def convert_service(found: wire.ApiService) -> DecodedObject:
    """Reduce a Service. Raises `ObjectError`, as all of these do, for a value of no use."""
    return _decoded(found.metadata, _reduce_service(found))


def convert_slice(
    found: wire.ApiEndpointSlice,
    endpoints: Iterable[_E],
    reduce: Callable[[_E, Family], Endpoint | str],
) -> DecodedObject:
    """Reduce an EndpointSlice whose `endpoints`, in whatever form they came, are reduced by `reduce`.

    That returns why an endpoint cannot be used if it cannot.
    """
    remarks: list[IgnoredField] = []
    return _decoded(found.metadata, _reduce_slice(found, endpoints, reduce, remarks), remarks)


def convert_node(found: wire.ApiNode) -> DecodedObject:
    """Reduce a Node."""
    return _decoded(found.metadata, _reduce_node(found))


def convert_service_cidr(found: wire.ApiServiceCIDR) -> DecodedObject:
    """Reduce a ServiceCIDR."""
    return _decoded(found.metadata, _reduce_service_cidr(found))


def _decoded(metadata: wire.ApiMetadata, reduced: Object | None, remarks: Iterable[IgnoredField] = ()) -> DecodedObject:
    _check_name(_NAME, metadata.name, "metadata.name")
    return DecodedObject(metadata.namespace, metadata.name, metadata.resource_version, reduced, tuple(remarks))


def _canonical(convert: Callable[[str], str | None], texts: Iterable[str] | None, field: str) -> tuple[str, ...]:
    found = []
    for text in texts or ():
        value = convert(text)
        if value is None:
            wanted = "CIDR" if convert is canonical_cidr else "address"
            raise ObjectError(f"Expected an IP {wanted}, got {text!r} - at `$.{field}`")
        found.append(value)
    return tuple(dict.fromkeys(found))


def _reduce_service(service: wire.ApiService) -> Service | None:
    metadata, spec = service.metadata, service.spec or wire.ApiServiceSpec()
    labels = metadata.labels or {}
    if PROXY_NAME_LABEL in labels:
        return None
    if spec.type == "ExternalName" or spec.cluster_ip in {"", "None"}:
        return None
    balancer = (service.status and service.status.load_balancer) or wire.ApiLoadBalancer()
    ingress = [entry.ip for entry in balancer.ingress or () if entry.ip and entry.ip_mode in {None, "VIP"}]
    external_ips = _canonical(canonical_address, spec.external_ips, "spec.externalIPs")
    accepts_external = spec.type in {"NodePort", "LoadBalancer"} or bool(external_ips)
    external_local = accepts_external and spec.external_traffic_policy == "Local"
    _check_name(_NAME, metadata.namespace, "metadata.namespace")
    ports = tuple(_reduce_port(port) for port in spec.ports or ())
    if not 0 <= spec.health_check_node_port <= 65535:
        found = spec.health_check_node_port
        raise ObjectError(f"Expected a port from 0 to 65535, got {found} - at `$.spec.healthCheckNodePort`")
    if len({(port.name, port.protocol) for port in ports}) < len(ports):
        raise ObjectError("Expected ports with different names - at `$.spec.ports`")
    return Service(
        namespace=intern(metadata.namespace),
        name=metadata.name,
        cluster_ips=_canonical(canonical_address, spec.cluster_ips or [spec.cluster_ip], "spec.clusterIPs"),
        ports=ports,
        affinity_seconds=_affinity_seconds(spec),
        internal_local=spec.internal_traffic_policy == "Local",
        external_local=external_local,
        external_ips=external_ips,
        vips=_canonical(canonical_address, ingress, "status.loadBalancer.ingress"),
        source_ranges=_canonical(canonical_cidr, spec.load_balancer_source_ranges, "spec.loadBalancerSourceRanges"),
        health_check_node_port=spec.health_check_node_port if external_local and spec.type == "LoadBalancer" else 0,
    )


def _reduce_port(port: wire.ApiServicePort) -> ServicePort:
    if not 1 <= port.port <= 65535:
        raise ObjectError(f"Expected a port from 1 to 65535, got {port.port} - at `$.spec.ports[...].port`")
    if not 0 <= port.node_port <= 65535:
        raise ObjectError(f"Expected a port from 0 to 65535, got {port.node_port} - at `$.spec.ports[...].nodePort`")
    _check_name(_PORT_NAME, port.name, "spec.ports[...].name")
    return ServicePort(intern(port.name), port.port, port.protocol, port.node_port)


def _affinity_seconds(spec: wire.ApiServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= LONGEST_AFFINITY_SECONDS:
        where = "$.spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise ObjectError(f"Expected 1 to {LONGEST_AFFINITY_SECONDS} seconds, got {seconds} - at `{where}`")
    return seconds


def _reduce_slice(
    found: wire.ApiEndpointSlice,
    endpoints: Iterable[_E],
    reduce: Callable[[_E, Family], Endpoint | str],
    remarks: list[IgnoredField],
) -> EndpointSlice | None:
    metadata, labels = found.metadata, found.metadata.labels or {}
    service = labels.get(SERVICE_NAME_LABEL, "")
    if PROXY_NAME_LABEL in labels or HEADLESS_LABEL in labels or not service:
        return None
    if found.address_type not in {"IPv4", "IPv6"}:
        return None
    family = Family(found.address_type)
    reduced = [reduce(endpoint, family) for endpoint in endpoints]
    usable = tuple([each for each in reduced if isinstance(each, Endpoint)])
    if len(usable) < len(reduced):
        bad = ((place, each) for place, each in enumerate(reduced) if isinstance(each, str))
        remarks += [IgnoredField(("endpoints", place), text) for place, text in bad]
    ports = found.ports or ()
    if not all(port.port for port in ports):
        remarks += [
            IgnoredField(
                ("ports", place), f"port {port.name!r} has no number" if port.name else "the port has no number"
            )
            for place, port in enumerate(ports)
            if not port.port
        ]
    return EndpointSlice(
        namespace=intern(metadata.namespace),
        name=metadata.name,
        service=f"{metadata.namespace}/{service}",
        family=family,
        endpoints=usable,
        ports=tuple(_reduce_endpoint_port(port) for port in ports if port.port),
        last_change=_trigger_time(metadata.annotations),
    )


def _reduce_endpoint_port(port: wire.ApiEndpointPort) -> EndpointPort:
    number = port.port or 0
    if not 1 <= number <= 65535:
        raise ObjectError(f"Expected a port from 1 to 65535, got {number} - at `$.ports[...].port`")
    return EndpointPort(intern(port.name or ""), number, port.protocol or "TCP")


def convert_endpoint(endpoint: wire.ApiEndpoint, family: Family) -> Endpoint | str:
    """Keep only the first address (KEP-752 deprecated the others), and only one of the slice's family.

    Return why an endpoint cannot be used if it cannot.
    """
    if not endpoint.addresses:
        return "the endpoint has no address"
    address = canonical_address(endpoint.addresses[0])
    if address is None or family_of(address) is not family:
        return f"{endpoint.addresses[0]!r} is not an {family.value} address"
    conditions = endpoint.conditions or wire.ApiConditions()
    hints = endpoint.hints or wire.ApiHints()
    return Endpoint(
        address=address,
        node=intern(endpoint.node_name or ""),
        ready=conditions.ready is not False,
        serving=conditions.serving is not False,
        terminating=conditions.terminating is True,
        for_zones=tuple(intern(zone.name) for zone in hints.for_zones or ()),
        for_nodes=tuple(intern(node.name) for node in hints.for_nodes or ()),
    )


def _trigger_time(annotations: dict[str, str] | None) -> float:
    text = (annotations or {}).get(TRIGGER_TIME_ANNOTATION, "")
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def _reduce_node(node: wire.ApiNode) -> Node:
    metadata, spec, status = (
        node.metadata,
        node.spec or wire.ApiNodeSpec(),
        node.status or wire.ApiNodeStatus(),
    )
    addresses = status.addresses or []
    own = [item.address for kind in ("InternalIP", "ExternalIP") for item in addresses if item.type == kind]
    pod_cidrs = spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])
    return Node(
        name=metadata.name,
        uid=metadata.uid,
        addresses=tuple(address for text in own if (address := canonical_address(text)) is not None),
        zone=(metadata.labels or {}).get(ZONE_LABEL, ""),
        pod_cidrs=_canonical(canonical_cidr, pod_cidrs, "spec.podCIDRs"),
        being_deleted=metadata.deletion_timestamp is not None
        or any(taint.key == DELETION_TAINT for taint in spec.taints or ()),
    )


def _reduce_service_cidr(found: wire.ApiServiceCIDR) -> ServiceCIDR:
    cidrs = found.spec.cidrs if found.spec else None
    return ServiceCIDR(found.metadata.name, _canonical(canonical_cidr, cidrs, "spec.cidrs"))
