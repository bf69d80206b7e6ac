"""Compare rules in the kernel with kproxy's rules, independently of how the kernel dumps them. Pure.

A dump of a rule is not identical to the message that created it (Linux 6.18). The kernel numbers a register by its
first 16 bytes if it can, adds attributes that have their default values, and clears the flag NLA_F_NESTED. All
expressions are therefore converted to the same form before they are compared. An attribute that this module does not
know is kept, so that a rule that has it differs.
"""

from __future__ import annotations

import struct
from functools import lru_cache

from msgspec import Struct

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink_message import attributes, iterate_attributes
from kproxy.model.types import Family
from kproxy.nftables.expressions import encode_rule
from kproxy.nftables.ruleset import NftRule

_REGISTERS = {
    b"bitwise": (nf.NFTA_BITWISE_SREG, nf.NFTA_BITWISE_DREG),
    b"cmp": (nf.NFTA_CMP_SREG,),
    b"ct": (nf.NFTA_CT_DREG,),
    b"dynset": (nf.NFTA_DYNSET_SREG_KEY,),
    b"fib": (nf.NFTA_FIB_DREG,),
    b"immediate": (nf.NFTA_IMMEDIATE_DREG,),
    b"lookup": (nf.NFTA_LOOKUP_SREG, nf.NFTA_LOOKUP_DREG),
    b"meta": (nf.NFTA_META_DREG, nf.NFTA_META_SREG),
    b"nat": (
        nf.NFTA_NAT_REG_ADDR_MIN,
        nf.NFTA_NAT_REG_ADDR_MAX,
        nf.NFTA_NAT_REG_PROTO_MIN,
        nf.NFTA_NAT_REG_PROTO_MAX,
    ),
    b"numgen": (nf.NFTA_NG_DREG,),
    b"payload": (nf.NFTA_PAYLOAD_DREG,),
    b"socket": (nf.NFTA_SOCKET_DREG,),
}
"""The attributes that contain the number of a register, by the name of the expression."""
_DATA = {
    b"bitwise": (nf.NFTA_BITWISE_MASK, nf.NFTA_BITWISE_XOR),
    b"cmp": (nf.NFTA_CMP_DATA,),
    b"immediate": (nf.NFTA_IMMEDIATE_DATA,),
}
"""The attributes that contain register data."""
_DEFAULTS = {
    b"bitwise": {nf.NFTA_BITWISE_OP: bytes(4)},  # NFT_BITWISE_MASK_XOR
    b"dynset": {nf.NFTA_DYNSET_TIMEOUT: bytes(8), nf.NFTA_DYNSET_FLAGS: bytes(4)},
    b"lookup": {nf.NFTA_LOOKUP_FLAGS: bytes(4)},
}
"""Attributes that kproxy omits, and the values that the kernel then dumps."""
_NAT_RANGES = {
    nf.NFTA_NAT_REG_ADDR_MAX: nf.NFTA_NAT_REG_ADDR_MIN,
    nf.NFTA_NAT_REG_PROTO_MAX: nf.NFTA_NAT_REG_PROTO_MIN,
}
"""The end of a range in a `nat` expression, which is by default the same register as its start."""
_BE32 = struct.Struct(">I")
_PART = struct.Struct("=HI")


class RuleContent(Struct, frozen=True, gc=False):
    """What a rule does, in a form that can be compared: its expressions, and its comment."""

    expressions: tuple[bytes, ...]
    comment: str = ""


def rule_content(rule: NftRule, family: Family) -> RuleContent:
    """Return the content of one of kproxy's rules."""
    return RuleContent(canonical_expressions(encode_rule(rule, family)), rule.comment)


def canonical_expressions(expressions: bytes) -> tuple[bytes, ...]:
    """Convert the payload of NFTA_RULE_EXPRESSIONS to a form that can be compared."""
    spans = iterate_attributes(expressions, 0, len(expressions))
    return tuple([_canonical(expressions[begin:end]) for _, begin, end in spans])


def expression_parts(expression: bytes) -> tuple[str, dict[int, bytes]]:
    """Return the name and the attributes of an expression of `RuleContent.expressions`."""
    parts = nested_values(expression)
    return parts[nf.NFTA_EXPR_NAME].decode(), nested_values(parts.get(nf.NFTA_EXPR_DATA, b""))


def nested_values(joined: bytes) -> dict[int, bytes]:
    """Return the attributes in the value of an attribute, as `expression_parts` returns it."""
    values: dict[int, bytes] = {}
    begin = 0
    while begin < len(joined):
        kind, size = _PART.unpack_from(joined, begin)
        begin += _PART.size
        values[kind] = joined[begin : begin + size]
        begin += size
    return values


@lru_cache(1 << 12)
def _canonical(expression: bytes) -> bytes:
    found = _payloads(expression)
    name = found.get(nf.NFTA_EXPR_NAME, b"").rstrip(b"\0")
    values = _payloads(found.get(nf.NFTA_EXPR_DATA, b""))
    for kind in _REGISTERS.get(name, ()):
        if kind in values:
            values[kind] = _canonical_register(values[kind])
    for kind in _DATA.get(name, ()):
        if kind in values:
            values[kind] = _canonical_data(values[kind])
    for kind, default in _DEFAULTS.get(name, {}).items():
        if values.get(kind) == default:
            del values[kind]
    if name == b"nat":
        for last, first in _NAT_RANGES.items():
            if last in values and values[last] == values.get(first):
                del values[last]
    return _joined({nf.NFTA_EXPR_NAME: name, nf.NFTA_EXPR_DATA: _joined(values)})


def _canonical_register(number: bytes) -> bytes:
    """Return the number of the 16-byte register whose first 4 bytes are the given register, if there is one."""
    if len(number) == _BE32.size:
        word = _BE32.unpack(number)[0] - nf.NFT_REG32_00
        if word >= 0 and word % 4 == 0:
            return _BE32.pack(word // 4 + 1)
    return number


def _canonical_data(data: bytes) -> bytes:
    """Convert a value or a verdict."""
    values = _payloads(data)
    if nf.NFTA_DATA_VERDICT in values:
        values[nf.NFTA_DATA_VERDICT] = _joined(_payloads(values[nf.NFTA_DATA_VERDICT]))
    return _joined(values)


def _payloads(data: bytes) -> dict[int, bytes]:
    return {kind: data[begin:end] for kind, (begin, end) in attributes(data, 0, len(data)).items()}


def _joined(values: dict[int, bytes]) -> bytes:
    return b"".join([_PART.pack(kind, len(value)) + value for kind, value in sorted(values.items())])
