"""A real connection tracking table: its entries, its parameters, and the netlink socket that the way to it is."""

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
from kproxy.model.types import Family
from tests.lab.namespace import Namespace

NEW, GET, DELETE = (
    nfnl_type(NFNL_SUBSYS_CTNETLINK, message)
    for message in (IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE)
)
ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
IP_TYPES = {family: (layout.source, layout.destination) for family, layout in TUPLE_LAYOUTS.items()}
PORT_TYPES = (CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT)


class Flow(NamedTuple):
    """A flow from a client to a destination that some source answers, each `ip:port`."""

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
    """Put entries into a namespace's table as if packets had made them."""

    def work() -> None:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for flow in flows:
                netlink.request(NEW, NLM_F_CREATE | NLM_F_EXCL, _message(flow))

    namespace.call(work)


def entries(namespace: Namespace, family: Family) -> dict[tuple[str, str], int]:
    """Return the ids of a family's UDP entries by destination and replying source; no two may share these."""

    def work() -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            for data, begin, end in netlink.dump(GET, nfgenmsg(ADDRESS_FAMILIES[family])):
                parts = attributes(data, begin + 4, end)
                original, reply = (_ends(data, parts[way], family) for way in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY))
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


def _tuple(way: int, flow: Flow, source: str, destination: str, zone: int) -> bytes:
    ips, ports = [], []
    for (address, port), ip_type, port_type in zip(
        (split_socket_text(source), split_socket_text(destination)), IP_TYPES[flow.family], PORT_TYPES, strict=True
    ):
        ips.append(attribute(ip_type, socket.inet_pton(ADDRESS_FAMILIES[flow.family], address)))
        ports.append(attribute(port_type, struct.pack(">H", port)))
    proto = nested(CTA_TUPLE_PROTO, attribute(CTA_PROTO_NUM, bytes([flow.protocol])), *ports)
    return nested(
        way, nested(CTA_TUPLE_IP, *ips), proto, attribute(CTA_TUPLE_ZONE, struct.pack(">H", zone)) if zone else b""
    )


def _ends(data: bytes, place: tuple[int, int], family: Family) -> tuple[int, str, str]:
    """Return protocol, source and destination of a tuple."""
    parts = attributes(data, *place)
    ip, proto = attributes(data, *parts[CTA_TUPLE_IP]), attributes(data, *parts[CTA_TUPLE_PROTO])
    number = data[proto[CTA_PROTO_NUM][0]]
    if number != socket.IPPROTO_UDP:
        return number, "", ""
    ends = []
    for ip_type, port_type in zip(IP_TYPES[family], PORT_TYPES, strict=True):
        address = socket.inet_ntop(ADDRESS_FAMILIES[family], data[slice(*ip[ip_type])])
        ends.append(socket_text(address, struct.unpack_from(">H", data, proto[port_type][0])[0]))
    return number, ends[0], ends[1]


class World(NamedTuple):
    """The names of one family."""

    family: Family
    client: str
    dns: str
    old: str
    new: str
    others: tuple[str, ...]
    own: str
    foreign: str


WORLDS = (
    World(
        Family.IPV4,
        "10.244.1.9:4000",
        "10.96.0.10:53",
        "10.244.1.1:5353",
        "10.244.1.2:5353",
        tuple(f"10.96.1.{number}:53" for number in range(1, MAX_FILTERED_DUMPS + 2)),
        "192.0.2.1:30053",
        "198.51.100.1:30053",
    ),
    World(
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


@pytest.fixture(params=WORLDS, ids=["ipv4", "ipv6"])
def world(request: pytest.FixtureRequest) -> World:
    found = request.param
    assert isinstance(found, World)
    return found


def flows(world: World, *ends: tuple[str, str]) -> list[Flow]:
    """Flows between these destinations and sources, each of a client's port of its own."""
    address, port = split_socket_text(world.client)
    return [Flow(socket_text(address, port + number), *each) for number, each in enumerate(ends)]


def clean(
    namespace: Namespace, family: Family, destinations: Collection[str], is_stale: Callable[[str, str], bool]
) -> int:
    return namespace.call(lambda: UdpConntrack(family).clean(destinations, is_stale))


def asked(namespace: Namespace, family: Family, destinations: Collection[str]) -> set[tuple[str, str]]:
    """The flows that a cleaning looks at."""
    found = set[tuple[str, str]]()

    def look(destination: str, source: str) -> bool:
        found.add((destination, source))
        return False

    assert clean(namespace, family, destinations, look) == 0
    return found


def test_the_stale_entry_goes_and_the_others_stay(namespace: Namespace, world: World) -> None:
    ends = [(world.dns, world.old), (world.dns, world.new), (world.others[0], world.old), (world.foreign, world.old)]
    insert(namespace, *flows(world, *ends), Flow(world.client, world.dns, world.old, socket.IPPROTO_TCP))
    before = entries(namespace, world.family)
    assert set(before) == set(ends)
    assert clean(namespace, world.family, [world.dns], lambda _, source: source == world.old) == 1
    del before[world.dns, world.old]
    assert entries(namespace, world.family) == before


@pytest.mark.parametrize("count", [1, MAX_FILTERED_DUMPS, MAX_FILTERED_DUMPS + 1])
def test_what_is_asked_for_is_looked_at_however_many_there_are(namespace: Namespace, world: World, count: int) -> None:
    insert(namespace, *flows(world, *((each, world.old) for each in (world.dns, world.foreign, *world.others))))
    wanted = world.others[:count]
    assert asked(namespace, world.family, wanted) == {(each, world.old) for each in wanted}


def test_a_port_of_any_address_is_a_destination(namespace: Namespace, world: World) -> None:
    insert(namespace, *flows(world, *((each, world.old) for each in (world.dns, world.own, world.foreign))))
    expected = {(world.own, world.old), (world.foreign, world.old)}
    assert asked(namespace, world.family, [":30053"]) == expected
    assert asked(namespace, world.family, [":30053", *world.others]) == expected


def test_who_asks_for_nothing_looks_at_nothing(namespace: Namespace, world: World) -> None:
    insert(namespace, Flow(world.client, world.dns, world.old))
    assert asked(namespace, world.family, [world.others[0]]) == set()


def test_all_clients_of_a_stale_pair_are_deleted(namespace: Namespace, world: World) -> None:
    count = 2 * REQUESTS_PER_SEND + 1
    insert(namespace, *flows(world, (world.dns, world.new), *[(world.dns, world.old)] * count))
    assert clean(namespace, world.family, [world.dns], lambda _, source: source == world.old) == count
    assert set(entries(namespace, world.family)) == {(world.dns, world.new)}


def test_two_questions_that_find_one_entry_delete_it_once(namespace: Namespace, world: World) -> None:
    insert(namespace, Flow(world.client, world.own, world.old))
    assert clean(namespace, world.family, [world.own, ":30053"], lambda *_: True) == 1
    assert entries(namespace, world.family) == {}


def test_the_other_family_is_not_touched(namespace: Namespace) -> None:
    insert(namespace, *(Flow(world.client, world.own, world.old) for world in WORLDS))
    assert clean(namespace, Family.IPV4, [":30053"], lambda *_: True) == 1
    assert len(entries(namespace, Family.IPV6)) == 1


@pytest.mark.parametrize("zone", [{"zone": 7}, {"original_zone": 7}], ids=["both-ways", "one-way"])
def test_in_another_zone_only_what_is_translated_goes(namespace: Namespace, world: World, zone: dict[str, int]) -> None:
    insert(namespace, Flow(world.client, world.dns, world.old, **zone))
    insert(namespace, Flow(world.client, world.others[0], world.others[0], **zone))
    insert(namespace, Flow(world.client, world.others[1], world.others[1]))
    wanted = [world.dns, *world.others]
    assert clean(namespace, world.family, wanted, lambda *_: True) == 2
    assert set(entries(namespace, world.family)) == {(world.others[0], world.others[0])}


def test_an_entry_that_ends_by_itself_meanwhile_is_no_failure(namespace: Namespace, world: World) -> None:
    flow = Flow(world.client, world.dns, world.old)
    insert(namespace, flow)

    def end_it(destination: str, source: str) -> bool:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            netlink.request(DELETE, 0, _message(flow))
        return True

    assert clean(namespace, world.family, [world.dns], end_it) == 0


@pytest.mark.parametrize("place", ["same-client-and-frontend", "same-client-and-endpoint"])
def test_an_entry_that_took_the_place_of_a_stale_one_stays(namespace: Namespace, world: World, place: str) -> None:
    flow = Flow(world.client, world.dns, world.old)  # in the same place in memory, as often as not
    by_frontend = place == "same-client-and-frontend"
    other = flow._replace(source=world.new) if by_frontend else flow._replace(destination=world.old)
    insert(namespace, flow)

    def replace_it(destination: str, source: str) -> bool:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            netlink.request(DELETE, 0, _message(flow))
            netlink.request(NEW, NLM_F_CREATE | NLM_F_EXCL, _message(other))
        return True

    assert clean(namespace, world.family, [world.dns], replace_it) == 0
    assert set(entries(namespace, world.family)) == {(other.destination, other.source)}


def test_the_kernel_answers_with_what_was_asked_for(namespace: Namespace, world: World) -> None:
    insert(namespace, *flows(world, (world.dns, world.old), (world.others[0], world.old), (world.own, world.old)))
    insert(namespace, Flow(world.client, world.dns, world.old, socket.IPPROTO_TCP))
    layout = TUPLE_LAYOUTS[world.family]
    address, port = split_socket_text(world.dns)

    def count(asked: bytes) -> int:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return len(list(netlink.dump(GET, asked)))

    packed = socket.inet_pton(layout.address_family, address)
    assert namespace.call(lambda: count(dump_request(layout))) == 3
    assert namespace.call(lambda: count(dump_request(layout, port=struct.pack(">H", port)))) == 2
    if world.family is Family.IPV4:
        assert namespace.call(lambda: count(dump_request(layout, packed, struct.pack(">H", port)))) == 1


def test_an_answer_that_holds_everything_is_read_all_the_same(namespace: Namespace, world: World) -> None:
    """As kernels without the filter give it."""
    insert(namespace, Flow(world.client, world.dns, world.old))
    insert(namespace, Flow(world.client, world.own, world.old, socket.IPPROTO_TCP))
    reader = ConntrackEntryReader(TUPLE_LAYOUTS[world.family])

    def read() -> list[FlowSockets | None]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            everything = nfgenmsg(ADDRESS_FAMILIES[world.family])
            return [reader.sockets(*message) for message in netlink.dump(GET, everything)]

    ends = [(split_socket_text(world.dns), split_socket_text(world.old))]
    packed = [
        tuple(socket.inet_pton(ADDRESS_FAMILIES[world.family], ip) + struct.pack(">H", port) for ip, port in pair)
        for pair in ends
    ]
    assert sorted(namespace.call(read), key=lambda each: each is None) == [*packed, None]


def test_without_the_privilege_it_says_so(namespace: Namespace) -> None:
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


# The socket.


def test_refused_requests_are_named_and_the_others_carried_out(namespace: Namespace) -> None:
    wanted = [
        Flow(f"10.0.0.1:{1000 + number}", f"10.96.0.1:{number + 1}", "10.0.0.2:53")
        for number in range(3 * REQUESTS_PER_SEND)
    ]
    twice = [0, 1, REQUESTS_PER_SEND - 1, REQUESTS_PER_SEND, 3 * REQUESTS_PER_SEND - 1]
    insert(namespace, *(wanted[number] for number in twice))

    def work() -> dict[int, int]:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return netlink.request_many(NEW, NLM_F_CREATE | NLM_F_EXCL, [_message(flow) for flow in wanted])

    assert namespace.call(work) == dict.fromkeys(twice, errno.EEXIST)
    assert len(entries(namespace, Family.IPV4)) == len(wanted)


def test_a_dump_that_is_refused_raises(namespace: Namespace) -> None:
    def work() -> None:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            list(netlink.dump(0x7F << 8, nfgenmsg()))

    with pytest.raises(NetlinkError) as caught:
        namespace.call(work)
    assert caught.value.errno == errno.EINVAL


def add_addresses(namespace: Namespace, third: int, count: Iterable[int]) -> None:
    lines = "".join(f"address add 10.9.{third}.{number}/32 dev lo\n" for number in count)
    namespace.run(["ip", "-batch", "-"], lines)


def test_a_dump_that_changes_meanwhile_is_told(namespace: Namespace) -> None:
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
def test_what_passes_is_asked_again_and_not_for_ever(error: OSError) -> None:
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


def test_what_does_not_pass_is_not_asked_again() -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise PermissionError(errno.EPERM, "no")

    with pytest.raises(PermissionError):
        retry_interrupted(ask)
    assert len(calls) == 1


def test_own_addresses_are_those_of_this_end(namespace: Namespace) -> None:
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run(["ip", "address", "add", "10.9.0.1", "peer", "10.9.0.2", "dev", "lo"])
    namespace.run(["ip", "address", "add", "2001:db8::1/128", "dev", "lo"])
    assert namespace.call(lambda: own_addresses(Family.IPV4)) == {"127.0.0.1", "10.9.0.1"}
    assert namespace.call(lambda: own_addresses(Family.IPV6)) == {"::1", "2001:db8::1"}


# Kernel parameters: those that each namespace has for itself.


def test_timeouts_are_set_for_this_namespace(namespace: Namespace) -> None:
    config = Conntrack(
        max_per_core=0,  # the machine's, not the namespace's
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


def test_route_localnet_is_set_for_this_namespace(namespace: Namespace) -> None:
    namespace.sysctl(ipv4__conf__all__route_localnet=0)
    assert namespace.call(ensure_route_localnet) == []
    assert namespace.call(lambda: read_parameters([ROUTE_LOCALNET])) == {ROUTE_LOCALNET: 1}


def test_what_is_read_only_is_told(namespace: Namespace) -> None:
    """As in a container that is not privileged."""
    program = (
        f"from kproxy.host.sysctl import write_parameters; print(write_parameters({{{conntrack_sysctls.UDP!r}: 77}}))"
    )
    script = 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"'
    done = namespace.run(["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", program])
    assert done.stdout == f"['cannot set /{conntrack_sysctls.UDP} to 77: Read-only file system']\n"
