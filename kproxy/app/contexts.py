"""From the configuration and this Node to the context of each family. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from kproxy.config import Config
from kproxy.config.types import PRIMARY
from kproxy.model.addresses import family_of
from kproxy.model.context import Context, local_traffic
from kproxy.model.store import Store
from kproxy.model.types import Family, Node


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
    """Return what all Services of a family share in the mode in force, but for what only the store knows.

    `local_addresses` are the addresses of this machine's interfaces, looked at only for `nodePortAddresses` that are
    CIDRs. `accounting` says whether nfacct counters can be used, `random_fully` whether iptables has
    `--random-fully`. As in kube-proxy, nftables mode neither counts through nfacct nor drops packets that conntrack
    calls INVALID, and has no NodePorts on loopback addresses.
    """
    node = node or Node(node_name)
    own = [address for address in node.addresses if family_of(address) is family]
    is_iptables = config.effective_mode == "iptables"
    candidates = (address for address in local_addresses if is_iptables or not ip_address(address).is_loopback)
    node_ports = node_port_addresses(config.effective_node_port_addresses, family, own, candidates)
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
        masquerade_all=config.backend.masquerade_all,
        masquerade_mark=1 << config.backend.masquerade_bit,
        node_port_addresses=node_ports,
        localhost_node_ports=localhost_node_ports(config, family),
        drop_invalid=is_iptables and not config.conntrack.tcp_be_liberal,
        accounting=is_iptables and accounting,
        random_fully=random_fully,
    )


def localhost_node_ports(config: Config, family: Family) -> bool:
    """Return whether NodePorts answer on 127.0.0.1: iptables and IPv4 only, and if `nodePortAddresses` holds it."""
    if family is Family.IPV6 or config.effective_mode != "iptables" or not config.iptables.localhost_node_ports:
        return False
    return not config.node_port_addresses or _holds_loopback(_cidrs(config.node_port_addresses, family))


def node_port_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that says why NodePorts of a context's family answer nowhere, or "" if they do.

    A Node that has addresses of the other family only is no reason to say anything: such clusters are ordinary.
    """
    if context.node_port_addresses != ():
        return ""
    family = context.family.value
    if config.effective_node_port_addresses == (PRIMARY,):
        known = node is not None and bool(node.addresses)
        where = f"the addresses of Node {context.node_name}"
        return "" if known else f"{family}: NodePorts answer nowhere until {where} are known"
    networks = _cidrs(config.node_port_addresses, context.family)
    off_loopback = config.effective_mode != "iptables" and _holds_loopback(networks)
    remark = "; there are none on loopback addresses in mode nftables" if off_loopback else ""
    shown = ", ".join(map(str, networks))
    return f"{family}: NodePorts answer nowhere: this machine has no address in nodePortAddresses ({shown}){remark}"


def local_traffic_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that says why traffic of local pods cannot be told apart in a context's family, or "" if it can.

    That is what kube-proxy says of the primary family. A family that the Node has no address of is not in use, and no
    reason to say anything; while the Node has no known address, the family of `bindAddress` is taken for the one in
    use, as in kube-proxy.
    """
    if context.local_traffic.detectable or context.family not in _families_in_use(config, node):
        return ""
    if config.detect_local_mode == "NodeCIDR":
        lacking = f"Node {context.node_name} has no {context.family.value} pod CIDR"
    else:
        lacking = f"no {context.family.value} clusterCIDR is set"
    lost = "" if context.masquerade_all else ", and off-cluster traffic to cluster IPs is not masqueraded"
    return (
        f"{context.family.value}: detectLocalMode is {config.detect_local_mode}, but {lacking}: "
        f"local pod traffic is not detected{lost}"
    )


def interface_warning(config: Config, interfaces: Collection[str]) -> str:
    """Return one line about interfaces of local pods that are not among those of this machine, or "" if they are.

    Either may be a typing error, or come with the node's first pod.
    """
    bridge, prefix = config.detect_local.bridge_interface, config.detect_local.interface_name_prefix
    if config.detect_local_mode == "BridgeInterface" and bridge not in interfaces:
        lacking = f"interface {bridge}"
    elif config.detect_local_mode == "InterfaceNamePrefix" and not any(name.startswith(prefix) for name in interfaces):
        lacking = f"interface whose name begins with {prefix}"
    else:
        return ""
    mode = config.detect_local_mode
    return f"detectLocalMode {mode}: no traffic counts as local pod traffic, since there is no {lacking}"


def _families_in_use(config: Config, node: Node | None) -> set[Family]:
    addresses = node.addresses if node else ()
    return {family_of(address) for address in addresses or (config.bind_address,)}


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
    networks = _cidrs(wanted, family)
    if not networks or any(network.prefixlen == 0 for network in networks):
        return None
    local = dict.fromkeys(address for address in local_addresses if family_of(address) is family)
    return tuple(address for address in local if any(ip_address(address) in network for network in networks))


def _cidrs(wanted: Iterable[str], family: Family) -> list[IPv4Network | IPv6Network]:
    return [ip_network(text) for text in wanted if text != PRIMARY and family_of(text) is family]


def _holds_loopback(networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(network.overlaps(ip_network("::1" if network.version == 6 else "127.0.0.0/8")) for network in networks)
