"""Encode the statements of a rule as nf_tables expressions (linux/netfilter/nf_tables.h). Pure.

Expressions work on 16 registers of 4 bytes each, NFT_REG32_00 to NFT_REG32_15. kproxy assigns the registers in the
same way as nft, so that `nft list` can print the rules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from ipaddress import ip_network
from typing import assert_never

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink_message import attribute, nested
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.elements import DROP, PROTOCOLS, address_family, pack_address
from kproxy.nftables.ruleset import KeyField, NftRule

_PORT_REGISTER = nf.NFT_REG32_00 + 4  # the port of `dnat to ADDRESS:PORT`; the first part of NFT_REG_2
_CT_STATE_NEW = 1 << nf.IP_CT_NEW + 1  # NF_CT_STATE_BIT(IP_CT_NEW)
_PORT_UNREACHABLE = {Family.IPV4: 3, Family.IPV6: 4}
"""The codes for "port unreachable" in ICMP (RFC 792) and ICMPv6 (RFC 4443)."""
_INTERFACE_NAME_SIZE = 16  # IFNAMSIZ
_ADDRESS_OFFSETS = {
    (Family.IPV4, KeyField.SOURCE): 12,
    (Family.IPV4, KeyField.DESTINATION): 16,
    (Family.IPV6, KeyField.SOURCE): 8,
    (Family.IPV6, KeyField.DESTINATION): 24,
}
"""Offsets of the addresses in the IP header, in bytes (RFC 791, RFC 8200)."""
_DPORT_OFFSET = _DPORT_SIZE = 2  # in bytes; the same for TCP, UDP and SCTP
_TCP_FLAGS_OFFSET = 13  # in bytes (RFC 9293)
_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_ACK = 0x01, 0x02, 0x04, 0x10
_BE32 = struct.Struct(">I")
_HOST32 = struct.Struct("=I")


# Attributes


def u32_attribute(kind: int, value: int) -> bytes:
    """Return an attribute with a 32-bit number. nf_tables expects network byte order."""
    return attribute(kind, _BE32.pack(value & 0xFFFFFFFF))


def string_attribute(kind: int, value: str) -> bytes:
    """Return an attribute with a NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def value_attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute that contains register data (a nested NFTA_DATA_VALUE attribute)."""
    return _value_header(kind, len(value)) + value + b"\0" * (-len(value) % 4)


@cache
def _value_header(kind: int, size: int) -> bytes:
    return nested(kind, attribute(nf.NFTA_DATA_VALUE, bytes(size)))[:8]


def verdict_attribute(kind: int, code: int, chain: str = "") -> bytes:
    """Return an attribute that contains a verdict (a nested NFTA_DATA_VERDICT attribute)."""
    target = (string_attribute(nf.NFTA_VERDICT_CHAIN, chain),) if chain else ()
    return nested(kind, nested(nf.NFTA_DATA_VERDICT, u32_attribute(nf.NFTA_VERDICT_CODE, code), *target))


@lru_cache(1 << 10)
def element_verdict_attribute(kind: int, verdict: str) -> bytes:
    """Return an attribute with the verdict of a map element: `DROP`, or a goto to the chain named `verdict`."""
    return verdict_attribute(kind, nf.NF_DROP) if verdict == DROP else verdict_attribute(kind, nf.NFT_GOTO, verdict)


# Statements


def encode_rule(rule: NftRule, family: Family) -> bytes:
    """Return the encoded expressions of a rule. They are the payload of NFTA_RULE_EXPRESSIONS."""
    return b"".join([part for statement in rule.statements for part in encode_statement(statement, family)])


def encode_statement(statement: nft.Statement, family: Family) -> Sequence[bytes]:
    """Return the encoded expressions of one statement. Each is an NFTA_LIST_ELEM attribute."""
    match statement:  # the most frequent statements come first, because Python tests the cases in order
        case nft.Goto():
            return [_verdict(nf.NFT_GOTO, statement.chain)]
        case nft.Lookup():
            return [*_load_key(statement.fields, family), _lookup(statement.set)]
        case nft.Numgen():
            return [_numgen(nf.NFT_REG32_00, statement.modulus), _compare(bytes(4))]
        case nft.MatchSaddr():
            return _match_network(KeyField.SOURCE, statement.network, family, negate=statement.negate)
        case nft.MatchDaddr():
            return _match_network(KeyField.DESTINATION, statement.network, family, negate=statement.negate)
        case nft.MatchIifname():
            return _match_interface(statement)
        case nft.FibLocal():
            return [_fib_address_type(statement.field), _compare(_HOST32.pack(nf.RTN_LOCAL), negate=statement.negate)]
        case nft.MatchL4Proto():
            return [_load_meta(nf.NFT_META_L4PROTO), _compare(bytes([PROTOCOLS[statement.protocol]]))]
        case nft.CtStateNew():
            return _match_conntrack_bit(nf.NFT_CT_STATE, _CT_STATE_NEW)
        case nft.CtStatusDnat():
            return _match_conntrack_bit(nf.NFT_CT_STATUS, nf.IPS_DST_NAT)
        case nft.MatchMark():
            return [_load_meta(nf.NFT_META_MARK), *_match_bit(statement.mark)]
        case nft.SetMark():
            return _change_mark(mask=0xFFFFFFFF & ~statement.mark, xor=statement.mark)
        case nft.XorMark():
            return _change_mark(mask=0xFFFFFFFF, xor=statement.mark)
        case nft.Masquerade():
            flags = u32_attribute(nf.NFTA_MASQ_FLAGS, nf.NF_NAT_RANGE_PROTO_RANDOM_FULLY)
            return [_expression("masq", flags)]
        case nft.UpdateSet():
            return [*_load_key((KeyField.SOURCE,), family), _update_set(statement.set)]
        case nft.Dnat():
            return _dnat_to(statement, family)
        case nft.DnatMap():
            return _dnat_to_map(statement, family)
        case nft.VerdictMap():
            return [*_load_key(statement.fields, family), _lookup(statement.map, nf.NFT_REG_VERDICT)]
        case nft.Jump():
            return [_verdict(nf.NFT_JUMP, statement.chain)]
        case nft.MatchSyn():
            return _match_syn(negate=statement.negate)
        case nft.MatchSocket():
            return [_load_socket(nf.NFT_SOCKET_TRANSPARENT), _compare(bytes([statement.transparent]))]
        case nft.Count():
            return [_count(statement.counter)]
        case nft.Drop():
            return [_verdict(nf.NF_DROP)]
        case nft.Return():
            return [_verdict(nf.NFT_RETURN)]
        case nft.Reject():
            return [_reject(family)]
        case _:
            assert_never(statement)


def _match_network(field: KeyField, network: str, family: Family, *, negate: bool) -> list[bytes]:
    """Return the expressions that match an address against a network.

    They compare only the bytes that the prefix covers. If the prefix ends within a byte or its length is 0, they apply
    the netmask to the whole address and compare the result.
    """
    found = ip_network(network)
    whole_bytes, rest = divmod(found.prefixlen, 8)
    size = whole_bytes if whole_bytes and not rest else 4 * _register_count(field, family)
    expressions = [_payload(nf.NFT_REG32_00, nf.NFT_PAYLOAD_NETWORK_HEADER, _ADDRESS_OFFSETS[family, field], size)]
    if size != whole_bytes:
        expressions.append(_bitwise(found.netmask.packed, bytes(size)))
    expressions.append(_compare(found.network_address.packed[:size], negate=negate))
    return expressions


def _match_interface(statement: nft.MatchIifname) -> list[bytes]:
    name = statement.name.encode()
    value = name if statement.prefix else name.ljust(_INTERFACE_NAME_SIZE, b"\0")
    return [_load_meta(nf.NFT_META_IIFNAME), _compare(value, negate=statement.negate)]


def _match_conntrack_bit(key: int, bit: int) -> list[bytes]:
    load = _expression("ct", u32_attribute(nf.NFTA_CT_DREG, nf.NFT_REG32_00), u32_attribute(nf.NFTA_CT_KEY, key))
    return [load, *_match_bit(bit)]


def _match_bit(bit: int) -> list[bytes]:
    return [_bitwise(_HOST32.pack(bit), bytes(4)), _compare(bytes(4), negate=True)]


def _match_syn(*, negate: bool) -> list[bytes]:
    return [
        _load_meta(nf.NFT_META_L4PROTO),
        _compare(bytes([PROTOCOLS["TCP"]])),
        _payload(nf.NFT_REG32_00, nf.NFT_PAYLOAD_TRANSPORT_HEADER, _TCP_FLAGS_OFFSET, 1),
        _bitwise(bytes([_TCP_FIN | _TCP_SYN | _TCP_RST | _TCP_ACK]), bytes(1)),
        _compare(bytes([_TCP_SYN]), negate=negate),
    ]


def _change_mark(*, mask: int, xor: int) -> list[bytes]:
    store = _expression(
        "meta",
        u32_attribute(nf.NFTA_META_KEY, nf.NFT_META_MARK),
        u32_attribute(nf.NFTA_META_SREG, nf.NFT_REG32_00),
    )
    return [_load_meta(nf.NFT_META_MARK), _bitwise(_HOST32.pack(mask), _HOST32.pack(xor)), store]


def _dnat_to(statement: nft.Dnat, family: Family) -> list[bytes]:
    return [
        _immediate(nf.NFT_REG32_00, pack_address(statement.address)),
        _immediate(_PORT_REGISTER, statement.port.to_bytes(2, "big")),
        _dnat(family, _PORT_REGISTER),
    ]


def _dnat_to_map(statement: nft.DnatMap, family: Family) -> list[bytes]:
    numgen_register = nf.NFT_REG32_00 + sum(_register_count(field, family) for field in statement.fields)
    return [
        *_load_key(statement.fields, family),
        _numgen(numgen_register, statement.modulus),
        _lookup(statement.map, nf.NFT_REG32_00),
        _dnat(family, nf.NFT_REG32_00 + _register_count(KeyField.DESTINATION, family)),
    ]


# Set keys


def _register_count(field: KeyField, family: Family) -> int:
    """Return how many 4-byte registers a field occupies."""
    return 4 if family is Family.IPV6 and field in {KeyField.SOURCE, KeyField.DESTINATION} else 1


def _load_key(fields: Iterable[KeyField], family: Family) -> Iterator[bytes]:
    """Yield the expressions that load the fields into consecutive registers, starting at NFT_REG32_00."""
    register = nf.NFT_REG32_00
    for field in fields:
        yield _load_field(field, register, family)
        register += _register_count(field, family)


def _load_field(field: KeyField, register: int, family: Family) -> bytes:
    if field is KeyField.PROTOCOL:
        return _load_meta(nf.NFT_META_L4PROTO, register)
    if field is KeyField.PORT:
        return _payload(register, nf.NFT_PAYLOAD_TRANSPORT_HEADER, _DPORT_OFFSET, _DPORT_SIZE)
    size = 4 * _register_count(field, family)
    return _payload(register, nf.NFT_PAYLOAD_NETWORK_HEADER, _ADDRESS_OFFSETS[family, field], size)


# Expressions


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(nf.NFTA_LIST_ELEM, string_attribute(nf.NFTA_EXPR_NAME, name), nested(nf.NFTA_EXPR_DATA, *attributes))


def _payload(register: int, base: int, offset: int, size: int) -> bytes:
    return _expression(
        "payload",
        u32_attribute(nf.NFTA_PAYLOAD_DREG, register),
        u32_attribute(nf.NFTA_PAYLOAD_BASE, base),
        u32_attribute(nf.NFTA_PAYLOAD_OFFSET, offset),
        u32_attribute(nf.NFTA_PAYLOAD_LEN, size),
    )


def _load_meta(key: int, register: int = nf.NFT_REG32_00) -> bytes:
    return _expression("meta", u32_attribute(nf.NFTA_META_KEY, key), u32_attribute(nf.NFTA_META_DREG, register))


def _compare(value: bytes, *, negate: bool = False) -> bytes:
    return _expression(
        "cmp",
        u32_attribute(nf.NFTA_CMP_SREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_CMP_OP, nf.NFT_CMP_NEQ if negate else nf.NFT_CMP_EQ),
        value_attribute(nf.NFTA_CMP_DATA, value),
    )


def _bitwise(mask: bytes, xor: bytes) -> bytes:
    return _expression(
        "bitwise",
        u32_attribute(nf.NFTA_BITWISE_SREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_BITWISE_DREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_BITWISE_LEN, len(mask)),
        value_attribute(nf.NFTA_BITWISE_MASK, mask),
        value_attribute(nf.NFTA_BITWISE_XOR, xor),
    )


def _lookup(name: str, destination: int | None = None) -> bytes:
    """Return the expression that searches a set or map for the key whose first register is NFT_REG32_00.

    If `destination` is given, the expression stores the map's value in that register.
    """
    store = () if destination is None else (u32_attribute(nf.NFTA_LOOKUP_DREG, destination),)
    return _expression(
        "lookup",
        string_attribute(nf.NFTA_LOOKUP_SET, name),
        u32_attribute(nf.NFTA_LOOKUP_SREG, nf.NFT_REG32_00),
        *store,
    )


def _update_set(name: str) -> bytes:
    return _expression(
        "dynset",
        string_attribute(nf.NFTA_DYNSET_SET_NAME, name),
        u32_attribute(nf.NFTA_DYNSET_OP, nf.NFT_DYNSET_OP_UPDATE),
        u32_attribute(nf.NFTA_DYNSET_SREG_KEY, nf.NFT_REG32_00),
    )


def _load_socket(key: int) -> bytes:
    return _expression(
        "socket", u32_attribute(nf.NFTA_SOCKET_KEY, key), u32_attribute(nf.NFTA_SOCKET_DREG, nf.NFT_REG32_00)
    )


def _count(name: str) -> bytes:
    return _expression(
        "objref",
        u32_attribute(nf.NFTA_OBJREF_IMM_TYPE, nf.NFT_OBJECT_COUNTER),
        string_attribute(nf.NFTA_OBJREF_IMM_NAME, name),
    )


def _fib_address_type(field: KeyField) -> bytes:
    flag = nf.NFTA_FIB_F_SADDR if field is KeyField.SOURCE else nf.NFTA_FIB_F_DADDR
    return _expression(
        "fib",
        u32_attribute(nf.NFTA_FIB_DREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_FIB_RESULT, nf.NFT_FIB_RESULT_ADDRTYPE),
        u32_attribute(nf.NFTA_FIB_FLAGS, flag),
    )


def _numgen(register: int, modulus: int) -> bytes:
    return _expression(
        "numgen",
        u32_attribute(nf.NFTA_NG_DREG, register),
        u32_attribute(nf.NFTA_NG_MODULUS, modulus),
        u32_attribute(nf.NFTA_NG_TYPE, nf.NFT_NG_RANDOM),
        u32_attribute(nf.NFTA_NG_OFFSET, 0),
    )


def _dnat(family: Family, port_register: int) -> bytes:
    """Return the expression for DNAT to the address in NFT_REG32_00 and the port in `port_register`."""
    return _expression(
        "nat",
        u32_attribute(nf.NFTA_NAT_TYPE, nf.NFT_NAT_DNAT),
        u32_attribute(nf.NFTA_NAT_FAMILY, address_family(family)),
        u32_attribute(nf.NFTA_NAT_REG_ADDR_MIN, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_NAT_REG_PROTO_MIN, port_register),
        u32_attribute(nf.NFTA_NAT_FLAGS, nf.NF_NAT_RANGE_MAP_IPS | nf.NF_NAT_RANGE_PROTO_SPECIFIED),
    )


def _immediate(register: int, value: bytes) -> bytes:
    return _expression(
        "immediate",
        u32_attribute(nf.NFTA_IMMEDIATE_DREG, register),
        value_attribute(nf.NFTA_IMMEDIATE_DATA, value),
    )


def _verdict(code: int, chain: str = "") -> bytes:
    return _expression(
        "immediate",
        u32_attribute(nf.NFTA_IMMEDIATE_DREG, nf.NFT_REG_VERDICT),
        verdict_attribute(nf.NFTA_IMMEDIATE_DATA, code, chain),
    )


def _reject(family: Family) -> bytes:
    return _expression(
        "reject",
        u32_attribute(nf.NFTA_REJECT_TYPE, nf.NFT_REJECT_ICMP_UNREACH),
        attribute(nf.NFTA_REJECT_ICMP_CODE, bytes([_PORT_UNREACHABLE[family]])),
    )
