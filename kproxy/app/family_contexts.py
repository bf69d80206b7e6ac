"""Derive the context of each IP family from the configuration and this Node. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from kproxy.config import Config
from kproxy.config.types import PRIMARY
from kproxy.model.addresses import family_of
from kproxy.model.context import Context, local_traffic
from kproxy.model.store import Store
from kproxy.model.types import Family, Node


def is_ready(config: Config, store: Store) -> bool:
    """Return whether the first sync can run: every kind is listed, and `detectLocalMode` has what it needs."""
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
    """Return the context of a family in the effective proxy mode, except for what only the store knows.

    `local_addresses` are the addresses of the node's interfaces; they matter only if `nodePortAddresses` has CIDRs.
    `accounting` says whether nfacct counters are available, `random_fully` whether iptables supports
    `--random-fully`. As in kube-proxy, nftables mode uses no nfacct counters, does not drop packets that conntrack
    classifies as INVALID, and has no NodePorts on loopback addresses.
    """
    node = node or Node(node_name)
    node_addresses = [address for address in node.addresses if family_of(address) is family]
    is_iptables = config.effective_mode == "iptables"
    candidates = (address for address in local_addresses if is_iptables or not ip_address(address).is_loopback)
    node_ports = node_port_addresses(config.effective_node_port_addresses, family, node_addresses, candidates)
    return Context(
        family,
        node_name,
        zone=node.zone,
        node_address=node_addresses[0] if node_addresses else "",
        local_traffic=local_traffic(
            config.detect_local_mode,
            family,
            cluster_cidrs=config.cluster_cidrs,
            pod_cidrs=node.pod_cidrs,
            bridge=config.detect_local.bridge_interface,
            interface_prefix=config.detect_local.interface_name_prefix,
        ),
        masquerade_all=config.backend.masquerade_all,
        masquerade_mark=1 << config.backend.masquerade_bit,
        node_port_addresses=node_ports,
        localhost_node_ports=localhost_node_ports(config, family),
        drop_invalid=is_iptables and not config.conntrack.tcp_be_liberal,
        accounting=is_iptables and accounting,
        random_fully=random_fully,
    )


def localhost_node_ports(config: Config, family: Family) -> bool:
    """Return whether NodePorts answer on 127.0.0.1: in iptables mode, IPv4, if `nodePortAddresses` includes it."""
    if family is Family.IPV6 or config.effective_mode != "iptables" or not config.iptables.localhost_node_ports:
        return False
    return not config.node_port_addresses or _include_loopback(_cidrs(config.node_port_addresses, family))


def node_port_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that says why no address of the context's family answers to NodePorts, or "".

    A Node with addresses of only the other family is not reported: single-stack clusters are normal.
    """
    if context.node_port_addresses != ():
        return ""
    family = context.family.value
    if config.effective_node_port_addresses == (PRIMARY,):
        known = node is not None and bool(node.addresses)
        where = f"Node {context.node_name}"
        return "" if known else f"{family}: NodePorts are unreachable until the addresses of {where} are known"
    networks = _cidrs(config.node_port_addresses, context.family)
    off_loopback = config.effective_mode != "iptables" and _include_loopback(networks)
    remark = "; nftables mode has no NodePorts on loopback addresses" if off_loopback else ""
    shown = ", ".join(map(str, networks))
    return f"{family}: NodePorts are unreachable: no local address is in nodePortAddresses ({shown}){remark}"


def local_traffic_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that says why traffic of local pods cannot be detected in the context's family, or "".

    kube-proxy logs the same for the primary family. Families without a Node address are not in use and not reported;
    while no Node address is known, the family of `bindAddress` counts as the one in use, as in kube-proxy.
    """
    if context.local_traffic.detectable or context.family not in _families_in_use(config, node):
        return ""
    if config.detect_local_mode == "NodeCIDR":
        missing = f"Node {context.node_name} has no {context.family.value} pod CIDR"
    else:
        missing = f"no {context.family.value} clusterCIDR is set"
    effect = "" if context.masquerade_all else ", and off-cluster traffic to ClusterIPs is not masqueraded"
    return (
        f"{context.family.value}: detectLocalMode is {config.detect_local_mode}, but {missing}: "
        f"local pod traffic is not detected{effect}"
    )


def interface_warning(config: Config, interfaces: Collection[str]) -> str:
    """Return one line if the node has no interface that `detectLocal` names, or "".

    The name may be misspelt, or the interface may only appear with the node's first pod.
    """
    bridge, prefix = config.detect_local.bridge_interface, config.detect_local.interface_name_prefix
    if config.detect_local_mode == "BridgeInterface" and bridge not in interfaces:
        missing = f"interface {bridge}"
    elif config.detect_local_mode == "InterfaceNamePrefix" and not any(name.startswith(prefix) for name in interfaces):
        missing = f"interface with the name prefix {prefix}"
    else:
        return ""
    mode = config.detect_local_mode
    return f"detectLocalMode {mode}: local pod traffic is not detected: the node has no {missing}"


def _families_in_use(config: Config, node: Node | None) -> set[Family]:
    addresses = node.addresses if node else ()
    return {family_of(address) for address in addresses or (config.bind_address,)}


def node_port_addresses(
    setting: Iterable[str], family: Family, node_addresses: list[str], local_addresses: Iterable[str]
) -> tuple[str, ...] | None:
    """Return the addresses of a family that NodePorts answer on, or None for every local address.

    `setting` is `nodePortAddresses`: empty means all, `primary` the first of `node_addresses`, and CIDRs select
    from `local_addresses`. As in kube-proxy, CIDRs of one family do not restrict the other; a `/0` CIDR restricts
    nothing.
    """
    setting = tuple(setting)
    if setting == (PRIMARY,):
        return tuple(node_addresses[:1])
    networks = _cidrs(setting, family)
    if not networks or any(network.prefixlen == 0 for network in networks):
        return None
    local = dict.fromkeys(address for address in local_addresses if family_of(address) is family)
    return tuple(address for address in local if any(ip_address(address) in network for network in networks))


def _cidrs(setting: Iterable[str], family: Family) -> list[IPv4Network | IPv6Network]:
    return [ip_network(text) for text in setting if text != PRIMARY and family_of(text) is family]


def _include_loopback(networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(network.overlaps(ip_network("::1" if network.version == 6 else "127.0.0.0/8")) for network in networks)
