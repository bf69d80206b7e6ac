"""What the API server answers in protobuf: the frames of a watch, and the Status of a refusal. Pure.

A frame is a bare `meta/v1.WatchEvent`; the object in it has the envelope of every answer: `k8s` and a zero
byte, then a `runtime.Unknown` that names its kind (Kubernetes API concepts, "Protobuf encoding"). The numbers are
those of the `generated.proto` files of k8s.io/api and k8s.io/apimachinery. Go writes plain fields even if they are
empty, where JSON leaves them out: here too, an empty text or message is none.

Why not the `protobuf` package: importing it alone adds 3 to 4 MB, and the values have to be fetched from its messages
one by one. This reader passes over what decides no rules (managedFields, targetRef, selectors, most labels) by its
length, and does not read again what came before: in a change of an EndpointSlice most endpoints are byte for byte
those of the last one. Measured with objects as Helm and the controllers write them, from a TLS socket to the value, in
microseconds and bytes per event, against typed JSON: a change in a slice of 10 endpoints 75 and 2485 against 72 and
4253, in one of 100 205 and 14471 against 314 and 28074; a Service 49 and 1121 against 30 and 1569. What is all new, as
in the initial list, takes 131 against 82 for a slice of 10. Memory is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, get_args

from msgspec import Struct, field

from kproxy.kube.codec import schema as wire
from kproxy.kube.codec.conversion import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    SERVICE_NAME_LABEL,
    TRIGGER_TIME_ANNOTATION,
    ZONE_LABEL,
    DecodedObject,
    ObjectError,
    convert_endpoint,
    convert_node,
    convert_service,
    convert_service_cidr,
    convert_slice,
)
from kproxy.kube.codec.watch_events import (
    INITIAL_EVENTS_END,
    Bookmark,
    Deleted,
    Event,
    UndecodableObject,
    one_line,
    refusal_of,
)
from kproxy.model.delta import Kind
from kproxy.model.types import Endpoint, EndpointSlice, Family, Protocol, Service, ServiceCIDR

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; the remaining two, groups, are not used by Kubernetes."""
_LONGEST_VARINT = 63
"""Bits by which the last of its bytes may be shifted."""
_S = TypeVar("_S")


class ProtobufError(ValueError):
    """Bytes that are not the message they should be; the message says why."""


class ProtobufField(NamedTuple):
    """How a field is read: the number and wire type before it, what makes a value of it, whether there are more."""

    tag: int
    convert: Callable[[Any], Any]
    repeated: bool = False


_Known: TypeAlias = dict[int, tuple[str, Callable[[Any], Any], bool]]


def message(shape: Callable[..., _S], **fields: ProtobufField) -> Callable[[bytes], _S]:
    """Return what reads a message and calls `shape` with those of `fields` that are there; others are skipped.

    An empty text or message counts as not there, a 0 or false does not. Reading raises `ProtobufError`, whatever a
    field's own reader raises, and `IndexError` for a message that is cut off.
    """
    known = {field.tag: (name, field.convert, field.repeated) for name, field in fields.items()}
    return partial(_read, known, shape)


def _read(known: _Known, shape: Callable[..., _S], raw: bytes) -> _S:
    found: dict[str, Any] = {}
    position, end = 0, len(raw)
    while position < end:
        tag, number = raw[position], raw[position + 1]
        position += 2
        if tag > 127 or tag & 5:
            tag, number, position = _uncommon(raw, position - 2)
        elif number > 127:
            number, position = _varint(raw, position - 1)
        if tag & 7 == _BYTES:
            stop = position + number
            if tag in known:
                name, convert, repeated = known[tag]
                if repeated:
                    found.setdefault(name, []).append(convert(raw[position:stop]))
                elif number:
                    found[name] = convert(raw[position:stop])
            position = stop
        elif tag in known:
            name, convert, _ = known[tag]
            found[name] = convert(number)
    if position > end:
        raise ProtobufError("a field is longer than its message")
    return shape(**found)


def span(raw: bytes, position: int, number: int) -> tuple[int, int]:
    """Return where the bytes of field `number`, below 16, begin and end. Raises `ProtobufError` for another field."""
    if raw[position] != number << 3 | _BYTES:
        raise ProtobufError(f"Expected field {number}, got {raw[position]:#x}")
    size, begin = _varint(raw, position + 1)
    if begin + size > len(raw):
        raise ProtobufError("a field is longer than its message")
    return begin, begin + size


def _uncommon(raw: bytes, position: int) -> tuple[int, int, int]:
    """Return a tag of several bytes or of a fixed length, its value or length (0 if fixed), and what follows these."""
    tag, position = _varint(raw, position)
    kind = tag & 7
    if kind in {_VARINT, _BYTES}:
        number, position = _varint(raw, position)
        return tag, number, position
    if kind in {_FIXED64, _FIXED32}:
        return tag, 0, position + (8 if kind == _FIXED64 else 4)
    raise ProtobufError(f"a field of wire type {kind}, which Kubernetes does not use")


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > _LONGEST_VARINT:
            raise ProtobufError("a number of more than 64 bits")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def text(number: int, *, repeated: bool = False) -> ProtobufField:
    """Return a string field. Raises `UnicodeDecodeError` when read, if it is not UTF-8."""
    return ProtobufField(number << 3 | _BYTES, bytes.decode, repeated)


def octets(number: int, *, repeated: bool = False) -> ProtobufField:
    """Return a field of bytes, or one whose message is to be read later."""
    return ProtobufField(number << 3 | _BYTES, bytes, repeated)


def integer(number: int) -> ProtobufField:
    """Return an int32 or int64 field."""
    return ProtobufField(number << 3 | _VARINT, _signed)


def boolean(number: int) -> ProtobufField:
    """Return a bool field."""
    return ProtobufField(number << 3 | _VARINT, bool)


def nested(number: int, read: Callable[[bytes], Any], *, repeated: bool = False) -> ProtobufField:
    """Return a field whose bytes `read` makes a value of, like those that `message` returns."""
    return ProtobufField(number << 3 | _BYTES, read, repeated)


MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\0"
"""What an answer in protobuf begins with. JSON never does."""
KEPT_ENDPOINTS = 1024
"""Endpoints of a watch that are remembered by their bytes: about 0.4 MB, and ten slices of the usual limit of 100."""


_PROTOCOLS = frozenset(get_args(Protocol))


def _protocol(raw: bytes) -> str:
    found = raw.decode()
    if found not in _PROTOCOLS:
        raise ObjectError(f"Expected TCP, UDP or SCTP, got {found!r} - at `ports[...].protocol`")
    return found


def _entry(key: str = "", value: str = "") -> tuple[str, str]:
    return key, value


_read_entry = message(_entry, key=text(1), value=text(2))
_KEPT_KEYS = (
    *(SERVICE_NAME_LABEL, PROXY_NAME_LABEL, HEADLESS_LABEL, ZONE_LABEL),
    *(TRIGGER_TIME_ANNOTATION, INITIAL_EVENTS_END),
)
_KEPT_ENTRIES = tuple(b"\n%c%b" % (len(key), key.encode()) for key in _KEPT_KEYS)


def _label(raw: bytes) -> tuple[str, str] | None:
    """Read a label or annotation, but only if it decides anything: Go writes the key first."""
    return _read_entry(raw) if raw.startswith(_KEPT_ENTRIES) else None


def _metadata(
    labels: list[tuple[str, str] | None] | None = None,
    annotations: list[tuple[str, str] | None] | None = None,
    **found: str,
) -> wire.ApiMetadata:
    return wire.ApiMetadata(
        labels=dict(filter(None, labels or ())), annotations=dict(filter(None, annotations or ())), **found
    )


_METADATA = message(
    _metadata,
    name=text(1),
    namespace=text(3),
    uid=text(5),
    resource_version=text(6),
    deletion_timestamp=nested(9, repr),  # a Time; only whether there is one matters
    labels=nested(11, _label, repeated=True),
    annotations=nested(12, _label, repeated=True),
)
_NAME_OF = nested(1, _METADATA)
_NO_NAME = wire.ApiMetadata()
_SERVICE_PORT = lru_cache(maxsize=256)(  # most are those of some other Service
    message(wire.ApiServicePort, name=text(1), protocol=nested(2, _protocol), port=integer(3), node_port=integer(5))
)
_AFFINITY = message(wire.ApiAffinityConfig, client_ip=nested(1, message(wire.ApiClientIP, timeout_seconds=integer(1))))
_SERVICE_SPEC = message(
    wire.ApiServiceSpec,
    ports=nested(1, _SERVICE_PORT, repeated=True),
    cluster_ip=text(3),
    type=text(4),
    external_ips=text(5, repeated=True),
    session_affinity=text(7),
    load_balancer_source_ranges=text(9, repeated=True),
    external_traffic_policy=text(11),
    health_check_node_port=integer(12),
    session_affinity_config=nested(14, _AFFINITY),
    cluster_ips=text(18, repeated=True),
    internal_traffic_policy=text(22),
)
_LOAD_BALANCER = message(
    wire.ApiLoadBalancer, ingress=nested(1, message(wire.ApiIngress, ip=text(1), ip_mode=text(3)), repeated=True)
)
_SERVICE = message(
    partial(wire.ApiService, metadata=_NO_NAME),
    metadata=_NAME_OF,
    spec=nested(2, _SERVICE_SPEC),
    status=nested(3, message(wire.ApiServiceStatus, load_balancer=nested(1, _LOAD_BALANCER))),
)
_NAMED = message(wire.ApiNamed, name=text(1))
_CONDITIONS = lru_cache(maxsize=32)(  # there are not many different ones
    message(wire.ApiConditions, ready=boolean(1), serving=boolean(2), terminating=boolean(3))
)
_ENDPOINT = message(
    wire.ApiEndpoint,
    addresses=text(1, repeated=True),
    conditions=nested(2, _CONDITIONS),
    node_name=text(6),
    hints=nested(
        8,
        message(wire.ApiHints, for_zones=nested(1, _NAMED, repeated=True), for_nodes=nested(2, _NAMED, repeated=True)),
    ),
)
_ENDPOINT_PORT = lru_cache(maxsize=256)(
    message(wire.ApiEndpointPort, name=text(1), protocol=nested(2, _protocol), port=integer(3))
)


class _UndecodedSlice(Struct):
    """An EndpointSlice whose endpoints are not read yet: how they are depends on a field after them."""

    metadata: wire.ApiMetadata = field(default_factory=wire.ApiMetadata)
    address_type: str = ""
    endpoints: list[bytes] = []
    ports: list[wire.ApiEndpointPort] | None = None


_SLICE = message(
    _UndecodedSlice,
    metadata=_NAME_OF,
    endpoints=octets(2, repeated=True),
    ports=nested(3, _ENDPOINT_PORT, repeated=True),
    address_type=text(4),
)
_NODE_SPEC = message(
    wire.ApiNodeSpec,
    pod_cidr=text(1),
    taints=nested(5, message(wire.ApiTaint, key=text(1)), repeated=True),
    pod_cidrs=text(7, repeated=True),
)
_NODE_ADDRESS = message(wire.ApiNodeAddress, type=text(1), address=text(2))
_NODE = message(
    partial(wire.ApiNode, metadata=_NO_NAME),
    metadata=_NAME_OF,
    spec=nested(2, _NODE_SPEC),
    status=nested(3, message(wire.ApiNodeStatus, addresses=nested(5, _NODE_ADDRESS, repeated=True))),
)
_SERVICE_CIDR = message(
    partial(wire.ApiServiceCIDR, metadata=_NO_NAME),
    metadata=_NAME_OF,
    spec=nested(2, message(wire.ApiServiceCIDRSpec, cidrs=text(1, repeated=True))),
)
_STATUS = message(
    wire.ApiStatus,
    message=text(3),
    reason=text(4),
    details=nested(5, message(wire.ApiStatusDetails, retry_after_seconds=integer(5))),
    code=integer(6),
)


def _kind(kind: str = "") -> str:
    return kind


def _form(encoding: str = "", media_type: str = "") -> tuple[str, str]:
    return encoding, media_type


_TYPE_META = lru_cache(maxsize=8)(message(_kind, kind=text(2)))
_FORM = message(_form, encoding=text(3), media_type=text(4))
_ONLY_METADATA = message(partial(wire.ApiService, metadata=_NO_NAME), metadata=_NAME_OF)
_BAD_BYTES = (ValueError, IndexError)  # IndexError: cut off


def _reason(error: Exception) -> str:
    return "a message is cut off" if isinstance(error, IndexError) else one_line(str(error))


def _opened(raw: bytes, kind: str) -> bytes:
    """Take an object of `kind` out of its envelope, whose parts Go writes in the order of their numbers."""
    if not raw.startswith(MAGIC):
        raise ProtobufError(f"Expected an object that begins with {MAGIC!r}, got {raw[:4]!r}")
    begin, end = span(raw, len(MAGIC), 1)
    found = _TYPE_META(raw[begin:end])
    if found != kind:
        raise ProtobufError(f"Expected a {kind}, got {found!r}")
    begin, end = span(raw, end, 2)
    encoding, media_type = _FORM(raw[end:])
    if encoding or media_type not in {"", MEDIA_TYPE}:
        raise ProtobufError(f"Expected plain protobuf, got {media_type!r} encoded as {encoding!r}")
    return raw[begin:end]


def _change(frame: bytes) -> tuple[str, bytes]:
    """Take a WatchEvent apart: what happened, and the object in its envelope."""
    begin, end = span(frame, 0, 1)
    change = frame[begin:end].decode()
    begin, end = span(frame, end, 2)
    begin, end = span(frame[:end], begin, 1)
    return change, frame[begin:end]


def read_status(raw: bytes) -> wire.ApiStatus:
    """Read the Status in a whole answer. Raises `ProtobufError`."""
    try:
        return _STATUS(_opened(raw, "Status"))
    except _BAD_BYTES as error:
        raise ProtobufError(_reason(error)) from None


def _read_endpoint(raw: bytes, family: Family) -> Endpoint | str:
    return convert_endpoint(_ENDPOINT(raw), family)


class FrameReader:
    """Reads the frames of one watch of `kind`, and remembers endpoints that come again."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._read_endpoint = lru_cache(maxsize=KEPT_ENDPOINTS)(_read_endpoint)

    def read(self, frame: bytes) -> Event:
        """Read one frame, without its length. Never raises: what cannot be read becomes `UndecodableObject`."""
        try:
            change, envelope = _change(frame)
            if change == "ERROR":
                return refusal_of(_STATUS(_opened(envelope, "Status")), 0, 0.0)
            raw = _opened(envelope, self._kind.__name__)
            if change in {"ADDED", "MODIFIED"}:
                return self._read_object(raw)
            metadata = _ONLY_METADATA(raw).metadata
        except _BAD_BYTES as error:
            return UndecodableObject("", "", "", _reason(error))
        if change == "BOOKMARK":
            ends_initial = (metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true"
            return Bookmark(metadata.resource_version, ends_initial)
        if change == "DELETED" and metadata.name:
            return Deleted(metadata.namespace, metadata.name, metadata.resource_version)
        return UndecodableObject("", "", "", one_line(f"Expected a watch event with a named object, got {change!r}"))

    def _read_object(self, raw: bytes) -> DecodedObject | UndecodableObject:
        try:
            return self._decode(raw)
        except _BAD_BYTES as error:
            metadata = _ONLY_METADATA(raw).metadata
            return UndecodableObject(metadata.namespace, metadata.name, metadata.resource_version, _reason(error))

    def _decode(self, raw: bytes) -> DecodedObject:
        if self._kind is Service:
            return convert_service(_SERVICE(raw))
        if self._kind is EndpointSlice:
            found = _SLICE(raw)
            rest = wire.ApiEndpointSlice(found.metadata, found.address_type, None, found.ports)
            return convert_slice(rest, found.endpoints, self._read_endpoint)
        if self._kind is ServiceCIDR:
            return convert_service_cidr(_SERVICE_CIDR(raw))
        return convert_node(_NODE(raw))
