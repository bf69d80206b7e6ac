"""Decode what the API server sends as JSON: watch events, list pages, Status and single objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from kproxy.kube.codec import schema as wire
from kproxy.kube.codec.conversion import (
    DecodedObject,
    ObjectError,
    convert_endpoint,
    convert_node,
    convert_service,
    convert_service_cidr,
    convert_slice,
)
from kproxy.kube.codec.protobuf import MAGIC, read_status
from kproxy.kube.codec.schema import ApiStatus
from kproxy.kube.codec.watch_events import (
    INITIAL_EVENTS_END,
    LONGEST_TEXT,
    Bookmark,
    Deleted,
    ErrorStatus,
    Event,
    UndecodableObject,
    one_line,
    refusal_of,
)
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

Raw: TypeAlias = bytes | msgspec.Raw | dict[str, Any]
_W = TypeVar("_W", bound=wire.ApiStruct)


def _decoder(shape: type[_W]) -> Callable[[Raw], _W]:
    from_text = msgspec.json.Decoder(shape).decode

    def decode(raw: Raw) -> _W:
        try:
            return msgspec.convert(raw, shape) if isinstance(raw, dict) else from_text(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is a DecodeError
            raise ObjectError(str(error)) from None
        except RecursionError:
            raise ObjectError("nested too deeply") from None

    return decode


_service = _decoder(wire.ApiService)
_endpoint_slice = _decoder(wire.ApiEndpointSlice)
_node = _decoder(wire.ApiNode)
_service_cidr = _decoder(wire.ApiServiceCIDR)


def decode_object(kind: Kind, raw: Raw) -> DecodedObject:
    """Decode one Service, EndpointSlice, Node or ServiceCIDR.

    `raw` is JSON text, or parsed data (from YAML). Raises `ObjectError`, naming the field, for a value that
    has the wrong type or meaning.
    """
    if kind is Service:
        return convert_service(_service(raw))
    if kind is EndpointSlice:
        endpoint_slice = _endpoint_slice(raw)
        return convert_slice(endpoint_slice, endpoint_slice.endpoints or (), convert_endpoint)
    if kind is ServiceCIDR:
        return convert_service_cidr(_service_cidr(raw))
    return convert_node(_node(raw))


class AnswerError(ValueError):
    """A list page that cannot be read at all; the message says why."""


class ListPage(Struct, frozen=True):
    """One page of a list; `continue_token` is "" on the last one."""

    resource_version: str
    continue_token: str
    items: tuple[DecodedObject | UndecodableObject, ...]


class _ObjectMetadata(Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class _NamedObject(Struct):
    metadata: _ObjectMetadata


class _WatchLine(Struct):
    type: str
    object: msgspec.Raw


class _ListMetadata(Struct, rename="camel"):
    resource_version: str = ""
    continue_token: str = msgspec.field(default="", name="continue")


class _ListBody(Struct):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


_line = msgspec.json.Decoder(_WatchLine)
_named = msgspec.json.Decoder(_NamedObject)
_list = msgspec.json.Decoder(_ListBody)
_status = msgspec.json.Decoder(ApiStatus)

# Text that is no JSON, not UTF-8, of the wrong shape, or nested deeper than the decoder's stack.
_BAD_TEXT = (ValueError, RecursionError)


def read_line(kind: Kind, raw: bytes) -> Event:
    """Read one line of a watch of `kind`. Never raises: what cannot be read becomes `UndecodableObject`."""
    try:
        line = _line.decode(raw)
        if line.type in {"ADDED", "MODIFIED"}:
            return _read_object(kind, line.object)
        if line.type == "ERROR":
            return refusal_of(_status.decode(line.object), 0, 0.0)
        metadata = _named.decode(line.object).metadata
    except _BAD_TEXT as error:
        return UndecodableObject("", "", "", one_line(str(error)))
    if line.type == "BOOKMARK":
        ends_initial = (metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true"
        return Bookmark(metadata.resource_version, ends_initial)
    if line.type == "DELETED" and metadata.name:
        return Deleted(metadata.namespace, metadata.name, metadata.resource_version)
    return UndecodableObject("", "", "", one_line(f"Expected a watch event with a named object, got {line.type!r}"))


def read_page(kind: Kind, raw: bytes) -> ListPage:
    """Read one page of a list of `kind`. Raises `AnswerError` if it is no list at all."""
    try:
        found = _list.decode(raw)
    except _BAD_TEXT as error:
        raise AnswerError(one_line(str(error))) from None
    items = tuple(_read_object(kind, item) for item in found.items or ())
    return ListPage(found.metadata.resource_version, found.metadata.continue_token, items)


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> ErrorStatus:
    """Read an HTTP answer other than 200; the body may be a Status, in either form, or any proxy's error page."""
    texts = {name.lower(): value for name, value in headers.items()}
    header = texts.get("retry-after", "")
    after = float(header) if header.isascii() and header.isdigit() else 0.0
    try:
        found = read_status(body) if body.startswith(MAGIC) else _status.decode(body)
    except _BAD_TEXT:
        found = ApiStatus(message=body[: LONGEST_TEXT * 4].decode(errors="replace"))
    return refusal_of(found, status, after)


def _read_object(kind: Kind, raw: msgspec.Raw) -> DecodedObject | UndecodableObject:
    try:
        decoded = decode_object(kind, raw)
    except _BAD_TEXT as error:
        return _unreadable(raw, one_line(str(error)))
    if not decoded.name:
        return UndecodableObject("", "", "", "Expected a name - at `$.metadata.name`")
    return decoded


def _unreadable(raw: msgspec.Raw, text: str) -> UndecodableObject:
    try:
        metadata = _named.decode(raw).metadata
    except _BAD_TEXT:
        return UndecodableObject("", "", "", text)
    return UndecodableObject(metadata.namespace, metadata.name, metadata.resource_version, text)
