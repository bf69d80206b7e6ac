"""Decode protobuf messages field by field (protobuf.dev, "Encoding"). Pure.

A decoder of a message is made from its fields: `message(shape, name=text(1), port=integer(3))`. It skips all other
fields.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types. The other two wire types delimit groups, which Kubernetes does not use."""
_MAX_VARINT_SHIFT = 63
DECODING_ERRORS = (ValueError, IndexError)
"""What decoders raise for bytes that are not a valid message. IndexError: the bytes end inside a tag or a number."""
_S = TypeVar("_S")


class ProtobufError(ValueError):
    """Bytes that are not a valid encoding of the expected message. The error's text says why."""


class ProtobufField(NamedTuple):
    """A field of a message: its tag (number and wire type), its decoder, and whether it is repeated."""

    tag: int
    decode: Callable[[Any], Any]
    repeated: bool = False


_KnownFields: TypeAlias = dict[int, tuple[str, Callable[[Any], Any], bool]]


def message(shape: Callable[..., _S], **fields: ProtobufField) -> Callable[[bytes], _S]:
    """Return a decoder for messages with these `fields`. The decoder skips all other fields.

    The decoder passes the values to `shape` as keyword arguments and returns the result. It omits fields that the
    message does not contain. An empty string or message also counts as absent, unless the field is repeated; 0 and
    false count as present. The decoder raises `ProtobufError`, `IndexError` if the message ends inside a tag or a
    number, and whatever the decoders of the fields raise.
    """
    known = {field.tag: (name, field.decode, field.repeated) for name, field in fields.items()}
    return partial(_decode_message, known, shape)


def text(number: int, *, repeated: bool = False) -> ProtobufField:
    """Return a string field. Decoding raises `UnicodeDecodeError` for invalid UTF-8."""
    return ProtobufField(number << 3 | _BYTES, bytes.decode, repeated)


def octets(number: int, *, repeated: bool = False) -> ProtobufField:
    """Return a field whose value stays undecoded: bytes, or a message that is decoded later."""
    return ProtobufField(number << 3 | _BYTES, bytes, repeated)


def integer(number: int) -> ProtobufField:
    """Return an int32 or int64 field."""
    return ProtobufField(number << 3 | _VARINT, _signed)


def boolean(number: int) -> ProtobufField:
    """Return a bool field."""
    return ProtobufField(number << 3 | _VARINT, bool)


def nested(number: int, decode: Callable[[bytes], Any], *, repeated: bool = False) -> ProtobufField:
    """Return a message field. `decode` decodes the message, like the decoders that `message` returns."""
    return ProtobufField(number << 3 | _BYTES, decode, repeated)


def _decode_message(known: _KnownFields, shape: Callable[..., _S], raw: bytes) -> _S:
    values: dict[str, Any] = {}
    position, end = 0, len(raw)
    while position < end:
        tag, number = raw[position], raw[position + 1]
        position += 2
        if tag > 127 or tag & 5:
            tag, number, position = _uncommon_field(raw, position - 2)
        elif number > 127:
            number, position = varint(raw, position - 1)
        entry = known.get(tag)
        if tag & 7 == _BYTES:
            stop = position + number
            if entry:
                name, decode, repeated = entry
                if repeated:
                    values.setdefault(name, []).append(decode(raw[position:stop]))
                elif number:
                    values[name] = decode(raw[position:stop])
            position = stop
        elif entry:
            values[entry[0]] = entry[1](number)
    if position > end:
        raise ProtobufError("a field extends past the end of its message")
    return shape(**values)


def bytes_field(raw: bytes, position: int, number: int) -> tuple[int, int]:
    """Return the start and end of the content of field `number` (at most 15), whose tag must be at `position`.

    Raises `ProtobufError` if another tag is at `position` or if the field extends past the end of `raw`, and
    `IndexError` if `raw` ends before the content.
    """
    if raw[position] != number << 3 | _BYTES:
        raise ProtobufError(f"expected field {number}, but found tag {raw[position]:#x}")
    size, start = raw[position + 1], position + 2
    if size > 127:
        size, start = varint(raw, position + 1)
    if start + size > len(raw):
        raise ProtobufError("a field extends past the end of its message")
    return start, start + size


def _uncommon_field(raw: bytes, position: int) -> tuple[int, int, int]:
    """Decode the tag of a field whose tag is longer than one byte or whose value has a fixed size.

    Return the tag, the field's value or length (0 for a fixed-size value), and the position at which to continue.
    Raises `ProtobufError` for a wire type that Kubernetes does not use.
    """
    tag, position = varint(raw, position)
    wire_type = tag & 7
    if wire_type in {_VARINT, _BYTES}:
        number, position = varint(raw, position)
        return tag, number, position
    if wire_type in {_FIXED64, _FIXED32}:
        return tag, 0, position + (8 if wire_type == _FIXED64 else 4)
    raise ProtobufError(f"unsupported wire type {wire_type}")


def varint(raw: bytes, position: int) -> tuple[int, int]:
    """Decode a varint. Return its value and the position after it.

    Raises `ProtobufError` if it is longer than 64 bits, and `IndexError` if `raw` ends before its end.
    """
    value = raw[position]
    if value < 128:
        return value, position + 1
    value &= 127
    shift = 7
    while True:
        position += 1
        byte = raw[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7
        if shift > _MAX_VARINT_SHIFT:
            raise ProtobufError("a varint is longer than 64 bits")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
