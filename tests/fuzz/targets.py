"""The fuzz targets: functions that parse one input and raise only if the parser breaks its contract."""

from __future__ import annotations

import http.client
import io
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from urllib3 import HTTPResponse

from kproxy.config import load_config
from kproxy.config.decode import ConfigError
from kproxy.documents.watch import PathSnapshot
from kproxy.host.commands import CommandError, find_lock_holder
from kproxy.host.ctnetlink import TUPLE_LAYOUTS, ConntrackEntryReader
from kproxy.host.interfaces import parse_addresses
from kproxy.host.netlink import NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import HEADER, NLMSG_DONE
from kproxy.iptables.runner import make_restore_error, parse_version
from kproxy.iptables.save_restore import SaveError, parse_rules, parse_save
from kproxy.ipvs.ipset import parse_entries
from kproxy.ipvs.virtual_servers import parse_servers
from kproxy.kube.client.response import ApiResponse, TransportError
from kproxy.kube.codec import protobuf
from kproxy.kube.codec.json_codec import ListPageError, read_error, read_page
from kproxy.kube.codec.streams import FramingError, read_events
from kproxy.kube.listwatch.protocol import ListWatch
from kproxy.kube.manifests.file_source import ManifestState
from kproxy.model.delta import Kind
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceCIDR
from kproxy.nftables.base_table import SETS
from kproxy.nftables.decode import TableReader
from kproxy.serve.http import RequestError, pop_request
from kproxy.serve.metrics_page import ip_traffic

CORPUS = Path(__file__).parent / "corpus"
KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node, ServiceCIDR)
_LIMIT = 1 << 20


class Target(Struct, frozen=True):
    """A fuzz target. Its corpus is the directory with its name."""

    name: str
    check: Callable[[bytes], None]

    def corpus(self) -> list[bytes]:
        """Return the inputs of the corpus in a fixed order."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


class _Stream:
    def __init__(self, media_type: str, data: bytes) -> None:
        self.media_type = media_type
        self._data = data

    def chunks(self) -> Iterable[bytes]:
        size = 1 + len(self._data) // 7
        return [self._data[start : start + size] for start in range(0, len(self._data), size)]


def _watch(media_type: str, data: bytes) -> None:
    for kind in KINDS:
        machine = ListWatch(kind, "node-1", lambda: 0.5)
        try:
            for event in read_events(kind, _Stream(media_type, data), _LIMIT):
                machine.handle_event(event)
                machine.next_request()
        except FramingError as error:
            machine.handle_oversize(str(error))
        _is_one_line(machine.error)


def _watch_json(data: bytes) -> None:
    _watch("application/json", data)


def _watch_protobuf(data: bytes) -> None:
    _watch(protobuf.MEDIA_TYPE, data)


def _list_page(data: bytes) -> None:
    for kind in KINDS:
        with suppress(ListPageError):
            read_page(kind, data)
        machine = ListWatch(kind, "node-1", lambda: 0.5)
        machine.handle_page(data)
        _is_one_line(machine.error)


def _error_response(data: bytes) -> None:
    error = read_error(429, {"Retry-After": data[:30].decode("latin-1")}, data)
    assert error.retry_after >= 0
    _is_one_line(str(error))
    for status in (400, 401, 403, 404, 406, 410, 422, 429, 500, 503):
        machine = ListWatch(Service, "node-1", lambda: 0.5)
        step = machine.handle_status(status, {}, data)
        assert step.reconnect_after is not None
        assert 0.0 <= step.reconnect_after <= 300.0


class _Connection:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self._data))


def _http_response(data: bytes) -> None:
    received = http.client.HTTPResponse(_Connection(data))  # type: ignore[arg-type]
    try:
        received.begin()
    except (http.client.HTTPException, OSError, ValueError):
        return  # urllib3 converts these
    raw = HTTPResponse(
        body=received,
        headers=dict(received.headers.items()),
        status=received.status,
        preload_content=False,
        original_response=received,
    )
    response = ApiResponse(raw, {})
    with suppress(TransportError):
        assert len(response.read(_LIMIT)) <= _LIMIT
    response.release()


def _http_request(data: bytes) -> None:
    buffer = bytearray(data)
    with suppress(RequestError):
        while pop_request(buffer) is not None:
            pass


def _config(data: bytes) -> None:
    for strict in (False, True):
        with suppress(ConfigError):
            load_config(data, "config.yaml", strict=strict)


def _manifests(data: bytes) -> None:
    state = ManifestState()
    for name in ("a.yaml", "b.json"):
        update = state.update(PathSnapshot({name: data}))
        for problem in update.problems:
            _is_one_line(str(problem))


class _ScriptedNetlink(NetlinkSocket):
    """A netlink socket whose first request is answered with given datagrams."""

    def __init__(self, datagrams: Sequence[bytes]) -> None:
        self._socket = _Datagrams(datagrams)  # type: ignore[assignment]
        self._sequence = 0


class _Datagrams:
    def __init__(self, datagrams: Sequence[bytes]) -> None:
        self._datagrams = list(datagrams)

    def send(self, data: bytes) -> int:
        return len(data)

    def recv(self, _size: int) -> bytes:
        return self._datagrams.pop(0) if self._datagrams else b""

    def close(self) -> None:
        """Do nothing."""


_DONE = HEADER.pack(HEADER.size + 4, NLMSG_DONE, 0, 1, 0) + struct.pack("=i", 0)


def _read_netlink(data: bytes, *readers: Callable[[NetlinkSocket], object]) -> None:
    """Let each reader read `data` as a complete dump. Only `OSError` is allowed."""
    for read in readers:

        def attempt(read: Callable[[NetlinkSocket], object] = read) -> None:
            with _ScriptedNetlink([data, _DONE]) as netlink:
                read(netlink)

        with suppress(OSError):
            retry_interrupted(attempt)


def _netlink_table(data: bytes) -> None:
    for family in Family:
        reader = TableReader(family)
        _read_netlink(
            data,
            reader._flags,
            reader._sets,
            reader._chains,
            *(lambda netlink, each=each, reader=reader: list(reader._dump_elements(netlink, each)) for each in SETS),
        )


def _netlink_addresses(data: bytes) -> None:
    _read_netlink(data, lambda netlink: parse_addresses(netlink.dump(0, b"")))


def _netlink_conntrack(data: bytes) -> None:
    def read(netlink: NetlinkSocket) -> None:
        for message in netlink.dump(0, b""):
            for layout in TUPLE_LAYOUTS.values():
                reader = ConntrackEntryReader(layout)
                reader.sockets(*message)
                reader.identity(*message)
                reader.has_zone(*message)

    _read_netlink(data, read)


def _netlink_ipvs(data: bytes) -> None:
    def read_entries(netlink: NetlinkSocket) -> list[object]:
        return [
            entry for dumped in netlink.dump(0, b"") for entry in parse_entries(dumped[0], dumped[1] + 4, dumped[2])
        ]

    _read_netlink(data, lambda netlink: list(parse_servers(netlink.dump(0, b""))), read_entries)


def _iptables_save(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with suppress(SaveError):
        parse_save(io.StringIO(text))
    parse_rules(text)


def _proc(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    find_lock_holder(text.splitlines(), "00:1a:1234")
    ip_traffic(text)
    with suppress(CommandError):
        parse_version(text)
    make_restore_error("iptables-restore", 1, text, lambda _: "")


def _is_one_line(text: str) -> None:
    assert len(text.splitlines()) <= 1, text


def _targets() -> Iterator[Target]:
    for check in (
        *(
            _watch_json,
            _watch_protobuf,
            _list_page,
            _error_response,
            _http_response,
            _http_request,
            _config,
            _manifests,
        ),
        *(_netlink_table, _netlink_addresses, _netlink_conntrack, _netlink_ipvs, _iptables_save, _proc),
    ):
        yield Target(check.__name__.removeprefix("_").replace("_", "-"), check)


TARGETS = {target.name: target for target in _targets()}
