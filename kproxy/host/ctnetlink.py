"""Read, count and delete entries of the kernel's connection tracking table over ctnetlink.

Whether an entry is stale depends on two of its sockets: the original destination, to which the client sends, and the
source of the replies. The two sockets differ if the destination is translated (DNAT).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import TypeAlias

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import NFGENMSG_SIZE, attribute, attributes, nested, nfgenmsg, nfnl_type
from kproxy.model.addresses import socket_text, split_socket_text
from kproxy.model.types import Family, Protocol

# linux/netfilter/nfnetlink.h and linux/netfilter/nfnetlink_conntrack.h
NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_NEW = 0
IPCTNL_MSG_CT_GET = 1
IPCTNL_MSG_CT_DELETE = 2
CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_PROTOINFO = 4
CTA_TIMEOUT = 7
CTA_ID = 12
CTA_ZONE = 18
CTA_FILTER = 25
CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_TUPLE_ZONE = 3
CTA_IP_V4_SRC = 1
CTA_IP_V4_DST = 2
CTA_IP_V6_SRC = 3
CTA_IP_V6_DST = 4
CTA_PROTO_NUM = 1
CTA_PROTO_SRC_PORT = 2
CTA_PROTO_DST_PORT = 3
CTA_PROTOINFO_TCP = 1
CTA_PROTOINFO_TCP_STATE = 1
CTA_PROTOINFO_SCTP = 3
CTA_PROTOINFO_SCTP_STATE = 1
CTA_FILTER_ORIG_FLAGS = 1
CTA_FILTER_REPLY_FLAGS = 2

# The bits of CTA_FILTER_ORIG_FLAGS and CTA_FILTER_REPLY_FLAGS: net/netfilter/nf_internals.h in the kernel's source.
CTA_FILTER_F_CTA_IP_DST = 1 << 1
CTA_FILTER_F_CTA_PROTO_NUM = 1 << 3
CTA_FILTER_F_CTA_PROTO_DST_PORT = 1 << 5

TCP_CONNTRACK_TIME_WAIT, TCP_CONNTRACK_CLOSE = 7, 8  # linux/netfilter/nf_conntrack_tcp.h
IPS_SEEN_REPLY = 1 << 1  # linux/netfilter/nf_conntrack_common.h
_STATES = {
    "TCP": ("", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
            "SYN_SENT2"),
    "SCTP": ("", "CLOSED", "COOKIE_WAIT", "COOKIE_ECHOED", "ESTABLISHED", "SHUTDOWN_SENT", "SHUTDOWN_RECD",
             "SHUTDOWN_ACK_SENT", "HEARTBEAT_SENT"),
}  # fmt: skip
"""The names of connection states, by number (enum tcp_conntrack and enum sctp_conntrack)."""

MAX_FILTERED_DUMPS = 4
"""Maximum number of destinations for which separate filtered dumps are requested. If there are more destinations, a
single dump requests all UDP entries.

For each filtered dump, the kernel walks its whole hash table (9 ms for 262,144 buckets). It needs 1.7 us for each entry
in a reply. With 50,000 entries, four filtered dumps take 70 ms, and one dump of all entries takes 130 ms.
"""
_PORT = struct.Struct(">H")
_FLOW_PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP, "SCTP": socket.IPPROTO_SCTP}
_CLOSED = {TCP_CONNTRACK_TIME_WAIT, TCP_CONNTRACK_CLOSE}

FlowSockets: TypeAlias = tuple[bytes, bytes]
"""The original destination and the reply source of an entry. Each is a packed address followed by a packed port."""
IsStale: TypeAlias = Callable[[str, str], bool]
"""Returns whether the flows with the given original destination and reply source ("ip:port") are stale."""


class TupleLayout(Struct, frozen=True):
    """The properties of a conntrack tuple that depend on the IP family.

    `address_size` is in bytes. `source` and `destination` are CTA_IP_* attribute types.
    """

    address_family: int
    address_size: int
    source: int
    destination: int


TUPLE_LAYOUTS = {
    Family.IPV4: TupleLayout(socket.AF_INET, 4, CTA_IP_V4_SRC, CTA_IP_V4_DST),
    Family.IPV6: TupleLayout(socket.AF_INET6, 16, CTA_IP_V6_SRC, CTA_IP_V6_DST),
}


def count_flows(family: Family) -> Counter[tuple[str, str, str]]:
    """Count the tracked TCP, UDP and SCTP connections of a family in the network namespace of the calling thread.

    The keys are the protocol, the original destination, and the source of the replies, each "ip:port". TCP connections
    that have been closed do not count. Raises `OSError`.
    """
    layout = TUPLE_LAYOUTS[family]
    kind = nfnl_type(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET)

    def attempt() -> Counter[tuple[str, str, str]]:
        flows: Counter[tuple[str, str, str]] = Counter()
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for message in netlink.dump(kind, nfgenmsg(layout.address_family)):
                if (flow := _flow(layout, *message)) is not None:
                    flows[flow] += 1
        return flows

    return retry_interrupted(attempt)


class TrackedConnection(Struct, frozen=True, kw_only=True):
    """A tracked connection: the sockets of the client's packets, and those of the replies.

    `state` is the name of the TCP or SCTP state, otherwise "". `replied` is whether a reply has been seen.
    """

    source: str
    source_port: int
    destination: str
    port: int
    reply_source: str
    reply_source_port: int
    reply_destination: str
    reply_port: int
    state: str = ""
    replied: bool = True


def read_connections(
    family: Family, protocol: Protocol, source: str, destination: str, port: int
) -> list[TrackedConnection]:
    """Return the connections of one client to one destination, given as addresses in canonical form.

    Entries outside the default conntrack zone are omitted: they are second views of connections, for example by
    Open vSwitch. Reads the table of the calling thread's network namespace. Raises `OSError`.
    """
    layout, number = TUPLE_LAYOUTS[family], _FLOW_PROTOCOLS[protocol]
    # Not by address: see `UdpConntrack._dump_requests`.
    request = dump_request(layout, port=_PORT.pack(port), protocol=number)

    def read() -> list[TrackedConnection]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            messages = netlink.dump(nfnl_type(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET), request)
            entries = (_connection(layout, protocol, *message) for message in messages)
            wanted = (source, destination, port)
            return [each for each in entries if each and (each.source, each.destination, each.port) == wanted]

    return retry_interrupted(read)


def _connection(layout: TupleLayout, protocol: Protocol, data: bytes, begin: int, end: int) -> TrackedConnection | None:
    """Return the connection of an entry, or None if it has another protocol or is outside the default zone."""
    found, number = attributes(data, begin + NFGENMSG_SIZE, end), _FLOW_PROTOCOLS[protocol]
    sockets = []
    for direction in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY):
        for address, kind in ((layout.source, CTA_PROTO_SRC_PORT), (layout.destination, CTA_PROTO_DST_PORT)):
            packed = _parse_socket(data, found.get(direction), address, kind, number)
            if packed is None:
                return None
            sockets.append((socket.inet_ntop(layout.address_family, packed[:-2]), int.from_bytes(packed[-2:], "big")))
    tuples = (attributes(data, *found[direction]) for direction in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY))
    if CTA_ZONE in found or any(CTA_TUPLE_ZONE in each for each in tuples):
        return None
    (source, source_port), (destination, port), reply_source, reply_destination = sockets
    status = int.from_bytes(data[slice(*found[CTA_STATUS])], "big") if CTA_STATUS in found else 0
    return TrackedConnection(
        source=source,
        source_port=source_port,
        destination=destination,
        port=port,
        reply_source=reply_source[0],
        reply_source_port=reply_source[1],
        reply_destination=reply_destination[0],
        reply_port=reply_destination[1],
        state=_state(protocol, data, found.get(CTA_PROTOINFO)),
        replied=bool(status & IPS_SEEN_REPLY),
    )


def _state(protocol: Protocol, data: bytes, position: tuple[int, int] | None) -> str:
    names = _STATES.get(protocol, ("",))
    number = (_sctp_state if protocol == "SCTP" else _tcp_state)(data, position)
    return names[number] if number < len(names) else ""


def _flow(layout: TupleLayout, data: bytes, begin: int, end: int) -> tuple[str, str, str] | None:
    found = attributes(data, begin + NFGENMSG_SIZE, end)
    for name, number in _FLOW_PROTOCOLS.items():
        if (sockets := _sockets_in(layout, data, found, number)) is not None:
            if name == "TCP" and _tcp_state(data, found.get(CTA_PROTOINFO)) in _CLOSED:
                return None
            destination, source = sockets
            return name, _text(layout, destination), _text(layout, source)
    return None


def _tcp_state(data: bytes, position: tuple[int, int] | None) -> int:
    return _state_number(data, position, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE)


def _sctp_state(data: bytes, position: tuple[int, int] | None) -> int:
    return _state_number(data, position, CTA_PROTOINFO_SCTP, CTA_PROTOINFO_SCTP_STATE)


def _state_number(data: bytes, position: tuple[int, int] | None, *kinds: int) -> int:
    for kind in kinds:
        position = attributes(data, *position).get(kind) if position is not None else None
    return data[position[0]] if position is not None else 0


def _text(layout: TupleLayout, packed: bytes) -> str:
    address = socket.inet_ntop(layout.address_family, packed[:-2])
    return socket_text(address, _PORT.unpack(packed[-2:])[0])


class UdpConntrack:
    """The UDP conntrack entries of one IP family in the network namespace of the calling thread."""

    def __init__(self, family: Family) -> None:
        self._layout = TUPLE_LAYOUTS[family]
        self._reader = ConntrackEntryReader(self._layout)

    def clean(self, destinations: Collection[str], is_stale: IsStale) -> int:
        """Delete the stale entries of flows to these destinations; return how many entries were deleted.

        A destination is "ip:port", or ":port" for this port on any address. `is_stale` is usually called only once for
        all flows with the same destination and the same reply source. Raises `OSError` if stale entries may remain.

        An entry outside the default conntrack zone is deleted only if its destination is translated. If it is not
        translated, the entry is only a second view of the same flow. For example, Open vSwitch also tracks flows in its
        own zones.
        """
        stale = _StaleFilter(self._layout, destinations, is_stale)
        requests = list(self._dump_requests(destinations))

        def attempt() -> int:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                return self._delete(netlink, self._find_stale(netlink, requests, stale))

        return retry_interrupted(attempt)

    def _dump_requests(self, destinations: Collection[str]) -> Iterator[bytes]:
        """Yield the payloads of dump requests that cover the destinations. The replies may contain other entries, too.

        IPv6 requests never filter by address: the kernel inverts the comparison of addresses (seen in Linux 6.18) and
        would return the entries of all other addresses.
        """
        if len(destinations) > MAX_FILTERED_DUMPS:
            yield dump_request(self._layout)
            return
        filters: dict[tuple[bytes, bytes], None] = {}
        for destination in destinations:
            address, port = split_socket_text(destination)
            by_address = address and self._layout.address_family == socket.AF_INET
            filters[socket.inet_aton(address) if by_address else b"", _PORT.pack(port)] = None
        for packed_address, packed_port in filters:
            yield dump_request(self._layout, packed_address, packed_port)

    def _find_stale(self, netlink: NetlinkSocket, requests: list[bytes], stale: _StaleFilter) -> dict[bytes, None]:
        """Return the identifying attributes of stale entries, without duplicates.

        Duplicates occur because the replies to two requests may contain the same entry.
        """
        reader = self._reader
        kind = nfnl_type(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET)
        actions: dict[int, _Action] = {}
        found: dict[bytes, None] = {}
        for request in requests:
            for message in netlink.dump(kind, request):
                fingerprint = reader.fingerprint(message[0], message[1])
                action = actions.get(fingerprint)
                if action is None:
                    action = stale.action(reader.sockets(*message))
                    if reader.is_standard(fingerprint):
                        actions[fingerprint] = action
                if action is _Action.DELETE or (
                    action is _Action.DELETE_IN_DEFAULT_ZONE and not reader.has_zone(*message)
                ):
                    found[reader.identity(*message)] = None
        return found

    def _delete(self, netlink: NetlinkSocket, identities: Collection[bytes]) -> int:
        header = nfgenmsg(self._layout.address_family)
        kind = nfnl_type(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE)
        errors = netlink.request_many(kind, 0, [header + identity for identity in identities])
        failures = [code for code in errors.values() if code != errno.ENOENT]  # ENOENT: the entry has expired
        if failures:
            raise NetlinkError(failures[0], f"failed to delete {len(failures)} entries: {os.strerror(failures[0])}")
        return len(identities) - len(errors)


class _Action(Enum):
    """What to do with the entries that have a certain original destination and reply source."""

    KEEP = 0
    DELETE = 1
    DELETE_IN_DEFAULT_ZONE = 2
    """For stale entries whose destination is not translated."""


class _StaleFilter:
    """Decides which entries to delete, given their sockets."""

    def __init__(self, layout: TupleLayout, destinations: Collection[str], is_stale: IsStale) -> None:
        self._layout = layout
        self._is_stale = is_stale
        self._sockets: set[bytes] = set()
        self._ports: set[bytes] = set()
        for destination in destinations:
            address, port = split_socket_text(destination)
            if address:
                self._sockets.add(socket.inet_pton(layout.address_family, address) + _PORT.pack(port))
            else:
                self._ports.add(_PORT.pack(port))

    def action(self, sockets: FlowSockets | None) -> _Action:
        if sockets is None:
            return _Action.KEEP
        destination, source = sockets
        if destination not in self._sockets and destination[-2:] not in self._ports:
            return _Action.KEEP
        if not self._is_stale(_text(self._layout, destination), _text(self._layout, source)):
            return _Action.KEEP
        return _Action.DELETE if destination != source else _Action.DELETE_IN_DEFAULT_ZONE


def read_flows(family: Family, protocol: int, port: int = 0) -> list[tuple[str, str]]:
    """Return the original destination and the reply source of each entry of an IP protocol, both as `ip:port`.

    With a `port`, only the entries with this destination port are returned. Entries in all zones are included. Raises
    `OSError`.
    """
    layout = TUPLE_LAYOUTS[family]
    packed_port = _PORT.pack(port) if port else b""
    request = dump_request(layout, port=packed_port, protocol=protocol)

    def read() -> list[tuple[str, str]]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            messages = netlink.dump(nfnl_type(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET), request)
            found = (_parse_sockets_of(layout, protocol, *message) for message in messages)
            # Kernels before 5.8 ignore the filter.
            return [
                (_text(layout, destination), _text(layout, source))
                for destination, source in filter(None, found)
                if destination.endswith(packed_port)
            ]

    return retry_interrupted(read)


def _parse_sockets_of(layout: TupleLayout, protocol: int, data: bytes, begin: int, end: int) -> FlowSockets | None:
    """Return the sockets of an entry, or None if the entry is not for this IP protocol."""
    return _sockets_in(layout, data, attributes(data, begin + NFGENMSG_SIZE, end), protocol)


def _sockets_in(
    layout: TupleLayout, data: bytes, found: Mapping[int, tuple[int, int]], protocol: int
) -> FlowSockets | None:
    """Like `_parse_sockets_of`, with the positions of the attributes of the entry."""
    destination = _parse_socket(data, found.get(CTA_TUPLE_ORIG), layout.destination, CTA_PROTO_DST_PORT, protocol)
    source = _parse_socket(data, found.get(CTA_TUPLE_REPLY), layout.source, CTA_PROTO_SRC_PORT, protocol)
    return (destination, source) if destination and source else None


def dump_request(
    layout: TupleLayout, address: bytes = b"", port: bytes = b"", protocol: int = socket.IPPROTO_UDP
) -> bytes:
    """Return the payload of a request to dump the entries of a family and an IP protocol.

    With a `port` or an `address` (both packed), the request is limited to the entries with this original destination.
    Kernels before 5.8 ignore CTA_FILTER and dump all entries.
    """
    flags = CTA_FILTER_F_CTA_PROTO_NUM
    flags |= CTA_FILTER_F_CTA_PROTO_DST_PORT if port else 0
    flags |= CTA_FILTER_F_CTA_IP_DST if address else 0
    ip = nested(CTA_TUPLE_IP, attribute(layout.destination, address)) if address else b""
    proto = attribute(CTA_PROTO_NUM, bytes([protocol]))
    proto += attribute(CTA_PROTO_DST_PORT, port) if port else b""
    return (
        nfgenmsg(layout.address_family)
        + nested(CTA_TUPLE_ORIG, ip, nested(CTA_TUPLE_PROTO, proto))
        + nested(
            CTA_FILTER,
            attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags)),
            attribute(CTA_FILTER_REPLY_FLAGS, struct.pack("=I", 0)),
        )
    )


class ConntrackEntryReader:
    """Reads conntrack entries of one IP family from netlink messages.

    Methods that read a message take the buffer that contains the message, and the offset of the message's payload in
    that buffer.

    A message begins with the two tuples of an entry, one for each direction. For UDP, the tuples always have the same
    attributes in the same order, unless a conntrack zone applies to only one direction. An entry with this standard
    layout has a fingerprint: an integer that consists of the attribute headers, the protocol, the original destination
    and the reply source. Entries that differ only in their client have the same fingerprint. Computing a fingerprint is
    many times faster than parsing the attributes.
    """

    def __init__(self, layout: TupleLayout) -> None:
        self._layout = layout
        zeros, ones = (
            _encode_tuple(CTA_TUPLE_ORIG, layout, byte) + _encode_tuple(CTA_TUPLE_REPLY, layout, byte)
            for byte in (b"\0", b"\xff")
        )
        headers = bytes(0xFF if left == right else 0 for left, right in zip(zeros, ones, strict=True))
        size, self._tuples_size = layout.address_size, len(zeros)
        # Offsets in the original tuple. It consists of its header, CTA_TUPLE_IP with two addresses, and CTA_TUPLE_PROTO
        # with the protocol and two ports.
        self._protocol = slice(24 + 2 * size, 25 + 2 * size)
        self._destination = slice(16 + size, 16 + 2 * size), slice(40 + 2 * size, 42 + 2 * size)
        source = len(zeros) // 2 + 12  # in the reply tuple, which follows the original tuple
        self._source = slice(source, source + size), slice(source + 20 + 2 * size, source + 22 + 2 * size)
        mask = bytearray(headers)
        for position in (self._protocol, *self._destination, *self._source):
            mask[position] = b"\xff" * (position.stop - position.start)
        self._standard_headers = int.from_bytes(zeros, "little")
        self._header_mask = int.from_bytes(headers, "little")
        self._fingerprint_mask = int.from_bytes(mask, "little")

    def fingerprint(self, data: bytes, begin: int) -> int:
        """Return the fingerprint of an entry. It is meaningful only if `is_standard` returns True for it."""
        begin += NFGENMSG_SIZE
        return int.from_bytes(data[begin : begin + self._tuples_size], "little") & self._fingerprint_mask

    def is_standard(self, fingerprint: int) -> bool:
        """Return whether a fingerprint belongs to an entry with the standard layout."""
        return fingerprint & self._header_mask == self._standard_headers

    def sockets(self, data: bytes, begin: int, end: int) -> FlowSockets | None:
        """Return the sockets of an entry with any layout, or None if the entry is not for UDP."""
        if not self.is_standard(self.fingerprint(data, begin)):
            return self._parse_sockets(data, begin, end)
        begin += NFGENMSG_SIZE
        tuples = data[begin : begin + self._tuples_size]
        if tuples[self._protocol][0] != socket.IPPROTO_UDP:
            return None
        destination, source = self._destination, self._source
        return tuples[destination[0]] + tuples[destination[1]], tuples[source[0]] + tuples[source[1]]

    def identity(self, data: bytes, begin: int, end: int) -> bytes:
        """Return the attributes that make a delete request match only this entry: reply tuple, zone and ID.

        The original tuple and the ID would not be enough. The kernel derives the ID from the original tuple and from
        the entry's address in memory. A new entry with the same original tuple can therefore have the same ID, if it is
        stored at the same address.
        """
        found = attributes(data, begin + NFGENMSG_SIZE, end)
        kinds = (CTA_TUPLE_REPLY, CTA_ZONE, CTA_ID)
        return b"".join(attribute(kind, data[slice(*found[kind])]) for kind in kinds if kind in found)

    def has_zone(self, data: bytes, begin: int, end: int) -> bool:
        """Return whether an entry is outside the default conntrack zone in either direction."""
        found = attributes(data, begin + NFGENMSG_SIZE, end)
        # A zone that applies to only one direction is part of this direction's tuple, which makes the layout
        # non-standard.
        return CTA_ZONE in found or not self.is_standard(self.fingerprint(data, begin))

    def _parse_sockets(self, data: bytes, begin: int, end: int) -> FlowSockets | None:
        return _parse_sockets_of(self._layout, socket.IPPROTO_UDP, data, begin, end)


def _encode_tuple(direction: int, layout: TupleLayout, byte: bytes) -> bytes:
    """Encode a tuple in the standard layout. Every byte of its values is `byte`."""
    ip = (attribute(kind, byte * layout.address_size) for kind in (layout.source, layout.destination))
    ports = (attribute(kind, byte * 2) for kind in (CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT))
    proto = nested(CTA_TUPLE_PROTO, attribute(CTA_PROTO_NUM, byte), *ports)
    return nested(direction, nested(CTA_TUPLE_IP, *ip), proto)


def _parse_socket(
    data: bytes, position: tuple[int, int] | None, address: int, port: int, protocol: int
) -> bytes | None:
    """Return one socket of the tuple at a position, or None if there is no tuple of the protocol at this position.

    `address` and `port` are the types of the attributes that contain the address and the port of the socket.
    """
    try:
        fields = attributes(data, *position) if position else {}
        ip, proto = attributes(data, *fields[CTA_TUPLE_IP]), attributes(data, *fields[CTA_TUPLE_PROTO])
        if data[proto[CTA_PROTO_NUM][0]] != protocol:
            return None
        return data[slice(*ip[address])] + data[slice(*proto[port])]
    except KeyError:
        return None
