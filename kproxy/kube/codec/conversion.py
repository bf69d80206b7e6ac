"""Convert API objects to the model, validating the fields that affect rules. Pure.

An object that gets no rules is converted to None:

- a headless or ExternalName Service, or a Service whose ClusterIP is not yet allocated
- a Service or EndpointSlice that belongs to another proxy (label `service.kubernetes.io/service-proxy-name`)
- an EndpointSlice that belongs to no Service (it has no label `kubernetes.io/service-name`)
- an EndpointSlice with an address type other than IPv4 and IPv6, such as FQDN
- an EndpointSlice with the label `service.kubernetes.io/headless`

A Service that has a ClusterIP gets rules even if it has the label `service.kubernetes.io/headless`. The label
affects only EndpointSlices, as observed in kube-proxy 1.36.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from sys import intern
from typing import NamedTuple, TypeVar, get_args

from msgspec import Struct

from kproxy.documents.document import FieldPath, field_path_text, format_value
from kproxy.kube.codec import schema
from kproxy.kube.codec.object_error import ObjectError, must_be
from kproxy.model.addresses import canonical_address, canonical_cidr, family_of
from kproxy.model.delta import Object
from kproxy.model.types import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Family,
    Node,
    Protocol,
    Service,
    ServiceCIDR,
    ServicePort,
)

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"
DEFAULT_AFFINITY_SECONDS = 10800
"""Default of `sessionAffinityConfig.clientIP.timeoutSeconds`: 3 hours (Service API)."""
MAX_AFFINITY_SECONDS = 86400
"""Maximum of `sessionAffinityConfig.clientIP.timeoutSeconds`: 1 day (Service API)."""
MAX_PORT = 65535
MAX_FIELDS_LOGGED = 3
"""Maximum number of ignored fields that a log line names. An EndpointSlice can have a hundred invalid endpoints."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_PORT_NAME = re.compile(r"([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?")
# Names become part of rules. The API server enforces these formats, but an object file could contain any name.
_NAME_FORMAT = "a lowercase RFC 1123 subdomain (letters, digits, '-' and '.')"
_PORT_NAME_FORMAT = "a lowercase RFC 1123 label (up to 63 letters, digits and '-')"
_ADDRESS = "an IP address"
_CIDR = "a CIDR (such as 10.0.0.0/8)"
_PROTOCOLS: dict[str, Protocol] = {protocol: protocol for protocol in get_args(Protocol)}
_E = TypeVar("_E")


class IgnoredField(NamedTuple):
    """The field that makes an endpoint or port unusable, and the problem.

    The endpoint or port is ignored; the rest of the object is used.
    """

    field: FieldPath
    problem: str


class DecodedObject(Struct, frozen=True, gc=False):
    """An API object. `object` is its content as a model object, or None if it gets no rules."""

    namespace: str
    name: str
    resource_version: str
    object: Object | None
    ignored_fields: tuple[IgnoredField, ...] = ()


def ignored_fields_text(ignored: Sequence[IgnoredField]) -> str:
    """Describe the ignored fields of one object in one line."""
    parts = [f"{field_path_text(field)} {problem}" for field, problem in ignored[:MAX_FIELDS_LOGGED]]
    more = len(ignored) - MAX_FIELDS_LOGGED
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def convert_service(service: schema.ApiService) -> DecodedObject:
    """Convert a Service. Raises `ObjectError` for an invalid value."""
    return _decoded(service.metadata, _convert_service(service))


def convert_slice(
    endpoint_slice: schema.ApiEndpointSlice,
    endpoints: Iterable[_E],
    convert: Callable[[_E, Family], Endpoint | IgnoredField],
) -> DecodedObject:
    """Convert an EndpointSlice. Its endpoints are passed as `endpoints`; `endpoint_slice.endpoints` is not used.

    `convert` converts one item of `endpoints`, or returns the field that makes the endpoint unusable. Raises
    `ObjectError` for an invalid value elsewhere in the object.
    """
    ignored: list[IgnoredField] = []
    return _decoded(endpoint_slice.metadata, _convert_slice(endpoint_slice, endpoints, convert, ignored), ignored)


def convert_endpoint(endpoint: schema.ApiEndpoint, family: Family) -> Endpoint | IgnoredField:
    """Convert an endpoint, or return the field that makes it unusable.

    As in kube-proxy, only the endpoint's first address is used, because the API defines no meaning for the others. The
    address must be of `family`, the IP family of the EndpointSlice.
    """
    if not endpoint.addresses:
        return IgnoredField(("addresses",), "is empty")
    address = canonical_address(endpoint.addresses[0])
    if address is None or family_of(address) is not family:
        error = must_be(f"an {family.value} address", endpoint.addresses[0])
        return IgnoredField(("addresses", 0), error.problem)
    conditions = endpoint.conditions or schema.ApiConditions()
    hints = endpoint.hints or schema.ApiHints()
    return Endpoint(
        address=address,
        node=intern(endpoint.node_name or ""),
        ready=conditions.ready is not False,
        serving=conditions.serving is not False,
        terminating=conditions.terminating is True,
        for_zones=tuple(intern(zone.name) for zone in hints.for_zones or ()),
        for_nodes=tuple(intern(node.name) for node in hints.for_nodes or ()),
    )


def convert_node(node: schema.ApiNode) -> DecodedObject:
    """Convert a Node. Raises `ObjectError` for an invalid value."""
    return _decoded(node.metadata, _convert_node(node))


def convert_service_cidr(service_cidr: schema.ApiServiceCIDR) -> DecodedObject:
    """Convert a ServiceCIDR. Raises `ObjectError` for an invalid value."""
    cidrs = service_cidr.spec.cidrs if service_cidr.spec else None
    converted = ServiceCIDR(service_cidr.metadata.name, _cidrs(cidrs, "spec", "cidrs"))
    return _decoded(service_cidr.metadata, converted)


def _decoded(
    metadata: schema.ApiMetadata, converted: Object | None, ignored: Iterable[IgnoredField] = ()
) -> DecodedObject:
    _check_name(metadata.name, "name")
    return DecodedObject(metadata.namespace, metadata.name, metadata.resource_version, converted, tuple(ignored))


def _check_name(name: str, field: str) -> None:
    if not _NAME.fullmatch(name):
        raise must_be(_NAME_FORMAT, name, "metadata", field) if name else ObjectError("is missing", ("metadata", field))


def _out_of_range(low: int, high: int, number: int, *field: str | int) -> ObjectError:
    return must_be(f"from {low} to {high}", number, *field)


def _unknown_protocol(protocol: str, *field: str | int) -> ObjectError:
    return must_be(f"one of {', '.join(_PROTOCOLS)}", protocol, *field)


def _address(text: str, *field: str | int) -> str:
    address = canonical_address(text)
    if address is None:
        raise must_be(_ADDRESS, text, *field)
    return address


def _addresses(texts: Sequence[str] | None, *field: str) -> tuple[str, ...]:
    return _canonical(canonical_address, _ADDRESS, texts, *field)


def _cidr(text: str, *field: str | int) -> str:
    cidr = canonical_cidr(text)
    if cidr is None:
        raise must_be(_CIDR, text, *field)
    return cidr


def _cidrs(texts: Sequence[str] | None, *field: str) -> tuple[str, ...]:
    return _canonical(canonical_cidr, _CIDR, texts, *field)


def _canonical(
    convert: Callable[[str], str | None], expected: str, texts: Sequence[str] | None, *field: str
) -> tuple[str, ...]:
    """Return the canonical forms of a list's values, without duplicates. Raises `ObjectError`."""
    if not texts:
        return ()
    values = []
    for index, text in enumerate(texts):
        value = convert(text)
        if value is None:
            raise must_be(expected, text, *field, index)
        values.append(value)
    return tuple(dict.fromkeys(values))


def _convert_service(service: schema.ApiService) -> Service | None:
    metadata, spec = service.metadata, service.spec or schema.ApiServiceSpec()
    if PROXY_NAME_LABEL in (metadata.labels or {}):
        return None
    if spec.type == "ExternalName" or spec.cluster_ip in {"", "None"}:
        return None
    external_ips = _addresses(spec.external_ips, "spec", "externalIPs")
    accepts_external = spec.type in {"NodePort", "LoadBalancer"} or bool(external_ips)
    external_local = accepts_external and spec.external_traffic_policy == "Local"
    _check_name(metadata.namespace, "namespace")
    ports = tuple([_convert_port(port, index) for index, port in enumerate(spec.ports or ())])
    if not 0 <= spec.health_check_node_port <= MAX_PORT:
        raise _out_of_range(0, MAX_PORT, spec.health_check_node_port, "spec", "healthCheckNodePort")
    if len({(port.name, port.protocol) for port in ports}) < len(ports):
        raise _duplicate_port(ports)
    return Service(
        namespace=intern(metadata.namespace),
        name=metadata.name,
        cluster_ips=_cluster_ips(spec),
        ports=ports,
        affinity_seconds=_affinity_seconds(spec),
        internal_local=spec.internal_traffic_policy == "Local",
        external_local=external_local,
        external_ips=external_ips,
        vips=_load_balancer_vips(service),
        source_ranges=_cidrs(spec.load_balancer_source_ranges, "spec", "loadBalancerSourceRanges"),
        health_check_node_port=spec.health_check_node_port if external_local and spec.type == "LoadBalancer" else 0,
    )


def _cluster_ips(spec: schema.ApiServiceSpec) -> tuple[str, ...]:
    if spec.cluster_ips:
        return _addresses(spec.cluster_ips, "spec", "clusterIPs")
    return (_address(spec.cluster_ip, "spec", "clusterIP"),)


def _load_balancer_vips(service: schema.ApiService) -> tuple[str, ...]:
    balancer = service.status and service.status.load_balancer
    if not balancer or not balancer.ingress:
        return ()
    return tuple(
        dict.fromkeys(
            _address(entry.ip, "status", "loadBalancer", "ingress", index, "ip")
            for index, entry in enumerate(balancer.ingress)
            if entry.ip and entry.ip_mode in {None, "VIP"}
        )
    )


def _convert_port(port: schema.ApiServicePort, index: int) -> ServicePort:
    if port.port is None:
        raise ObjectError("is missing", ("spec", "ports", index, "port"))
    if not 1 <= port.port <= MAX_PORT:
        raise _out_of_range(1, MAX_PORT, port.port, "spec", "ports", index, "port")
    if not 0 <= port.node_port <= MAX_PORT:
        raise _out_of_range(0, MAX_PORT, port.node_port, "spec", "ports", index, "nodePort")
    if not _PORT_NAME.fullmatch(port.name):
        raise must_be(_PORT_NAME_FORMAT, port.name, "spec", "ports", index, "name")
    protocol = _PROTOCOLS.get(port.protocol)
    if protocol is None:
        raise _unknown_protocol(port.protocol, "spec", "ports", index, "protocol")
    return ServicePort(intern(port.name), port.port, protocol, port.node_port)


def _duplicate_port(ports: Sequence[ServicePort]) -> ObjectError:
    seen: set[tuple[str, str]] = set()
    for index, port in enumerate(ports):
        if (port.name, port.protocol) in seen:
            name = format_value(port.name)
            problem = f"must be unique among the Service's {port.protocol} ports, but {name} is used twice"
            return ObjectError(problem, ("spec", "ports", index, "name"))
        seen.add((port.name, port.protocol))
    raise AssertionError("the ports have different names")


def _affinity_seconds(spec: schema.ApiServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= MAX_AFFINITY_SECONDS:
        field = ("spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds")
        raise _out_of_range(1, MAX_AFFINITY_SECONDS, seconds, *field)
    return seconds


def _convert_slice(
    endpoint_slice: schema.ApiEndpointSlice,
    endpoints: Iterable[_E],
    convert: Callable[[_E, Family], Endpoint | IgnoredField],
    ignored: list[IgnoredField],
) -> EndpointSlice | None:
    metadata, labels = endpoint_slice.metadata, endpoint_slice.metadata.labels or {}
    service = labels.get(SERVICE_NAME_LABEL, "")
    if PROXY_NAME_LABEL in labels or HEADLESS_LABEL in labels or not service:
        return None
    if endpoint_slice.address_type not in {"IPv4", "IPv6"}:
        return None
    family = Family(endpoint_slice.address_type)
    converted = [convert(endpoint, family) for endpoint in endpoints]
    usable = tuple([item for item in converted if isinstance(item, Endpoint)])
    if len(usable) < len(converted):
        ignored += [
            IgnoredField(("endpoints", index, *item.field), item.problem)
            for index, item in enumerate(converted)
            if isinstance(item, IgnoredField)
        ]
    ports = tuple([_convert_endpoint_port(port, index) for index, port in enumerate(endpoint_slice.ports or ())])
    if not all(ports):
        ignored += [
            IgnoredField(("ports", index, "port"), "is missing") for index, port in enumerate(ports) if not port
        ]
    return EndpointSlice(
        namespace=intern(metadata.namespace),
        name=metadata.name,
        service=f"{metadata.namespace}/{service}",
        family=family,
        endpoints=usable,
        ports=tuple(filter(None, ports)),
        last_change=_trigger_time(metadata.annotations),
    )


def _convert_endpoint_port(port: schema.ApiEndpointPort, index: int) -> EndpointPort | None:
    """Convert a port, or return None if its number is missing or 0. Raises `ObjectError`."""
    protocol = "TCP" if port.protocol is None else _PROTOCOLS.get(port.protocol)
    if protocol is None:
        raise _unknown_protocol(port.protocol or "", "ports", index, "protocol")
    if not port.port:
        return None
    if not 1 <= port.port <= MAX_PORT:
        raise _out_of_range(1, MAX_PORT, port.port, "ports", index, "port")
    return EndpointPort(intern(port.name or ""), port.port, protocol)


def _trigger_time(annotations: dict[str, str] | None) -> float:
    text = (annotations or {}).get(TRIGGER_TIME_ANNOTATION, "")
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def _convert_node(node: schema.ApiNode) -> Node:
    metadata = node.metadata
    spec, status = node.spec or schema.ApiNodeSpec(), node.status or schema.ApiNodeStatus()
    addresses = status.addresses or []
    own = [item.address for kind in ("InternalIP", "ExternalIP") for item in addresses if item.type == kind]
    if spec.pod_cidr and not spec.pod_cidrs:
        pod_cidrs: tuple[str, ...] = (_cidr(spec.pod_cidr, "spec", "podCIDR"),)
    else:
        pod_cidrs = _cidrs(spec.pod_cidrs, "spec", "podCIDRs")
    return Node(
        name=metadata.name,
        uid=metadata.uid,
        addresses=tuple(address for text in own if (address := canonical_address(text)) is not None),
        zone=(metadata.labels or {}).get(ZONE_LABEL, ""),
        pod_cidrs=pod_cidrs,
        being_deleted=metadata.deletion_timestamp is not None
        or any(taint.key == DELETION_TAINT for taint in spec.taints or ()),
    )
