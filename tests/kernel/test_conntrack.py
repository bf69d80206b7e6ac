"""The kernel's connection tracking: deleting stale UDP entries, the netlink socket and the sysctls."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import pytest

from kproxy.config import conntrack_sysctls
from kproxy.config.types import Conntrack, Seconds
from kproxy.host.ctnetlink import (
    CTA_ID,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_NUM,
    CTA_PROTO_SRC_PORT,
    CTA_TIMEOUT,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_REPLY,
    CTA_TUPLE_ZONE,
    CTA_ZONE,
    IPCTNL_MSG_CT_DELETE,
    IPCTNL_MSG_CT_GET,
    IPCTNL_MSG_CT_NEW,
    MAX_FILTERED_DUMPS,
    NFNL_SUBSYS_CTNETLINK,
    TUPLE_LAYOUTS,
    ConntrackEntryReader,
    FlowSockets,
    UdpConntrack,
    dump_request,
    read_connections,
)
from kproxy.host.interfaces import RTM_GETADDR, own_addresses
from kproxy.host.netlink import (
    MAX_ATTEMPTS,
    NETLINK_NETFILTER,
    REQUESTS_PER_SEND,
    DumpInterruptedError,
    NetlinkError,
    NetlinkSocket,
    retry_interrupted,
)
from kproxy.host.netlink_message import NLM_F_CREATE, NLM_F_EXCL, attribute, attributes, nested, nfgenmsg, nfnl_type
from kproxy.host.sysctl import ROUTE_LOCALNET, ensure_route_localnet, read_parameters, write_parameters
from kproxy.model.addresses import family_of, socket_text, split_socket_text
from kproxy.model.types import Family, Protocol
from tests.lab.namespace import Namespace

NEW, GET, DELETE = (
    nfnl_type(NFNL_SUBSYS_CTNETLINK, message)
    for message in (IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE)
)
ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
IP_TYPES = {family: (layout.source, layout.destination) for family, layout in TUPLE_LAYOUTS.items()}
PORT_TYPES = (CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT)


class Flow(NamedTuple):
    """A flow from a client to a destination, and the source of the replies. All three are `ip:port`."""

    client: str
    destination: str
    source: str
    protocol: int = socket.IPPROTO_UDP
    zone: int = 0
    original_zone: int = 0

    @property
    def family(self) -> Family:
        return family_of(split_socket_text(self.client)[0])


def insert(namespace: Namespace, *flows: Flow) -> None:
    """Create conntrack entries in a namespace as if packets had created them."""

    def work() -> None:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for flow in flows:
                netlink.request(NEW, NLM_F_CREATE | NLM_F_EXCL, _message(flow))

    namespace.call(work)


def entries(namespace: Namespace, family: Family) -> dict[tuple[str, str], int]:
    """Return the IDs of a family's UDP entries by destination and reply source. Fails if two entries share both."""

    def work() -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(GET, nfgenmsg(ADDRESS_FAMILIES[family])):
                parts = attributes(data, begin + 4, end)
                original, reply = (
                    _parse_tuple(data, parts[kind], family) for kind in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY)
                )
                if original[0] == socket.IPPROTO_UDP:
                    assert (original[2], reply[1]) not in found
                    found[original[2], reply[1]] = struct.unpack_from(">I", data, parts[CTA_ID][0])[0]
        return found

    return namespace.call(work)


def _message(flow: Flow) -> bytes:
    message = nfgenmsg(ADDRESS_FAMILIES[flow.family])
    message += _tuple(CTA_TUPLE_ORIG, flow, flow.client, flow.destination, flow.original_zone)
    message += _tuple(CTA_TUPLE_REPLY, flow, flow.source, flow.client, 0)
    message += attribute(CTA_ZONE, struct.pack(">H", flow.zone)) if flow.zone else b""
    return message + attribute(CTA_TIMEOUT, struct.pack(">I", 600))


def _tuple(kind: int, flow: Flow, source: str, destination: str, zone: int) -> bytes:
    ips, ports = [], []
    for (address, port), ip_type, port_type in zip(
        (split_socket_text(source), split_socket_text(destination)), IP_TYPES[flow.family], PORT_TYPES, strict=True
    ):
        ips.append(attribute(ip_type, socket.inet_pton(ADDRESS_FAMILIES[flow.family], address)))
        ports.append(attribute(port_type, struct.pack(">H", port)))
    proto = nested(CTA_TUPLE_PROTO, attribute(CTA_PROTO_NUM, bytes([flow.protocol])), *ports)
    return nested(
        kind, nested(CTA_TUPLE_IP, *ips), proto, attribute(CTA_TUPLE_ZONE, struct.pack(">H", zone)) if zone else b""
    )


def _parse_tuple(data: bytes, bounds: tuple[int, int], family: Family) -> tuple[int, str, str]:
    """Return the protocol, source and destination of a tuple."""
    parts = attributes(data, *bounds)
    ip, proto = attributes(data, *parts[CTA_TUPLE_IP]), attributes(data, *parts[CTA_TUPLE_PROTO])
    number = data[proto[CTA_PROTO_NUM][0]]
    if number != socket.IPPROTO_UDP:
        return number, "", ""
    sockets = []
    for ip_type, port_type in zip(IP_TYPES[family], PORT_TYPES, strict=True):
        address = socket.inet_ntop(ADDRESS_FAMILIES[family], data[slice(*ip[ip_type])])
        sockets.append(socket_text(address, struct.unpack_from(">H", data, proto[port_type][0])[0]))
    return number, sockets[0], sockets[1]


class FamilySockets(NamedTuple):
    """The sockets of one family, each `ip:port`.

    `dns` and `others` are ClusterIPs, `old` and `new` endpoints, `own` and `foreign` NodePorts of two nodes.
    """

    family: Family
    client: str
    dns: str
    old: str
    new: str
    others: tuple[str, ...]
    own: str
    foreign: str


FAMILY_SOCKETS = (
    FamilySockets(
        Family.IPV4,
        "10.244.1.9:4000",
        "10.96.0.10:53",
        "10.244.1.1:5353",
        "10.244.1.2:5353",
        tuple(f"10.96.1.{number}:53" for number in range(1, MAX_FILTERED_DUMPS + 2)),
        "192.0.2.1:30053",
        "198.51.100.1:30053",
    ),
    FamilySockets(
        Family.IPV6,
        "[fd00:244::9]:4000",
        "[fd00:96::a]:53",
        "[fd00:244::1]:5353",
        "[fd00:244::2]:5353",
        tuple(f"[fd00:96::1:{number}]:53" for number in range(1, MAX_FILTERED_DUMPS + 2)),
        "[2001:db8::1]:30053",
        "[2001:db8:9::1]:30053",
    ),
)


@pytest.fixture(params=FAMILY_SOCKETS, ids=["ipv4", "ipv6"])
def sockets(request: pytest.FixtureRequest) -> FamilySockets:
    found = request.param
    assert isinstance(found, FamilySockets)
    return found


def flows(sockets: FamilySockets, *pairs: tuple[str, str]) -> list[Flow]:
    """Return flows with these destinations and reply sources. Each has its own client port."""
    address, port = split_socket_text(sockets.client)
    return [Flow(socket_text(address, port + number), *each) for number, each in enumerate(pairs)]


def clean(
    namespace: Namespace, family: Family, destinations: Collection[str], is_stale: Callable[[str, str], bool]
) -> int:
    return namespace.call(lambda: UdpConntrack(family).clean(destinations, is_stale))


def checked_flows(namespace: Namespace, family: Family, destinations: Collection[str]) -> set[tuple[str, str]]:
    """Return the flows that a cleanup of these destinations checks."""
    found = set[tuple[str, str]]()

    def record(destination: str, source: str) -> bool:
        found.add((destination, source))
        return False

    assert clean(namespace, family, destinations, record) == 0
    return found


def test_only_the_stale_entry_is_deleted(namespace: Namespace, sockets: FamilySockets) -> None:
    pairs = [
        (sockets.dns, sockets.old),
        (sockets.dns, sockets.new),
        (sockets.others[0], sockets.old),
        (sockets.foreign, sockets.old),
    ]
    insert(namespace, *flows(sockets, *pairs), Flow(sockets.client, sockets.dns, sockets.old, socket.IPPROTO_TCP))
    before = entries(namespace, sockets.family)
    assert set(before) == set(pairs)
    assert clean(namespace, sockets.family, [sockets.dns], lambda _, source: source == sockets.old) == 1
    del before[sockets.dns, sockets.old]
    assert entries(namespace, sockets.family) == before


@pytest.mark.parametrize("count", [1, MAX_FILTERED_DUMPS, MAX_FILTERED_DUMPS + 1])
def test_all_requested_destinations_are_checked(namespace: Namespace, sockets: FamilySockets, count: int) -> None:
    insert(
        namespace, *flows(sockets, *((each, sockets.old) for each in (sockets.dns, sockets.foreign, *sockets.others)))
    )
    destinations = sockets.others[:count]
    assert checked_flows(namespace, sockets.family, destinations) == {(each, sockets.old) for each in destinations}


def test_port_without_address_matches_all_addresses(namespace: Namespace, sockets: FamilySockets) -> None:
    insert(namespace, *flows(sockets, *((each, sockets.old) for each in (sockets.dns, sockets.own, sockets.foreign))))
    expected = {(sockets.own, sockets.old), (sockets.foreign, sockets.old)}
    assert checked_flows(namespace, sockets.family, [":30053"]) == expected
    assert checked_flows(namespace, sockets.family, [":30053", *sockets.others]) == expected


def test_entries_of_other_destinations_are_not_checked(namespace: Namespace, sockets: FamilySockets) -> None:
    insert(namespace, Flow(sockets.client, sockets.dns, sockets.old))
    assert checked_flows(namespace, sockets.family, [sockets.others[0]]) == set()


def test_stale_entries_of_all_clients_are_deleted(namespace: Namespace, sockets: FamilySockets) -> None:
    count = 2 * REQUESTS_PER_SEND + 1
    insert(namespace, *flows(sockets, (sockets.dns, sockets.new), *[(sockets.dns, sockets.old)] * count))
    assert clean(namespace, sockets.family, [sockets.dns], lambda _, source: source == sockets.old) == count
    assert set(entries(namespace, sockets.family)) == {(sockets.dns, sockets.new)}


def test_entry_matched_by_two_destinations_is_deleted_once(namespace: Namespace, sockets: FamilySockets) -> None:
    insert(namespace, Flow(sockets.client, sockets.own, sockets.old))
    assert clean(namespace, sockets.family, [sockets.own, ":30053"], lambda *_: True) == 1
    assert entries(namespace, sockets.family) == {}


def test_other_family_is_not_touched(namespace: Namespace) -> None:
    insert(namespace, *(Flow(sockets.client, sockets.own, sockets.old) for sockets in FAMILY_SOCKETS))
    assert clean(namespace, Family.IPV4, [":30053"], lambda *_: True) == 1
    assert len(entries(namespace, Family.IPV6)) == 1


@pytest.mark.parametrize("zone", [{"zone": 7}, {"original_zone": 7}], ids=["both-directions", "original-direction"])
def test_only_translated_entries_are_deleted_in_other_zones(
    namespace: Namespace, sockets: FamilySockets, zone: dict[str, int]
) -> None:
    insert(namespace, Flow(sockets.client, sockets.dns, sockets.old, **zone))
    insert(namespace, Flow(sockets.client, sockets.others[0], sockets.others[0], **zone))
    insert(namespace, Flow(sockets.client, sockets.others[1], sockets.others[1]))
    destinations = [sockets.dns, *sockets.others]
    assert clean(namespace, sockets.family, destinations, lambda *_: True) == 2
    assert set(entries(namespace, sockets.family)) == {(sockets.others[0], sockets.others[0])}


def test_entry_that_expires_meanwhile_is_not_an_error(namespace: Namespace, sockets: FamilySockets) -> None:
    flow = Flow(sockets.client, sockets.dns, sockets.old)
    insert(namespace, flow)

    def delete_entry(destination: str, source: str) -> bool:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            netlink.request(DELETE, 0, _message(flow))
        return True

    assert clean(namespace, sockets.family, [sockets.dns], delete_entry) == 0


@pytest.mark.parametrize("replacement", ["same-client-and-frontend", "same-client-and-endpoint"])
def test_entry_that_replaced_a_stale_one_is_kept(
    namespace: Namespace, sockets: FamilySockets, replacement: str
) -> None:
    flow = Flow(sockets.client, sockets.dns, sockets.old)  # the kernel often reuses its memory, and so its ID
    by_frontend = replacement == "same-client-and-frontend"
    other = flow._replace(source=sockets.new) if by_frontend else flow._replace(destination=sockets.old)
    insert(namespace, flow)

    def replace_entry(destination: str, source: str) -> bool:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            netlink.request(DELETE, 0, _message(flow))
            netlink.request(NEW, NLM_F_CREATE | NLM_F_EXCL, _message(other))
        return True

    assert clean(namespace, sockets.family, [sockets.dns], replace_entry) == 0
    assert set(entries(namespace, sockets.family)) == {(other.destination, other.source)}


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_connections_of_one_client_are_read(namespace: Namespace, sockets: FamilySockets, protocol: Protocol) -> None:
    numbers = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}
    client, frontend, endpoint = sockets.client, sockets.dns, sockets.old
    wanted = Flow(client, frontend, endpoint, numbers[protocol])
    insert(namespace, *(wanted._replace(protocol=number) for number in numbers.values()))
    insert(namespace, wanted._replace(destination=sockets.others[0], source=sockets.new))
    insert(namespace, wanted._replace(client=sockets.foreign))
    insert(namespace, wanted._replace(zone=7), wanted._replace(original_zone=8, source=sockets.own))
    (source, source_port), (destination, port) = split_socket_text(client), split_socket_text(frontend)
    (found,) = namespace.call(lambda: read_connections(wanted.family, protocol, source, destination, port))
    assert (found.source, found.source_port, found.destination, found.port) == (source, source_port, destination, port)
    assert (found.reply_source, found.reply_source_port) == split_socket_text(endpoint)
    assert (found.reply_destination, found.reply_port) == (source, source_port)
    assert (found.state, found.replied) == ("", False)


def test_state_of_a_connection_is_read(namespace: Namespace) -> None:
    namespace.run(["ip", "link", "set", "lo", "up"])
    # Connection tracking is active as soon as a rule needs it.
    rules = "add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c ct state new"
    namespace.run(["nft", rules])
    with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect(("127.0.0.1", port))
            (found,) = namespace.call(lambda: read_connections(Family.IPV4, "TCP", "127.0.0.1", "127.0.0.1", port))
    assert (found.state, found.replied) == ("ESTABLISHED", True)


def test_kernel_filters_dumps(namespace: Namespace, sockets: FamilySockets) -> None:
    insert(
        namespace,
        *flows(sockets, (sockets.dns, sockets.old), (sockets.others[0], sockets.old), (sockets.own, sockets.old)),
    )
    insert(namespace, Flow(sockets.client, sockets.dns, sockets.old, socket.IPPROTO_TCP))
    layout = TUPLE_LAYOUTS[sockets.family]
    address, port = split_socket_text(sockets.dns)

    def count(request: bytes) -> int:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return len(list(netlink.dump(GET, request)))

    packed = socket.inet_pton(layout.address_family, address)
    assert namespace.call(lambda: count(dump_request(layout))) == 3
    assert namespace.call(lambda: count(dump_request(layout, port=struct.pack(">H", port)))) == 2
    if sockets.family is Family.IPV4:
        assert namespace.call(lambda: count(dump_request(layout, packed, struct.pack(">H", port)))) == 1


def test_unfiltered_dump_is_read_too(namespace: Namespace, sockets: FamilySockets) -> None:
    """Kernels without dump filters return all entries."""
    insert(namespace, Flow(sockets.client, sockets.dns, sockets.old))
    insert(namespace, Flow(sockets.client, sockets.own, sockets.old, socket.IPPROTO_TCP))
    reader = ConntrackEntryReader(TUPLE_LAYOUTS[sockets.family])

    def read() -> list[FlowSockets | None]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            everything = nfgenmsg(ADDRESS_FAMILIES[sockets.family])
            return [reader.sockets(*message) for message in netlink.dump(GET, everything)]

    pairs = [(split_socket_text(sockets.dns), split_socket_text(sockets.old))]
    packed = [
        tuple(socket.inet_pton(ADDRESS_FAMILIES[sockets.family], ip) + struct.pack(">H", port) for ip, port in pair)
        for pair in pairs
    ]
    assert sorted(namespace.call(read), key=lambda each: each is None) == [*packed, None]


def test_missing_capability_is_an_error(namespace: Namespace) -> None:
    program = (
        "from kproxy.host.ctnetlink import UdpConntrack\n"
        "from kproxy.model.types import Family\n"
        "try:\n"
        "    UdpConntrack(Family.IPV4).clean([':53'], lambda *_: True)\n"
        "except OSError as error:\n"
        "    print(error.errno, error.strerror)\n"
    )
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", program]
    assert namespace.run(command).stdout == f"{errno.EPERM} Operation not permitted\n"


# The netlink socket.


def test_rejected_requests_are_reported_and_the_others_applied(namespace: Namespace) -> None:
    requested = [
        Flow(f"10.0.0.1:{1000 + number}", f"10.96.0.1:{number + 1}", "10.0.0.2:53")
        for number in range(3 * REQUESTS_PER_SEND)
    ]
    existing = [0, 1, REQUESTS_PER_SEND - 1, REQUESTS_PER_SEND, 3 * REQUESTS_PER_SEND - 1]
    insert(namespace, *(requested[number] for number in existing))

    def work() -> dict[int, int]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return netlink.request_many(NEW, NLM_F_CREATE | NLM_F_EXCL, [_message(flow) for flow in requested])

    assert namespace.call(work) == dict.fromkeys(existing, errno.EEXIST)
    assert len(entries(namespace, Family.IPV4)) == len(requested)


def test_rejected_dump_raises(namespace: Namespace) -> None:
    def work() -> None:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            list(netlink.dump(0x7F << 8, nfgenmsg()))

    with pytest.raises(NetlinkError) as caught:
        namespace.call(work)
    assert caught.value.errno == errno.EINVAL


def add_addresses(namespace: Namespace, third: int, numbers: Iterable[int]) -> None:
    lines = "".join(f"address add 10.9.{third}.{number}/32 dev lo\n" for number in numbers)
    namespace.run(["ip", "-batch", "-"], lines)


def test_interrupted_dump_raises(namespace: Namespace) -> None:
    for third in range(4):
        add_addresses(namespace, third, range(1, 251))

    def work() -> None:
        with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
            for number, _ in enumerate(netlink.dump(RTM_GETADDR, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0))):
                if number == 0:
                    add_addresses(namespace, 5, [1])

    with pytest.raises(DumpInterruptedError):
        namespace.call(work)


@pytest.mark.parametrize("error", [DumpInterruptedError(0, "interrupted"), OSError(errno.ENOBUFS, "lost")])
def test_transient_errors_are_retried_a_limited_number_of_times(error: OSError) -> None:
    calls = []

    def ask(failures: int) -> str:
        calls.append(failures)
        if len(calls) <= failures:
            raise error
        return "done"

    assert retry_interrupted(lambda: ask(MAX_ATTEMPTS - 1)) == "done"
    calls.clear()
    with pytest.raises(OSError, match=error.strerror or ""):
        retry_interrupted(lambda: ask(MAX_ATTEMPTS))
    assert len(calls) == MAX_ATTEMPTS


def test_permanent_errors_are_not_retried() -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise PermissionError(errno.EPERM, "no")

    with pytest.raises(PermissionError):
        retry_interrupted(ask)
    assert len(calls) == 1


def test_own_addresses_exclude_peer_addresses(namespace: Namespace) -> None:
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run(["ip", "address", "add", "10.9.0.1", "peer", "10.9.0.2", "dev", "lo"])
    namespace.run(["ip", "address", "add", "2001:db8::1/128", "dev", "lo"])
    assert namespace.call(lambda: own_addresses(Family.IPV4)) == {"127.0.0.1", "10.9.0.1"}
    assert namespace.call(lambda: own_addresses(Family.IPV6)) == {"::1", "2001:db8::1"}


# Sysctls that each network namespace has for itself.


def test_timeouts_are_set_in_this_namespace(namespace: Namespace) -> None:
    config = Conntrack(
        max_per_core=0,  # not namespaced
        tcp_established_timeout=Seconds(1001),
        tcp_close_wait_timeout=Seconds(1002),
        tcp_be_liberal=True,
        udp_timeout=Seconds(1003),
        udp_stream_timeout=Seconds(1004),
    )

    def work() -> tuple[list[str], dict[str, int]]:
        problems = write_parameters(
            conntrack_sysctls.sysctl_changes(config, 8, read_parameters(conntrack_sysctls.PARAMETERS))
        )
        return problems, conntrack_sysctls.sysctl_changes(config, 8, read_parameters(conntrack_sysctls.PARAMETERS))

    assert namespace.call(work) == ([], {})


def test_route_localnet_is_set_in_this_namespace(namespace: Namespace) -> None:
    namespace.sysctl(ipv4__conf__all__route_localnet=0)
    assert namespace.call(ensure_route_localnet) == []
    assert namespace.call(lambda: read_parameters([ROUTE_LOCALNET])) == {ROUTE_LOCALNET: 1}


def test_read_only_sysctl_is_reported(namespace: Namespace) -> None:
    """An unprivileged container has a read-only /proc/sys."""
    program = (
        f"from kproxy.host.sysctl import write_parameters; print(write_parameters({{{conntrack_sysctls.UDP!r}: 77}}))"
    )
    script = 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"'
    done = namespace.run(["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", program])
    assert done.stdout == f"['cannot set /{conntrack_sysctls.UDP} to 77: Read-only file system']\n"
