"""Reading protobuf messages from a description of the fields of interest. Pure.

The encoding is that of protobuf.dev/programming-guides/encoding. Not supported, as Kubernetes has none of them: groups,
packed lists, and a message field that comes in two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; the remaining two, groups, are not used by Kubernetes."""

_LONGEST_VARINT = 63
"""Bits by which the last of its bytes may be shifted."""

_S = TypeVar("_S")


class ProtobufError(ValueError):
    """Bytes that are not the message they should be; the message says why."""


class Field(NamedTuple):
    """How a field is read: the number and wire type before it, what makes a value of it, whether there are more."""

    tag: int
    convert: Callable[[Any], Any]
    repeated: bool = False


_Known: TypeAlias = dict[int, tuple[str, Callable[[Any], Any], bool]]


def message(shape: Callable[..., _S], **fields: Field) -> Callable[[bytes], _S]:
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


def text(number: int, *, repeated: bool = False) -> Field:
    """Return a string field. Raises `UnicodeDecodeError` when read, if it is not UTF-8."""
    return Field(number << 3 | _BYTES, bytes.decode, repeated)


def octets(number: int, *, repeated: bool = False) -> Field:
    """Return a field of bytes, or one whose message is to be read later."""
    return Field(number << 3 | _BYTES, bytes, repeated)


def integer(number: int) -> Field:
    """Return an int32 or int64 field."""
    return Field(number << 3 | _VARINT, _signed)


def boolean(number: int) -> Field:
    """Return a bool field."""
    return Field(number << 3 | _VARINT, bool)


def nested(number: int, read: Callable[[bytes], Any], *, repeated: bool = False) -> Field:
    """Return a field whose bytes `read` makes a value of, like those that `message` returns."""
    return Field(number << 3 | _BYTES, read, repeated)
