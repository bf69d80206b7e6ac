"""The kernel parameters that `kproxy doctor` reads, as paths relative to `/`. Pure."""

from __future__ import annotations

from kproxy.config.conntrack_sysctls import HASH_SIZE, MAX

IP_FORWARD = "proc/sys/net/ipv4/ip_forward"
IPV6_FORWARDING = "proc/sys/net/ipv6/conf/all/forwarding"
BRIDGE_IPTABLES = "proc/sys/net/bridge/bridge-nf-call-iptables"
BRIDGE_IP6TABLES = "proc/sys/net/bridge/bridge-nf-call-ip6tables"
ROUTE_LOCALNET = "proc/sys/net/ipv4/conf/all/route_localnet"
CONNTRACK_MAX = MAX
CONNTRACK_BUCKETS = HASH_SIZE
CONNTRACK_COUNT = "proc/sys/net/netfilter/nf_conntrack_count"
SYSCTLS = (IP_FORWARD, IPV6_FORWARDING, BRIDGE_IPTABLES, BRIDGE_IP6TABLES, ROUTE_LOCALNET, CONNTRACK_COUNT)


def reverse_path(interface: str) -> str:
    """Return the path of the sysctl `rp_filter` of an interface, or of all interfaces for `all`."""
    return f"proc/sys/net/ipv4/conf/{interface}/rp_filter"
