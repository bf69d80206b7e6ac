"""Read the current state of a table from the kernel over netlink."""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink import NETLINK_NETFILTER, DumpInterruptedError, NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import MalformedMessageError, attribute, attributes, nested, nfgenmsg, nfnl_type
from kproxy.model.types import Family
from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import (
    DROP,
    ElementValue,
    SetElement,
    SetLayout,
    address_family,
    endpoint_size,
    set_layout,
)
from kproxy.nftables.encode import HOOK_NUMBERS
from kproxy.nftables.expressions import string_attribute, u32_attribute, value_attribute
from kproxy.nftables.names import TABLE
from kproxy.nftables.repair import POLICY_DROP
from kproxy.nftables.rule_content import RuleContent, canonical_expressions
from kproxy.nftables.ruleset import MapValue, NftHook, NftSet
from kproxy.nftables.snapshot import TableSnapshot

Span: TypeAlias = tuple[int, int]
"""Start and end of an attribute's payload in a buffer."""
_GETTABLE = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETTABLE)
_GETCHAIN = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETCHAIN)
_GETRULE = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETRULE)
_GETSET = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETSET)
_GETSETELEM = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETSETELEM)
_GETOBJ = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETOBJ)
_GETGEN = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETGEN)
_NFGENMSG_SIZE = 4
_HOOK_NAMES = {number: name for name, number in HOOK_NUMBERS.items()}
_BE32 = struct.Struct(">I")
_BE32_SIGNED = struct.Struct(">i")
_BE64 = struct.Struct(">Q")
_LENGTH = struct.Struct("=H")


class TableReader:
    """Reads one family's table.

    Each method opens a new netlink socket. It raises `OSError` if the socket cannot be opened or fails, and
    `NetlinkError`, a subclass, if the kernel rejects a request.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._header = nfgenmsg(address_family(family))
        self._table = string_attribute(nf.NFTA_TABLE_NAME, TABLE)  # the same number as NFTA_CHAIN_TABLE and so on

    def generation(self) -> int:
        """Return the generation ID, which the kernel increments whenever any table changes. Raises `NetlinkError`."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            generations: list[int] = []
            for data, begin, end in netlink.get(_GETGEN, nfgenmsg()):
                spans = attributes(data, begin + _NFGENMSG_SIZE, end)
                generations.append(_u32(data, spans[nf.NFTA_GEN_ID]))
            return generations[0]

    def exists(self) -> bool:
        """Return whether the table exists. Raises `NetlinkError`."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return self._flags(netlink) is not None

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        """Read the table. Return None if it does not exist.

        Raises `NetlinkError`, in particular `DumpInterruptedError` if any table changes during a dump. With
        `allow_interrupted`, a change is tolerated while elements are dumped. After a change, the kernel continues the
        dump within the same set, so a change to another table does no harm. A change to this table can cause elements
        to be missing from the result.
        """
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            flags = self._flags(netlink)
            if flags is None:
                return None
            snapshot = TableSnapshot(self._sets(netlink), self._chains(netlink), flags=flags)
            for each in SETS:
                layout = snapshot.sets.get(each.name)
                if layout is not None and replace(layout, counters=False) == set_layout(each, self._family):
                    elements = self._elements(netlink, each, allow_interrupted=allow_interrupted)
                    snapshot.elements[each.name] = elements
            return snapshot

    def chain_use_counts(self) -> Counter[str]:
        """Return the use count of each chain (NFTA_CHAIN_USE). Raises `NetlinkError`.

        A chain's use count is the number of its rules plus the number of rules and elements whose verdict is a jump or
        goto to it.
        """
        counts: Counter[str] = Counter()
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(_GETCHAIN, self._header + self._table):
                spans = attributes(data, begin + _NFGENMSG_SIZE, end)
                if _string(data, spans[nf.NFTA_CHAIN_TABLE]) == TABLE:
                    counts[_string(data, spans[nf.NFTA_CHAIN_NAME])] = _u32(data, spans[nf.NFTA_CHAIN_USE])
        return counts

    def flags(self) -> int | None:
        """Return the table's flags (enum nft_table_flags), or None if the table does not exist."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return self._flags(netlink)

    def sets(self, names: Iterable[str] | None = None) -> dict[str, SetLayout]:
        """Return the layouts of the named sets that exist, by default of all sets. Anonymous sets are omitted."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            if names is None:
                return self._sets(netlink)
            found = {}
            for name in names:
                for data, spans in self._object(netlink, _GETSET, string_attribute(nf.NFTA_SET_NAME, name)):
                    found[name] = _set_layout(data, spans)
            return found

    def chains(self, names: Iterable[str] | None = None) -> dict[str, NftHook | None]:
        """Return the hooks of the named chains that exist, by default of all chains."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            if names is None:
                return self._chains(netlink)
            found = {}
            for name in names:
                for data, spans in self._object(netlink, _GETCHAIN, string_attribute(nf.NFTA_CHAIN_NAME, name)):
                    found[name] = _hook(data, spans) if nf.NFTA_CHAIN_HOOK in spans else None
            return found

    def rules(self, chain: str | None = None) -> Iterator[tuple[str, RuleContent]]:
        """Yield the rules of one chain, or of all chains, each with the name of its chain.

        The rules of a chain are consecutive. If the chain does not exist, nothing is yielded.
        """
        filters = string_attribute(nf.NFTA_RULE_CHAIN, chain) if chain is not None else b""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(_GETRULE, self._header + self._table + filters):
                spans = attributes(data, begin + _NFGENMSG_SIZE, end)
                if _string(data, spans[nf.NFTA_RULE_TABLE]) == TABLE:
                    yield _string(data, spans[nf.NFTA_RULE_CHAIN]), _rule_content(data, spans)

    def elements(self, definition: NftSet) -> dict[bytes, SetElement]:
        """Return all elements of a set, by key. Raises `DumpInterruptedError` if the dump is not consistent."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return self._elements(netlink, definition, allow_interrupted=False)

    def walk_elements(self, definition: NftSet) -> Iterator[SetElement]:
        """Yield the elements of a set, while the kernel dumps them.

        Raises `DumpInterruptedError` at the end if any table has changed meanwhile. If this set has changed, or if the
        kernel has resized it, elements may be missing or repeated.
        """
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            yield from self._dump_elements(netlink, definition)

    def element(self, definition: NftSet, key: bytes) -> SetElement | None:
        """Return one element of a set, or None if it does not exist."""
        wanted = nested(nf.NFTA_LIST_ELEM, value_attribute(nf.NFTA_SET_ELEM_KEY, key))
        name = string_attribute(nf.NFTA_SET_ELEM_LIST_SET, definition.name)
        request = name + nested(nf.NFTA_SET_ELEM_LIST_ELEMENTS, wanted)
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, spans in self._object(netlink, _GETSETELEM, request):
                offset, _ = spans[nf.NFTA_SET_ELEM_LIST_ELEMENTS]
                (size,) = _LENGTH.unpack_from(data, offset)
                return _element(data, offset + 4, offset + size, definition.value)
        return None

    def counted_elements(self, definition: NftSet) -> list[tuple[SetElement, int | None]]:
        """Return the elements of a set, each with the packets that it counted, or None if it has no counter.

        Raises `DumpInterruptedError` if the dump is not consistent.
        """
        layout = _endpoint_layout(definition, self._family, counters=True)
        found: list[tuple[SetElement, int | None]] = []
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, offset, size in self._dump_raw(netlink, definition):
                begin, end = offset + 4, offset + size
                if layout and layout.matches(data, offset):
                    found.append((layout.decode(data, offset), _BE64.unpack_from(data, end - _BE64.size)[0]))
                else:
                    found.append((_element(data, begin, end, definition.value), _packets(data, begin, end)))
        if len({element.key for element, _ in found}) < len(found):
            raise _interrupted_by_resizing()
        return found

    def counters(self) -> dict[str, int]:
        """Return the packets that each named counter has counted, or nothing if the table does not exist."""
        found = {}
        request = self._header + self._table + u32_attribute(nf.NFTA_OBJ_TYPE, nf.NFT_OBJECT_COUNTER)
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(_GETOBJ, request):
                spans = attributes(data, begin + _NFGENMSG_SIZE, end)
                if _string(data, spans[nf.NFTA_OBJ_TABLE]) == TABLE:
                    packets, _ = attributes(data, *spans[nf.NFTA_OBJ_DATA])[nf.NFTA_COUNTER_PACKETS]
                    found[_string(data, spans[nf.NFTA_OBJ_NAME])] = _BE64.unpack_from(data, packets)[0]
        return found

    def _object(self, netlink: NetlinkSocket, kind: int, request: bytes) -> list[tuple[bytes, dict[int, Span]]]:
        """Request one object. Return the reply and its attributes, or nothing if the object does not exist."""
        try:
            return [
                (data, attributes(data, begin + _NFGENMSG_SIZE, end))
                for data, begin, end in netlink.get(kind, self._header + self._table + request)
            ]
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def _flags(self, netlink: NetlinkSocket) -> int | None:
        """Return the table's flags, or None if the table does not exist."""
        flags = 0
        try:
            for data, begin, end in netlink.get(_GETTABLE, self._header + self._table):
                spans = attributes(data, begin + _NFGENMSG_SIZE, end)
                flags = _u32(data, spans[nf.NFTA_TABLE_FLAGS])
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return flags

    def _sets(self, netlink: NetlinkSocket) -> dict[str, SetLayout]:
        layouts = {}
        for data, begin, end in netlink.dump(_GETSET, self._header + self._table):
            spans = attributes(data, begin + _NFGENMSG_SIZE, end)
            layout = _set_layout(data, spans)
            if not layout.flags & nf.NFT_SET_ANONYMOUS:  # an anonymous set is part of a rule and deleted with it
                layouts[_string(data, spans[nf.NFTA_SET_NAME])] = layout
        return layouts

    def _chains(self, netlink: NetlinkSocket) -> dict[str, NftHook | None]:
        chains = {}
        for data, begin, end in netlink.dump(_GETCHAIN, self._header + self._table):
            spans = attributes(data, begin + _NFGENMSG_SIZE, end)
            # Before Linux 6.3, the dump contains the chains of all tables of the family.
            if _string(data, spans[nf.NFTA_CHAIN_TABLE]) == TABLE:
                hook = _hook(data, spans) if nf.NFTA_CHAIN_HOOK in spans else None
                chains[_string(data, spans[nf.NFTA_CHAIN_NAME])] = hook
        return chains

    def _elements(
        self, netlink: NetlinkSocket, definition: NftSet, *, allow_interrupted: bool
    ) -> dict[bytes, SetElement]:
        elements: dict[bytes, SetElement] = {}
        repeated = False
        with suppress(DumpInterruptedError) if allow_interrupted else nullcontext():
            for element in self._dump_elements(netlink, definition):
                repeated |= element.key in elements
                elements[element.key] = element
            if repeated:
                raise _interrupted_by_resizing()
        return elements

    def _dump_elements(self, netlink: NetlinkSocket, definition: NftSet) -> Iterator[SetElement]:
        plain, counted = (_endpoint_layout(definition, self._family, counters=each) for each in (False, True))
        for data, offset, size in self._dump_raw(netlink, definition):
            if plain and plain.matches(data, offset):
                yield plain.decode(data, offset)
            elif counted and counted.matches(data, offset):
                yield counted.decode(data, offset)
            else:
                yield _element(data, offset + 4, offset + size, definition.value)

    def _dump_raw(self, netlink: NetlinkSocket, definition: NftSet) -> Iterator[tuple[bytes, int, int]]:
        """Yield each element of a set: the buffer that contains it, the offset of its attribute, and its size."""
        request = self._header + self._table + string_attribute(nf.NFTA_SET_ELEM_LIST_SET, definition.name)
        for data, begin, end in netlink.dump(_GETSETELEM, request):
            spans = attributes(data, begin + _NFGENMSG_SIZE, end)
            offset, list_end = spans[nf.NFTA_SET_ELEM_LIST_ELEMENTS]
            while offset + 4 <= list_end:
                (size,) = _LENGTH.unpack_from(data, offset)
                if size < 4 or offset + size > list_end:
                    raise MalformedMessageError(f"an element of {size} bytes where {list_end - offset} are left")
                yield data, offset, size
                offset += (size + 3) & ~3


def _interrupted_by_resizing() -> DumpInterruptedError:
    """While the kernel resizes a set, the dump contains some elements twice, and lacks others (Linux 6.18)."""
    return DumpInterruptedError(0, "dump interrupted by the resizing of a set")


class _EndpointElementLayout(Struct, frozen=True, gc=False):
    """The encoding of a map element that has a key, an endpoint as its value, and no other attributes but a counter.

    Most elements have this encoding. They can be decoded without parsing their attributes, because only the key, the
    value and the counter differ: `before_key`, `before_value` and `after_value` are the constant bytes before the key,
    between key and value, and between value and counter. `key_size` and `value_size` are in bytes.
    """

    before_key: bytes
    before_value: bytes
    after_value: bytes
    key_size: int
    value_size: int

    def matches(self, data: bytes, offset: int) -> bool:
        before_value = offset + len(self.before_key) + self.key_size
        after_value = before_value + len(self.before_value) + self.value_size
        return (
            data.startswith(self.before_key, offset)
            and data.startswith(self.before_value, before_value)
            and data.startswith(self.after_value, after_value)
        )

    def decode(self, data: bytes, offset: int) -> SetElement:
        key = offset + len(self.before_key)
        value = key + self.key_size + len(self.before_value)
        return SetElement(data[key : key + self.key_size], data[value : value + self.value_size])


def _endpoint_layout(definition: NftSet, family: Family, *, counters: bool) -> _EndpointElementLayout | None:
    if definition.value is not MapValue.ENDPOINT:
        return None
    key_size, value_size = set_layout(definition, family).key_size, endpoint_size(family)
    after_value, counter_size = _counter_frame() if counters else (b"", 0)
    before_key = struct.pack(
        "=6H",
        *(key_size + value_size + 20 + counter_size, nf.NFTA_LIST_ELEM),
        *(key_size + 8, nf.NFTA_SET_ELEM_KEY),
        *(key_size + 4, nf.NFTA_DATA_VALUE),
    )
    before_value = struct.pack("=4H", *(value_size + 8, nf.NFTA_SET_ELEM_DATA), *(value_size + 4, nf.NFTA_DATA_VALUE))
    return _EndpointElementLayout(before_key, before_value, after_value, key_size, value_size)


def _counter_frame() -> tuple[bytes, int]:
    """Return the constant first bytes of an element's counter, as the kernel dumps it, and the size of the counter.

    The last 8 bytes are the number of packets.
    """
    name = attribute(nf.NFTA_EXPR_NAME, b"counter\0")
    number = 4 + _BE64.size
    data = struct.pack("=4H", 4 + 2 * number, nf.NFTA_EXPR_DATA, number, nf.NFTA_COUNTER_BYTES)
    size = 4 + len(name) + 4 + 2 * number
    return struct.pack("=2H", size, nf.NFTA_SET_ELEM_EXPR) + name + data, size


def _set_layout(data: bytes, spans: dict[int, Span]) -> SetLayout:
    numbers = (
        _u32(data, spans[kind]) if kind in spans else 0
        for kind in (
            nf.NFTA_SET_FLAGS,
            nf.NFTA_SET_KEY_TYPE,
            nf.NFTA_SET_KEY_LEN,
            nf.NFTA_SET_DATA_TYPE,
            nf.NFTA_SET_DATA_LEN,
        )
    )
    flags, key_type, key_size, data_type, data_size = numbers
    timeout = _BE64.unpack_from(data, spans[nf.NFTA_SET_TIMEOUT][0])[0] if nf.NFTA_SET_TIMEOUT in spans else 0
    size = _set_size(data, spans[nf.NFTA_SET_DESC]) if nf.NFTA_SET_DESC in spans else 0
    counters = nf.NFTA_SET_EXPR in spans or nf.NFTA_SET_EXPRESSIONS in spans
    return SetLayout(flags, key_type, key_size, data_type, data_size, timeout, size, counters)


def _set_size(data: bytes, description: Span) -> int:
    spans = attributes(data, *description)
    return _u32(data, spans[nf.NFTA_SET_DESC_SIZE]) if nf.NFTA_SET_DESC_SIZE in spans else 0


def _hook(data: bytes, chain: dict[int, Span]) -> NftHook:
    spans = attributes(data, *chain[nf.NFTA_CHAIN_HOOK])
    number = _u32(data, spans[nf.NFTA_HOOK_HOOKNUM])
    (priority,) = _BE32_SIGNED.unpack_from(data, spans[nf.NFTA_HOOK_PRIORITY][0])
    hook = _HOOK_NAMES.get(number, str(number))
    if nf.NFTA_CHAIN_POLICY in chain and _u32(data, chain[nf.NFTA_CHAIN_POLICY]) != nf.NF_ACCEPT:
        hook += POLICY_DROP
    chain_type = _string(data, chain[nf.NFTA_CHAIN_TYPE])
    return NftHook(chain_type, hook, priority)  # type: ignore[arg-type]  # an unknown hook never equals one of kproxy's


def _rule_content(data: bytes, spans: dict[int, Span]) -> RuleContent:
    begin, end = spans.get(nf.NFTA_RULE_EXPRESSIONS, (0, 0))
    comment = _comment(data, spans[nf.NFTA_RULE_USERDATA]) if nf.NFTA_RULE_USERDATA in spans else ""
    return RuleContent(canonical_expressions(data[begin:end]), comment)


def _element(data: bytes, begin: int, end: int, map_value: MapValue) -> SetElement:
    spans = attributes(data, begin, end)
    # The catch-all element `*` has no key.
    key = _value(data, spans[nf.NFTA_SET_ELEM_KEY]) if nf.NFTA_SET_ELEM_KEY in spans else b""
    comment = _comment(data, spans[nf.NFTA_SET_ELEM_USERDATA]) if nf.NFTA_SET_ELEM_USERDATA in spans else ""
    value: ElementValue = None
    if map_value is MapValue.ENDPOINT:
        value = _value(data, spans[nf.NFTA_SET_ELEM_DATA])
    elif map_value is MapValue.VERDICT:
        value = _verdict(data, spans[nf.NFTA_SET_ELEM_DATA])
    return SetElement(key, value, comment)


def _packets(data: bytes, begin: int, end: int) -> int | None:
    """Return the number of packets that an element counted, or None if it has no counter."""
    spans = attributes(data, begin, end)
    if nf.NFTA_SET_ELEM_EXPR not in spans:
        return None
    spans = attributes(data, *spans[nf.NFTA_SET_ELEM_EXPR])
    if nf.NFTA_EXPR_DATA not in spans or _string(data, spans[nf.NFTA_EXPR_NAME]) != "counter":
        return None
    spans = attributes(data, *spans[nf.NFTA_EXPR_DATA])
    packets: int = _BE64.unpack_from(data, spans[nf.NFTA_COUNTER_PACKETS][0])[0]
    return packets


def _value(data: bytes, span: Span) -> bytes:
    # The payload consists of one NFTA_DATA_VALUE attribute.
    begin, _ = span
    (size,) = _LENGTH.unpack_from(data, begin)
    return data[begin + 4 : begin + size]


def _verdict(data: bytes, span: Span) -> str:
    """Return the target chain of a `goto` verdict, or `DROP` for a `drop` verdict.

    For any other verdict, return a string that differs from `DROP` and from the names of kproxy's chains.
    """
    spans = attributes(data, *attributes(data, *span)[nf.NFTA_DATA_VERDICT])
    (code,) = _BE32_SIGNED.unpack_from(data, spans[nf.NFTA_VERDICT_CODE][0])
    if code == nf.NFT_GOTO:
        return _string(data, spans[nf.NFTA_VERDICT_CHAIN])
    return DROP if code == nf.NF_DROP else f"verdict {code}"


def _comment(data: bytes, span: Span) -> str:
    """Return an element's comment, which is the only entry in the user data of the elements that kproxy creates.

    The entry starts with its type and its length, one byte each.
    """
    begin, end = span
    return data[begin + 2 : end].rstrip(b"\0").decode(errors="replace") if end - begin >= 2 else ""


def _u32(data: bytes, span: Span) -> int:
    number: int = _BE32.unpack_from(data, span[0])[0]
    return number


def _string(data: bytes, span: Span) -> str:
    return data[span[0] : span[1]].rstrip(b"\0").decode(errors="replace")
