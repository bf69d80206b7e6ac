"""Watch a real packet with nftables' tracing, in a table of its own that disappears with this process."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from msgspec import Struct

from kproxy.diagnose.trace.flow import PROTOCOL_NUMBERS
from kproxy.diagnose.trace.kernel import KernelError
from kproxy.host import nf_tables_constants as nf
from kproxy.host.ctnetlink import TrackedConnection, read_connections
from kproxy.host.netlink_message import nested
from kproxy.host.nf_tables_trace import TABLE, TraceEvent, TraceSocket, TraceTable
from kproxy.model.addresses import socket_text
from kproxy.model.types import Family, Protocol
from kproxy.nftables import ruleset as nft
from kproxy.nftables.expressions import encode_statement, string_attribute, u32_attribute, value_attribute
from kproxy.nftables.names import table_family

WAIT_SECONDS = 30
"""How long to wait for a packet that somebody else sends."""
SEND_SECONDS = 3
"""How long to send packets if the kernel traces none of them."""
QUIET_SECONDS = 0.2
"""A packet has left the node, or has been delivered, if nothing has happened to it for this time."""
_ATTEMPT_SECONDS = 0.2
_TYPES = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM, "SCTP": socket.SOCK_STREAM}
_TCP_FLAGS_OFFSET = 13
_SYN, _SYN_ACK = b"\x02", b"\x12"


class WatchedFlow(Struct, frozen=True, kw_only=True):
    """The packets to watch. If the node `sends` them, they are sent here."""

    family: Family
    source: str
    destination: str
    port: int
    protocol: Protocol
    sends: bool


class WatchedPacket(Struct, frozen=True, kw_only=True):
    """What the kernel has done with a packet: its events, including those of the own table, and its conntrack entry.

    There is no entry if the packet was dropped, or if the endpoint has already refused the connection.
    """

    events: tuple[TraceEvent, ...]
    connection: TrackedConnection | None = None

    @property
    def endpoint(self) -> str:
        """The destination of the packet after DNAT ("ip:port")."""
        if self.connection is not None:
            return socket_text(self.connection.reply_source, self.connection.reply_source_port)
        return socket_text(*_latest_destination(self.events))


def watch(flow: WatchedFlow, ready: Callable[[], object] = lambda: None) -> WatchedPacket | None:
    """Return what the kernel does with the first packet of a flow, or None if none came. Raises `KernelError`.

    `ready` is called when packets are watched.
    """
    try:
        with TraceSocket() as events, _mark(flow):
            ready()
            found = _first_packet(flow, events)
        if not found:
            return None
        return WatchedPacket(events=tuple(found), connection=_connection(flow, found[0]))
    except OSError as error:
        if error.errno in {errno.EEXIST, errno.EPERM}:  # EPERM: the table belongs to another process
            raise KernelError(
                f"table {table_family(flow.family)} {TABLE} exists already, probably because of another "
                "`kproxy trace --live`; wait for its end, or delete the table"
            ) from None
        raise KernelError(f"cannot trace a real packet: {error.strerror or error}") from None


def _mark(flow: WatchedFlow) -> TraceTable:
    """Create the table that marks the packets of a flow which may be the first of a connection."""
    statements: tuple[nft.Statement, ...] = (
        nft.MatchSaddr(flow.source),
        nft.MatchDaddr(flow.destination),
        nft.MatchL4Proto(flow.protocol),
    )
    expressions = [each for statement in statements for each in encode_statement(statement, flow.family)]
    expressions += [_load_transport(2, 2), _compare(flow.port.to_bytes(2, "big"))]
    if flow.protocol == "TCP":
        expressions += [_load_transport(_TCP_FLAGS_OFFSET, 1), _and(_SYN_ACK), _compare(_SYN)]
    return TraceTable(flow.family, "output" if flow.sends else "prerouting", [*expressions, *_set_nftrace()])


def _first_packet(flow: WatchedFlow, events: TraceSocket) -> list[TraceEvent]:
    """Return the events of the first packet, beginning with that of the own table."""
    end = time.monotonic() + (SEND_SECONDS if flow.sends else WAIT_SECONDS)
    found: list[TraceEvent] = []
    latest = 0.0
    while True:
        now = time.monotonic()
        if found and (found[-1].drops or now > latest + QUIET_SECONDS):
            return found
        if not found and now > end:
            return []
        if flow.sends and not found:
            _send(flow)
        wait = latest + QUIET_SECONDS - now if found else _ATTEMPT_SECONDS if flow.sends else end - now
        longer = first_packet([*found, *events.receive(wait)])
        if len(longer) > len(found):
            found, latest = longer, time.monotonic()


def first_packet(events: Iterable[TraceEvent]) -> list[TraceEvent]:
    """Return the events of the first packet that the own table has marked, up to the event that drops it.

    Packets that other tables trace have no event of the own table. They are skipped. A packet that returns through the
    loopback interface is recognized by its destination, because its source may have been masqueraded.
    """
    found: list[TraceEvent] = []
    numbers: set[int] = set()
    for event in events:
        if not found:
            if event.table != TABLE:
                continue
        elif event.table == TABLE and event.kind == "rule":
            break  # the next packet, whose buffer is at the same address
        elif event.packet not in numbers and not (
            event.from_loopback and event.network and event.destination == _latest_destination(found)
        ):
            continue
        numbers.add(event.packet)
        found.append(event)
        if event.drops:
            break
    return found


def _latest_destination(events: Sequence[TraceEvent]) -> tuple[str, int]:
    return next(event.destination for event in reversed(events) if event.network)


def _connection(flow: WatchedFlow, event: TraceEvent) -> TrackedConnection | None:
    source_port = int.from_bytes(event.transport[:2], "big")
    with suppress(OSError):
        entries = read_connections(flow.family, flow.protocol, flow.source, flow.destination, flow.port)
        return next((each for each in entries if each.source_port == source_port), None)
    return None


def _send(flow: WatchedFlow) -> None:
    """Send a packet of the flow."""
    family = socket.AF_INET6 if flow.family is Family.IPV6 else socket.AF_INET
    kind, number = _TYPES[flow.protocol], PROTOCOL_NUMBERS[flow.protocol]
    with suppress(OSError), socket.socket(family, kind, number) as sending:
        sending.setblocking(False)
        sending.bind((flow.source, 0))
        sending.connect_ex((flow.destination, flow.port))
        if kind == socket.SOCK_DGRAM:
            sending.send(b"\n")


# Expressions that no rule of kproxy has


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(nf.NFTA_LIST_ELEM, string_attribute(nf.NFTA_EXPR_NAME, name), nested(nf.NFTA_EXPR_DATA, *attributes))


def _load_transport(offset: int, size: int) -> bytes:
    return _expression(
        "payload",
        u32_attribute(nf.NFTA_PAYLOAD_DREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_PAYLOAD_BASE, nf.NFT_PAYLOAD_TRANSPORT_HEADER),
        u32_attribute(nf.NFTA_PAYLOAD_OFFSET, offset),
        u32_attribute(nf.NFTA_PAYLOAD_LEN, size),
    )


def _and(mask: bytes) -> bytes:
    return _expression(
        "bitwise",
        u32_attribute(nf.NFTA_BITWISE_SREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_BITWISE_DREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_BITWISE_LEN, len(mask)),
        value_attribute(nf.NFTA_BITWISE_MASK, mask),
        value_attribute(nf.NFTA_BITWISE_XOR, bytes(len(mask))),
    )


def _compare(value: bytes) -> bytes:
    return _expression(
        "cmp",
        u32_attribute(nf.NFTA_CMP_SREG, nf.NFT_REG32_00),
        u32_attribute(nf.NFTA_CMP_OP, nf.NFT_CMP_EQ),
        value_attribute(nf.NFTA_CMP_DATA, value),
    )


def _set_nftrace() -> list[bytes]:
    return [
        _expression(
            "immediate",
            u32_attribute(nf.NFTA_IMMEDIATE_DREG, nf.NFT_REG32_00),
            value_attribute(nf.NFTA_IMMEDIATE_DATA, b"\x01"),
        ),
        _expression(
            "meta",
            u32_attribute(nf.NFTA_META_KEY, nf.NFT_META_NFTRACE),
            u32_attribute(nf.NFTA_META_SREG, nf.NFT_REG32_00),
        ),
    ]
