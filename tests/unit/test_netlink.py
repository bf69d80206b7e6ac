"""Netlink replies that are cut off or impossible: reading them fails, and never hangs or looks like an empty table."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.host.netlink import (
    MAX_ATTEMPTS,
    DumpInterruptedError,
    NetlinkError,
    NetlinkSocket,
    retry_interrupted,
)
from kproxy.host.netlink_message import (
    HEADER,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSG_OVERRUN,
    MalformedMessageError,
    attribute,
    attributes,
    iterate_attributes,
)

ITEM = 16
"""A message type of the dump."""


class ScriptedNetlink(NetlinkSocket):
    """A netlink socket whose replies are given."""

    def __init__(self, datagrams: Iterable[bytes]) -> None:
        self._socket, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sequence = 0
        for datagram in datagrams:
            self.kernel.send(datagram)
        self.kernel.shutdown(socket.SHUT_WR)

    def payloads(self) -> list[bytes]:
        return [data[begin:end] for data, begin, end in self.dump(ITEM, b"")]


def message(kind: int, payload: bytes = b"", *, size: int | None = None, flags: int = 0) -> bytes:
    """Encode a reply to the first request. `size` is the size in its header, by default the right one."""
    real = HEADER.size + len(payload)
    return HEADER.pack(real if size is None else size, kind, flags, 1, 0) + payload + b"\0" * (-real % 4)


DONE = message(NLMSG_DONE, struct.pack("=i", 0))


def read(*datagrams: bytes) -> list[bytes]:
    with ScriptedNetlink(datagrams) as netlink:
        return netlink.payloads()


def test_complete_dump_is_read() -> None:
    assert read(message(ITEM, b"one") + message(ITEM, b"two"), message(ITEM, b"three"), DONE) == [
        b"one",
        b"two",
        b"three",
    ]


@pytest.mark.parametrize(
    "last",
    [
        b"",
        message(ITEM, b"half")[:10],
        message(ITEM, b"cut off here", size=4096),
        message(ITEM, size=0),
        message(ITEM, size=15),
        message(ITEM, b"x", size=2**32 - 1),
    ],
    ids=["nothing more", "half a header", "longer than the datagram", "size 0", "smaller than its header", "huge"],
)
def test_dump_that_is_cut_short_is_an_error(last: bytes) -> None:
    with pytest.raises(MalformedMessageError, match="malformed netlink message") as caught:
        read(message(ITEM, b"one"), *([last] if last else []))
    assert caught.value.errno == errno.EBADMSG


def test_lost_messages_are_an_error_that_is_retried() -> None:
    with pytest.raises(NetlinkError) as caught:
        read(message(ITEM, b"one"), message(NLMSG_OVERRUN))
    assert caught.value.errno == errno.ENOBUFS


def test_error_at_the_end_of_a_dump() -> None:
    with pytest.raises(NetlinkError) as caught:
        read(message(ITEM, b"one"), message(NLMSG_DONE, struct.pack("=i", -errno.ENOMEM)))
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(DumpInterruptedError):
        read(message(ITEM, b"one", flags=NLM_F_DUMP_INTR), DONE)


@pytest.mark.parametrize("reply", [b"", message(NLMSG_ERROR)[:12], message(NLMSG_ERROR)])
def test_acknowledgment_that_is_cut_short_is_an_error(reply: bytes) -> None:
    with ScriptedNetlink([reply] if reply else []) as netlink, pytest.raises(MalformedMessageError):
        netlink.request(ITEM, 0, b"")


@pytest.mark.parametrize("size", [0, 1, 3, 9, 0xFFFF])
def test_attribute_of_an_impossible_size_is_an_error(size: int) -> None:
    data = struct.pack("=HH", size, 1) + b"data"
    for read_attributes in (attributes, lambda *args: list(iterate_attributes(*args))):
        with pytest.raises(MalformedMessageError):
            read_attributes(data, 0, len(data))
        with pytest.raises(MalformedMessageError):
            read_attributes(attribute(1, b"data"), 0, 100)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=20)), max_size=5), st.binary(max_size=3))
def test_attributes_round_trip(items: list[tuple[int, bytes]], rest: bytes) -> None:
    data = b"".join(attribute(kind, payload) for kind, payload in items) + rest
    found = [(kind, data[begin:end]) for kind, begin, end in iterate_attributes(data, 0, len(data))]
    assert found == items
    assert {kind: data[slice(*span)] for kind, span in attributes(data, 0, len(data)).items()} == dict(items)


@pytest.mark.parametrize("error", [KeyError(3), struct.error("too short"), ValueError("not UTF-8"), IndexError()])
def test_message_without_the_expected_attributes_is_malformed(error: Exception) -> None:
    attempts = 0

    def read_table() -> None:
        nonlocal attempts
        attempts += 1
        raise error

    with pytest.raises(MalformedMessageError):
        retry_interrupted(read_table)
    assert attempts == 1


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM])
def test_only_lost_messages_are_read_again(code: int) -> None:
    attempts = 0

    def read_table() -> None:
        nonlocal attempts
        attempts += 1
        raise OSError(code, "")

    with pytest.raises(OSError, match=str(code)):
        retry_interrupted(read_table)
    assert attempts == (MAX_ATTEMPTS if code == errno.ENOBUFS else 1)
