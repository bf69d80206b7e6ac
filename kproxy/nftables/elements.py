"""Sets and elements as the kernel lays them out: key and data types, sizes, packed keys and values."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.types import Family, Protocol
from kproxy.nftables.ruleset import KeyField, MapValue, NftSet

_MAP, _TIMEOUT, _EVAL = 8, 0x10, 0x20
_IPV4_ADDRESS, _IPV6_ADDRESS = 7, 8
_TYPES = {KeyField.PROTOCOL: 12, KeyField.PORT: 13, KeyField.NUMBER: 4}
_TYPE_BITS = 6
_AFFINITY_SET_SIZE = 65535
"""How many clients an endpoint can remember: what the kernel takes for a set that rules add to, if it is told no size.

kube-proxy tells it the same size, and then the kernel sets aside room for all of them at once, 2 MB for each endpoint.
"""
_VERDICT_TYPE, _VERDICT_SIZE = 0xFFFFFF00, 16


class SetLayout(Struct, frozen=True):
    """What decides whether a set can be used as it is.

    `timeout` is in milliseconds, `size` how many elements it may have (0: as many as there is memory for).
    """

    flags: int
    key_type: int
    key_size: int
    data_type: int = 0
    data_size: int = 0
    timeout: int = 0
    size: int = 0

    @property
    def has_verdicts(self) -> bool:
        """Whether elements may lead to chains, which cannot be deleted before the elements are."""
        return self.data_type == _VERDICT_TYPE


def set_layout(found: NftSet, family: Family) -> SetLayout:
    """Return the shape that a set has in the table of a family."""
    flags = 0 if found.value is MapValue.NOTHING else _MAP
    if found.timeout:
        flags |= _TIMEOUT | _EVAL
    data_type = data_size = 0
    if found.value is MapValue.VERDICT:
        data_type, data_size = _VERDICT_TYPE, _VERDICT_SIZE
    elif found.value is MapValue.ENDPOINT:
        data_type, data_size = _concatenated((KeyField.DESTINATION, KeyField.PORT), family)
    key_type, key_size = _concatenated(found.key, family)
    size = _AFFINITY_SET_SIZE if found.timeout else 0
    return SetLayout(flags, key_type, key_size, data_type, data_size, found.timeout * 1000, size)


def _concatenated(fields: Iterable[KeyField], family: Family) -> tuple[int, int]:
    """Return type and size of fields one after the other, each padded to a register."""
    kind = size = 0
    for field in fields:
        address = _IPV6_ADDRESS if family is Family.IPV6 else _IPV4_ADDRESS
        kind = kind << _TYPE_BITS | _TYPES.get(field, address)
        size += 16 if field not in _TYPES and family is Family.IPV6 else 4
    return kind, size


DROP = ""
"""The verdict `drop`; any other is the name of a chain to go to."""
ElementValue: TypeAlias = bytes | str | None
"""An endpoint, a verdict, or nothing."""


class SetElement(Struct, frozen=True, gc=False):
    """One element of a set or map; `comment` is for people."""

    key: bytes
    value: ElementValue = None
    comment: str = ""


PROTOCOLS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_IP4, _IP6 = int(AF_INET), int(AF_INET6)  # a plain number is converted faster
_PROTOCOL_AND_PORT = struct.Struct(">B3xH2x")
_PORT = struct.Struct(">H2x")
_NUMBER = struct.Struct("=I")


def address_family(family: Family) -> int:
    """Return the `AF_` number of a family."""
    return AF_INET6 if family is Family.IPV6 else AF_INET


def pack_address(address: str) -> bytes:
    """Return an address of either family as bytes."""
    return inet_pton(_IP6 if ":" in address else _IP4, address)


def unpack_address(packed: bytes) -> str:
    """Return the address that bytes stand for."""
    return inet_ntop(AF_INET6 if len(packed) == 16 else AF_INET, packed)


def node_port_key(protocol: Protocol, port: int) -> bytes:
    """Return the key of a NodePort."""
    return _PROTOCOL_AND_PORT.pack(PROTOCOLS[protocol], port)


def service_key(address: str, protocol: Protocol, port: int) -> bytes:
    """Return the key of a frontend that has an address of its own."""
    return pack_address(address) + _PROTOCOL_AND_PORT.pack(PROTOCOLS[protocol], port)


def frontend_text(key: bytes) -> str:
    """Return what a frontend's key stands for: `IP:port/PROTOCOL`, or `NodePort number/PROTOCOL`."""
    number, port = _PROTOCOL_AND_PORT.unpack(key[-_PROTOCOL_AND_PORT.size :])
    protocol = next(name for name, known in PROTOCOLS.items() if known == number)
    address = key[: -_PROTOCOL_AND_PORT.size]
    where = socket_text(unpack_address(address), port) if address else f"NodePort {port}"
    return f"{where}/{protocol}"


def pack_pool(endpoints: Sequence[str]) -> bytes:
    """Return the values that stand for endpoints of one family, given as `ip:port`, one after the other."""
    parts = [endpoint.rpartition(":") for endpoint in endpoints]
    if parts and parts[0][0][0] == "[":
        return b"".join([inet_pton(_IP6, address[1:-1]) + _packed_port(port) for address, _, port in parts])
    return b"".join([inet_pton(_IP4, address) + _packed_port(port) for address, _, port in parts])


@lru_cache(1 << 10)
def _packed_port(port: str) -> bytes:
    return _PORT.pack(int(port))


def hairpin_key(endpoint: str, protocol: Protocol) -> bytes:
    """Return the key of a connection from an endpoint to itself."""
    address, port = split_socket_text(endpoint)
    packed = pack_address(address)
    return packed + packed + node_port_key(protocol, port)


def endpoint_size(family: Family) -> int:
    """Return how many bytes stand for an endpoint."""
    return (16 if family is Family.IPV6 else 4) + _PORT.size


def numbered(frontend: bytes, place: int) -> bytes:
    """Return the key of the endpoint of that number, from 0, of a frontend."""
    return frontend + _NUMBER.pack(place)


POOL_ENDPOINTS = 500
"""How many endpoints one `EndpointElements` has at most, so that a message can hold it."""


class EndpointElements(Struct, frozen=True, gc=False):
    """Elements by which a frontend finds its endpoints, numbered from `first`; each value has `size` bytes."""

    frontend: bytes
    values: bytes
    size: int
    first: int = 0

    def elements(self) -> list[SetElement]:
        """Return them one by one."""
        return [SetElement(self.frontend + number, value) for number, value in self.numbered()]

    def numbered(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the number, as the last part of the key, and the value of each."""
        values, size = self.values, self.size
        begins = range(0, len(values), size)
        numbers = _numbers(self.first, len(begins))
        return zip(numbers, [values[begin : begin + size] for begin in begins], strict=True)


@lru_cache(1 << 8)
def _numbers(first: int, count: int) -> tuple[bytes, ...]:
    return tuple(map(_NUMBER.pack, range(first, first + count)))


def pools(frontend: bytes, values: bytes, size: int) -> Iterator[EndpointElements]:
    """Yield all endpoints of a frontend in pools of a size that can be handled."""
    step = POOL_ENDPOINTS * size
    for place, begin in enumerate(range(0, len(values), step)):
        yield EndpointElements(frontend, values[begin : begin + step], size, place * POOL_ENDPOINTS)
