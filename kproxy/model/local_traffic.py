"""Telling traffic of this node's pods from traffic that comes from elsewhere (`detectLocalMode`, KEP-2450)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from kproxy.model.types import Family, family_of


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
