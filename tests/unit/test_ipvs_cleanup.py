"""Cleanup of kube-proxy's ipvs mode: its sets and virtual servers, and the netlink messages for virtual servers.

Few test kernels have IPVS, so the messages are compared with those of pyroute2.
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
    """Return the kernel's message about one virtual server, encoded by pyroute2, and the range of its payload."""
    encoded = ipvsmsg()
    encoded["cmd"] = 1
    named = [(f"IPVS_SVC_ATTR_{name.upper()}", value) for name, value in attributes.items()]
    encoded["attrs"] = [("IPVS_CMD_ATTR_SERVICE", {"attrs": named})]
    encoded.encode()
    return bytes(encoded.data), HEADER.size, len(encoded.data)


def test_virtual_servers_of_the_kernel_are_parsed() -> None:
    servers = parse_servers(
        iter(
            (
                message(af=socket.AF_INET, protocol=TCP, addr="10.96.0.80", port=80, sched_name="rr", timeout=0),
                message(af=socket.AF_INET6, protocol=UDP, addr="fd00:10:96::a", port=53, sched_name="rr"),
                message(af=socket.AF_INET, fwmark=7, sched_name="rr"),
            )
        )
    )
    assert [(server.address, server.protocol, server.port) for server in servers] == [
        ("10.96.0.80", TCP, 80),
        ("fd00:10:96::a", UDP, 53),
    ]


def test_ipv4_address_has_the_size_of_an_ipv6_address() -> None:
    """The kernel sends the whole union nf_inet_addr and expects it in requests."""
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
def test_deletion_names_one_virtual_server(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    (server,) = parse_servers(iter([message(af=family, protocol=TCP, addr=address, port=80, sched_name="rr")]))
    payload = encode_deletion(server)
    decoded = ipvsmsg(HEADER.pack(HEADER.size + len(payload), 30, 0, 1, 0) + payload)
    decoded.decode()
    assert decoded["cmd"] == 3
    service = decoded.get_attr("IPVS_CMD_ATTR_SERVICE")
    assert {name.removeprefix("IPVS_SVC_ATTR_"): value for name, value in service["attrs"]} == {
        "AF": family,
        "PROTOCOL": TCP,
        "ADDR": address,
        "PORT": 80,
    }


def test_generic_netlink_family_is_resolved_by_name() -> None:
    with NetlinkSocket(NETLINK_GENERIC) as netlink:
        assert resolve_family_id(netlink, "nlctrl") == 16
        with pytest.raises(NetlinkError, match="No such file"):
            resolve_family_id(netlink, "kproxy-none")


def test_set_names_match_kube_proxy_and_the_length_limit() -> None:
    assert len(SETS) == 34
    assert {"KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP", "KUBE-6-LOAD-BALANCER-SOURCE-CID"} < SETS
    assert all(len(name) <= 31 for name in SETS)


def test_virtual_servers_in_the_sets_of_kube_proxy_are_removed() -> None:
    servers = {
        name: VirtualServer(address, protocol, port, name.encode())
        for name, address, protocol, port in (
            ("cluster IP", "10.96.0.80", TCP, 80),
            ("another port of a cluster IP", "10.96.0.80", TCP, 8080),
            ("another protocol of a cluster IP", "10.96.0.80", UDP, 80),
            ("node port", "192.0.2.10", TCP, 30080),
            ("node port of another protocol", "192.0.2.10", UDP, 30080),
            ("node port number on another address", "192.0.2.50", TCP, 30080),
            ("of keepalived", "192.0.2.50", TCP, 80),
        )
    }
    entries = {IpsetEntry("10.96.0.80", TCP, 80), IpsetEntry("", TCP, 30080)}
    selected = kube_proxy_servers(servers.values(), entries, {"192.0.2.10"})
    assert [server.key.decode() for server in selected] == ["cluster IP", "node port"]


def not_permitted(*_: object) -> dict[Any, str]:
    raise NetlinkError(1, "Operation not permitted")


LEFTOVERS = IpvsLeftovers(7, ("KUBE-CLUSTER-IP", "KUBE-LOOP-BACK"))
SERVER = VirtualServer("10.96.0.80", TCP, 80, b"")


def simulate_kernel(monkeypatch: pytest.MonkeyPatch, **steps: Callable[..., object]) -> list[str]:
    """Replace the functions of the cleanup that access the kernel; return the list of deletions, in order."""
    deleted: list[str] = []

    def delete(kind: str) -> Callable[..., dict[str, str]]:
        def step(_: object) -> dict[str, str]:
            deleted.append(kind)
            return {}

        return step

    defaults: dict[str, Callable[..., object]] = {
        "addresses_by_interface": lambda _: {},
        "virtual_servers": lambda: [SERVER],
        "set_entries": lambda _: {IpsetEntry("10.96.0.80", TCP, 80)},
        "delete_virtual_servers": delete("virtual servers"),
        "destroy_sets": delete("sets"),
        "delete_interface": delete("interface"),
    }
    for name, step in (defaults | steps).items():
        monkeypatch.setattr(cleanup, name, step)
    return deleted


def test_virtual_servers_are_removed_before_sets_and_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = simulate_kernel(monkeypatch)
    assert remove_leftovers(LEFTOVERS).removed == ["1 virtual server", "2 ipsets", "the interface kube-ipvs0"]
    assert deleted == ["virtual servers", "sets", "interface"]


@pytest.mark.parametrize(
    ("step", "replacement", "problem"),
    [
        (
            "delete_virtual_servers",
            lambda servers: dict.fromkeys(servers, "Device or resource busy"),
            "cannot remove 1 IPVS virtual server (first: 10.96.0.80 port 80): Device or resource busy",
        ),
        ("virtual_servers", not_permitted, "cannot remove IPVS virtual servers: Operation not permitted"),
        ("set_entries", not_permitted, "cannot remove IPVS virtual servers: Operation not permitted"),
    ],
)
def test_sets_and_interface_are_kept_while_virtual_servers_remain(
    monkeypatch: pytest.MonkeyPatch, step: str, replacement: Callable[..., object], problem: str
) -> None:
    deleted = simulate_kernel(monkeypatch, **{step: replacement})
    done = remove_leftovers(LEFTOVERS)
    assert (done.servers_remain, done.removed, deleted) == (True, [], [])
    assert done.problems == [problem]
    simulate_kernel(monkeypatch)
    assert remove_leftovers(LEFTOVERS).removed == ["1 virtual server", "2 ipsets", "the interface kube-ipvs0"]


def test_virtual_server_on_the_ipvs_interface_in_no_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_kernel(
        monkeypatch,
        set_entries=lambda _: set(),
        addresses_by_interface=lambda _: {7: frozenset({"10.96.0.80"}), 1: frozenset({"192.0.2.10"})},
    )
    done = remove_leftovers(LEFTOVERS)
    assert done.removed == ["2 ipsets", "the interface kube-ipvs0"]
    assert done.problems == [
        "not removing 1 IPVS virtual server (first: 10.96.0.80 port 80) on addresses of kube-ipvs0: not in any of "
        "kube-proxy's ipsets"
    ]


def test_failure_to_remove_sets_or_interface_is_reported_and_the_rest_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_kernel(monkeypatch, destroy_sets=lambda names: {names[0]: "rules use it"}, delete_interface=not_permitted)
    done = remove_leftovers(LEFTOVERS)
    assert not done.servers_remain
    assert done.removed == ["1 virtual server", "1 ipset"]
    assert done.problems == [
        "cannot remove ipsets KUBE-CLUSTER-IP: rules use it",
        "cannot remove the interface kube-ipvs0: Operation not permitted",
    ]
