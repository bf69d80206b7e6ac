"""Read the connection counters of the proxy mode that programs this node."""

from __future__ import annotations

from typing import Literal

from kproxy.app.backends import IPV6_ADDRESSES
from kproxy.host.process import has_net_admin
from kproxy.iptables import connection_counts as iptables
from kproxy.model.connection_counts import ConnectionCounts, Counts, CountsUnavailableError
from kproxy.model.types import Family
from kproxy.nftables import connection_counts as nftables


def read_counts(*, endpoints: bool) -> tuple[Literal["iptables", "nftables"], Counts]:
    """Return the mode whose rules exist in this network namespace, and the counters of each IP family.

    Without `endpoints`, nftables mode reads only the counters of the frontends. Raises `CountsUnavailableError`.
    """
    if not has_net_admin():
        raise CountsUnavailableError(
            "only root may read the counters: run this command as root (capability CAP_NET_ADMIN in this network "
            "namespace)"
        )
    families = _families()
    if found := _existing({each: nftables.read_connection_counts(each, endpoints=endpoints) for each in families}):
        return "nftables", found
    if found := _existing({each: iptables.read_connection_counts(each) for each in families}):
        return "iptables", found
    raise CountsUnavailableError(
        "this network namespace has no rules of kproxy; run this command on the node, or in the kproxy pod: "
        "kubectl -n kube-system exec ds/kproxy -- kproxy top"
    )


def _families() -> list[Family]:
    return list(Family) if IPV6_ADDRESSES.exists() else [Family.IPV4]


def _existing(counts: dict[Family, ConnectionCounts | None]) -> Counts:
    return {family: each for family, each in counts.items() if each is not None}
