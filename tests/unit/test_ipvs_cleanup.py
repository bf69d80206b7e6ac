"""Which sets and virtual servers are those of kube-proxy's ipvs mode, and how the kernel speaks of virtual servers.

Messages are checked against pyroute2's own idea of them, as few test kernels have IPVS.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2.netlink.generic.ipvs import ipvsmsg

from kproxy.host.netlink import NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import HEADER, attribute
from kproxy.ipvs import cleanup
from kproxy.ipvs.cleanup import SETS, IpvsLeftovers, kube_proxy_servers, remove_leftovers
from kproxy.ipvs.ipset import IpsetEntry
from kproxy.ipvs.virtual_servers import (
    NETLINK_GENERIC,
    VirtualServer,
    encode_deletion,
    parse_servers,
    resolve_family_id,
)

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


def message(**attributes: object) -> tuple[bytes, int, int]:
    """What the kernel answers about one virtual server, as pyroute2 would write it."""
    made = ipvsmsg()
    made["cmd"] = 1
    named = [(f"IPVS_SVC_ATTR_{name.upper()}", value) for name, value in attributes.items()]
    made["attrs"] = [("IPVS_CMD_ATTR_SERVICE", {"attrs": named})]
    made.encode()
    return bytes(made.data), HEADER.size, len(made.data)


def test_what_the_kernel_says_of_virtual_servers_is_read() -> None:
    found = parse_servers(
        iter(
            (
                message(af=socket.AF_INET, protocol=TCP, addr="10.96.0.80", port=80, sched_name="rr", timeout=0),
                message(af=socket.AF_INET6, protocol=UDP, addr="fd00:10:96::a", port=53, sched_name="rr"),
                message(af=socket.AF_INET, fwmark=7, sched_name="rr"),
            )
        )
    )
    assert [(each.address, each.protocol, each.port) for each in found] == [
        ("10.96.0.80", TCP, 80),
        ("fd00:10:96::a", UDP, 53),
    ]


def test_an_ipv4_address_comes_in_as_many_bytes_as_one_of_ipv6() -> None:
    """The kernel sends the whole union nf_inet_addr, and wants it back."""
    address = socket.inet_aton("10.96.0.80") + bytes(12)
    parts = (
        attribute(1, struct.pack("=H", socket.AF_INET))
        + attribute(2, struct.pack("=H", TCP))
        + attribute(3, address)
        + attribute(4, struct.pack(">H", 80))
    )
    data = bytes(4) + attribute(1, parts + attribute(6, b"rr\0"))
    (server,) = parse_servers(iter([(data, 0, len(data))]))
    assert server == VirtualServer("10.96.0.80", TCP, 80, parts)


@pytest.mark.parametrize("address", ["10.96.0.80", "fd00:10:96::80"])
def test_a_deletion_names_one_virtual_server(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    (server,) = parse_servers(iter([message(af=family, protocol=TCP, addr=address, port=80, sched_name="rr")]))
    payload = encode_deletion(server)
    read = ipvsmsg(HEADER.pack(HEADER.size + len(payload), 30, 0, 1, 0) + payload)
    read.decode()
    assert read["cmd"] == 3
    service = read.get_attr("IPVS_CMD_ATTR_SERVICE")
    assert {name.removeprefix("IPVS_SVC_ATTR_"): value for name, value in service["attrs"]} == {
        "AF": family,
        "PROTOCOL": TCP,
        "ADDR": address,
        "PORT": 80,
    }


def test_a_family_of_generic_netlink_is_found_by_its_name() -> None:
    with NetlinkSocket(NETLINK_GENERIC) as netlink:
        assert resolve_family_id(netlink, "nlctrl") == 16
        with pytest.raises(NetlinkError, match="No such file"):
            resolve_family_id(netlink, "kproxy-none")


def test_names_of_sets_are_exact_and_fit() -> None:
    assert len(SETS) == 34
    assert {"KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP", "KUBE-6-LOAD-BALANCER-SOURCE-CID"} < SETS
    assert all(len(name) <= 31 for name in SETS)


def test_virtual_servers_are_kube_proxys_by_what_its_sets_hold() -> None:
    servers = {
        name: VirtualServer(address, protocol, port, name.encode())
        for name, address, protocol, port in (
            ("cluster IP", "10.96.0.80", TCP, 80),
            ("another port of a cluster IP", "10.96.0.80", TCP, 8080),
            ("another protocol of a cluster IP", "10.96.0.80", UDP, 80),
            ("node port", "192.0.2.10", TCP, 30080),
            ("another protocol's node port", "192.0.2.10", UDP, 30080),
            ("a node port's number elsewhere", "192.0.2.50", TCP, 30080),
            ("keepalived's", "192.0.2.50", TCP, 80),
        )
    }
    entries = {IpsetEntry("10.96.0.80", TCP, 80), IpsetEntry("", TCP, 30080)}
    found = kube_proxy_servers(servers.values(), entries, {"192.0.2.10"})
    assert [each.key.decode() for each in found] == ["cluster IP", "node port"]


def refuse(*_: object) -> dict[Any, str]:
    raise NetlinkError(1, "Operation not permitted")


FOUND = IpvsLeftovers(7, ("KUBE-CLUSTER-IP", "KUBE-LOOP-BACK"))
SERVER = VirtualServer("10.96.0.80", TCP, 80, b"")


def stand_in(monkeypatch: pytest.MonkeyPatch, **steps: Callable[..., object]) -> list[str]:
    """Let a kernel answer that has IPVS; return the list of what is deleted, in order."""
    deleted: list[str] = []

    def delete(what: str) -> Callable[..., dict[str, str]]:
        def step(_: object) -> dict[str, str]:
            deleted.append(what)
            return {}

        return step

    answers: dict[str, Callable[..., object]] = {
        "addresses_by_interface": lambda _: {},
        "virtual_servers": lambda: [SERVER],
        "set_entries": lambda _: {IpsetEntry("10.96.0.80", TCP, 80)},
        "delete_virtual_servers": delete("virtual servers"),
        "destroy_sets": delete("sets"),
        "delete_interface": delete("interface"),
    }
    for name, step in (answers | steps).items():
        monkeypatch.setattr(cleanup, name, step)
    return deleted


def test_what_tells_of_virtual_servers_goes_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = stand_in(monkeypatch)
    assert remove_leftovers(FOUND).removed == ["1 virtual server", "2 ipsets", "the interface kube-ipvs0"]
    assert deleted == ["virtual servers", "sets", "interface"]


@pytest.mark.parametrize(
    ("step", "answer", "problem"),
    [
        (
            "delete_virtual_servers",
            lambda servers: dict.fromkeys(servers, "Device or resource busy"),
            "cannot remove 1 IPVS virtual server (first: 10.96.0.80 port 80): Device or resource busy",
        ),
        ("virtual_servers", refuse, "cannot remove IPVS virtual servers: Operation not permitted"),
        ("set_entries", refuse, "cannot remove IPVS virtual servers: Operation not permitted"),
    ],
)
def test_while_virtual_servers_stay_all_stays_that_tells_which_they_are(
    monkeypatch: pytest.MonkeyPatch, step: str, answer: Callable[..., object], problem: str
) -> None:
    deleted = stand_in(monkeypatch, **{step: answer})
    done = remove_leftovers(FOUND)
    assert (done.servers_remain, done.removed, deleted) == (True, [], [])
    assert done.problems == [problem]
    stand_in(monkeypatch)
    assert remove_leftovers(FOUND).removed == ["1 virtual server", "2 ipsets", "the interface kube-ipvs0"]


def test_a_virtual_server_of_a_service_that_no_set_names_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        set_entries=lambda _: set(),
        addresses_by_interface=lambda _: {7: frozenset({"10.96.0.80"}), 1: frozenset({"192.0.2.10"})},
    )
    done = remove_leftovers(FOUND)
    assert done.removed == ["2 ipsets", "the interface kube-ipvs0"]
    assert done.problems == [
        "not removing 1 IPVS virtual server (first: 10.96.0.80 port 80) on addresses of kube-ipvs0: not in any of "
        "kube-proxy's ipsets"
    ]


def test_what_else_cannot_be_removed_is_said_and_the_rest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, destroy_sets=lambda names: {names[0]: "rules use it"}, delete_interface=refuse)
    done = remove_leftovers(FOUND)
    assert not done.servers_remain
    assert done.removed == ["1 virtual server", "1 ipset"]
    assert done.problems == [
        "cannot remove ipsets KUBE-CLUSTER-IP: rules use it",
        "cannot remove the interface kube-ipvs0: Operation not permitted",
    ]
