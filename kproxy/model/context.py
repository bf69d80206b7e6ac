"""The context that all Services of a family share, and the detection of local traffic (KEP-2450). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from kproxy.model.addresses import family_of
from kproxy.model.types import Family


class LocalTraffic(Struct, frozen=True):
    """How to recognize packets from pods on this node: by source CIDR, input interface or interface name prefix.

    At most one field is set. If none is, local traffic cannot be detected.
    """

    cidr: str = ""
    interface: str = ""
    interface_prefix: str = ""

    @property
    def detectable(self) -> bool:
        """Whether local traffic can be detected."""
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
    """Return how to detect a family's local traffic for a `detectLocalMode`.

    The CIDR modes use the first CIDR of the family. Without one, local traffic of the family cannot be detected.
    """
    if mode == "BridgeInterface":
        return LocalTraffic(interface=bridge)
    if mode == "InterfaceNamePrefix":
        return LocalTraffic(interface_prefix=interface_prefix)
    candidates = cluster_cidrs if mode == "ClusterCIDR" else pod_cidrs
    return LocalTraffic(cidr=next((cidr for cidr in candidates if family_of(cidr) is family), ""))


class Context(Struct, frozen=True):
    """Everything besides Services that the rules of a family depend on. If it changes, all Services are rendered again.

    `node_address` is this node's primary address of the family, "" while it is unknown. `node_port_addresses` are the
    addresses that accept NodePort connections, None for all local addresses. `masquerade_mark` is the mark itself, such
    as 0x4000 for bit 14. `drop_invalid` drops packets in conntrack state INVALID. `accounting` counts packets with
    nfacct objects, which must exist before a rule can refer to them. `random_fully` randomizes the source ports of
    masqueraded packets. `large_cluster` omits the comments of per-endpoint rules. `service_cidrs` are the ranges from
    which ClusterIPs are allocated, empty while unknown; nftables mode drops packets to addresses in these ranges that
    belong to no Service.
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
