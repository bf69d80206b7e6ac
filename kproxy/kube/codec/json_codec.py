"""Decode JSON from the API server: watch events, list pages, Status and single objects. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from kproxy.kube.codec import schema
from kproxy.kube.codec.contents import Contents
from kproxy.kube.codec.conversion import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    SERVICE_NAME_LABEL,
    TRIGGER_TIME_ANNOTATION,
    DecodedObject,
    convert_endpoint,
    convert_node,
    convert_service,
    convert_service_cidr,
    convert_slice,
)
from kproxy.kube.codec.object_error import ObjectError, explain
from kproxy.kube.codec.protobuf import MAGIC, read_status
from kproxy.kube.codec.watch_events import (
    INITIAL_EVENTS_END,
    MAX_TEXT_LENGTH,
    Bookmark,
    Deleted,
    ErrorStatus,
    Event,
    Unchanged,
    UndecodableObject,
    deleted_event,
    error_from_status,
    one_line,
)
from kproxy.kube.codec.wire_format import ProtobufError
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

Raw: TypeAlias = bytes | msgspec.Raw | Any
"""JSON text, or data that was parsed from YAML."""
_JSON_TEXT = (bytes, msgspec.Raw)
_MODIFIED = b'{"type":"MODIFIED",'
"""The start of an event of this type, as Go writes it."""
_NO_JSON = msgspec.Raw()
_S = TypeVar("_S", bound=Struct)


class ListPageError(ValueError):
    """A list page cannot be decoded. The message says why."""


class ListPage(Struct, frozen=True):
    """One page of a list; `continue_token` is "" on the last page."""

    resource_version: str
    continue_token: str
    items: tuple[DecodedObject | UndecodableObject, ...]


class _ObjectMetadata(Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class _ObjectHeader(Struct):
    metadata: _ObjectMetadata


class _WatchEvent(Struct):
    type: str
    object: msgspec.Raw


class _SliceParts(Struct, rename="camel"):
    metadata: schema.ApiMetadata
    endpoints: msgspec.Raw = _NO_JSON
    ports: msgspec.Raw = _NO_JSON
    address_type: str = ""


class _ServiceParts(Struct):
    metadata: schema.ApiMetadata
    spec: msgspec.Raw = _NO_JSON
    status: msgspec.Raw = _NO_JSON


class _SliceEvent(Struct):
    object: _SliceParts


class _ServiceEvent(Struct):
    object: _ServiceParts


class _ListMetadata(Struct, rename="camel"):
    resource_version: str = ""
    continue_token: str = msgspec.field(default="", name="continue")


class _ObjectList(Struct):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


def decoder(shape: type[_S]) -> Callable[[Raw], _S]:
    """Return a function that decodes JSON text or parsed data as a `shape`. The function raises `ObjectError`."""
    decode_json = msgspec.json.Decoder(shape).decode

    def decode(raw: Raw) -> _S:
        try:
            return decode_json(raw) if isinstance(raw, _JSON_TEXT) else msgspec.convert(raw, shape)
        except (ValueError, RecursionError) as error:
            raise explain(error, raw) from None

    return decode


_decode_event = msgspec.json.Decoder(_WatchEvent).decode
_decode_service_event = msgspec.json.Decoder(_ServiceEvent).decode
_decode_slice_event = msgspec.json.Decoder(_SliceEvent).decode
_decode_service = decoder(schema.ApiService)
_decode_slice = decoder(schema.ApiEndpointSlice)
_decode_node = decoder(schema.ApiNode)
_decode_service_cidr = decoder(schema.ApiServiceCIDR)
_decode_status = decoder(schema.ApiStatus)
_decode_metadata = decoder(_ObjectHeader)
_decode_list = decoder(_ObjectList)


def decode_object(kind: Kind, raw: Raw) -> DecodedObject:
    """Decode one Service, EndpointSlice, Node or ServiceCIDR. Raises `ObjectError` for an invalid field."""
    if kind is Service:
        return convert_service(_decode_service(raw))
    if kind is EndpointSlice:
        endpoint_slice = _decode_slice(raw)
        return convert_slice(endpoint_slice, endpoint_slice.endpoints or (), convert_endpoint)
    if kind is ServiceCIDR:
        return convert_service_cidr(_decode_service_cidr(raw))
    return convert_node(_decode_node(raw))


def read_line(kind: Kind, raw: bytes) -> Event:
    """Decode one line of a watch of `kind`.

    Never raises: a line that cannot be decoded becomes an `UndecodableObject`.
    """
    try:
        event = _decode_event(raw)
    except (ValueError, RecursionError) as error:
        return UndecodableObject("", "", "", one_line(str(explain(error, raw))))
    try:
        if event.type in {"ADDED", "MODIFIED"}:
            return _decode_item(kind, event.object)
        if event.type == "ERROR":
            return error_from_status(_decode_status(event.object))
        metadata = _decode_metadata(event.object).metadata
        if event.type == "BOOKMARK":
            initial_events_end = (metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true"
            return Bookmark(metadata.resource_version, initial_events_end)
        return deleted_event(event.type, metadata.namespace, metadata.name, metadata.resource_version)
    except ObjectError as error:
        return UndecodableObject("", "", "", one_line(str(error)))


class LineReader:
    """Decodes the lines of one watch of `kind`, and recognizes events that change nothing that kproxy uses."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._contents = Contents()

    def read(self, raw: bytes) -> Event:
        """Like `read_line`, but return `Unchanged` for such an event."""
        modified = raw.startswith(_MODIFIED)
        if modified and (unchanged := self._unchanged(raw)):
            return unchanged
        event = read_line(self._kind, raw)
        if isinstance(event, Deleted | UndecodableObject) or (isinstance(event, DecodedObject) and not modified):
            self._contents.forget(event.namespace, event.name)
        return event

    def _unchanged(self, raw: bytes) -> Unchanged | None:
        try:
            if self._kind is EndpointSlice:
                part = _decode_slice_event(raw).object
                metadata = part.metadata
                content: tuple[object, ...] = (bytes(part.endpoints), bytes(part.ports), part.address_type)
            elif self._kind is Service:
                service = _decode_service_event(raw).object
                metadata, content = service.metadata, (bytes(service.spec), bytes(service.status))
            else:
                return None
        except (ValueError, RecursionError):
            return None  # `read_line` says what is wrong
        labels, annotations = metadata.labels or {}, metadata.annotations or {}
        used = [labels.get(SERVICE_NAME_LABEL), PROXY_NAME_LABEL in labels, HEADLESS_LABEL in labels]
        used.append(annotations.get(TRIGGER_TIME_ANNOTATION))
        if self._contents.is_unchanged(metadata.namespace, metadata.name, *used, *content):
            return Unchanged(metadata.resource_version)
        return None


def read_page(kind: Kind, raw: bytes) -> ListPage:
    """Decode one page of a list of `kind`. An item that is invalid becomes an `UndecodableObject`.

    Raises `ListPageError` if the page is not valid JSON or not a list.
    """
    try:
        page = _decode_list(raw)
    except ObjectError as error:
        raise ListPageError(one_line(str(error))) from None
    items = tuple(_decode_item(kind, item) for item in page.items or ())
    return ListPage(page.metadata.resource_version, page.metadata.continue_token, items)


def read_error(status: int, headers: Mapping[str, str], body: bytes) -> ErrorStatus:
    """Decode an HTTP response whose status is not 200.

    The body can be a Status in JSON or protobuf, or any other text, such as the error page of a proxy. Never raises.
    """
    lower_case = {name.lower(): value for name, value in headers.items()}
    header = lower_case.get("retry-after", "")
    seconds = float(header) if header.isascii() and header.isdigit() else 0.0
    try:
        body_status = read_status(body) if body.startswith(MAGIC) else _decode_status(body)
    except (ObjectError, ProtobufError):
        body_status = schema.ApiStatus(message=body[: MAX_TEXT_LENGTH * 4].decode(errors="replace"))
    return error_from_status(body_status, status, seconds)


def _decode_item(kind: Kind, raw: msgspec.Raw) -> DecodedObject | UndecodableObject:
    try:
        return decode_object(kind, raw)
    except ObjectError as error:
        return _undecodable(raw, one_line(str(error)))


def _undecodable(raw: msgspec.Raw, text: str) -> UndecodableObject:
    try:
        metadata = _decode_metadata(raw).metadata
    except ObjectError:
        return UndecodableObject("", "", "", text)
    return UndecodableObject(metadata.namespace, metadata.name, metadata.resource_version, text)
