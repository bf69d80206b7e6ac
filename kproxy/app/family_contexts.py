"""Derive the context of each IP family from the configuration and this Node. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import ip_address

from kproxy.app.localhost_node_ports import localhost_traffic
from kproxy.app.node_port_addresses import localhost_node_ports, node_port_addresses
from kproxy.config.types import Config
from kproxy.model.addresses import family_of
from kproxy.model.context import Context, local_traffic
from kproxy.model.store import Store
from kproxy.model.types import Family, Node


def is_ready(config: Config, store: Store) -> bool:
    """Return whether the first sync can run.

    All kinds of objects must have been listed. With `detectLocalMode: NodeCIDR`, the Node must also have pod CIDRs.
    """
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
    has_proxy: bool = True,
    can_hold: bool = True,
) -> Context:
    """Return the context of a family in the effective proxy mode.

    The fields `service_cidrs` and `large_cluster` keep their default values, because they depend on the store.

    `local_addresses` are the addresses of the node's interfaces. They are used only if `depends_on_interfaces` is true.
    `accounting` is true if nfacct counters are available. `random_fully` is true if the source ports of
    masqueraded packets can be randomized (`--random-fully` in iptables). As in kube-proxy, nftables mode uses no nfacct
    counters and does not drop packets that conntrack classifies as INVALID, and `nodePortAddresses` selects loopback
    addresses only if `localhost_node_ports` is true: elsewhere, the kernel drops packets from and to them. For
    `has_proxy` and `can_hold`, see `localhost_traffic`.
    """
    node = node or Node(node_name)
    node_addresses = [address for address in node.addresses if family_of(address) is family]
    is_iptables = config.effective_mode == "iptables"
    localhost = localhost_node_ports(config, family)
    candidates = (address for address in local_addresses if localhost or not ip_address(address).is_loopback)
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
        localhost_node_ports=localhost,
        drop_invalid=is_iptables and not config.conntrack.tcp_be_liberal,
        accounting=is_iptables and accounting,
        random_fully=random_fully,
        connection_counters=config.kproxy.connection_counters and not is_iptables,
        localhost_traffic=localhost_traffic(config, family, has_proxy=has_proxy, can_hold=can_hold),
    )


def assumed_context(config: Config, family: Family, node_name: str, node: Node | None) -> Context:
    """Return the context of a family without inspecting this machine.

    The kernel and iptables are assumed to support all optional features, and the node is assumed to have exactly the
    addresses of its Node object, 127.0.0.1 and ::1.
    """
    addresses = (*(node.addresses if node else ()), "127.0.0.1", "::1")
    return make_context(config, family, node_name, node, addresses, accounting=True, random_fully=True)


def local_traffic_warning(config: Config, node: Node | None, context: Context) -> str:
    """Return one line that explains why traffic from local pods cannot be detected in the context's family, or "".

    kube-proxy logs the same warning for the primary family. If the Node has no address of a family, the family is not
    in use, and no warning is returned for it. While no address of the Node is known, the family of `bindAddress` is
    assumed to be in use, as in kube-proxy.
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
    """Return a one-line warning if the node has no interface that matches `detectLocal`, or "".

    The configured name may be misspelled, or the interface may not exist until the node's first pod starts.
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
