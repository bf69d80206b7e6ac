"""Decide what happens to NodePorts on loopback addresses in nftables mode (KEP-6032). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

from kproxy.config.types import Config
from kproxy.model.addresses import family_of
from kproxy.model.context import LocalhostTraffic
from kproxy.model.localhost_node_ports import LOOPBACK_NETWORKS
from kproxy.model.types import Family

GATE = "KubeProxyNFTablesLocalhostNodePorts"
"""The feature gate. It is on by default, as in Kubernetes 1.38."""
_LOCALHOST = "localhost"
_KEYWORDS = frozenset({"primary", _LOCALHOST, "all"})


def names_loopback(setting: Iterable[str], family: Family) -> bool:
    """Return whether `nodePortAddresses` explicitly names a loopback range of an IP family.

    These are `localhost` and the CIDRs within 127.0.0.0/8 or `::1/128`. Neither `all` nor a larger CIDR counts.
    """
    loopback = ip_network(LOOPBACK_NETWORKS[family])
    return any(
        text == _LOCALHOST
        or (text not in _KEYWORDS and family_of(text) is family and ip_network(text).subnet_of(loopback))  # type: ignore[arg-type]  # the same family
        for text in setting
    )


def wants_localhost_proxy(config: Config, family: Family) -> bool:
    """Return whether the daemon must serve NodePorts on the loopback address of an IP family."""
    return _is_enabled(config) and names_loopback(config.node_port_addresses, family)


def localhost_traffic(config: Config, family: Family, *, has_proxy: bool, can_hold: bool) -> LocalhostTraffic:
    """Return what the rules do with packets to NodePorts on loopback addresses.

    `has_proxy` is true if this process serves NodePorts there, provided that the configuration asks for it. `can_hold`
    is true if the kernel can match packets for which no socket exists.
    """
    if not _is_enabled(config):
        return ""
    if not (has_proxy and wants_localhost_proxy(config, family)):
        return "reject"
    return "proxy-hold" if can_hold else "proxy"


def _is_enabled(config: Config) -> bool:
    return config.effective_mode == "nftables" and config.feature_gates.get(GATE, True)
