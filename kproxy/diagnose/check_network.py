"""Judge forwarding, connection tracking, reverse path filters, bridges and MTUs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from kproxy.config.conntrack_sysctls import HASH_SIZE, MAX
from kproxy.diagnose import paths
from kproxy.diagnose.facts import HostFacts
from kproxy.diagnose.finding import Finding, error, info, passed, warning
from kproxy.host.observed import Link

FULL_ENOUGH, ALMOST_FULL = 0.75, 0.9
"""Which part of the connection tracking table must be in use for a warning, and for an error."""
MAX_ENTRIES_PER_BUCKET = 8
"""If more entries share a bucket on average, lookups become slow. kproxy configures 4."""
STRICT = 1
"""The value of `rp_filter` that drops packets whose reply would leave through another interface (ip-sysctl.rst)."""
TUNNEL_OVERHEADS = {
    "vxlan": 50,
    "geneve": 50,
    "wireguard": 60,
    "ipip": 20,
    "sit": 20,
    "gre": 24,
    "gretap": 38,
    "ip6tnl": 40,
}
"""Minimum number of bytes that each kind of tunnel adds to a packet, over IPv4 if it can use both families."""
_CONTAINER_BRIDGE = re.compile(r"docker\d+|virbr\d+|br-[0-9a-f]{12}|lxcbr\d+|lxdbr\d+|podman\d+")
"""Names of bridges of programs other than Kubernetes network plugins."""
_OWN_MTU_PER_ROUTE = re.compile(r"cilium_.*")
"""Tunnel interfaces whose MTU does not limit packets: Cilium sets the MTU of its routes instead."""


def check_network(facts: HostFacts) -> Iterator[Finding]:
    """Yield the findings about sysctls, connection tracking and interfaces."""
    yield from _forwarding(facts)
    yield from _bridges(facts)
    yield from _localhost(facts)
    yield from _reverse_path(facts)
    yield from _conntrack(facts)
    yield from _mtu(facts)


def uses_ipv6(facts: HostFacts) -> bool:
    """Return whether the cluster has IPv6, as far as the configuration and the Node show."""
    node = facts.api.node
    known = (*node.addresses, *node.pod_cidrs) if node else ()
    return facts.ipv6_kernel and (facts.settings.ipv6 or any(":" in text for text in known))


def uplinks(facts: HostFacts) -> list[Link]:
    """Return the interfaces that connect this node to others: those of the default routes and of the Node's addresses.

    Tunnels do not count.
    """
    node = facts.api.node
    node_addresses = set(node.addresses) if node else set()
    return [
        link
        for link in facts.links
        if not link.loopback
        and link.kind not in TUNNEL_OVERHEADS
        and (link.name in facts.default_interfaces or node_addresses & facts.addresses.get(link.index, frozenset()))
    ]


def _forwarding(facts: HostFacts) -> Iterator[Finding]:
    ipv4, ipv6 = facts.parameters.get(paths.IP_FORWARD), facts.parameters.get(paths.IPV6_FORWARDING)
    if ipv4 == 0:
        yield error(
            "IPForwardingDisabled",
            "net.ipv4.ip_forward is 0: connections to Services do not reach pods or other nodes",
            "set net.ipv4.ip_forward=1 with sysctl -w, and in a file in /etc/sysctl.d",
        )
    elif ipv4 is not None:
        yield passed("IPForwardingEnabled", "net.ipv4.ip_forward is 1")
    if ipv6 == 0 and uses_ipv6(facts):
        yield error(
            "IPv6ForwardingDisabled",
            "net.ipv6.conf.all.forwarding is 0: IPv6 connections to Services do not reach pods or other nodes",
            "set net.ipv6.conf.all.forwarding=1 with sysctl -w, and in a file in /etc/sysctl.d",
        )
    elif ipv6 and uses_ipv6(facts):
        yield passed("IPv6ForwardingEnabled", "net.ipv6.conf.all.forwarding is 1")


def pod_bridges(links: Iterable[Link]) -> list[Link]:
    """Return the bridges that have ports, without those that belong to Docker, libvirt and the like."""
    links = tuple(links)
    masters = {link.master for link in links}
    return [
        link
        for link in links
        if link.kind == "bridge" and link.index in masters and not _CONTAINER_BRIDGE.fullmatch(link.name)
    ]


def _bridges(facts: HostFacts) -> Iterator[Finding]:
    bridges = pod_bridges(facts.links)
    if not bridges:
        return
    names = ", ".join(link.name for link in bridges)
    needed = {paths.BRIDGE_IPTABLES: "bridge-nf-call-iptables"}
    if uses_ipv6(facts):
        needed[paths.BRIDGE_IP6TABLES] = "bridge-nf-call-ip6tables"
    effect = "a pod may get no reply from a Service whose endpoint is on the same bridge"
    absent = [name for path, name in needed.items() if path not in facts.parameters]
    disabled = [name for path, name in needed.items() if facts.parameters.get(path) == 0]
    if absent:
        yield warning(
            "BridgeNetfilterNotLoaded",
            f"bridge {names}: the module br_netfilter is not loaded: {effect}",
            "run modprobe br_netfilter, and add it to a file in /etc/modules-load.d",
        )
    elif disabled:
        yield warning(
            "BridgeNetfilterDisabled",
            f"bridge {names}: {' and '.join(disabled)} of net.bridge is 0: {effect}",
            f"set {' and '.join(f'net.bridge.{name}=1' for name in disabled)} with sysctl -w, and in /etc/sysctl.d",
        )
    else:
        yield passed("BridgeNetfilterEnabled", f"bridged packets pass the rules ({names})")


def _localhost(facts: HostFacts) -> Iterator[Finding]:
    value = facts.parameters.get(paths.ROUTE_LOCALNET)
    if facts.settings.localhost_node_ports and value == 0:
        writable = paths.ROUTE_LOCALNET in facts.writable
        if writable or facts.uid or not facts.net_admin:
            yield info(
                "RouteLocalnetUnset",
                "net.ipv4.conf.all.route_localnet is 0; kproxy sets it, so that NodePorts answer on 127.0.0.1",
            )
        else:
            yield warning(
                "RouteLocalnetReadOnly",
                "net.ipv4.conf.all.route_localnet is 0 and read-only here: NodePorts do not answer on 127.0.0.1",
                "run kproxy run --init-only in a privileged init container, or set localhostNodePorts: false",
            )
    elif value and facts.settings.mode == "nftables":
        yield warning(
            "RouteLocalnetExposed",
            "net.ipv4.conf.all.route_localnet is 1: neighbors can reach ports that listen on 127.0.0.1",
            "set it to 0: nftables mode does not need it and has no rule against it (CVE-2020-8558)",
        )


def _reverse_path(facts: HostFacts) -> Iterator[Finding]:
    everywhere = facts.parameters.get(paths.reverse_path("all"))
    if everywhere is None:
        return
    checked = uplinks(facts)
    strict = [
        link.name
        for link in checked
        if max(everywhere, facts.parameters.get(paths.reverse_path(link.name), 0)) == STRICT
    ]
    if strict and len(checked) > 1:
        yield warning(
            "StrictReversePathFilter",
            f"rp_filter is 1 (strict) on {_some(strict)}: asymmetrically routed connections to Services are dropped",
            "set net.ipv4.conf.all.rp_filter=2 (loose) if replies may take another interface than requests",
        )
    elif checked:
        yield passed("ReversePathFilter", "rp_filter does not affect Services")


def _conntrack(facts: HostFacts) -> Iterator[Finding]:
    limit, entries = facts.parameters.get(paths.CONNTRACK_MAX), facts.parameters.get(paths.CONNTRACK_COUNT)
    if limit and entries is not None:
        yield _fill(entries, limit, facts.conntrack_drops)
    wanted = facts.settings.conntrack.get(MAX)
    if limit and wanted:
        yield _limit(facts, limit, wanted)
    buckets = facts.parameters.get(HASH_SIZE)
    if limit and buckets and limit > buckets * MAX_ENTRIES_PER_BUCKET and HASH_SIZE not in facts.writable:
        yield info(
            "ConntrackBucketsFew",
            f"connection tracking has {buckets} buckets for at most {limit} entries: lookups are slow when it is full",
            f"write {limit // 4} to /sys/module/nf_conntrack/parameters/hashsize",
        )


def _fill(entries: int, limit: int, drops: int) -> Finding:
    share = entries / limit
    seen = f"{entries} of {limit} connection tracking entries are in use ({share:.0%})"
    action = "raise conntrack.maxPerCore and conntrack.min, or find the client that opens so many connections"
    if share >= ALMOST_FULL:
        return error("ConntrackTableFull", f"{seen}: when the table is full, new connections are dropped", action)
    if share >= FULL_ENOUGH:
        return warning("ConntrackTableFilling", f"{seen}: when the table is full, new connections are dropped", action)
    if drops:
        return info("ConntrackDropped", f"{seen}; {drops} packets were dropped since boot for lack of entries", action)
    return passed("ConntrackTable", seen)


def _limit(facts: HostFacts, limit: int, wanted: int) -> Finding:
    if not facts.processes.own and MAX in facts.writable:
        return info("ConntrackLimitUnset", f"nf_conntrack_max is {limit}; kproxy raises it to {wanted} when it starts")
    if not facts.processes.own and facts.uid:
        return info("ConntrackLimitUnset", f"nf_conntrack_max is {limit}; the configuration asks for {wanted}")
    return warning(
        "ConntrackLimitLow",
        f"nf_conntrack_max is {limit} and was not raised to {wanted}, as the configuration asks",
        f"set net.netfilter.nf_conntrack_max={wanted}, or run kproxy run --init-only in a privileged init container",
    )


def _mtu(facts: HostFacts) -> Iterator[Finding]:
    external = uplinks(facts)
    if not external:
        return
    smallest = min(external, key=lambda link: link.mtu)
    tunnels = [
        link
        for link in facts.links
        if link.up and link.kind in TUNNEL_OVERHEADS and not _OWN_MTU_PER_ROUTE.fullmatch(link.name)
    ]
    too_large = [link for link in tunnels if link.mtu + TUNNEL_OVERHEADS[link.kind] > smallest.mtu]
    for link in too_large:
        yield error(
            "TunnelMTUTooLarge",
            f"{link.name} ({link.kind}) has MTU {link.mtu}, but packets gain {TUNNEL_OVERHEADS[link.kind]} bytes and "
            f"{smallest.name} has MTU {smallest.mtu}: large packets to pods on other nodes are lost",
            f"set the network plugin's MTU to {smallest.mtu - TUNNEL_OVERHEADS[link.kind]} or less",
        )
    limit = min([*tunnels, smallest], key=lambda link: link.mtu)
    pods = [link for link in _pod_links(facts, external) if link.mtu > limit.mtu]
    if pods:
        yield warning(
            "PodMTUTooLarge",
            f"{_some([link.name for link in pods])} of pods: MTU {max(link.mtu for link in pods)} is larger than that "
            f"of {limit.name} ({limit.mtu}): connections that block ICMP stall",
            f"set the network plugin's MTU to {limit.mtu} or less, and restart the pods",
        )
    if len({link.mtu for link in external}) > 1:
        seen = ", ".join(f"{link.name} {link.mtu}" for link in external)
        yield info("UplinkMTUsDiffer", f"interfaces to other nodes have different MTUs: {seen}")
    if not too_large and not pods:
        seen = ", ".join(f"{link.name} {link.mtu}" for link in [*external, *tunnels][:4])
        yield passed("MTUsConsistent", f"the MTUs on the way to pods fit ({seen})")


def _pod_links(facts: HostFacts, external: list[Link]) -> list[Link]:
    foreign = {link.index for link in facts.links if _CONTAINER_BRIDGE.fullmatch(link.name)}
    own = {link.index for link in external}
    return [
        link
        for link in facts.links
        if link.kind == "veth" and link.up and link.master not in foreign and link.index not in own
    ]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
