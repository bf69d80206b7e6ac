"""What all Services of one family share: this node, its addresses, and the settings that shape every rule."""

from __future__ import annotations

from msgspec import Struct

from kproxy.model.local_traffic import LocalTraffic
from kproxy.model.types import Family


class Context(Struct, frozen=True):
    """One value for everything that is not a Service: when it changes, every Service is rendered again.

    `node_address` is this node's primary address of the family, "" while unknown. `node_port_addresses` are
    the addresses that NodePorts answer on, None for every local address. `large_cluster` leaves out
    the comments of per-endpoint rules. `masquerade_mark` is the bit as a number, 0x4000 for bit 14.
    `drop_invalid` drops packets that conntrack calls INVALID, `accounting` counts through nfacct objects, which
    must exist before a rule can name them. `service_cidrs` are the ranges that ClusterIPs are allocated from, empty
    while unknown: packets to addresses in them that no Service has are dropped in nftables mode.
    """

    family: Family
    node_name: str
    zone: str = ""
    node_address: str = ""
    local_traffic: LocalTraffic = LocalTraffic()
    masquerade_all: bool = False
    masquerade_mark: int = 1 << 14
    node_port_addresses: tuple[str, ...] | None = None
    localhost_node_ports: bool = False
    drop_invalid: bool = True
    accounting: bool = True
    random_fully: bool = True
    large_cluster: bool = False
    service_cidrs: tuple[str, ...] = ()
