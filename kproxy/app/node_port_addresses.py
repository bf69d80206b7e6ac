"""Select the addresses that accept NodePort connections, as specified by `nodePortAddresses`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from kproxy.config.types import NODE_PORT_KEYWORDS, PRIMARY, Config
from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.types import Family, Node

LOOPBACK = {Family.IPV4: ip_network("127.0.0.0/8"), Family.IPV6: ip_network("::1/128")}
"""The loopback addresses of each IP family."""


def node_port_addresses(
    setting: Iterable[str], family: Family, node_addresses: list[str], local_addresses: Iterable[str]
) -> tuple[str, ...] | None:
    """Return the addresses of a family that accept NodePort connections, or None for all local addresses.

    `setting` is `nodePortAddresses`. `primary` selects the first of `node_addresses`, and CIDRs, including those that
    keywords stand for, select from `local_addresses`. As in kube-proxy, a family is not restricted if the setting has
    no entry for it or selects all its addresses (a `/0` CIDR), and `primary` is ignored on a Node whose own address is
    a loopback address.
    """
    setting = tuple(setting)
    networks = _networks(setting, family)
    primary = node_addresses[:1] if PRIMARY in setting else []
    restricted = bool(networks) or PRIMARY in setting
    if any(ip_address(address).is_loopback for address in primary):
        primary, restricted = [], bool(networks)
    if not restricted or _include_all(networks):
        return None
    local = (address for address in local_addresses if family_of(address) is family)
    selected = (address for address in local if any(ip_address(address) in network for network in networks))
    return tuple(dict.fromkeys([*primary, *selected]))


def localhost_node_ports(config: Config, family: Family) -> bool:
    """Return whether NodePorts are reachable on 127.0.0.1.

    This requires iptables mode, the IPv4 family, and `localhostNodePorts: true`. In addition, `nodePortAddresses` must
    not restrict the family, or select addresses in 127.0.0.0/8.
    """
    if family is Family.IPV6 or config.effective_mode != "iptables" or not config.iptables.localhost_node_ports:
        return False
    networks = _networks(config.node_port_addresses, family)
    unrestricted = not networks and PRIMARY not in config.node_port_addresses
    return unrestricted or any(network.overlaps(LOOPBACK[family]) for network in networks)


def depends_on_interfaces(config: Config) -> bool:
    """Return whether the addresses of the node's interfaces decide which addresses accept NodePort connections."""
    return any(_selects_from_interfaces(config, family) for family in Family)


def node_port_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that explains why no address of the context's family accepts NodePort connections, or "".

    If `nodePortAddresses` has only keywords for the family, no warning is returned for a Node that has only addresses
    of the other family, because single-stack clusters are normal.
    """
    if context.node_port_addresses != () or context.localhost_traffic.startswith("proxy"):
        return ""
    family = context.family
    setting = config.effective_node_port_addresses
    if PRIMARY in setting and (node is None or not node.addresses):
        return f"{family.value}: NodePorts are unreachable until the addresses of Node {context.node_name} are known"
    entries = [text for text in setting if text != PRIMARY and _networks([text], family)]
    in_use = node is None or not node.addresses or any(family_of(address) is family for address in node.addresses)
    if PRIMARY in setting or (not in_use and all(text in NODE_PORT_KEYWORDS for text in entries)):
        return ""
    remark = _loopback_remark(config, family)
    shown = ", ".join(entries)
    return f"{family.value}: NodePorts are unreachable: no local address is in nodePortAddresses ({shown}){remark}"


def _networks(setting: Iterable[str], family: Family) -> list[IPv4Network | IPv6Network]:
    """Return the CIDRs of a family, including those that keywords stand for."""
    return [ip_network(text) for text in _cidrs(setting) if family_of(text) is family]


def _cidrs(setting: Iterable[str]) -> Iterator[str]:
    for text in setting:
        yield from NODE_PORT_KEYWORDS.get(text, (text,))


def _include_all(networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(network.prefixlen == 0 for network in networks)


def _selects_from_interfaces(config: Config, family: Family) -> bool:
    networks = _networks(config.effective_node_port_addresses, family)
    if _include_all(networks):
        return False
    # Addresses inside the loopback range are irrelevant if it has no NodePorts.
    only_loopback = all(_is_inside(network, LOOPBACK[family]) for network in networks)
    return bool(networks) and (not only_loopback or localhost_node_ports(config, family))


def _is_inside(network: IPv4Network | IPv6Network, other: IPv4Network | IPv6Network) -> bool:
    return network.overlaps(other) and network.prefixlen >= other.prefixlen


def _loopback_remark(config: Config, family: Family) -> str:
    """Return the end of a warning that says why loopback addresses do not count, or "" if none are selected."""
    networks = _networks(config.effective_node_port_addresses, family)
    if localhost_node_ports(config, family) or not any(network.overlaps(LOOPBACK[family]) for network in networks):
        return ""
    if config.effective_mode != "iptables":
        return "; nftables mode has no NodePorts on loopback addresses"
    if family is Family.IPV6:
        return "; iptables mode has no NodePorts on ::1"
    return "; iptables.localhostNodePorts is false"
