"""Trace packets with nf_tables: a table that marks packets, and the kernel's notifications about marked packets."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from socket import AF_INET, AF_INET6, inet_ntop
from types import TracebackType
from typing import Literal, Self

from msgspec import Struct

from kproxy.host.netlink import NETLINK_NETFILTER, SO_RCVBUFFORCE, BatchRejectedError, BatchSocket
from kproxy.host.netlink_message import (
    HEADER,
    NFGENMSG_SIZE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    MalformedMessageError,
    align,
    attribute,
    attributes,
    nested,
    nfgenmsg,
    nfnl_type,
)
from kproxy.host.nf_tables_constants import (
    NF_INET_LOCAL_OUT,
    NF_INET_PRE_ROUTING,
    NFNL_SUBSYS_NFTABLES,
    NFNLGRP_NFTRACE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    NFT_MSG_TRACE,
    NFT_TABLE_F_OWNER,
    NFT_TRACETYPE_POLICY,
    NFT_TRACETYPE_RULE,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_TABLE,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME,
    NFTA_TRACE_CHAIN,
    NFTA_TRACE_ID,
    NFTA_TRACE_IIFTYPE,
    NFTA_TRACE_NETWORK_HEADER,
    NFTA_TRACE_POLICY,
    NFTA_TRACE_RULE_HANDLE,
    NFTA_TRACE_TABLE,
    NFTA_TRACE_TRANSPORT_HEADER,
    NFTA_TRACE_TYPE,
    NFTA_TRACE_VERDICT,
    NFTA_VERDICT_CODE,
)
from kproxy.model.types import Family

TABLE = "kproxy-trace"
PRIORITY = -400
"""Before connection tracking (-200) and iptables' table raw (-300)."""
_HOOKS = {"prerouting": NF_INET_PRE_ROUTING, "output": NF_INET_LOCAL_OUT}
_ADDRESS_FAMILIES = {Family.IPV4: AF_INET, Family.IPV6: AF_INET6}
_FAMILY_NAMES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_*, linux/netfilter.h
_RECEIVE_BUFFER = 4 << 20
_RECEIVE_SIZE = 1 << 16
_DROP = 0  # NF_DROP
_ARPHRD_LOOPBACK = 772  # linux/if_arp.h
_TRACE = nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_TRACE)


class TraceEvent(Struct, frozen=True, kw_only=True):
    """A rule that a marked packet has matched, the policy that it has met, or the end of a chain.

    `packet` tells packets apart; a packet gets another number when it returns through the loopback interface. `family`
    is nft's name of the table's family. `handle` is that of the rule. `drops` is whether the packet ends here.
    `from_loopback` is whether it was received on the loopback interface. `network` and `transport` are its headers.
    The kernel sends the headers and the interface only with the first event in each base chain.
    """

    packet: int
    family: str
    table: str
    chain: str
    kind: Literal["rule", "policy", "return"]
    handle: int = 0
    drops: bool = False
    from_loopback: bool = False
    network: bytes = b""
    transport: bytes = b""

    @property
    def destination(self) -> tuple[str, int]:
        """The packet's destination address and port, from its headers."""
        # RFC 791, RFC 8200
        family, begin, end = (AF_INET6, 24, 40) if self.network[0] >> 4 == 6 else (AF_INET, 16, 20)
        return inet_ntop(family, self.network[begin:end]), int.from_bytes(self.transport[2:4], "big")


class TraceTable:
    """A table that marks packets of one IP family for tracing. A context manager.

    The table belongs to a netlink socket of this process (`flags owner`, Linux 5.12): the kernel removes it when the
    socket is closed, also if the process is killed.
    """

    def __init__(self, family: Family, hook: Literal["prerouting", "output"], expressions: Sequence[bytes]) -> None:
        """Create the table with one rule. Raises `OSError`, with EEXIST if there is such a table already."""
        self._batch = BatchSocket(NFNL_SUBSYS_NFTABLES)
        try:
            self._batch.commit(list(_creation(family, hook, expressions)))
        except BatchRejectedError as error:
            self.close()
            first = error.rejections[0]
            raise OSError(first.code, first.reason) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the table."""
        self._batch.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _creation(
    family: Family, hook: Literal["prerouting", "output"], expressions: Sequence[bytes]
) -> Iterator[tuple[int, int, bytes]]:
    header, table = nfgenmsg(_ADDRESS_FAMILIES[family]), TABLE.encode() + b"\0"
    chain = hook.encode() + b"\0"
    place = nested(
        NFTA_CHAIN_HOOK,
        attribute(NFTA_HOOK_HOOKNUM, struct.pack(">I", _HOOKS[hook])),
        attribute(NFTA_HOOK_PRIORITY, struct.pack(">i", PRIORITY)),
    )
    owner = attribute(NFTA_TABLE_FLAGS, struct.pack(">I", NFT_TABLE_F_OWNER))
    messages = (
        (NFT_MSG_NEWTABLE, NLM_F_EXCL, attribute(NFTA_TABLE_NAME, table) + owner),
        (
            NFT_MSG_NEWCHAIN,
            0,
            attribute(NFTA_CHAIN_TABLE, table)
            + attribute(NFTA_CHAIN_NAME, chain)
            + place
            + attribute(NFTA_CHAIN_TYPE, b"filter\0"),
        ),
        (
            NFT_MSG_NEWRULE,
            0,
            attribute(NFTA_RULE_TABLE, table)
            + attribute(NFTA_RULE_CHAIN, chain)
            + nested(NFTA_RULE_EXPRESSIONS, *expressions),
        ),
    )
    for kind, flags, payload in messages:
        yield nfnl_type(NFNL_SUBSYS_NFTABLES, kind), NLM_F_CREATE | flags, header + payload


class TraceSocket:
    """Receives the events of marked packets in the network namespace of the calling thread. A context manager."""

    def __init__(self) -> None:
        """Begin to receive. Raises `OSError`."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.bind((0, 1 << NFNLGRP_NFTRACE - 1))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def receive(self, timeout: float) -> list[TraceEvent]:
        """Wait for events, at most `timeout` seconds; return those that came together, or none. Raises `OSError`."""
        self._socket.settimeout(max(timeout, 0.001))
        try:
            return list(parse_events(self._socket.recv(_RECEIVE_SIZE)))
        except TimeoutError:
            return []
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise OSError(error.errno, "too many packets are traced at the same time") from None
            raise


def parse_events(data: bytes) -> Iterator[TraceEvent]:
    """Yield the events in a datagram. Raises `MalformedMessageError`."""
    begin = 0
    while begin + HEADER.size <= len(data):
        size, kind, _, _, _ = HEADER.unpack_from(data, begin)
        if size < HEADER.size or begin + size > len(data):
            raise MalformedMessageError(f"{size} bytes where {len(data) - begin} are left")
        if kind == _TRACE:
            yield _event(data, begin + HEADER.size, begin + size)
        begin += align(size)


def _event(data: bytes, begin: int, end: int) -> TraceEvent:
    spans = attributes(data, begin + NFGENMSG_SIZE, end)

    def value(kind: int) -> bytes:
        return data[slice(*spans[kind])] if kind in spans else b""

    kind: Literal["rule", "policy", "return"] = "return"
    code = None
    number = int.from_bytes(value(NFTA_TRACE_TYPE), "big")
    # The kernel reports the end of a chain as the match of a rule without a handle (Linux 6.18).
    if number == NFT_TRACETYPE_RULE and NFTA_TRACE_RULE_HANDLE in spans:
        kind = "rule"
        verdict = attributes(data, *spans[NFTA_TRACE_VERDICT]) if NFTA_TRACE_VERDICT in spans else {}
        code = int.from_bytes(data[slice(*verdict[NFTA_VERDICT_CODE])], "big") if NFTA_VERDICT_CODE in verdict else None
    elif number == NFT_TRACETYPE_POLICY:
        kind = "policy"
        code = int.from_bytes(value(NFTA_TRACE_POLICY), "big") if NFTA_TRACE_POLICY in spans else None
    return TraceEvent(
        packet=int.from_bytes(value(NFTA_TRACE_ID), "big"),
        family=_FAMILY_NAMES.get(data[begin], str(data[begin])),
        table=_text(value(NFTA_TRACE_TABLE)),
        chain=_text(value(NFTA_TRACE_CHAIN)),
        kind=kind,
        handle=int.from_bytes(value(NFTA_TRACE_RULE_HANDLE), "big"),
        drops=code == _DROP,
        from_loopback=int.from_bytes(value(NFTA_TRACE_IIFTYPE), "big") == _ARPHRD_LOOPBACK,
        network=value(NFTA_TRACE_NETWORK_HEADER),
        transport=value(NFTA_TRACE_TRANSPORT_HEADER),
    )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
