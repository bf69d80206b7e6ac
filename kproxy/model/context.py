"""The context that all Services of one IP family share, and how to recognize local pod traffic (KEP-2450). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from msgspec import Struct

from kproxy.model.addresses import family_of
from kproxy.model.types import Family

LocalhostTraffic: TypeAlias = Literal["", "reject", "proxy", "proxy-hold"]
"""What nftables mode does with packets to NodePorts on loopback addresses.

- "": nothing. They reach whatever listens there.
- `reject`: they are rejected.
- `proxy`: kproxy serves TCP (see `kproxy.model.localhost_node_ports`). Packets of other protocols are rejected.
- `proxy-hold`: like `proxy`. In addition, a connection that arrives while kproxy does not listen waits for it, because
  the kernel drops the first packet and the client sends it again.
"""


class LocalTraffic(Struct, frozen=True):
    """How to recognize packets from pods on this node: by source CIDR, input interface or interface name prefix.

    At most one field is set. If no field is set, packets from local pods cannot be recognized.
    """

    cidr: str = ""
    interface: str = ""
    interface_prefix: str = ""

    @property
    def detectable(self) -> bool:
        """Whether packets from local pods can be recognized."""
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
    """Return how to recognize packets from local pods in one IP family, given a `detectLocalMode`.

    ClusterCIDR uses the first CIDR of the family in `cluster_cidrs`, and NodeCIDR the first one in `pod_cidrs`. If
    there is none, packets from local pods cannot be recognized in this family.
    """
    if mode == "BridgeInterface":
        return LocalTraffic(interface=bridge)
    if mode == "InterfaceNamePrefix":
        return LocalTraffic(interface_prefix=interface_prefix)
    candidates = cluster_cidrs if mode == "ClusterCIDR" else pod_cidrs
    return LocalTraffic(cidr=next((cidr for cidr in candidates if family_of(cidr) is family), ""))


class Context(Struct, frozen=True):
    """Everything that the rules of one IP family depend on, except Services and EndpointSlices.

    If any field changes, all Services are rendered again.

    `node_address` is this node's primary address of the family, or "" while the address is unknown.
    `node_port_addresses` are the addresses that accept NodePort connections; None means all local addresses.
    `masquerade_mark` is the packet mark, not the number of its bit: 0x4000 for bit 14. If `drop_invalid` is true,
    packets in conntrack state INVALID are dropped. If `accounting` is true, rules count packets with nfacct objects;
    these objects must exist before a rule can refer to them. If `random_fully` is true, the source ports of masqueraded
    packets are randomized. If `large_cluster` is true, per-endpoint rules have no comments.

    `service_cidrs` are the ranges from which ClusterIPs are allocated; an empty tuple means that they are unknown.
    nftables mode drops packets to an address in these ranges if no Service has that address.

    `localhost_traffic` is what nftables mode does with packets to NodePorts on loopback addresses.

    If `connection_counters` is true, the elements of nftables maps count the connections to each frontend and endpoint.
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
    connection_counters: bool = False
    localhost_traffic: LocalhostTraffic = ""
