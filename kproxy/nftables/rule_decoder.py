"""Decode kproxy's rules, as they were read from the kernel. Pure.

This is the inverse of `kproxy.nftables.expressions`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address, ip_network
from typing import TypeAlias

from kproxy.host import nf_tables_constants as nf
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import PROTOCOLS, unpack_address
from kproxy.nftables.rule_content import RuleContent, expression_parts, nested_values, rule_content
from kproxy.nftables.ruleset import KeyField, NftRule

Attributes: TypeAlias = dict[int, bytes]
_Decoder: TypeAlias = Callable[[Sequence[Attributes], Family], nft.Statement | None]
_Decoders: TypeAlias = dict[tuple[str, ...], _Decoder]
_SOURCE = (KeyField.SOURCE,)
_BE32 = struct.Struct(">I")
_HOST32 = struct.Struct("=I")
_PROTOCOL_NAMES = {bytes([number]): name for name, number in PROTOCOLS.items()}
_INTERFACE_NAME_SIZE = 16  # IFNAMSIZ


def decode_rule(content: RuleContent, family: Family) -> NftRule | None:
    """Return the rule that has this content, or None if no rule in a chain of a Service has it."""
    return _decode(content, family, _DECODERS)


def decode_any_rule(content: RuleContent, family: Family) -> NftRule | None:
    """Return the rule that has this content, or None if it has a statement that no rule of kproxy has."""
    return _decode(content, family, _ALL_DECODERS)


def _decode(content: RuleContent, family: Family, decoders: _Decoders) -> NftRule | None:
    try:
        parts = [expression_parts(each) for each in content.expressions]
        decoded = NftRule(tuple(_statements(parts, family, decoders)), content.comment)
        return decoded if rule_content(decoded, family) == content else None
    except (KeyError, ValueError, struct.error):  # an attribute is missing or has an unexpected value
        return None


def _statements(
    parts: Sequence[tuple[str, Attributes]], family: Family, decoders: _Decoders
) -> Iterator[nft.Statement]:
    begin = 0
    while begin < len(parts):
        names = tuple(name for name, _ in parts[begin:])
        for pattern, decode in decoders.items():
            end = begin + len(pattern)
            if names[: len(pattern)] == pattern and (
                statement := decode([values for _, values in parts[begin:end]], family)
            ):
                yield statement
                begin = end
                break
        else:
            raise ValueError(names)


# `_decode` encodes its result and compares it with the rule. The decoders therefore need not check the attributes
# that are the same in all rules.


def _dnat(values: Sequence[Attributes], _: Family) -> nft.Statement:
    address, port = (nested_values(each[nf.NFTA_IMMEDIATE_DATA])[nf.NFTA_DATA_VALUE] for each in values[:2])
    return nft.Dnat(unpack_address(address), int.from_bytes(port, "big"))


def _verdict(values: Sequence[Attributes], _: Family) -> nft.Statement:
    verdict = nested_values(nested_values(values[0][nf.NFTA_IMMEDIATE_DATA])[nf.NFTA_DATA_VERDICT])
    code = int.from_bytes(verdict[nf.NFTA_VERDICT_CODE], "big", signed=True)
    if code == nf.NF_DROP:
        return nft.Drop()
    if code == nf.NFT_RETURN:
        return nft.Return()
    chain = _text(verdict[nf.NFTA_VERDICT_CHAIN])
    return nft.Goto(chain) if code == nf.NFT_GOTO else nft.Jump(chain)


def _lookup(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.Lookup(_SOURCE, _text(values[1][nf.NFTA_LOOKUP_SET]))


def _update_set(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.UpdateSet(_text(values[1][nf.NFTA_DYNSET_SET_NAME]))


def _network(values: Sequence[Attributes], family: Family) -> nft.Statement:
    value, negate = _compared(values[-1])
    length = 8 * len(value)
    if len(values) == 3:
        mask = nested_values(values[1][nf.NFTA_BITWISE_MASK])[nf.NFTA_DATA_VALUE]
        length = int.from_bytes(mask, "big").bit_count()
    address = ip_address(value.ljust(16 if family is Family.IPV6 else 4, b"\0"))
    return nft.MatchSaddr(str(ip_network((address, length))), negate)


def _mark(values: Sequence[Attributes], _: Family) -> nft.Statement:
    xor = nested_values(values[1][nf.NFTA_BITWISE_XOR])[nf.NFTA_DATA_VALUE]
    return nft.SetMark(_HOST32.unpack(xor)[0])


def _meta(values: Sequence[Attributes], _: Family) -> nft.Statement:
    value, negate = _compared(values[1])
    if _BE32.unpack(values[0][nf.NFTA_META_KEY])[0] == nf.NFT_META_L4PROTO:
        return nft.MatchL4Proto(_PROTOCOL_NAMES[value])
    name = value.rstrip(b"\0").decode()
    return nft.MatchIifname(name, prefix=len(value) < _INTERFACE_NAME_SIZE, negate=negate)


def _fib(values: Sequence[Attributes], _: Family) -> nft.Statement:
    is_source = _BE32.unpack(values[0][nf.NFTA_FIB_FLAGS])[0] == nf.NFTA_FIB_F_SADDR
    return nft.FibLocal(KeyField.SOURCE if is_source else KeyField.DESTINATION, _compared(values[1])[1])


def _numgen(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.Numgen(_BE32.unpack(values[0][nf.NFTA_NG_MODULUS])[0])


_DECODERS: _Decoders = {
    ("immediate", "immediate", "nat"): _dnat,
    ("payload", "bitwise", "cmp"): _network,
    ("meta", "bitwise", "meta"): _mark,
    ("payload", "cmp"): _network,
    ("payload", "lookup"): _lookup,
    ("payload", "dynset"): _update_set,
    ("meta", "cmp"): _meta,
    ("fib", "cmp"): _fib,
    ("numgen", "cmp"): _numgen,
    ("immediate",): _verdict,
}
"""The decoder of each statement, by the names of the statement's expressions. Longer sequences come first."""


# Statements of other chains


def _any_network(values: Sequence[Attributes], family: Family) -> nft.Statement:
    found = _network(values, family)
    if isinstance(found, nft.MatchSaddr) and _field(values[0], family) is KeyField.DESTINATION:
        return nft.MatchDaddr(found.network, found.negate)
    return found


def _any_mark(values: Sequence[Attributes], _: Family) -> nft.Statement:
    mask, xor = (
        _HOST32.unpack(nested_values(values[1][kind])[nf.NFTA_DATA_VALUE])[0]
        for kind in (nf.NFTA_BITWISE_MASK, nf.NFTA_BITWISE_XOR)
    )
    return nft.XorMark(xor) if mask == 0xFFFFFFFF else nft.SetMark(xor)


def _match_syn(values: Sequence[Attributes], _: Family) -> nft.Statement | None:
    """Return None if these are two statements: a match of the protocol, and one of an address."""
    is_header = _BE32.unpack(values[2][nf.NFTA_PAYLOAD_BASE])[0] == nf.NFT_PAYLOAD_TRANSPORT_HEADER
    return nft.MatchSyn(negate=_compared(values[-1])[1]) if is_header else None


def _match_socket(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.MatchSocket(transparent=bool(_compared(values[1])[0][0]))


def _count(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.Count(_text(values[0][nf.NFTA_OBJREF_IMM_NAME]))


def _match_mark(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.MatchMark(_HOST32.unpack(nested_values(values[1][nf.NFTA_BITWISE_MASK])[nf.NFTA_DATA_VALUE])[0])


def _conntrack(values: Sequence[Attributes], _: Family) -> nft.Statement:
    return nft.CtStateNew() if _BE32.unpack(values[0][nf.NFTA_CT_KEY])[0] == nf.NFT_CT_STATE else nft.CtStatusDnat()


def _any_lookup(values: Sequence[Attributes], family: Family) -> nft.Statement:
    fields = tuple(_field(each, family) for each in values[:-1])
    name = _text(values[-1][nf.NFTA_LOOKUP_SET])
    return nft.VerdictMap(fields, name) if nf.NFTA_LOOKUP_DREG in values[-1] else nft.Lookup(fields, name)


def _dnat_map(values: Sequence[Attributes], family: Family) -> nft.Statement:
    *loads, numgen, lookup, _ = values
    fields = tuple(_field(each, family) for each in loads)
    modulus = _BE32.unpack(numgen[nf.NFTA_NG_MODULUS])[0]
    return nft.DnatMap(fields, modulus, _text(lookup[nf.NFTA_LOOKUP_SET]))


def _field(load: Attributes, family: Family) -> KeyField:
    """Return the field of a key that an expression loads."""
    if nf.NFTA_PAYLOAD_LEN not in load:  # an expression `meta`
        return KeyField.PROTOCOL
    if _BE32.unpack(load[nf.NFTA_PAYLOAD_BASE])[0] == nf.NFT_PAYLOAD_TRANSPORT_HEADER:
        return KeyField.PORT
    source_offset = 8 if family is Family.IPV6 else 12  # RFC 8200, RFC 791
    is_source = _BE32.unpack(load[nf.NFTA_PAYLOAD_OFFSET])[0] == source_offset
    return KeyField.SOURCE if is_source else KeyField.DESTINATION


def _loads(key: Sequence[KeyField]) -> tuple[str, ...]:
    """Return the names of the expressions that load the fields of a key."""
    return tuple("meta" if field is KeyField.PROTOCOL else "payload" for field in key if field is not KeyField.NUMGEN)


_KEYS = sorted({each.key for each in SETS}, key=len, reverse=True)
_ALL_DECODERS: _Decoders = {
    ("meta", "cmp", "payload", "bitwise", "cmp"): _match_syn,
    ("socket", "cmp"): _match_socket,
    ("objref",): _count,
    **{(*_loads(key), "numgen", "lookup", "nat"): _dnat_map for key in _KEYS if KeyField.NUMGEN in key},
    **{(*_loads(key), "lookup"): _any_lookup for key in _KEYS},
    **_DECODERS,
    ("payload", "bitwise", "cmp"): _any_network,
    ("payload", "cmp"): _any_network,
    ("payload", "lookup"): _any_lookup,
    ("meta", "bitwise", "meta"): _any_mark,
    ("meta", "bitwise", "cmp"): _match_mark,
    ("ct", "bitwise", "cmp"): _conntrack,
    ("masq",): lambda *_: nft.Masquerade(),
    ("reject",): lambda *_: nft.Reject(),
}
"""The decoders of all statements of kproxy's rules."""


def _compared(values: Attributes) -> tuple[bytes, bool]:
    """Return the value of a comparison, and whether it is negated."""
    value = nested_values(values[nf.NFTA_CMP_DATA])[nf.NFTA_DATA_VALUE]
    return value, _BE32.unpack(values[nf.NFTA_CMP_OP])[0] == nf.NFT_CMP_NEQ


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()
