"""Decode Services and EndpointSlices whose encoding differs from a known one only in names and addresses. Pure.

Decoding an object field by field takes tens of microseconds in Python. But most objects of a cluster have one of a few
shapes: for example, all Services with one ClusterIP and the TCP port 80 have the same bytes except for their metadata,
their selector and the address. A `ShapeReader` splits an object at these parts, which only takes a few comparisons. If
it knows the rest of the object, it also knows everything that follows from it, including that it is valid.

The first object of each shape, and every object with an unusual structure, is decoded field by field. Both ways give
the same result, because objects are only split between two fields. This relies on the order of the fields: Go writes
them in the order of their numbers. What kproxy does not use, such as the rest of the metadata, is not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from sys import intern
from typing import TypeAlias, TypeVar

from kproxy.kube.codec.contents import Contents
from kproxy.kube.codec.conversion import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    SERVICE_NAME_LABEL,
    TRIGGER_TIME_ANNOTATION,
    DecodedObject,
    IgnoredField,
    is_label,
    is_subdomain,
    trigger_time,
)
from kproxy.kube.codec.watch_events import Unchanged
from kproxy.kube.codec.wire_format import DECODING_ERRORS, message, varint
from kproxy.model.addresses import canonical_address, family_of, special_range
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service

ENDPOINT_CACHE_SIZE = 1024
"""Maximum number of endpoints that the reader of one watch caches.

They take about 0.4 MB. By default, the EndpointSlice controller puts at most 100 endpoints into one EndpointSlice.
"""
MAX_SHAPES = 256
"""Maximum number of shapes that are kept, of each kind: Services, ends of EndpointSlices, and endpoints."""
MAX_SHAPE_BYTES = 512
"""Maximum size of an encoded endpoint that is cached, and of the part of an object that belongs to its shape."""

# Tags: the number of a field and its wire type.
_NAME, _GENERATE_NAME, _NAMESPACE, _SELF_LINK, _UID, _RESOURCE_VERSION = 0x0A, 0x12, 0x1A, 0x22, 0x2A, 0x32
_GENERATION, _CREATED, _DELETED, _GRACE_PERIOD, _LABEL, _ANNOTATION = 0x38, 0x42, 0x4A, 0x50, 0x5A, 0x62
_BEFORE_LABELS = frozenset({_GENERATION, _CREATED, _DELETED, _GRACE_PERIOD})
_NUMBERS = frozenset({_GENERATION, _GRACE_PERIOD})
_METADATA, _SPEC, _ENDPOINT = 0x0A, 0x12, 0x12
_PORT, _SELECTOR, _CLUSTER_IP, _CLUSTER_IPS = 0x0A, 0x12, 0x1A, b"\x92\x01"
_ADDRESS, _CONDITIONS, _HOSTNAME, _TARGET = 0x0A, 0x12, 0x1A, 0x22
_ONE_BYTE = 127
"""The largest length that is encoded as one byte."""
_MAX_ADDRESS = 45


def _entry_start(key: str) -> bytes:
    """Return the first bytes of a label or annotation, up to the length of its value."""
    return b"\n%c%b\x12" % (len(key), key.encode())


_PROXY_NAME = PROXY_NAME_LABEL.encode()
_SERVICE_NAME_ENTRY = _entry_start(SERVICE_NAME_LABEL)
_OTHER_ENTRIES = (_entry_start(PROXY_NAME_LABEL)[:-1], _entry_start(HEADLESS_LABEL)[:-1])
_TRIGGER_TIME_ENTRY = _entry_start(TRIGGER_TIME_ANNOTATION)

_K = TypeVar("_K")
_V = TypeVar("_V")

_Names: TypeAlias = tuple[str, str, str, int, int]
"""An object's namespace, name and resourceVersion, the position after them, and the end of the metadata."""
_ServiceKey: TypeAlias = tuple[bytes, bytes, bytes, int, int]
"""The encoding of a Service's ports, what lies between both occurrences of its ClusterIP, and what follows the last
ClusterIP; how many bytes of that belong to the spec; and the number of ClusterIPs."""


class _Unusual(Exception):  # noqa: N818 - not an error
    """The object must be decoded field by field."""


class ShapeReader:
    """Decodes the Services or EndpointSlices of one watch, and remembers their shapes and contents.

    `decode` decodes an object field by field, and `decode_endpoint` an endpoint; they raise one of `DECODING_ERRORS`.
    """

    def __init__(
        self,
        decode: Callable[[bytes], DecodedObject],
        decode_endpoint: Callable[[bytes, Family], Endpoint | IgnoredField],
    ) -> None:
        self._decode = decode
        self._decode_endpoint = decode_endpoint
        self._namespaces: dict[bytes, str] = {}
        self._services: dict[_ServiceKey, Service] = {}
        self._slice_ends: dict[bytes, tuple[Family, tuple[EndpointPort, ...]]] = {}
        self._endpoints: dict[tuple[bytes, bytes, Family], Endpoint] = {}
        self._endpoint = lru_cache(maxsize=ENDPOINT_CACHE_SIZE)(self._read_endpoint)
        self._contents = Contents()

    def forget(self, namespace: str, name: str) -> None:
        """Forget the content of an object, which has been deleted or could not be decoded."""
        self._contents.forget(namespace, name)

    def read_service(self, raw: bytes, *, modified: bool) -> DecodedObject | Unchanged:
        """Decode a Service. Raises one of `DECODING_ERRORS`.

        If it is `modified`, and nothing that kproxy uses has changed since it was last read, return `Unchanged`.
        """
        try:
            return self._service(raw, modified=modified)
        except (_Unusual, *DECODING_ERRORS):
            return self._unusual(raw)

    def read_slice(self, raw: bytes, *, modified: bool) -> DecodedObject | Unchanged:
        """Like `read_service`, for an EndpointSlice."""
        try:
            return self._slice(raw, modified=modified)
        except (_Unusual, *DECODING_ERRORS):
            return self._unusual(raw)

    def _unusual(self, raw: bytes) -> DecodedObject:
        decoded = self._decode(raw)
        self.forget(decoded.namespace, decoded.name)
        return decoded

    def _service(self, raw: bytes, *, modified: bool) -> DecodedObject | Unchanged:
        namespace, name, resource_version, position, metadata_end = self._names(raw)
        if raw.find(_PROXY_NAME, position, metadata_end) >= 0 or not is_label(name):
            raise _Unusual
        content = raw[metadata_end:]
        if self._is_unchanged(namespace, name, content, modified=modified):
            return Unchanged(resource_version)
        key, addresses = _service_parts(content)
        shape = self._services.get(key)
        if shape is not None:
            service = _service_of(shape, namespace, name, addresses)
            return DecodedObject(namespace, name, resource_version, service)
        decoded = self._decode(raw)
        found = decoded.object
        if (
            isinstance(found, Service)
            and not decoded.ignored_fields
            and found == _service_of(found, namespace, name, addresses)
        ):
            self._new_service_shape(key, found)
        return decoded

    def _new_service_shape(self, key: _ServiceKey, service: Service) -> None:
        if _may_be_shape(*key[:3]) and _is_sequence_of_fields(key[1]):
            _remember(self._services, key, service)

    def _slice(self, raw: bytes, *, modified: bool) -> DecodedObject | Unchanged:
        namespace, name, resource_version, position, metadata_end = self._names(raw)
        service, triggered = _slice_metadata(raw, position, metadata_end)
        content = raw[metadata_end:]
        if self._is_unchanged(namespace, name, service, triggered, content, modified=modified):
            return Unchanged(resource_version)
        endpoints: list[bytes] = []
        position = 0
        while content[position] == _ENDPOINT:
            size, start = varint(content, position + 1)
            position = start + size
            endpoints.append(content[start:position])
        end = content[position:]
        owner = service.decode()
        if not (is_label(owner) and (is_label(name) or is_subdomain(name))):
            raise _Unusual
        known = self._slice_ends.get(end)
        decoded = self._decode(raw) if known is None else None
        if decoded is not None:
            if not isinstance(decoded.object, EndpointSlice) or decoded.ignored_fields:
                return decoded
            known = decoded.object.family, decoded.object.ports
        assert known is not None
        family, ports = known
        endpoint_slice = EndpointSlice(
            namespace,
            name,
            f"{namespace}/{owner}",
            family,
            tuple([self._known_endpoint(each, family) for each in endpoints]),
            ports,
            trigger_time(triggered.decode()),
        )
        if decoded is None:
            return DecodedObject(namespace, name, resource_version, endpoint_slice)
        if decoded.object == endpoint_slice and _may_be_shape(end):
            _remember(self._slice_ends, end, known)
        return decoded

    def _known_endpoint(self, raw: bytes, family: Family) -> Endpoint:
        # Anyone who may write EndpointSlices can make an endpoint long, for example with its targetRef.
        return self._endpoint(raw, family) if len(raw) <= MAX_SHAPE_BYTES else self._read_endpoint(raw, family)

    def _read_endpoint(self, raw: bytes, family: Family) -> Endpoint:
        if raw[0] != _ADDRESS or raw[1] > _MAX_ADDRESS:
            raise _Unusual
        position = start = 2 + raw[1]
        address = raw[2:position].decode()
        padded = raw + b"\0"  # not the tag of a field
        if padded[position] == _CONDITIONS:
            position = _next_field(padded, position)
        conditions = raw[start:position]
        if padded[position] == _HOSTNAME:
            position = _next_field(padded, position)
        if padded[position] == _TARGET:
            position = _next_field(padded, position)
        if position > len(raw) or not _is_usable(address) or family_of(address) is not family:
            raise _Unusual
        end = raw[position:]
        key = (conditions, end, family)
        shape = self._endpoints.get(key)
        if shape is None:
            decoded = self._decode_endpoint(raw, family)
            if not isinstance(decoded, Endpoint):
                raise _Unusual
            if decoded == _endpoint_of(decoded, address) and _may_be_shape(conditions, end):
                _remember(self._endpoints, key, decoded)
            return decoded
        return _endpoint_of(shape, address)

    def _is_unchanged(self, namespace: str, name: str, *content: bytes, modified: bool) -> bool:
        if modified:
            return self._contents.is_unchanged(namespace, name, *content)
        self._contents.forget(namespace, name)
        return False

    def _names(self, raw: bytes) -> _Names:
        """Read the metadata of an object up to its resourceVersion. Raises `_Unusual` or one of `DECODING_ERRORS`."""
        if raw[0] != _METADATA:
            raise _Unusual
        size, position = varint(raw, 1)
        end = position + size
        if raw[position] != _NAME or raw[position + 1] > _ONE_BYTE:
            raise _Unusual
        stop = _next_field(raw, position)
        name = raw[position + 2 : stop].decode()
        position = stop
        if raw[position] == _GENERATE_NAME:
            position = _next_field(raw, position)
        if raw[position] != _NAMESPACE or raw[position + 1] > _ONE_BYTE:
            raise _Unusual
        stop = _next_field(raw, position)
        namespace = self._namespaces.get(raw[position + 2 : stop]) or self._namespace(raw[position + 2 : stop])
        position = stop
        if raw[position] == _SELF_LINK:
            position = _next_field(raw, position)
        if raw[position] == _UID:
            position = _next_field(raw, position)
        if raw[position] != _RESOURCE_VERSION or raw[position + 1] > _ONE_BYTE:
            raise _Unusual
        stop = _next_field(raw, position)
        if stop > end:
            raise _Unusual
        return namespace, name, raw[position + 2 : stop].decode(), stop, end

    def _namespace(self, raw: bytes) -> str:
        namespace = raw.decode()
        if not is_label(namespace):
            raise _Unusual
        _remember(self._namespaces, raw, namespace)
        return intern(namespace)


def _service_parts(content: bytes) -> tuple[_ServiceKey, list[str]]:
    """Split the spec and status of a Service into what belongs to its shape, and its ClusterIPs.

    Raises `_Unusual` if there are none that rules can use, or one of `DECODING_ERRORS`.
    """
    if content[0] != _SPEC:
        raise _Unusual
    size, start = varint(content, 1)
    spec_end = start + size
    position = start
    while content[position] == _PORT:
        position = _next_field(content, position)
    ports = content[start:position]
    while content[position] == _SELECTOR:
        position = _next_field(content, position)
    if content[position] != _CLUSTER_IP or content[position + 1] > _MAX_ADDRESS:
        raise _Unusual
    stop = position + 2 + content[position + 1]
    between, found, rest = content[stop:].partition(_CLUSTER_IPS + content[position + 1 : stop])
    addresses = [content[position + 2 : stop].decode()]
    if rest.startswith(_CLUSTER_IPS):  # a dual-stack Service
        stop = 3 + rest[2]
        addresses.append(rest[3:stop].decode())
        rest = rest[stop:]
        if family_of(addresses[0]) is family_of(addresses[1]):
            raise _Unusual
    in_spec = spec_end - len(content) + len(rest)
    if not found or in_spec < 0 or not all(map(_is_usable, addresses)):
        raise _Unusual
    return (ports, between, rest, in_spec, len(addresses)), addresses


def _service_of(shape: Service, namespace: str, name: str, addresses: list[str]) -> Service:
    return Service(
        namespace,
        name,
        tuple(addresses),
        shape.ports,
        shape.affinity_seconds,
        shape.internal_local,
        shape.external_local,
        shape.external_ips,
        shape.vips,
        shape.source_ranges,
        shape.health_check_node_port,
    )


def _endpoint_of(shape: Endpoint, address: str) -> Endpoint:
    return Endpoint(
        address, shape.node, shape.ready, shape.serving, shape.terminating, shape.for_zones, shape.for_nodes
    )


def _slice_metadata(raw: bytes, position: int, end: int) -> tuple[bytes, bytes]:
    """Return the name of an EndpointSlice's Service and the time of its last change, undecoded.

    `position` is the position after the resourceVersion, and `end` the end of the metadata. Raises `_Unusual` if the
    slice gets no rules, or one of `DECODING_ERRORS`.
    """
    service = triggered = b""
    while position < end and raw[position] in _BEFORE_LABELS:
        numeric = raw[position] in _NUMBERS
        position = varint(raw, position + 1)[1] if numeric else _next_field(raw, position)
    while position < end and raw[position] == _LABEL:
        size, start = varint(raw, position + 1)
        position = start + size
        if raw.startswith(_SERVICE_NAME_ENTRY, start):
            service = _entry_value(raw, start + len(_SERVICE_NAME_ENTRY), position)
        elif raw.startswith(_OTHER_ENTRIES, start):
            raise _Unusual
    while position < end and raw[position] == _ANNOTATION:
        size, start = varint(raw, position + 1)
        position = start + size
        if raw.startswith(_TRIGGER_TIME_ENTRY, start):
            triggered = _entry_value(raw, start + len(_TRIGGER_TIME_ENTRY), position)
    if position > end or not service:
        raise _Unusual
    return service, triggered


def _entry_value(raw: bytes, position: int, end: int) -> bytes:
    """Return the value of a label or annotation whose length is at `position`. `end` is the end of the entry."""
    if raw[position] > _ONE_BYTE or position + 1 + raw[position] != end:
        raise _Unusual
    return raw[position + 1 : end]


def _next_field(raw: bytes, position: int) -> int:
    """Return the end of the string or message whose tag is at `position`."""
    size = raw[position + 1]
    if size <= _ONE_BYTE:
        return position + 2 + size
    size, start = varint(raw, position + 1)
    return start + size


def _is_usable(address: str) -> bool:
    """Return whether a text is an address in canonical form and in no special range."""
    return canonical_address(address) == address and not special_range(address)


_skip_fields = message(bool)


def _is_sequence_of_fields(raw: bytes) -> bool:
    try:
        _skip_fields(raw)
    except DECODING_ERRORS:
        return False
    return True


def _may_be_shape(*parts: bytes) -> bool:
    return sum(map(len, parts)) <= MAX_SHAPE_BYTES


def _remember(shapes: dict[_K, _V], key: _K, value: _V) -> None:
    if len(shapes) >= MAX_SHAPES:
        shapes.clear()
    shapes[key] = value
