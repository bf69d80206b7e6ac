"""Encode transactions as nf_tables netlink messages (linux/netfilter/nf_tables.h). Pure.

Each message also carries the name of the object that it adds or deletes. If the kernel rejects the message, the error
can then name that object.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink_message import (
    NFGENMSG_SIZE,
    NLM_F_APPEND,
    NLM_F_CREATE,
    align,
    attribute,
    nested,
    nfgenmsg,
    nfnl_type,
)
from kproxy.model.types import Family
from kproxy.nftables.base_table import TABLE_COMMENT
from kproxy.nftables.elements import EndpointElements, SetElement, address_family, set_layout
from kproxy.nftables.expressions import (
    element_verdict_attribute,
    encode_rule,
    string_attribute,
    u32_attribute,
    value_attribute,
)
from kproxy.nftables.names import TABLE
from kproxy.nftables.ruleset import KeyField, MapValue, NftChain, NftSet, named_counters
from kproxy.nftables.transaction import Transaction

_E = TypeVar("_E", SetElement, EndpointElements)
HOOK_NUMBERS = {
    "prerouting": nf.NF_INET_PRE_ROUTING,
    "input": nf.NF_INET_LOCAL_IN,
    "forward": nf.NF_INET_FORWARD,
    "output": nf.NF_INET_LOCAL_OUT,
    "postrouting": nf.NF_INET_POST_ROUTING,
}
_MAX_ELEMENTS_SIZE = 60_000
"""Maximum total size of the elements in one message, in bytes.

All elements are in one attribute, and the length of an attribute is a 16-bit number.
"""

# Values of nft's own enums (datatype.h, expression.h and proto.h in its source). nft stores them in a set's user data.
_BYTEORDER_INVALID, _BYTEORDER_BIG_ENDIAN = 0, 2
_EXPR_PAYLOAD, _EXPR_META, _EXPR_CONCAT, _EXPR_NUMGEN = 7, 9, 13, 23
_PROTO_DESC_TH, _PROTO_DESC_IP, _PROTO_DESC_IP6 = 11, 12, 13
_THDR_DPORT = 2
_IPHDR_SADDR, _IPHDR_DADDR = 11, 12
_IP6HDR_SADDR, _IP6HDR_DADDR = 8, 9


_COUNTER = string_attribute(nf.NFTA_EXPR_NAME, "counter") + nested(nf.NFTA_EXPR_DATA)
"""The expression `counter`. If a set has it, the kernel adds a counter to each new element of the set (Linux 5.11)."""


class NftMessage(Struct, frozen=True, gc=False):
    """One netlink message. `subject` describes the object that the message adds or deletes.

    `kind` and `name` are the kind and the name of the table, chain or set; the chain's if the message adds or deletes
    rules, and the set's if it adds or deletes elements. In the latter case, `elements` are the elements in the order in
    which they are encoded, and `elements_offset` is the offset of the first element in the payload, in bytes.
    """

    type: int
    flags: int
    payload: bytes
    subject: str
    kind: Literal["table", "chain", "set"]
    name: str
    elements: Sequence[SetElement | EndpointElements] = ()
    elements_offset: int = 0


class TransactionEncoder:
    """Encodes transactions for one family's table."""

    def __init__(self, family: Family, table: str = TABLE) -> None:
        self._family = family
        self._header = nfgenmsg(address_family(family))
        self._table = string_attribute(nf.NFTA_TABLE_NAME, table)  # also NFTA_CHAIN_TABLE, NFTA_RULE_TABLE and so on
        self._table_name = table

    def encode(self, transaction: Transaction) -> Iterator[NftMessage]:
        """Yield the messages of a transaction in the order in which the kernel must process them."""
        if transaction.create_table:
            yield self._add_table()
        if transaction.replace_table:
            yield self._delete_table()
            yield self._add_table()
        yield from self._deletions(transaction)
        for set_id, definition in enumerate(transaction.added_sets, 1):
            yield self._add_set(definition, set_id)
        for chain in transaction.added_chains:
            yield self._add_chain(chain)
        for name in named_counters(transaction.added_rules):
            yield self._add_counter(name)
        for chain in transaction.added_rules:
            yield from self._add_rules(chain)
        for name, runs in transaction.added_endpoints.items():
            yield from self._elements(nf.NFT_MSG_NEWSETELEM, NLM_F_CREATE, name, runs, _encode_endpoints)
        for name, elements in transaction.added_elements.items():
            yield from self._elements(nf.NFT_MSG_NEWSETELEM, NLM_F_CREATE, name, elements, _encode_element)
        if transaction.delete_table:
            yield self._delete_table()

    def _deletions(self, transaction: Transaction) -> Iterator[NftMessage]:
        for name, elements in transaction.deleted_elements.items():
            yield from self._elements(nf.NFT_MSG_DELSETELEM, 0, name, elements, _encode_key)
        for name in transaction.flushed_chains:
            chain = string_attribute(nf.NFTA_RULE_CHAIN, name)
            yield self._message(nf.NFT_MSG_DELRULE, 0, "chain", name, chain, subject=f"the rules of chain {name}")
        for name in transaction.deleted_sets:
            yield self._message(nf.NFT_MSG_DELSET, 0, "set", name, string_attribute(nf.NFTA_SET_NAME, name))
        for name in transaction.deleted_chains:
            yield self._message(nf.NFT_MSG_DELCHAIN, 0, "chain", name, string_attribute(nf.NFTA_CHAIN_NAME, name))

    def _message(
        self,
        message: int,
        flags: int,
        kind: Literal["table", "chain", "set"],
        name: str,
        *attributes: bytes,
        subject: str = "",
    ) -> NftMessage:
        payload = b"".join((self._header, self._table, *attributes))
        message_type = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, message)
        return NftMessage(message_type, flags, payload, subject or f"{kind} {name}", kind, name)

    def _add_table(self) -> NftMessage:
        flags = u32_attribute(nf.NFTA_TABLE_FLAGS, 0)
        userdata = attribute(nf.NFTA_TABLE_USERDATA, _comment(nf.NFTNL_UDATA_TABLE_COMMENT, TABLE_COMMENT))
        return self._message(nf.NFT_MSG_NEWTABLE, NLM_F_CREATE, "table", self._table_name, flags, userdata)

    def _delete_table(self) -> NftMessage:
        return self._message(nf.NFT_MSG_DELTABLE, 0, "table", self._table_name)

    def _add_set(self, definition: NftSet, set_id: int) -> NftMessage:
        layout = set_layout(definition, self._family)
        attributes = [
            string_attribute(nf.NFTA_SET_NAME, definition.name),
            u32_attribute(nf.NFTA_SET_FLAGS, layout.flags),
            u32_attribute(nf.NFTA_SET_KEY_TYPE, layout.key_type),
            u32_attribute(nf.NFTA_SET_KEY_LEN, layout.key_size),
            u32_attribute(nf.NFTA_SET_ID, set_id),
        ]
        if layout.data_size:
            attributes.append(u32_attribute(nf.NFTA_SET_DATA_TYPE, layout.data_type))
            attributes.append(u32_attribute(nf.NFTA_SET_DATA_LEN, layout.data_size))
        if layout.timeout:
            attributes.append(attribute(nf.NFTA_SET_TIMEOUT, struct.pack(">Q", layout.timeout)))
        if layout.counters:
            attributes.append(nested(nf.NFTA_SET_EXPR, _COUNTER))
        attributes.append(attribute(nf.NFTA_SET_USERDATA, _set_userdata(definition, self._family)))
        return self._message(nf.NFT_MSG_NEWSET, NLM_F_CREATE, "set", definition.name, *attributes)

    def _add_chain(self, chain: NftChain) -> NftMessage:
        attributes = [string_attribute(nf.NFTA_CHAIN_NAME, chain.name)]
        if chain.hook:
            number = u32_attribute(nf.NFTA_HOOK_HOOKNUM, HOOK_NUMBERS[chain.hook.hook])
            priority = attribute(nf.NFTA_HOOK_PRIORITY, struct.pack(">i", chain.hook.priority))
            attributes.append(nested(nf.NFTA_CHAIN_HOOK, number, priority))
            attributes.append(u32_attribute(nf.NFTA_CHAIN_POLICY, nf.NF_ACCEPT))
            attributes.append(string_attribute(nf.NFTA_CHAIN_TYPE, chain.hook.type))
        if chain.comment:
            userdata = _comment(nf.NFTNL_UDATA_CHAIN_COMMENT, chain.comment)
            attributes.append(attribute(nf.NFTA_CHAIN_USERDATA, userdata))
        return self._message(nf.NFT_MSG_NEWCHAIN, NLM_F_CREATE, "chain", chain.name, *attributes)

    def _add_counter(self, name: str) -> NftMessage:
        """Create a counter. If it exists, it keeps its value."""
        return self._message(
            nf.NFT_MSG_NEWOBJ,
            NLM_F_CREATE,
            "table",
            self._table_name,
            string_attribute(nf.NFTA_OBJ_NAME, name),
            u32_attribute(nf.NFTA_OBJ_TYPE, nf.NFT_OBJECT_COUNTER),
            nested(nf.NFTA_OBJ_DATA),
            subject=f"counter {name}",
        )

    def _add_rules(self, chain: NftChain) -> Iterator[NftMessage]:
        chain_name = string_attribute(nf.NFTA_RULE_CHAIN, chain.name)
        for number, rule in enumerate(chain.rules, 1):
            attributes = [chain_name, nested(nf.NFTA_RULE_EXPRESSIONS, encode_rule(rule, self._family))]
            if rule.comment:
                userdata = _comment(nf.NFTNL_UDATA_RULE_COMMENT, rule.comment)
                attributes.append(attribute(nf.NFTA_RULE_USERDATA, userdata))
            subject = f"rule {number} of chain {chain.name}"
            flags = NLM_F_CREATE | NLM_F_APPEND
            yield self._message(nf.NFT_MSG_NEWRULE, flags, "chain", chain.name, *attributes, subject=subject)

    def _elements(
        self, message: int, flags: int, set_name: str, elements: Sequence[_E], encode: Callable[[_E], bytes]
    ) -> Iterator[NftMessage]:
        """Yield the messages that add or delete elements of one set.

        The elements in one message have at most `_MAX_ELEMENTS_SIZE` bytes in total.
        """
        start = self._header + self._table + string_attribute(nf.NFTA_SET_ELEM_LIST_SET, set_name)
        kind = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, message)
        parts: list[bytes] = []
        begin = size = 0
        for end, element in enumerate(elements):
            encoded = encode(element)
            if size + len(encoded) > _MAX_ELEMENTS_SIZE and parts:
                payload = start + nested(nf.NFTA_SET_ELEM_LIST_ELEMENTS, *parts)
                yield NftMessage(kind, flags, payload, set_name, "set", set_name, elements[begin:end], len(start) + 4)
                parts, begin, size = [], end, 0
            parts.append(encoded)
            size += len(encoded)
        payload = start + nested(nf.NFTA_SET_ELEM_LIST_ELEMENTS, *parts)
        yield NftMessage(kind, flags, payload, set_name, "set", set_name, elements[begin:], len(start) + 4)


def rejected_element(message: NftMessage, offset: int) -> SetElement | None:
    """Return the element that the kernel rejected, or None if no element is at the reported offset.

    `offset` is the offset in the message's payload, in bytes, that the kernel reported with the error.
    """
    return next((element for element, begin, end in _encoded_elements(message) if begin <= offset < end), None)


def split_elements(message: NftMessage) -> Iterator[NftMessage]:
    """Yield a message for each element of a message.

    The kernel reports only the first rejected element of a message. If each element has a message of its own, the
    kernel reports all rejected elements at once.
    """
    start = message.payload[: message.elements_offset - 4]  # without the header of the attribute with all elements
    for element, begin, end in _encoded_elements(message):
        payload = start + nested(nf.NFTA_SET_ELEM_LIST_ELEMENTS, message.payload[begin:end])
        yield replace(message, payload=payload, elements=(element,))


def is_about_table(offset: int) -> bool:
    """Return whether the offset that the kernel reported with an error is that of the table's name."""
    return offset == NFGENMSG_SIZE


def _encoded_elements(message: NftMessage) -> Iterator[tuple[SetElement, int, int]]:
    """Yield each element, and the start and end of its encoding in the payload, including the padding."""
    begin = message.elements_offset
    for each in message.elements:
        for element in each.elements() if isinstance(each, EndpointElements) else (each,):
            (size,) = struct.unpack_from("=H", message.payload, begin)
            end = begin + align(size)
            yield element, begin, end
            begin = end


# Elements


def _encode_key(element: SetElement) -> bytes:
    return nested(nf.NFTA_LIST_ELEM, value_attribute(nf.NFTA_SET_ELEM_KEY, element.key))


def _encode_element(element: SetElement) -> bytes:
    value = element.value
    encoded = value_attribute(nf.NFTA_SET_ELEM_KEY, element.key)
    if isinstance(value, bytes):
        encoded += value_attribute(nf.NFTA_SET_ELEM_DATA, value)
    elif value is not None:
        encoded += element_verdict_attribute(nf.NFTA_SET_ELEM_DATA, value)
    if element.comment:
        encoded += attribute(nf.NFTA_SET_ELEM_USERDATA, _comment(nf.NFTNL_UDATA_SET_ELEM_COMMENT, element.comment))
    return nested(nf.NFTA_LIST_ELEM, encoded)


def _encode_endpoints(run: EndpointElements) -> bytes:
    """Encode consecutive endpoint elements.

    The result is the same as if `_encode_element` encoded each element. This function is faster because it encodes only
    the index and the value of each element: all other bytes are the same.
    """
    before, between = _endpoint_frame(len(run.frontend) + 4, run.value_size)
    before += run.frontend
    return b"".join([before + index + between + value for index, value in run.indexed_values()])


@cache
def _endpoint_frame(key_size: int, value_size: int) -> tuple[bytes, bytes]:
    """Return the constant bytes of an encoded endpoint element: those before the key, and those before the value."""
    encoded = _encode_element(SetElement(bytes(key_size), bytes(value_size)))
    return encoded[: -key_size - value_size - 8], encoded[-value_size - 8 : -value_size]


# User data (libnftnl/udata.h): the kernel only stores it; nft uses it to print comments and the types of sets


def _comment(kind: int, comment: str) -> bytes:
    return _udata(kind, comment.encode() + b"\0")


def _set_userdata(definition: NftSet, family: Family) -> bytes:
    byte_order = _BYTEORDER_INVALID if len(definition.key) > 1 else _BYTEORDER_BIG_ENDIAN
    parts = [_udata_u32(nf.NFTNL_UDATA_SET_KEYBYTEORDER, byte_order)]
    if definition.value is not MapValue.NONE:
        parts.append(_udata_u32(nf.NFTNL_UDATA_SET_DATABYTEORDER, _BYTEORDER_INVALID))
    if definition.value is MapValue.ENDPOINT:
        parts.append(_udata(nf.NFTNL_UDATA_SET_KEY_TYPEOF, _typeof(definition.key, family)))
        data_type = _typeof((KeyField.DESTINATION, KeyField.PORT), family)
        parts.append(_udata(nf.NFTNL_UDATA_SET_DATA_TYPEOF, data_type))
    elif len(definition.key) > 1:
        parts.append(_udata(nf.NFTNL_UDATA_SET_KEY_TYPEOF, _typeof((), family)))
    if definition.value is not MapValue.NONE:
        parts.append(_udata_u32(nf.NFTNL_UDATA_SET_DATA_INTERVAL, 0))
    if definition.comment:
        parts.append(_comment(nf.NFTNL_UDATA_SET_COMMENT, definition.comment))
    return b"".join(parts)


def _typeof(fields: Sequence[KeyField], family: Family) -> bytes:
    """Return the user data from which nft prints a set's type: `typeof` followed by these concatenated fields."""
    parts = (_udata(index, _typeof_field(field, family)) for index, field in enumerate(fields))
    return _typeof_expression(_EXPR_CONCAT, b"".join(parts))


def _typeof_field(field: KeyField, family: Family) -> bytes:
    expression, *arguments = _typeof_arguments(field, family)
    return _typeof_expression(expression, b"".join(_udata_u32(index, each) for index, each in enumerate(arguments)))


def _typeof_expression(expression: int, arguments: bytes) -> bytes:
    return _udata_u32(nf.NFTNL_UDATA_SET_TYPEOF_EXPR, expression) + _udata(nf.NFTNL_UDATA_SET_TYPEOF_DATA, arguments)


def _typeof_arguments(field: KeyField, family: Family) -> tuple[int, ...]:
    """Return nft's expression type for a field, followed by the arguments of the expression."""
    if field is KeyField.PROTOCOL:
        return _EXPR_META, nf.NFT_META_L4PROTO
    if field is KeyField.PORT:
        return _EXPR_PAYLOAD, _PROTO_DESC_TH, _THDR_DPORT
    if field is KeyField.NUMGEN:
        return _EXPR_NUMGEN, nf.NFT_NG_RANDOM, 2, 0  # modulus and offset, which have no meaning in a type
    if family is Family.IPV6:
        return _EXPR_PAYLOAD, _PROTO_DESC_IP6, _IP6HDR_SADDR if field is KeyField.SOURCE else _IP6HDR_DADDR
    return _EXPR_PAYLOAD, _PROTO_DESC_IP, _IPHDR_SADDR if field is KeyField.SOURCE else _IPHDR_DADDR


def _udata(kind: int, value: bytes) -> bytes:
    return bytes((kind, len(value))) + value


def _udata_u32(kind: int, value: int) -> bytes:
    return _udata(kind, value.to_bytes(4, sys.byteorder))
