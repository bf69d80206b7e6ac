"""From the API's JSON to the model: decode only the fields that decide rules, and reduce them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import msgspec

from kproxy.kube import wire
from kproxy.kube.canonical import canonical_address, canonical_cidr
from kproxy.kube.reduction import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    Decoded,
    ObjectError,
    reduce_endpoint,
    reduce_node,
    reduce_service,
    reduce_service_cidr,
    reduce_slice,
)
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Service, ServiceCIDR

__all__ = [
    "HEADLESS_LABEL",
    "PROXY_NAME_LABEL",
    "Decoded",
    "ObjectError",
    "canonical_address",
    "canonical_cidr",
    "decode_object",
]

Raw: TypeAlias = bytes | msgspec.Raw | dict[str, Any]

_W = TypeVar("_W", bound=wire.Wire)


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


_service = _decoder(wire.ServiceWire)
_endpoint_slice = _decoder(wire.EndpointSliceWire)
_node = _decoder(wire.NodeWire)
_service_cidr = _decoder(wire.ServiceCIDRWire)


def decode_object(kind: Kind, raw: Raw) -> Decoded:
    """Decode one Service, EndpointSlice, Node or ServiceCIDR.

    `raw` is JSON text, or parsed data (from YAML). Raises `ObjectError`, naming the field, for a value that
    has the wrong type or meaning.
    """
    if kind is Service:
        return reduce_service(_service(raw))
    if kind is EndpointSlice:
        endpoint_slice = _endpoint_slice(raw)
        return reduce_slice(endpoint_slice, endpoint_slice.endpoints or (), reduce_endpoint)
    if kind is ServiceCIDR:
        return reduce_service_cidr(_service_cidr(raw))
    return reduce_node(_node(raw))
