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
from functools import lru_cache
from sys import intern
from typing import NamedTuple, TypeVar, get_args

from msgspec import Struct

from kproxy.documents.document import FieldPath, field_path_text, format_value
from kproxy.kube.codec import schema
from kproxy.kube.codec.object_error import ObjectError, must_be
from kproxy.model.addresses import canonical_address, canonical_cidr, family_of, special_range
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

MAX_SUBDOMAIN_LENGTH = 253
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
# Names become part of rules. The API server enforces these formats, but an object file could contain any name.
_LABEL_FORMAT = "a lowercase RFC 1123 label (up to 63 letters, digits and '-')"
_SUBDOMAIN_FORMAT = f"a lowercase RFC 1123 subdomain (up to {MAX_SUBDOMAIN_LENGTH} letters, digits, '-' and '.')"
_SPECIAL = frozenset({"unspecified", "loopback", "link-local", "link-local multicast"})
_NOT_FORWARDABLE = frozenset({"unspecified", "loopback", "link-local multicast"})
"""The special ranges that a ClusterIP or load balancer IP cannot be in.

The API server allows ClusterIPs in every range of a ServiceCIDR, and load balancer IPs in every range. kproxy ignores
these three: rules for a loopback address would redirect the connections of programs on the node to themselves.
"""
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
    ignored: list[IgnoredField] = []
    _check_name(service.metadata.name, "name", label=True)
    return _decoded(service.metadata, _convert_service(service, ignored), ignored)


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
    if special := special_range(address):
        return IgnoredField(("addresses", 0), _special_address(special, endpoint.addresses[0]).problem)
    if endpoint.node_name and not is_subdomain(endpoint.node_name):
        return IgnoredField(("nodeName",), must_be(_SUBDOMAIN_FORMAT, endpoint.node_name).problem)
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


def _check_name(name: str, field: str, *, label: bool = False) -> None:
    if not name:
        raise ObjectError("is missing", ("metadata", field))
    if not (_LABEL.fullmatch(name) if label else is_subdomain(name)):
        raise must_be(_LABEL_FORMAT if label else _SUBDOMAIN_FORMAT, name, "metadata", field)


@lru_cache(maxsize=1024)  # the names of nodes occur in many endpoints
def is_subdomain(name: str) -> bool:
    """Return whether a name is a lowercase RFC 1123 subdomain, as the names of most objects are."""
    return len(name) <= MAX_SUBDOMAIN_LENGTH and _SUBDOMAIN.fullmatch(name) is not None


def is_label(name: str) -> bool:
    """Return whether a name is a lowercase RFC 1123 label, as the names of namespaces and Services are."""
    return _LABEL.fullmatch(name) is not None


def _special_address(special: str, address: str, *field: str | int) -> ObjectError:
    article = "an" if special[0] in "aeiou" else "a"
    return ObjectError(f"must not be {article} {special} address, but is {format_value(address)}", field)


def _out_of_range(low: int, high: int, number: int, *field: str | int) -> ObjectError:
    return must_be(f"from {low} to {high}", number, *field)


def _unknown_protocol(protocol: str, *field: str | int) -> ObjectError:
    return must_be(f"one of {', '.join(_PROTOCOLS)}", protocol, *field)


def _address(text: str, refused: frozenset[str], *field: str | int) -> str:
    """Return an address in canonical form. Raises `ObjectError` if it is in one of the `refused` special ranges."""
    address = canonical_address(text)
    if address is None:
        raise must_be(_ADDRESS, text, *field)
    if (special := special_range(address)) in refused:
        raise _special_address(special, text, *field)
    return address


def _addresses(texts: Sequence[str] | None, refused: frozenset[str], *field: str) -> tuple[str, ...]:
    """Like `_address`, for a list of addresses. Duplicates are removed."""
    return tuple(dict.fromkeys(_address(text, refused, *field, index) for index, text in enumerate(texts or ())))


def _cidr(text: str, *field: str | int) -> str:
    cidr = canonical_cidr(text)
    if cidr is None:
        raise must_be(_CIDR, text, *field)
    return cidr


def _cidrs(texts: Sequence[str] | None, *field: str) -> tuple[str, ...]:
    """Return the canonical forms of CIDRs, without duplicates. Raises `ObjectError`."""
    return tuple(dict.fromkeys(_cidr(text, *field, index) for index, text in enumerate(texts or ())))


def _convert_service(service: schema.ApiService, ignored: list[IgnoredField]) -> Service | None:
    metadata, spec = service.metadata, service.spec or schema.ApiServiceSpec()
    if PROXY_NAME_LABEL in (metadata.labels or {}):
        return None
    if spec.type == "ExternalName" or spec.cluster_ip in {"", "None"}:
        return None
    external_ips = _addresses(spec.external_ips, _SPECIAL, "spec", "externalIPs")
    accepts_external = spec.type in {"NodePort", "LoadBalancer"} or bool(external_ips)
    external_local = accepts_external and spec.external_traffic_policy == "Local"
    _check_name(metadata.namespace, "namespace", label=True)
    ports = tuple([_convert_port(port, index) for index, port in enumerate(spec.ports or ())])
    if not 0 <= spec.health_check_node_port <= MAX_PORT:
        raise _out_of_range(0, MAX_PORT, spec.health_check_node_port, "spec", "healthCheckNodePort")
    if len(ports) > 1:
        _check_duplicate_ports(ports)
    return Service(
        namespace=intern(metadata.namespace),
        name=metadata.name,
        cluster_ips=_cluster_ips(spec),
        ports=ports,
        affinity_seconds=_affinity_seconds(spec),
        internal_local=spec.internal_traffic_policy == "Local",
        external_local=external_local,
        external_ips=external_ips,
        vips=_load_balancer_vips(service, ignored),
        source_ranges=_cidrs(spec.load_balancer_source_ranges, "spec", "loadBalancerSourceRanges"),
        health_check_node_port=spec.health_check_node_port if external_local and spec.type == "LoadBalancer" else 0,
    )


def _cluster_ips(spec: schema.ApiServiceSpec) -> tuple[str, ...]:
    if not spec.cluster_ips:
        return (_address(spec.cluster_ip, _NOT_FORWARDABLE, "spec", "clusterIP"),)
    addresses = _addresses(spec.cluster_ips, _NOT_FORWARDABLE, "spec", "clusterIPs")
    if len(addresses) > len({family_of(address) for address in addresses}):
        raise must_be("at most one address of each IP family", addresses, "spec", "clusterIPs")
    return addresses


def _load_balancer_vips(service: schema.ApiService, ignored: list[IgnoredField]) -> tuple[str, ...]:
    """Return the addresses with ipMode VIP. Those that cannot be forwarded are added to `ignored`."""
    balancer = service.status and service.status.load_balancer
    if not balancer or not balancer.ingress:
        return ()
    vips = []
    for index, entry in enumerate(balancer.ingress):
        if not entry.ip or entry.ip_mode not in {None, "VIP"}:
            continue
        field = ("status", "loadBalancer", "ingress", index, "ip")
        address = _address(entry.ip, frozenset(), *field)
        if (special := special_range(address)) in _NOT_FORWARDABLE:
            ignored.append(IgnoredField(field, _special_address(special, entry.ip).problem))
        else:
            vips.append(address)
    return tuple(dict.fromkeys(vips))


def _convert_port(port: schema.ApiServicePort, index: int) -> ServicePort:
    if port.port is None:
        raise ObjectError("is missing", ("spec", "ports", index, "port"))
    if not 1 <= port.port <= MAX_PORT:
        raise _out_of_range(1, MAX_PORT, port.port, "spec", "ports", index, "port")
    if not 0 <= port.node_port <= MAX_PORT:
        raise _out_of_range(0, MAX_PORT, port.node_port, "spec", "ports", index, "nodePort")
    if port.name and not _LABEL.fullmatch(port.name):
        raise must_be(_LABEL_FORMAT, port.name, "spec", "ports", index, "name")
    protocol = _PROTOCOLS.get(port.protocol)
    if protocol is None:
        raise _unknown_protocol(port.protocol, "spec", "ports", index, "protocol")
    return ServicePort(intern(port.name), port.port, protocol, port.node_port)


def _check_duplicate_ports(ports: Sequence[ServicePort]) -> None:
    """Raise `ObjectError` if two ports with the same protocol have the same name, port or nodePort."""
    seen: set[tuple[str, str | int, str]] = set()
    for index, port in enumerate(ports):
        for field, value in (("name", port.name), ("port", port.port), ("nodePort", port.node_port)):
            if field == "nodePort" and not value:
                continue
            if (field, value, port.protocol) in seen:
                used = f"but {format_value(value)} is used twice"
                problem = f"must be unique among the Service's {port.protocol} ports, {used}"
                raise ObjectError(problem, ("spec", "ports", index, field))
            seen.add((field, value, port.protocol))


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
    if PROXY_NAME_LABEL in labels or HEADLESS_LABEL in labels or not _LABEL.fullmatch(service):
        return None  # a label that is not a valid name of a Service names no Service
    if endpoint_slice.address_type not in {"IPv4", "IPv6"}:
        return None
    family = Family(endpoint_slice.address_type)
    _check_name(metadata.namespace, "namespace", label=True)
    converted = [convert(endpoint, family) for endpoint in endpoints]
    usable = tuple([item for item in converted if isinstance(item, Endpoint)])
    if len(usable) < len(converted):
        ignored += [
            IgnoredField(("endpoints", index, *item.field), item.problem)
            for index, item in enumerate(converted)
            if isinstance(item, IgnoredField)
        ]
    ports: list[EndpointPort] = []
    for index, port in enumerate(endpoint_slice.ports or ()):
        converted_port = _convert_endpoint_port(port)
        if isinstance(converted_port, IgnoredField):
            ignored.append(IgnoredField(("ports", index, *converted_port.field), converted_port.problem))
        else:
            ports.append(converted_port)
    return EndpointSlice(
        namespace=intern(metadata.namespace),
        name=metadata.name,
        service=f"{metadata.namespace}/{service}",
        family=family,
        endpoints=usable,
        ports=tuple(ports),
        last_change=trigger_time((metadata.annotations or {}).get(TRIGGER_TIME_ANNOTATION, "")),
        invalid=len(ignored),
    )


def _convert_endpoint_port(port: schema.ApiEndpointPort) -> EndpointPort | IgnoredField:
    """Convert a port, or return the field that makes it unusable."""
    protocol = "TCP" if port.protocol is None else _PROTOCOLS.get(port.protocol)
    if protocol is None:
        return IgnoredField(("protocol",), _unknown_protocol(port.protocol or "").problem)
    if not port.port:
        return IgnoredField(("port",), "is missing")
    if not 1 <= port.port <= MAX_PORT:
        return IgnoredField(("port",), _out_of_range(1, MAX_PORT, port.port).problem)
    if port.name and not _LABEL.fullmatch(port.name):
        return IgnoredField(("name",), must_be(_LABEL_FORMAT, port.name).problem)
    return EndpointPort(intern(port.name or ""), port.port, protocol)


def trigger_time(text: str) -> float:
    """Return the time of the last change of an EndpointSlice, in seconds since the epoch, or 0.0 if it is unknown.

    `text` is the value of the annotation `TRIGGER_TIME_ANNOTATION`, or "".
    """
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
