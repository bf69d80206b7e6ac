"""Transactions as netlink messages (linux/netfilter/nf_tables.h), without I/O.

Every message remembers what it is about, so that what the kernel refuses can be named.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TypeVar

from msgspec import Struct

from kproxy.host.netlink_message import NLM_F_APPEND, NLM_F_CREATE, attribute, nested, nfgenmsg
from kproxy.model.types import Family
from kproxy.nftables.base_table import TABLE_COMMENT
from kproxy.nftables.elements import EndpointElements, SetElement, address_family, set_layout
from kproxy.nftables.expressions import NF_ACCEPT, NFTA_LIST_ELEM, data, element_verdict, encode_rule, number, text
from kproxy.nftables.names import TABLE
from kproxy.nftables.ruleset import KeyField, MapValue, NftChain, NftSet
from kproxy.nftables.transaction import Transaction

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


def set_userdata(found: NftSet, family: Family) -> bytes:
    """Return the user data of a set or map."""
    parts = [_number(_SET_KEY_BYTE_ORDER, 0 if len(found.key) > 1 else _BIG_ENDIAN)]
    if found.value is not MapValue.NOTHING:
        parts.append(_number(_SET_DATA_BYTE_ORDER, 0))
    if found.value is MapValue.ENDPOINT:
        parts.append(_entry(_SET_KEY_TYPEOF, _typeof(found.key, family)))
        parts.append(_entry(_SET_DATA_TYPEOF, _typeof((KeyField.DESTINATION, KeyField.PORT), family)))
    elif len(found.key) > 1:
        parts.append(_entry(_SET_KEY_TYPEOF, _typeof((), family)))
    if found.value is not MapValue.NOTHING:
        parts.append(_number(_SET_DATA_INTERVAL, 0))
    if found.comment:
        parts.append(_entry(_SET_COMMENT, found.comment.encode() + b"\0"))
    return b"".join(parts)


def _typeof(fields: Sequence[KeyField], family: Family) -> bytes:
    """Return how nft notes that a key was written as a concatenation of expressions."""
    parts = (_entry(place, _expression(field, family)) for place, field in enumerate(fields))
    return _number(_TYPEOF_EXPRESSION, _CONCATENATION) + _entry(_TYPEOF_DATA, b"".join(parts))


def _expression(field: KeyField, family: Family) -> bytes:
    kind, *details = _described(field, family)
    described = b"".join(_number(place, detail) for place, detail in enumerate(details))
    return _number(_TYPEOF_EXPRESSION, kind) + _entry(_TYPEOF_DATA, described)


def _described(field: KeyField, family: Family) -> tuple[int, ...]:
    """Return the kind of nft's expression for a field, and its details."""
    if field is KeyField.PROTOCOL:
        return _META, _L4PROTO
    if field is KeyField.PORT:
        return _PAYLOAD, _TRANSPORT, 2
    if field is KeyField.NUMBER:
        return _NUMGEN, 1, 2, 0  # random, mod 2, from 0: any modulus stands for all
    header, source, destination = (_IP6, 8, 9) if family is Family.IPV6 else (_IP, 11, 12)
    return _PAYLOAD, header, source if field is KeyField.SOURCE else destination


def _entry(kind: int, value: bytes) -> bytes:
    return bytes((kind, len(value))) + value


def _number(kind: int, value: int) -> bytes:
    return _entry(kind, value.to_bytes(4, sys.byteorder))


NFNL_SUBSYS_NFTABLES = 10
_NEWTABLE, _DELTABLE = 0, 2
_NEWCHAIN, _DELCHAIN = 3, 5
_NEWRULE, _DELRULE = 6, 8
_NEWSET, _DELSET = 9, 11
_NEWSETELEM, _DELSETELEM = 12, 14
_E = TypeVar("_E", SetElement, EndpointElements)
_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_ELEMENTS_SIZE = 60_000
"""How many bytes of elements one message holds at most: an attribute's length has 16 bits."""


class NftMessage(Struct, frozen=True, gc=False):
    """One message: its type and flags, its payload, and what it is about.

    For elements, `subject` is their set, `elements` are those in the message, in order, and `first` is where in the
    payload they begin.
    """

    kind: int
    flags: int
    payload: bytes
    subject: str
    elements: Sequence[SetElement | EndpointElements] = ()
    first: int = 0


class TransactionEncoder:
    """Encodes transactions of one family."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._family = family
        self._header = nfgenmsg(address_family(family))
        self._table = text(1, table)
        self._name = table

    def encode(self, change: Transaction) -> Iterator[NftMessage]:
        """Yield the messages of a transaction, in their order."""
        if change.create:
            yield self._new_table()
        if change.replace:
            yield self._message(_DELTABLE, 0, f"table {self._name}")
            yield self._new_table()
        yield from self._removals(change)
        for place, found in enumerate(change.sets, 1):
            yield self._new_set(found, place)
        for chain in change.chains:
            yield self._new_chain(chain)
        for chain in change.rules:
            yield from self._new_rules(chain)
        for name, pools in change.pools.items():
            yield from self._elements(_NEWSETELEM, NLM_F_CREATE, name, pools, _encode_pool)
        for name, elements in change.added.items():
            yield from self._elements(_NEWSETELEM, NLM_F_CREATE, name, elements, _encode_element)
        if change.drop:
            yield self._message(_DELTABLE, 0, f"table {self._name}")

    def _removals(self, change: Transaction) -> Iterator[NftMessage]:
        for name, elements in change.removed.items():
            yield from self._elements(_DELSETELEM, 0, name, elements, _encode_key)
        for name in change.flushed:
            yield self._message(_DELRULE, 0, f"the rules of chain {name}", text(2, name))
        for name in change.deleted_sets:
            yield self._message(_DELSET, 0, f"set {name}", text(2, name))
        for name in change.deleted_chains:
            yield self._message(_DELCHAIN, 0, f"chain {name}", text(3, name))

    def _message(self, kind: int, flags: int, subject: str, *attributes: bytes) -> NftMessage:
        payload = b"".join((self._header, self._table, *attributes))
        return NftMessage(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, payload, subject)

    def _new_table(self) -> NftMessage:
        described = attribute(6, comment(TABLE_COMMENT))
        return self._message(_NEWTABLE, NLM_F_CREATE, f"table {self._name}", number(2, 0), described)

    def _new_set(self, found: NftSet, identity: int) -> NftMessage:
        shape = set_layout(found, self._family)
        attributes = [
            text(2, found.name),
            number(3, shape.flags),
            number(4, shape.key_type),
            number(5, shape.key_size),
            number(10, identity),
        ]
        if shape.data_size:
            attributes += [number(6, shape.data_type), number(7, shape.data_size)]
        if shape.timeout:
            attributes.append(attribute(11, struct.pack(">Q", shape.timeout)))
        attributes.append(attribute(13, set_userdata(found, self._family)))
        return self._message(_NEWSET, NLM_F_CREATE, f"set {found.name}", *attributes)

    def _new_chain(self, chain: NftChain) -> NftMessage:
        attributes = [text(3, chain.name)]
        if chain.hook:
            priority = struct.pack(">i", chain.hook.priority)
            attributes.append(nested(4, number(1, _HOOKS[chain.hook.hook]), attribute(2, priority)))
            attributes += [number(5, NF_ACCEPT), text(7, chain.hook.type)]
        if chain.comment:
            attributes.append(attribute(12, comment(chain.comment)))
        return self._message(_NEWCHAIN, NLM_F_CREATE, f"chain {chain.name}", *attributes)

    def _new_rules(self, chain: NftChain) -> Iterator[NftMessage]:
        for place, rule in enumerate(chain.rules, 1):
            attributes = [text(2, chain.name), nested(4, encode_rule(rule, self._family))]
            if rule.comment:
                attributes.append(attribute(7, comment(rule.comment)))
            subject = f"rule {place} of chain {chain.name}"
            yield self._message(_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, subject, *attributes)

    def _elements(
        self, kind: int, flags: int, name: str, elements: Sequence[_E], encode: Callable[[_E], bytes]
    ) -> Iterator[NftMessage]:
        """Yield as many messages as it takes: one holds no more than the length of an attribute can say."""
        start = self._header + self._table + text(2, name)
        head = NFNL_SUBSYS_NFTABLES << 8 | kind
        found: list[bytes] = []
        begin = size = 0
        for end, element in enumerate(elements):
            encoded = encode(element)
            if size + len(encoded) > _ELEMENTS_SIZE and found:
                payload = start + nested(3, *found)
                yield NftMessage(head, flags, payload, name, elements[begin:end], len(start) + 4)
                found, begin, size = [], end, 0
            found.append(encoded)
            size += len(encoded)
        yield NftMessage(head, flags, start + nested(3, *found), name, elements[begin:], len(start) + 4)


def _encode_key(element: SetElement) -> bytes:
    return nested(NFTA_LIST_ELEM, data(1, element.key))


def _encode_element(element: SetElement) -> bytes:
    value = element.value
    encoded = data(1, element.key)
    if isinstance(value, bytes):
        encoded += data(2, value)
    elif value is not None:
        encoded += element_verdict(2, value)
    if element.comment:
        encoded += attribute(6, comment(element.comment))
    return nested(NFTA_LIST_ELEM, encoded)


def _encode_pool(pool: EndpointElements) -> bytes:
    """Return what `_encode_element` would make of all elements of a pool, which differ in a few bytes only."""
    before, between = _endpoint_frame(len(pool.frontend) + 4, pool.size)
    before += pool.frontend
    return b"".join([before + number + between + value for number, value in pool.numbered()])


@cache
def _endpoint_frame(key: int, value: int) -> tuple[bytes, bytes]:
    """Return what stands before the key and between key and value of an endpoint's element, given their sizes."""
    encoded = _encode_element(SetElement(bytes(key), bytes(value)))
    return encoded[: -key - value - 8], encoded[-value - 8 : -value]


def refused_element(message: NftMessage, offset: int) -> SetElement | None:
    """Return the element of a message that the kernel points at by an offset into the payload, None if at none."""
    place = message.first
    for found in message.elements:
        for element in found.elements() if isinstance(found, EndpointElements) else (found,):
            (size,) = struct.unpack_from("=H", message.payload, place)
            if place <= offset < place + size:
                return element
            place += (size + 3) & ~3
    return None
