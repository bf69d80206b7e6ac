"""Statements as the expressions that the kernel carries out (linux/netfilter/nf_tables.h), one attribute for each.

Expressions work on 16 registers of 4 bytes. They are laid out as nft lays them out, so that nft can read them back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache, singledispatch
from ipaddress import ip_network

from kproxy.host.netlink_message import attribute, nested
from kproxy.model.types import Family
from kproxy.nftables import ruleset as nft
from kproxy.nftables.elements import DROP, PROTOCOLS, address_family, pack_address
from kproxy.nftables.ruleset import KeyField, NftRule

NFTA_LIST_ELEM = 1
_NFTA_EXPR_NAME, _NFTA_EXPR_DATA = 1, 2
_NFTA_DATA_VALUE, NFTA_DATA_VERDICT = 1, 2
_NFTA_VERDICT_CODE, _NFTA_VERDICT_CHAIN = 1, 2
NF_DROP, NF_ACCEPT, NFT_JUMP, NFT_GOTO, NFT_RETURN = 0, 1, -3, -4, -5
_VERDICT_REGISTER = 0
_FIRST_REGISTER = 8  # NFT_REG32_00
_SECOND = 4  # NFT_REG_2 begins after four words
_EQUAL, _NOT_EQUAL = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META_MARK, _META_IIFNAME, _META_L4PROTO = 3, 6, 16
_CT_STATE, _CT_STATUS = 0, 2
_CT_STATE_NEW, _CT_STATUS_DNAT = 8, 0x20
_FIB_ADDRTYPE, _FIB_SADDR, _FIB_DADDR, _RTN_LOCAL = 3, 1, 2, 2
_NAT_DNAT, _NAT_RANGE_MAP_IPS_AND_PORTS, _NAT_RANDOM_FULLY = 1, 3, 0x10
_REJECT_UNREACHABLE = 0
_PORT_UNREACHABLE = {Family.IPV4: 3, Family.IPV6: 4}  # codes of ICMP (RFC 792) and ICMPv6 (RFC 4443)
_DYNSET_UPDATE = 1
_INTERFACE_NAME_SIZE = 16
_OFFSETS = {
    (Family.IPV4, KeyField.SOURCE): 12,
    (Family.IPV4, KeyField.DESTINATION): 16,
    (Family.IPV6, KeyField.SOURCE): 8,
    (Family.IPV6, KeyField.DESTINATION): 24,
}
"""Where addresses are in the header of a packet (RFC 791, RFC 8200)."""
_BE32 = struct.Struct(">I")
_HOST32 = struct.Struct("=I")


def number(kind: int, value: int) -> bytes:
    """Return an attribute with a number of 32 bits, in network byte order as nf_tables has it."""
    return attribute(kind, _BE32.pack(value & 0xFFFFFFFF))


def text(kind: int, value: str) -> bytes:
    """Return an attribute with a string."""
    return attribute(kind, value.encode() + b"\0")


def data(kind: int, value: bytes) -> bytes:
    """Return an attribute that holds a value for a register."""
    return _data_header(kind, len(value)) + value + b"\0" * (-len(value) % 4)


@cache
def _data_header(kind: int, size: int) -> bytes:
    return nested(kind, attribute(_NFTA_DATA_VALUE, bytes(size)))[:8]


def verdict(kind: int, code: int, chain: str = "") -> bytes:
    """Return an attribute that holds a verdict."""
    target = (text(_NFTA_VERDICT_CHAIN, chain),) if chain else ()
    return nested(kind, nested(NFTA_DATA_VERDICT, number(_NFTA_VERDICT_CODE, code), *target))


@lru_cache(1 << 10)
def element_verdict(kind: int, chain: str) -> bytes:
    """Return an attribute that holds the verdict of a map's element: `DROP`, or to go to a chain."""
    return verdict(kind, NF_DROP) if chain == DROP else verdict(kind, NFT_GOTO, chain)


def encode_rule(rule: NftRule, family: Family) -> bytes:
    """Return the expressions of a rule, one attribute after the other."""
    return b"".join(part for statement in rule.statements for part in expressions(statement, family))


@singledispatch
def expressions(statement: object, family: Family) -> Iterator[bytes]:
    """Yield the expressions of one statement."""
    raise TypeError(f"no way to encode {statement!r}")


@expressions.register
def _(statement: nft.MatchSaddr, family: Family) -> Iterator[bytes]:
    return _network(KeyField.SOURCE, statement.network, family, inside=statement.inside)


@expressions.register
def _(statement: nft.MatchDaddr, family: Family) -> Iterator[bytes]:
    return _network(KeyField.DESTINATION, statement.network, family, inside=statement.inside)


@expressions.register
def _(statement: nft.MatchIifname, family: Family) -> Iterator[bytes]:
    name = statement.name.encode()
    yield _expression("meta", number(2, _META_IIFNAME), number(1, _register(0)))
    yield _compare(name if statement.prefix else name.ljust(_INTERFACE_NAME_SIZE, b"\0"), equal=statement.inside)


@expressions.register
def _(statement: nft.Lookup, family: Family) -> Iterator[bytes]:
    yield from _load(statement.fields, family)
    yield _expression("lookup", text(1, statement.set), number(2, _register(0)))


@expressions.register
def _(statement: nft.FibLocal, family: Family) -> Iterator[bytes]:
    which = _FIB_SADDR if statement.field is KeyField.SOURCE else _FIB_DADDR
    yield _expression("fib", number(1, _register(0)), number(2, _FIB_ADDRTYPE), number(3, which))
    yield _compare(_HOST32.pack(_RTN_LOCAL))


@expressions.register
def _(statement: nft.MatchL4Proto, family: Family) -> Iterator[bytes]:
    yield _expression("meta", number(2, _META_L4PROTO), number(1, _register(0)))
    yield _compare(bytes([PROTOCOLS[statement.protocol]]))


@expressions.register
def _(statement: nft.CtStateNew, family: Family) -> Iterator[bytes]:
    return _connection_has(_CT_STATE, _CT_STATE_NEW)


@expressions.register
def _(statement: nft.CtStatusDnat, family: Family) -> Iterator[bytes]:
    return _connection_has(_CT_STATUS, _CT_STATUS_DNAT)


@expressions.register
def _(statement: nft.MatchMark, family: Family) -> Iterator[bytes]:
    yield _load_mark()
    yield _bitwise(_HOST32.pack(statement.mark), bytes(4))
    yield _compare(bytes(4), equal=False)


@expressions.register
def _(statement: nft.Numgen, family: Family) -> Iterator[bytes]:
    yield _random(_register(0), statement.of)
    yield _compare(bytes(4))


@expressions.register
def _(statement: nft.SetMark, family: Family) -> Iterator[bytes]:
    return _change_mark(0xFFFFFFFF & ~statement.mark, statement.mark)


@expressions.register
def _(statement: nft.XorMark, family: Family) -> Iterator[bytes]:
    return _change_mark(0xFFFFFFFF, statement.mark)


@expressions.register
def _(statement: nft.Masquerade, family: Family) -> Iterator[bytes]:
    yield _expression("masq", number(1, _NAT_RANDOM_FULLY))


@expressions.register
def _(statement: nft.UpdateSet, family: Family) -> Iterator[bytes]:
    yield from _load((KeyField.SOURCE,), family)
    yield _expression("dynset", text(1, statement.set), number(3, _DYNSET_UPDATE), number(4, _register(0)))


@expressions.register
def _(statement: nft.Dnat, family: Family) -> Iterator[bytes]:
    yield _immediate(_register(0), pack_address(statement.address))
    yield _immediate(_register(_SECOND), statement.port.to_bytes(2, "big"))
    yield _translate(family, _SECOND)


@expressions.register
def _(statement: nft.DnatMap, family: Family) -> Iterator[bytes]:
    yield from _load(statement.fields, family)
    yield _random(_register(sum(_words(field, family) for field in statement.fields)), statement.of)
    yield _expression("lookup", text(1, statement.map), number(2, _register(0)), number(3, _register(0)))
    yield _translate(family, _words(KeyField.DESTINATION, family))


@expressions.register
def _(statement: nft.VerdictMap, family: Family) -> Iterator[bytes]:
    yield from _load(statement.fields, family)
    yield _expression("lookup", text(1, statement.map), number(2, _register(0)), number(3, _VERDICT_REGISTER))


@expressions.register
def _(statement: nft.Go, family: Family) -> Iterator[bytes]:
    yield _decide(NFT_JUMP if statement.back else NFT_GOTO, statement.chain)


@expressions.register
def _(statement: nft.Drop, family: Family) -> Iterator[bytes]:
    yield _decide(NF_DROP)


@expressions.register
def _(statement: nft.Return, family: Family) -> Iterator[bytes]:
    yield _decide(NFT_RETURN)


@expressions.register
def _(statement: nft.Reject, family: Family) -> Iterator[bytes]:
    code = attribute(2, bytes([_PORT_UNREACHABLE[family]]))
    yield _expression("reject", number(1, _REJECT_UNREACHABLE), code)


def _words(field: KeyField, family: Family) -> int:
    """Return how many registers a field takes."""
    return 4 if family is Family.IPV6 and field in {KeyField.SOURCE, KeyField.DESTINATION} else 1


def _load(fields: Iterable[KeyField], family: Family) -> Iterator[bytes]:
    """Yield what puts the fields into registers, one after the other."""
    word = 0
    for field in fields:
        yield _load_field(field, _register(word), family)
        word += _words(field, family)


def _load_field(field: KeyField, register: int, family: Family) -> bytes:
    if field is KeyField.PROTOCOL:
        return _expression("meta", number(2, _META_L4PROTO), number(1, register))
    if field is KeyField.PORT:
        return _payload(register, _TRANSPORT_HEADER, 2, 2)
    return _payload(register, _NETWORK_HEADER, _OFFSETS[family, field], 4 * _words(field, family))


def _network(field: KeyField, network: str, family: Family, *, inside: bool) -> Iterator[bytes]:
    """Yield the comparison with a network: of the bytes that it fixes if these are whole, else with a mask."""
    found = ip_network(network)
    whole, rest = divmod(found.prefixlen, 8)
    size = whole if whole and not rest else 4 * _words(field, family)
    yield _payload(_register(0), _NETWORK_HEADER, _OFFSETS[family, field], size)
    if size != whole:
        yield _bitwise(found.netmask.packed, bytes(size))
    yield _compare(found.network_address.packed[:size], equal=inside)


def _translate(family: Family, port_word: int) -> bytes:
    """Return the change of destination to the address in the first registers and the port in another."""
    address, port = number(3, _register(0)), number(5, _register(port_word))
    flags = number(7, _NAT_RANGE_MAP_IPS_AND_PORTS)
    return _expression("nat", number(1, _NAT_DNAT), number(2, address_family(family)), address, port, flags)


def _register(word: int) -> int:
    return _FIRST_REGISTER + word


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, text(_NFTA_EXPR_NAME, name), nested(_NFTA_EXPR_DATA, *attributes))


def _payload(register: int, base: int, offset: int, size: int) -> bytes:
    return _expression("payload", number(1, register), number(2, base), number(3, offset), number(4, size))


def _compare(value: bytes, *, equal: bool = True) -> bytes:
    operation = _EQUAL if equal else _NOT_EQUAL
    return _expression("cmp", number(1, _register(0)), number(2, operation), data(3, value))


def _bitwise(mask: bytes, flip: bytes) -> bytes:
    size = number(3, len(mask))
    return _expression("bitwise", number(1, _register(0)), number(2, _register(0)), size, data(4, mask), data(5, flip))


def _load_mark() -> bytes:
    return _expression("meta", number(2, _META_MARK), number(1, _register(0)))


def _change_mark(mask: int, flip: int) -> Iterator[bytes]:
    yield _load_mark()
    yield _bitwise(_HOST32.pack(mask), _HOST32.pack(flip))
    yield _expression("meta", number(2, _META_MARK), number(3, _register(0)))


def _connection_has(key: int, bit: int) -> Iterator[bytes]:
    yield _expression("ct", number(1, _register(0)), number(2, key))
    yield _bitwise(_HOST32.pack(bit), bytes(4))
    yield _compare(bytes(4), equal=False)


def _random(register: int, below: int) -> bytes:
    random, offset = number(3, 1), number(4, 0)
    return _expression("numgen", number(1, register), number(2, below), random, offset)


def _immediate(register: int, value: bytes) -> bytes:
    return _expression("immediate", number(1, register), data(2, value))


def _decide(code: int, chain: str = "") -> bytes:
    return _expression("immediate", number(1, _VERDICT_REGISTER), verdict(2, code, chain))
