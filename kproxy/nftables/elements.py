"""How the kernel represents sets and elements: data types, sizes, packed keys and values. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TypeAlias

from msgspec import Struct

from kproxy.host.nf_tables_constants import NFT_DATA_VERDICT, NFT_SET_EVAL, NFT_SET_MAP, NFT_SET_TIMEOUT
from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.types import Family, Protocol
from kproxy.nftables.ruleset import KeyField, MapValue, NftSet

DROP = ""
"""Represents the verdict `drop`. Every other verdict is a `goto`, represented by the name of its target chain."""
PROTOCOLS: dict[Protocol, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
"""IP protocol numbers (IANA)."""
MAX_ENDPOINT_RUN = 500
"""Maximum number of elements in one `EndpointElements`. This many elements fit into one netlink message."""
# nft's numbers for data types (enum datatypes in its datatype.h). The number for a concatenation contains the number of
# each concatenated type in 6 bits (TYPE_BITS).
_TYPE_IPADDR, _TYPE_IP6ADDR = 7, 8
_DATA_TYPES = {KeyField.PROTOCOL: 12, KeyField.PORT: 13, KeyField.NUMGEN: 4}
_TYPE_BITS = 6
_VERDICT_SIZE = 16  # sizeof(struct nft_verdict)
_AFFINITY_SET_SIZE = 65535
"""Maximum number of clients in an affinity set.

This is the kernel's default for a dynamic set (a set to which rules add elements), so the netlink message that creates
the set does not contain a size. kube-proxy requests the same size explicitly. With an explicit size, the kernel
allocates memory for all elements when it creates the set: 2 MB for each endpoint.
"""
_INET, _INET6 = int(AF_INET), int(AF_INET6)  # inet_pton is faster with a plain int than with the enum
_PROTOCOL_AND_PORT = struct.Struct(">B3xH2x")
_PORT = struct.Struct(">H2x")
_INDEX = struct.Struct("=I")


# Sets


class SetLayout(Struct, frozen=True):
    """The properties of a set that cannot be changed after its creation. A set with other properties must be replaced.

    `key_size` and `data_size` are in bytes, `timeout` is in milliseconds, and `size` is the maximum number of elements
    (0: no limit). With `counters`, each element has a packet counter.
    """

    flags: int
    key_type: int
    key_size: int
    data_type: int = 0
    data_size: int = 0
    timeout: int = 0
    size: int = 0
    counters: bool = False

    @property
    def has_verdicts(self) -> bool:
        """Whether this is a verdict map. Its elements must be deleted before the chains that they refer to."""
        return self.data_type == NFT_DATA_VERDICT


def set_layout(definition: NftSet, family: Family) -> SetLayout:
    """Return the layout that a set must have in the table of a family."""
    flags = 0 if definition.value is MapValue.NONE else NFT_SET_MAP
    if definition.timeout:
        flags |= NFT_SET_TIMEOUT | NFT_SET_EVAL
    data_type = data_size = 0
    if definition.value is MapValue.VERDICT:
        data_type, data_size = NFT_DATA_VERDICT, _VERDICT_SIZE
    elif definition.value is MapValue.ENDPOINT:
        data_type, data_size = _concatenated_type((KeyField.DESTINATION, KeyField.PORT), family)
    key_type, key_size = _concatenated_type(definition.key, family)
    size = _AFFINITY_SET_SIZE if definition.timeout else 0
    timeout = definition.timeout * 1000
    return SetLayout(flags, key_type, key_size, data_type, data_size, timeout, size, definition.counters)


def _concatenated_type(fields: Iterable[KeyField], family: Family) -> tuple[int, int]:
    """Return nft's data type of a concatenation, and its size in bytes. Each field takes a multiple of 4 bytes."""
    data_type = size = 0
    for field in fields:
        address_type = _TYPE_IP6ADDR if family is Family.IPV6 else _TYPE_IPADDR
        data_type = data_type << _TYPE_BITS | _DATA_TYPES.get(field, address_type)
        size += 16 if field not in _DATA_TYPES and family is Family.IPV6 else 4
    return data_type, size


# Elements


ElementValue: TypeAlias = bytes | str | None
"""A packed endpoint (bytes), a verdict (str), or None for an element of a set, which has no value."""


class SetElement(Struct, frozen=True, gc=False):
    """One element of a set or map. The kernel stores the `comment` but does not use it; nft shows it."""

    key: bytes
    value: ElementValue = None
    comment: str = ""


class EndpointElements(Struct, frozen=True, gc=False):
    """Elements of an endpoint map for consecutive endpoints of one frontend, starting at index `first_index`.

    The key of each element is the frontend's key followed by the index. Each value has `value_size` bytes. The values
    are concatenated to save memory, because a large cluster has many of them.
    """

    frontend: bytes
    values: bytes
    value_size: int
    first_index: int = 0

    def elements(self) -> list[SetElement]:
        """Return the elements as `SetElement` objects."""
        return [SetElement(self.frontend + index, value) for index, value in self.indexed_values()]

    def indexed_values(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the packed index and the value of each element. The index is the last field of the element's key."""
        values, size = self.values, self.value_size
        begins = range(0, len(values), size)
        indexes = _packed_indexes(self.first_index, len(begins))
        return zip(indexes, [values[begin : begin + size] for begin in begins], strict=True)


@lru_cache(1 << 8)
def _packed_indexes(first: int, count: int) -> tuple[bytes, ...]:
    return tuple(map(_INDEX.pack, range(first, first + count)))


def endpoint_elements(frontend: bytes, values: bytes, value_size: int) -> Iterator[EndpointElements]:
    """Yield the map elements for all endpoints of a frontend, in groups of at most `MAX_ENDPOINT_RUN`."""
    step = MAX_ENDPOINT_RUN * value_size
    for run, begin in enumerate(range(0, len(values), step)):
        yield EndpointElements(frontend, values[begin : begin + step], value_size, run * MAX_ENDPOINT_RUN)


# Keys and values


def address_family(family: Family) -> int:
    """Return AF_INET or AF_INET6."""
    return AF_INET6 if family is Family.IPV6 else AF_INET


def pack_address(address: str) -> bytes:
    """Return an IPv4 or IPv6 address as 4 or 16 bytes in network byte order."""
    return inet_pton(_INET6 if ":" in address else _INET, address)


def unpack_address(packed: bytes) -> str:
    """Return the text form of a packed IPv4 or IPv6 address."""
    return inet_ntop(AF_INET6 if len(packed) == 16 else AF_INET, packed)


def node_port_key(protocol: Protocol, port: int) -> bytes:
    """Return the key of a NodePort frontend, as in the NodePort maps."""
    return _PROTOCOL_AND_PORT.pack(PROTOCOLS[protocol], port)


def service_key(address: str, protocol: Protocol, port: int) -> bytes:
    """Return the key of a frontend with an address: ClusterIP, external IP or load balancer IP."""
    return pack_address(address) + _PROTOCOL_AND_PORT.pack(PROTOCOLS[protocol], port)


def frontend_text(key: bytes) -> str:
    """Return the text of a frontend's key: `IP:port/PROTOCOL`, or `NodePort number/PROTOCOL`."""
    number, port = _PROTOCOL_AND_PORT.unpack(key[-_PROTOCOL_AND_PORT.size :])
    protocol = next((name for name, known in PROTOCOLS.items() if known == number), f"protocol {number}")
    address = key[: -_PROTOCOL_AND_PORT.size]
    text = socket_text(unpack_address(address), port) if address else f"NodePort {port}"
    return f"{text}/{protocol}"


def hairpin_key(endpoint: str, protocol: Protocol) -> bytes:
    """Return the key of connections from an endpoint (`IP:port`) to itself, for the set `hairpin-connections`."""
    address, port = split_socket_text(endpoint)
    packed = pack_address(address)
    return packed + packed + node_port_key(protocol, port)


def hairpin_keys(frontend: bytes, endpoints: bytes, family: Family) -> Iterator[bytes]:
    """Yield the `hairpin_key` of each endpoint of a frontend. `endpoints` are the concatenated map values."""
    protocol = frontend[-_PROTOCOL_AND_PORT.size : -_PORT.size]
    size = endpoint_size(family)
    for begin in range(0, len(endpoints), size):
        port_begin = begin + size - _PORT.size
        address, port = endpoints[begin:port_begin], endpoints[port_begin : begin + size]
        yield address + address + protocol + port


def endpoint_key(frontend: bytes, index: int) -> bytes:
    """Return the key of the element for a frontend's endpoint. `index` is 0-based."""
    return frontend + _INDEX.pack(index)


def endpoint_size(family: Family) -> int:
    """Return the size in bytes of a packed endpoint: an address, and a port padded to 4 bytes."""
    return (16 if family is Family.IPV6 else 4) + _PORT.size


def pack_endpoints(endpoints: Sequence[str]) -> bytes:
    """Return the concatenated map values for endpoints of one family. Each endpoint is given as `IP:port`."""
    if not endpoints:
        return b""
    parts = [endpoint.rpartition(":") for endpoint in endpoints]
    if parts[0][0][0] == "[":
        return b"".join([inet_pton(_INET6, address[1:-1]) + _packed_port(port) for address, _, port in parts])
    return b"".join([inet_pton(_INET, address) + _packed_port(port) for address, _, port in parts])


@lru_cache(1 << 10)
def _packed_port(port: str) -> bytes:
    return _PORT.pack(int(port))


def frontend_of_endpoint(key: bytes) -> bytes:
    """Return the key of the frontend to which an element of an endpoint map belongs."""
    return key[: -_INDEX.size]


def endpoint_text(value: bytes) -> str:
    """Return the text of a packed endpoint: `IP:port`."""
    (port,) = _PORT.unpack(value[-_PORT.size :])
    return socket_text(unpack_address(value[: -_PORT.size]), port)
