"""Select the addresses that accept NodePort connections, as specified by `nodePortAddresses`. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from kproxy.config.types import PRIMARY, Config
from kproxy.model.addresses import family_of
from kproxy.model.context import Context
from kproxy.model.types import Family, Node


def node_port_addresses(
    setting: Iterable[str], family: Family, node_addresses: list[str], local_addresses: Iterable[str]
) -> tuple[str, ...] | None:
    """Return the addresses of a family that accept NodePort connections, or None for all local addresses.

    `setting` is `nodePortAddresses`. An empty setting selects all local addresses. `primary` selects the first of
    `node_addresses`, and CIDRs select from `local_addresses`. As in kube-proxy, CIDRs of one family do not restrict the
    other family, and a `/0` CIDR selects all local addresses of its family.
    """
    setting = tuple(setting)
    if setting == (PRIMARY,):
        return tuple(node_addresses[:1])
    networks = _cidrs(setting, family)
    if not networks or any(network.prefixlen == 0 for network in networks):
        return None
    local = dict.fromkeys(address for address in local_addresses if family_of(address) is family)
    return tuple(address for address in local if any(ip_address(address) in network for network in networks))


def localhost_node_ports(config: Config, family: Family) -> bool:
    """Return whether NodePorts are reachable on 127.0.0.1.

    This requires iptables mode, the IPv4 family, and `localhostNodePorts: true`. In addition, `nodePortAddresses` must
    be empty or contain a CIDR that overlaps 127.0.0.0/8.
    """
    if family is Family.IPV6 or config.effective_mode != "iptables" or not config.iptables.localhost_node_ports:
        return False
    return not config.node_port_addresses or _include_loopback(_cidrs(config.node_port_addresses, family))


def node_port_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that explains why no address of the context's family accepts NodePort connections, or "".

    With `nodePortAddresses: [primary]`, no warning is returned for a Node that has only addresses of the other family,
    because single-stack clusters are normal.
    """
    if context.node_port_addresses != () or context.localhost_traffic.startswith("proxy"):
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


def _cidrs(setting: Iterable[str], family: Family) -> list[IPv4Network | IPv6Network]:
    return [ip_network(text) for text in setting if text != PRIMARY and family_of(text) is family]


def _include_loopback(networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(network.overlaps(ip_network("::1" if network.version == 6 else "127.0.0.0/8")) for network in networks)
