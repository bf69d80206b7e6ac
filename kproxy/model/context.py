"""Telling traffic of this node's pods from traffic that comes from elsewhere (`detectLocalMode`, KEP-2450)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from kproxy.model.addresses import family_of
from kproxy.model.types import Family


class LocalTraffic(Struct, frozen=True):
    """How a packet of a local pod is recognised: by its source CIDR or by the interface that it comes in on.

    At most one is set; with none, local traffic cannot be told apart.
    """

    cidr: str = ""
    interface: str = ""
    interface_prefix: str = ""

    @property
    def detectable(self) -> bool:
        """Whether there is any way to tell."""
        return bool(self.cidr or self.interface or self.interface_prefix)


def local_traffic(
    mode: Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"],
    family: Family,
    *,
    cluster_cidrs: Iterable[str] = (),
    pod_cidrs: Iterable[str] = (),
    bridge: str = "",
    interface_prefix: str = "",
) -> LocalTraffic:
    """Return how local traffic of a family is recognised under a `detectLocalMode`.

    A CIDR mode without a CIDR of the family turns detection off for that family; of several pod CIDRs, the
    first of the family counts.
    """
    if mode == "BridgeInterface":
        return LocalTraffic(interface=bridge)
    if mode == "InterfaceNamePrefix":
        return LocalTraffic(interface_prefix=interface_prefix)
    candidates = cluster_cidrs if mode == "ClusterCIDR" else pod_cidrs
    return LocalTraffic(cidr=next((cidr for cidr in candidates if family_of(cidr) is family), ""))


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
