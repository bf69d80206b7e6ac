"""What nft keeps in the kernel for itself, beside what the kernel needs: comments, and how a set's type was written.

The kernel hands it back unread. Without it, `nft list` could not say what the parts of a key are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kproxy.model.types import Family
from kproxy.nftables.objects import Field, Set, Value

_COMMENT = 0
_SET_KEY_BYTE_ORDER, _SET_DATA_BYTE_ORDER, _SET_KEY_TYPEOF, _SET_DATA_TYPEOF, _SET_DATA_INTERVAL, _SET_COMMENT = (
    0,
    1,
    3,
    4,
    6,
    7,
)
_BIG_ENDIAN = 2
_TYPEOF_EXPRESSION, _TYPEOF_DATA = 0, 1
_PAYLOAD, _META, _CONCATENATION, _NUMGEN = 7, 9, 13, 23
_IP, _IP6, _TRANSPORT = 12, 13, 11
_L4PROTO = 16


def comment(text: str) -> bytes:
    """Return the user data of a table, chain, rule or element that has a comment."""
    return _entry(_COMMENT, text.encode() + b"\0")


def set_userdata(found: Set, family: Family) -> bytes:
    """Return the user data of a set or map."""
    parts = [_number(_SET_KEY_BYTE_ORDER, 0 if len(found.key) > 1 else _BIG_ENDIAN)]
    if found.value is not Value.NOTHING:
        parts.append(_number(_SET_DATA_BYTE_ORDER, 0))
    if found.value is Value.ENDPOINT:
        parts.append(_entry(_SET_KEY_TYPEOF, _typeof(found.key, family)))
        parts.append(_entry(_SET_DATA_TYPEOF, _typeof((Field.DESTINATION, Field.PORT), family)))
    elif len(found.key) > 1:
        parts.append(_entry(_SET_KEY_TYPEOF, _typeof((), family)))
    if found.value is not Value.NOTHING:
        parts.append(_number(_SET_DATA_INTERVAL, 0))
    if found.comment:
        parts.append(_entry(_SET_COMMENT, found.comment.encode() + b"\0"))
    return b"".join(parts)


def _typeof(fields: Sequence[Field], family: Family) -> bytes:
    """Return how nft notes that a key was written as a concatenation of expressions."""
    parts = (_entry(place, _expression(field, family)) for place, field in enumerate(fields))
    return _number(_TYPEOF_EXPRESSION, _CONCATENATION) + _entry(_TYPEOF_DATA, b"".join(parts))


def _expression(field: Field, family: Family) -> bytes:
    kind, *details = _described(field, family)
    described = b"".join(_number(place, detail) for place, detail in enumerate(details))
    return _number(_TYPEOF_EXPRESSION, kind) + _entry(_TYPEOF_DATA, described)


def _described(field: Field, family: Family) -> tuple[int, ...]:
    """Return the kind of nft's expression for a field, and its details."""
    if field is Field.PROTOCOL:
        return _META, _L4PROTO
    if field is Field.PORT:
        return _PAYLOAD, _TRANSPORT, 2
    if field is Field.NUMBER:
        return _NUMGEN, 1, 2, 0  # random, mod 2, from 0: any modulus stands for all
    header, source, destination = (_IP6, 8, 9) if family is Family.IPV6 else (_IP, 11, 12)
    return _PAYLOAD, header, source if field is Field.SOURCE else destination


def _entry(kind: int, value: bytes) -> bytes:
    return bytes((kind, len(value))) + value


def _number(kind: int, value: int) -> bytes:
    return _entry(kind, value.to_bytes(4, sys.byteorder))
