"""Reading a table out of the kernel: at start and when somebody else may have changed it, and at no other time."""

from __future__ import annotations

import errno
import struct
from collections import Counter
from contextlib import nullcontext, suppress

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, DumpInterruptedError, NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import attribute, attributes, nfgenmsg
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
from kproxy.nftables.encode import NFNL_SUBSYS_NFTABLES
from kproxy.nftables.expressions import NF_ACCEPT, NF_DROP, NFT_GOTO
from kproxy.nftables.names import TABLE
from kproxy.nftables.ruleset import MapValue, NftHook, NftSet
from kproxy.nftables.snapshot import TableSnapshot

_GETTABLE, _GETCHAIN, _GETSET, _GETSETELEM, _GETGEN = 1, 4, 10, 13, 16
_NFGENMSG_SIZE = 4
_NFT_SET_ANONYMOUS = 1
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_BE32 = struct.Struct(">I")
_BE64 = struct.Struct(">Q")
_SIZE = struct.Struct("=H")


class TableReader:
    """Reads one family's table over a netlink socket of its own."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._header = nfgenmsg(address_family(family))
        self._table = attribute(1, TABLE.encode() + b"\0")

    def generation(self) -> int:
        """Return the number of the last change that anybody made to any table. Raises `NetlinkError`."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            found: list[int] = []
            for data, begin, end in netlink.get(_kind(_GETGEN), nfgenmsg()):
                place, _ = attributes(data, begin + _NFGENMSG_SIZE, end)[1]
                found.append(_BE32.unpack_from(data, place)[0])
            return found[0]

    def exists(self) -> bool:
        """Return whether there is such a table. Raises `NetlinkError`."""
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return self._flags(netlink) is not None

    def view(self, *, lenient: bool = False) -> TableSnapshot | None:
        """Return what the table holds, None if there is none. Raises `NetlinkError`, also if tables changed meanwhile.

        With `lenient`, not if they did while elements were read: the kernel finds its place in a set again by the set
        alone, so that changes of others do no harm.
        """
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            flags = self._flags(netlink)
            if flags is None:
                return None
            view = TableSnapshot(self._sets(netlink), self._chains(netlink), flags=flags)
            for each in SETS:
                if view.sets.get(each.name) == set_layout(each, self._family):
                    view.elements[each.name] = self._elements(netlink, each, lenient=lenient)
            return view

    def uses(self) -> Counter[str]:
        """Return how often each chain is used, by rules in it and by whatever leads to it. Raises `NetlinkError`."""
        found: Counter[str] = Counter()
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(_kind(_GETCHAIN), self._header + self._table):
                parts = attributes(data, begin + _NFGENMSG_SIZE, end)
                if _string(data, parts[1]) == TABLE:
                    found[_string(data, parts[3])] = _BE32.unpack_from(data, parts[6][0])[0]
        return found

    def _flags(self, netlink: NetlinkSocket) -> int | None:
        """Return the table's flags, None if there is no table."""
        flags = 0
        try:
            for data, begin, end in netlink.get(_kind(_GETTABLE), self._header + self._table):
                place, _ = attributes(data, begin + _NFGENMSG_SIZE, end)[2]
                (flags,) = _BE32.unpack_from(data, place)
        except NetlinkError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return flags

    def _sets(self, netlink: NetlinkSocket) -> dict[str, SetLayout]:
        found = {}
        for data, begin, end in netlink.dump(_kind(_GETSET), self._header + self._table):
            parts = attributes(data, begin + _NFGENMSG_SIZE, end)
            numbers = {kind: _BE32.unpack_from(data, parts[kind][0])[0] for kind in (3, 4, 5, 6, 7) if kind in parts}
            timeout = _BE64.unpack_from(data, parts[11][0])[0] if 11 in parts else 0
            flags, key_type, key_size, data_type, data_size = (numbers.get(kind, 0) for kind in (3, 4, 5, 6, 7))
            if flags & _NFT_SET_ANONYMOUS:
                continue  # part of a rule, and gone with it
            size = _set_size(data, parts[9]) if 9 in parts else 0
            found[_string(data, parts[2])] = SetLayout(flags, key_type, key_size, data_type, data_size, timeout, size)
        return found

    def _chains(self, netlink: NetlinkSocket) -> dict[str, NftHook | None]:
        found = {}
        for data, begin, end in netlink.dump(_kind(_GETCHAIN), self._header + self._table):
            parts = attributes(data, begin + _NFGENMSG_SIZE, end)
            # Before Linux 6.3 the dump is of all tables of the family.
            if _string(data, parts[1]) == TABLE:
                found[_string(data, parts[3])] = _hook(data, parts) if 4 in parts else None
        return found

    def _elements(self, netlink: NetlinkSocket, owner: NftSet, *, lenient: bool) -> dict[bytes, SetElement]:
        found: dict[bytes, SetElement] = {}
        with suppress(DumpInterruptedError) if lenient else nullcontext():
            self._read_elements(netlink, owner, found)
        return found

    def _read_elements(self, netlink: NetlinkSocket, owner: NftSet, found: dict[bytes, SetElement]) -> None:
        asked = self._header + self._table + attribute(2, owner.name.encode() + b"\0")
        plain = _plain(owner, self._family)
        for data, begin, end in netlink.dump(_kind(_GETSETELEM), asked):
            place, listed_end = attributes(data, begin + _NFGENMSG_SIZE, end)[3]
            while place + 4 <= listed_end:
                if plain and plain.fits(data, place):
                    element, size = plain.element(data, place), plain.size
                else:
                    (size,) = _SIZE.unpack_from(data, place)
                    element = _element(data, place + 4, place + size, owner.value)
                found[element.key] = element
                place += (size + 3) & ~3


class _EndpointElementLayout(Struct, frozen=True, gc=False):
    """How the kernel lays out elements with a key, an endpoint and nothing else, of which there are many."""

    before: bytes
    between: bytes
    key: int
    value: int

    @property
    def size(self) -> int:
        return len(self.before) + self.key + len(self.between) + self.value

    def fits(self, data: bytes, place: int) -> bool:
        middle = place + len(self.before) + self.key
        return data.startswith(self.before, place) and data.startswith(self.between, middle)

    def element(self, data: bytes, place: int) -> SetElement:
        key = place + len(self.before)
        value = key + self.key + len(self.between)
        return SetElement(data[key : key + self.key], data[value : value + self.value])


def _plain(owner: NftSet, family: Family) -> _EndpointElementLayout | None:
    if owner.value is not MapValue.ENDPOINT:
        return None
    key, value = set_layout(owner, family).key_size, endpoint_size(family)
    before = struct.pack("=6H", key + value + 20, 1, key + 8, 1, key + 4, 1)
    return _EndpointElementLayout(before, struct.pack("=4H", value + 8, 2, value + 4, 1), key, value)


def _kind(number: int) -> int:
    return NFNL_SUBSYS_NFTABLES << 8 | number


def _string(data: bytes, place: tuple[int, int]) -> str:
    return data[place[0] : place[1]].rstrip(b"\0").decode(errors="replace")


def _set_size(data: bytes, place: tuple[int, int]) -> int:
    described = attributes(data, *place)
    size: int = _BE32.unpack_from(data, described[1][0])[0] if 1 in described else 0
    return size


def _hook(data: bytes, parts: dict[int, tuple[int, int]]) -> NftHook:
    inner = attributes(data, *parts[4])
    number = _BE32.unpack_from(data, inner[1][0])[0]
    (priority,) = struct.unpack_from(">i", data, inner[2][0])
    hook = _HOOKS[number] if number < len(_HOOKS) else str(number)
    if 5 in parts and _BE32.unpack_from(data, parts[5][0])[0] != NF_ACCEPT:
        hook += " with policy drop"
    return NftHook(_string(data, parts[7]), hook, priority)  # type: ignore[arg-type]  # a hook that is not ours compares unequal


def _element(data: bytes, begin: int, end: int, kind: MapValue) -> SetElement:
    parts = attributes(data, begin, end)
    key = _value(data, parts[1]) if 1 in parts else b""  # `*`, which stands for all other keys
    comment = _comment(data, parts[6]) if 6 in parts else ""
    value: ElementValue = None
    if kind is MapValue.ENDPOINT:
        value = _value(data, parts[2])
    elif kind is MapValue.VERDICT:
        value = _verdict(data, parts[2])
    return SetElement(key, value, comment)


def _value(data: bytes, place: tuple[int, int]) -> bytes:
    # One attribute of a value, with nothing beside it.
    begin, _ = place
    (size,) = _SIZE.unpack_from(data, begin)
    return data[begin + 4 : begin + size]


def _verdict(data: bytes, place: tuple[int, int]) -> str:
    """Return a chain to go to or `DROP`; of others' verdicts, something that is neither."""
    parts = attributes(data, *attributes(data, *place)[2])
    (code,) = struct.unpack_from(">i", data, parts[1][0])
    if code == NFT_GOTO:
        return _string(data, parts[2])
    return DROP if code == NF_DROP else f"verdict {code}"


def _comment(data: bytes, place: tuple[int, int]) -> str:
    begin, end = place
    return data[begin + 2 : end].rstrip(b"\0").decode(errors="replace") if end - begin >= 2 else ""
