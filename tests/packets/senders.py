"""The senders of packets, and how their packets look on the recorded node."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import NamedTuple

from kproxy.simulate.packet import Packet
from tests.packets.table import Row

NODE = "node"
NODE_AS = "node as "
"""Precedes an additional address of the node that it sends from, such as a VIP."""

NODE_ADDRESSES = {4: "10.99.0.2", 6: "fd00:99::2"}
SECOND_NODE_ADDRESSES = {4: "172.18.0.2", 6: "fd00:98::2"}
"""Addresses of the node that are neither in its Node object nor in a range of a recorded configuration."""

OTHER_NODE_ADDRESSES = {4: "10.99.0.3", 6: "fd00:99::3"}
LOCAL_POD_CIDRS = tuple(ip_network(cidr) for cidr in ("10.244.1.0/24", "fd00:10:244:1::/64"))
"""The pod CIDRs of the node."""

SERVICE_CIDRS = ("10.96.0.0/12", "fd00:10:96::/112")
"""The ServiceCIDR of the recorded clusters. The IPv4 range also contains the nodes' addresses."""

UNALLOCATED = {4: "10.96.255.250", 6: "fd00:10:96::fffa"}
"""Addresses in the ServiceCIDR that no Service has."""


UNDEFINED_PORT = 9999
"""A port that no Service has."""


class Sender(NamedTuple):
    """A sender's address in each IP family, and the interface on which the node receives its packets."""

    addresses: dict[int, str]
    interface: str


SENDERS = {
    "pod": Sender({4: "10.244.1.99", 6: "fd00:10:244:1::99"}, "veth-pod"),
    "bridged pod": Sender({4: "10.244.1.98", 6: "fd00:10:244:1::98"}, "cbr0"),
    "far pod": Sender({4: "10.244.2.99", 6: "fd00:10:244:2::99"}, "eth0"),
    "other node": Sender(OTHER_NODE_ADDRESSES, "eth0"),
    "client": Sender({4: "198.51.100.10", 6: "2001:db8:51::10"}, "eth0"),
    "second client": Sender({4: "192.0.2.7", 6: "2001:db8:52::7"}, "eth0"),
    "stranger": Sender({4: "198.18.0.10", 6: "2001:db8:18::10"}, "eth0"),
}
"""All senders except the node and the endpoints: pods on this and another node, another node, external clients."""


def sender_of(name: str) -> Sender:
    """Return a sender by its name in the table. The node itself is not a sender in this sense."""
    if name.startswith("endpoint "):
        address = name.removeprefix("endpoint ")
        local = any(ip_address(address) in cidr for cidr in LOCAL_POD_CIDRS)
        return Sender({ip_address(address).version: address}, "veth-endpoint" if local else "eth0")
    return SENDERS[name]


def source_of(row: Row) -> str:
    """Return the source address of a row's packet. The node sends to a loopback address from that same address."""
    version = ip_address(row.address).version
    if row.sender.startswith(NODE_AS):
        return row.sender.removeprefix(NODE_AS)
    if row.sender != NODE:
        return sender_of(row.sender).addresses[version]
    return row.address if ip_address(row.address).is_loopback else NODE_ADDRESSES[version]


def packet_of(row: Row) -> Packet:
    """Return a row's packet as the recorded node sees it."""
    from_node = row.sender.startswith(NODE)
    return Packet(
        protocol=row.protocol,
        source=source_of(row),
        destination=row.address,
        port=row.port,
        interface="" if from_node else sender_of(row.sender).interface,
        local_addresses=frozenset({*NODE_ADDRESSES.values(), *([source_of(row)] if from_node else ())}),
        affinity_endpoints=frozenset({row.remembering} if row.remembering else ()),
    )
