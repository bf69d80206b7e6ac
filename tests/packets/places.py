"""Who sends packets, and how they look to the recorded node."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import NamedTuple

from kproxy.simulate.packet import Packet
from tests.packets.table import Row

NODE = "node"
HOLDER = "node as "
"""Followed by a VIP or another address that this node has beside its first, and sends from."""
NODE_ADDRESSES = {4: "10.99.0.2", 6: "fd00:99::2"}
SECOND_NODE_ADDRESSES = {4: "172.18.0.2", 6: "fd00:98::2"}
"""An address of this node that its Node does not name, in no range that a recorded configuration names either."""
OTHER_NODE_ADDRESSES = {4: "10.99.0.3", 6: "fd00:99::3"}
HERE = tuple(ip_network(cidr) for cidr in ("10.244.1.0/24", "fd00:10:244:1::/64"))
"""The addresses of this node's pods."""

SERVICE_CIDRS = ("10.96.0.0/12", "fd00:10:96::/112")
"""The ranges of the recorded clusters' ServiceCIDR. The first holds the recorded nodes' IPv4 addresses, too."""
UNALLOCATED = {4: "10.96.255.250", 6: "fd00:10:96::fffa"}
"""An address in each that no Service has."""


class Place(NamedTuple):
    """A sender's address in each family, and the interface by which its packets come in."""

    addresses: dict[int, str]
    interface: str


PLACES = {
    "pod": Place({4: "10.244.1.99", 6: "fd00:10:244:1::99"}, "veth-pod"),
    "bridged pod": Place({4: "10.244.1.98", 6: "fd00:10:244:1::98"}, "cbr0"),
    "far pod": Place({4: "10.244.2.99", 6: "fd00:10:244:2::99"}, "eth0"),
    "other node": Place(OTHER_NODE_ADDRESSES, "eth0"),
    "client": Place({4: "198.51.100.10", 6: "2001:db8:51::10"}, "eth0"),
    "second client": Place({4: "192.0.2.7", 6: "2001:db8:52::7"}, "eth0"),
    "stranger": Place({4: "198.18.0.10", 6: "2001:db8:18::10"}, "eth0"),
}
"""The senders besides the node itself and endpoints: pods here and elsewhere, the next node, hosts outside."""


def place_of(sender: str) -> Place:
    """Return where a sender is that is not the node."""
    if sender.startswith("endpoint "):
        address = sender.removeprefix("endpoint ")
        here = any(ip_address(address) in cidr for cidr in HERE)
        return Place({ip_address(address).version: address}, "veth-endpoint" if here else "eth0")
    return PLACES[sender]


def source_of(row: Row) -> str:
    """Return the address that a row's packet comes from; the node uses the one that it sends to, if that is its own."""
    version = ip_address(row.address).version
    if row.sender.startswith(HOLDER):
        return row.sender.removeprefix(HOLDER)
    if row.sender != NODE:
        return place_of(row.sender).addresses[version]
    return row.address if ip_address(row.address).is_loopback else NODE_ADDRESSES[version]


def packet_of(row: Row) -> Packet:
    """Return a row's packet as the recorded node sees it."""
    by_node = row.sender.startswith(NODE)
    return Packet(
        protocol=row.protocol,
        source=source_of(row),
        destination=row.address,
        port=row.port,
        interface="" if by_node else place_of(row.sender).interface,
        local_addresses=frozenset({*NODE_ADDRESSES.values(), *([source_of(row)] if by_node else ())}),
        affinity_endpoints=frozenset({row.remembering} if row.remembering else ()),
    )
