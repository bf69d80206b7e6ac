"""From the configuration and this Node to the context of each family. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from kproxy.config import Config
from kproxy.config.types import PRIMARY
from kproxy.model.context import Context
from kproxy.model.local_traffic import local_traffic
from kproxy.model.store import Store
from kproxy.model.types import Family, Node, family_of


def is_known(config: Config, store: Store) -> bool:
    """Return whether enough is known for the first sync: all kinds listed, and what `detectLocalMode` goes by."""
    if not store.complete:
        return False
    return config.detect_local_mode != "NodeCIDR" or bool(store.node and store.node.pod_cidrs)


def make_context(
    config: Config,
    family: Family,
    node_name: str,
    node: Node | None,
    local_addresses: Iterable[str],
    *,
    accounting: bool,
    random_fully: bool,
) -> Context:
    """Return what all Services of a family share.

    `local_addresses` are the addresses of this machine's interfaces, looked at only for `nodePortAddresses` that are
    CIDRs. `accounting` says whether nfacct counters can be used, `random_fully` whether iptables has
    `--random-fully`.
    """
    node = node or Node(node_name)
    own = [address for address in node.addresses if family_of(address) is family]
    node_ports = node_port_addresses(config.node_port_addresses_in_force, family, own, local_addresses)
    return Context(
        family,
        node_name,
        zone=node.zone,
        node_address=own[0] if own else "",
        local_traffic=local_traffic(
            config.detect_local_mode,
            family,
            cluster_cidrs=config.cluster_cidrs,
            pod_cidrs=node.pod_cidrs,
            bridge=config.detect_local.bridge_interface,
            interface_prefix=config.detect_local.interface_name_prefix,
        ),
        masquerade_all=config.iptables.masquerade_all,
        masquerade_mark=1 << config.iptables.masquerade_bit,
        node_port_addresses=node_ports,
        localhost_node_ports=localhost_node_ports(config, family),
        drop_invalid=not config.conntrack.tcp_be_liberal,
        accounting=accounting,
        random_fully=random_fully,
    )


def localhost_node_ports(config: Config, family: Family) -> bool:
    """Return whether NodePorts answer on 127.0.0.1: iptables and IPv4 only, and if `nodePortAddresses` holds it."""
    if family is Family.IPV6 or not config.iptables.localhost_node_ports:
        return False
    allowed = [cidr for cidr in config.node_port_addresses if cidr != PRIMARY and family_of(cidr) is family]
    loopback = ip_network("127.0.0.0/8")
    return not config.node_port_addresses or any(ip_network(cidr).overlaps(loopback) for cidr in allowed)


def node_port_addresses(
    wanted: Iterable[str], family: Family, own: list[str], local_addresses: Iterable[str]
) -> tuple[str, ...] | None:
    """Return the addresses of a family that NodePorts answer on, None for all local ones.

    `wanted` is the setting `nodePortAddresses`: nothing means all, `primary` the Node's first address, and CIDRs the
    interface addresses within them. A family without a CIDR of its own is not restricted (as in kube-proxy), and
    a CIDR that holds every address restricts nothing either.
    """
    wanted = tuple(wanted)
    if wanted == (PRIMARY,):
        return tuple(own[:1])
    networks = [ip_network(cidr) for cidr in wanted if family_of(cidr) is family]
    if not networks or any(network.prefixlen == 0 for network in networks):
        return None
    local = dict.fromkeys(address for address in local_addresses if family_of(address) is family)
    return tuple(address for address in local if any(ip_address(address) in network for network in networks))
