"""The part of the table that does not depend on Services: its sets, maps and base chains. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from kproxy.model.context import Context
from kproxy.model.localhost_node_ports import LISTEN_ADDRESSES, LOOPBACK_NETWORKS
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.elements import PROTOCOLS
from kproxy.nftables.ruleset import (
    Count,
    CtStateNew,
    CtStatusDnat,
    Drop,
    FibLocal,
    Jump,
    KeyField,
    Lookup,
    MapValue,
    Masquerade,
    MatchDaddr,
    MatchIifname,
    MatchL4Proto,
    MatchMark,
    MatchSaddr,
    MatchSocket,
    MatchSyn,
    NftChain,
    NftHook,
    NftRule,
    NftSet,
    Reject,
    Return,
    SetMark,
    Statement,
    VerdictMap,
    XorMark,
    rule,
)

TABLE_COMMENT = "rules for kube-proxy"
SERVICE_KEY = (KeyField.DESTINATION, KeyField.PROTOCOL, KeyField.PORT)
"""Key of a frontend with an address: ClusterIP, external IP or load balancer IP."""
NODE_PORT_KEY = (KeyField.PROTOCOL, KeyField.PORT)
"""Key of a NodePort frontend."""
_CONNECTION_KEY = (KeyField.SOURCE, KeyField.DESTINATION, KeyField.PROTOCOL, KeyField.PORT)
_SERVICE_ENDPOINT_KEY = (*SERVICE_KEY, KeyField.NUMGEN)
_NODE_PORT_ENDPOINT_KEY = (*NODE_PORT_KEY, KeyField.NUMGEN)
# The comment of an existing set cannot be changed. Sets that an earlier version of kproxy created keep their comments.
SETS = (
    NftSet(names.CLUSTER_IPS, (KeyField.DESTINATION,), comment="ClusterIPs in use"),
    NftSet(names.NODE_PORT_IPS, (KeyField.DESTINATION,), comment="addresses on which NodePorts accept traffic"),
    NftSet(names.HAIRPINS, _CONNECTION_KEY, comment="local endpoints that connect to themselves"),
    NftSet(names.FIREWALL_IPS, SERVICE_KEY, MapValue.VERDICT, "frontends that only some sources may use"),
    NftSet(names.NO_ENDPOINT_SERVICES, SERVICE_KEY, MapValue.VERDICT, "frontends without endpoints"),
    NftSet(names.NO_ENDPOINT_NODE_PORTS, NODE_PORT_KEY, MapValue.VERDICT, "NodePorts without endpoints"),
    NftSet(names.SERVICE_IPS, SERVICE_KEY, MapValue.VERDICT, "ClusterIPs, external IPs and load balancer IPs"),
    NftSet(names.SERVICE_NODE_PORTS, NODE_PORT_KEY, MapValue.VERDICT, "NodePorts"),
    NftSet(names.LOCALHOST_NODE_PORTS, NODE_PORT_KEY, MapValue.VERDICT, "NodePorts on loopback addresses"),
    NftSet(names.SERVICE_ENDPOINTS, _SERVICE_ENDPOINT_KEY, MapValue.ENDPOINT, "endpoints of a frontend, numbered"),
    NftSet(names.SERVICE_LOCAL_ENDPOINTS, _SERVICE_ENDPOINT_KEY, MapValue.ENDPOINT, "local endpoints, numbered"),
    NftSet(names.NODE_PORT_ENDPOINTS, _NODE_PORT_ENDPOINT_KEY, MapValue.ENDPOINT, "endpoints of a NodePort, numbered"),
    NftSet(names.NODE_PORT_LOCAL_ENDPOINTS, _NODE_PORT_ENDPOINT_KEY, MapValue.ENDPOINT, "local endpoints, numbered"),
)
"""The sets and maps that every table has, without counters."""
COUNTED_MAPS = frozenset(
    {
        names.SERVICE_IPS,
        names.SERVICE_NODE_PORTS,
        names.SERVICE_ENDPOINTS,
        names.SERVICE_LOCAL_ENDPOINTS,
        names.NODE_PORT_ENDPOINTS,
        names.NODE_PORT_LOCAL_ENDPOINTS,
    }
)
"""The maps whose elements count connections if `Context.connection_counters` is set.

Only nat chains look up these maps, and the kernel runs nat chains only for the first packet of each connection.
"""
_SETS_WITH_COUNTERS = tuple(replace(each, counters=each.name in COUNTED_MAPS) for each in SETS)
_PRE_DNAT_PRIORITY = -110
_DNAT_PRIORITY = -100  # nft: dstnat
_FILTER_PRIORITY = 0  # nft: filter
_SNAT_PRIORITY = 100  # nft: srcnat


def base_sets(context: Context) -> tuple[NftSet, ...]:
    """Return the sets and maps that the table must have: `SETS`, with counters if the context asks for them."""
    return _SETS_WITH_COUNTERS if context.connection_counters else SETS


def local_traffic_match(context: Context, *, negate: bool) -> Statement | None:
    """Return the statement that matches traffic from local pods, as `detectLocalMode` defines them.

    With `negate`, the statement matches all other traffic. Return None if traffic from local pods cannot be detected.
    """
    local = context.local_traffic
    if local.cidr:
        return MatchSaddr(local.cidr, negate)
    if local.interface or local.interface_prefix:
        return MatchIifname(local.interface or local.interface_prefix, bool(local.interface_prefix), negate)
    return None


def base_chains(context: Context) -> tuple[NftChain, ...]:
    """Return the base chains, the chains that they jump to, and the chain `names.REJECT`, which verdict maps use.

    Each chain comes after the chains that it jumps to.

    Source ranges are checked before DNAT, while the packet still has the frontend's address. Packets to frontends
    without endpoints are rejected or dropped after the DNAT chains have run. DNAT does not change these packets, so
    they still have the frontend's address. kube-proxy uses the same hooks and priorities.
    """
    return (
        NftChain("firewall-check", (rule(VerdictMap(SERVICE_KEY, names.FIREWALL_IPS)),)),
        NftChain("service-endpoints-check", (rule(VerdictMap(SERVICE_KEY, names.NO_ENDPOINT_SERVICES)),)),
        NftChain("nodeport-endpoints-check", _node_port_rules(context, names.NO_ENDPOINT_NODE_PORTS)),
        *_localhost_chains(context),
        NftChain("cluster-ips-check", tuple(_cluster_ips_check(context))),
        NftChain("services", tuple(_services(context))),
        NftChain("masquerading", _masquerading(context)),
        NftChain(names.REJECT, (rule(Reject()),), "for frontends without any endpoint"),
        _base_chain("filter-prerouting-pre-dnat", "filter", "prerouting", _PRE_DNAT_PRIORITY, "firewall-check"),
        _base_chain("filter-output-pre-dnat", "filter", "output", _PRE_DNAT_PRIORITY, "firewall-check"),
        _base_chain("filter-input", "filter", "input", _FILTER_PRIORITY, *_input_checks(context)),
        _base_chain(
            "filter-forward", "filter", "forward", _FILTER_PRIORITY, "service-endpoints-check", "cluster-ips-check"
        ),
        _base_chain(
            "filter-output", "filter", "output", _FILTER_PRIORITY, "service-endpoints-check", "cluster-ips-check"
        ),
        _base_chain("nat-prerouting", "nat", "prerouting", _DNAT_PRIORITY, "services"),
        _base_chain("nat-output", "nat", "output", _DNAT_PRIORITY, "services"),
        _base_chain("nat-postrouting", "nat", "postrouting", _SNAT_PRIORITY, "masquerading"),
    )


def _input_checks(context: Context) -> tuple[str, ...]:
    checks = ("nodeport-endpoints-check", "service-endpoints-check")
    return (names.LOCALHOST_CHECK, *checks) if context.localhost_traffic else checks


def _localhost_chains(context: Context) -> Iterator[NftChain]:
    """Yield the chains for NodePorts on loopback addresses. The node's own packets to them traverse the input hook.

    One counter for each protocol counts the rejected packets, under kube-proxy's names.

    If kproxy serves NodePorts there, packets from other hosts and from pods must not reach its sockets, even if
    `route_localnet` is 1 (CVE-2020-8558). In addition, if the kernel can match sockets, a packet that opens a
    connection is dropped while there is no socket for it. The client sends the packet again, so the connection waits
    until kproxy listens. The rules look for any socket: it may also be a connection in state TIME_WAIT, which the
    kernel replaces, or the socket of another program.
    """
    if not context.localhost_traffic:
        return
    to_loopback = MatchDaddr(LOOPBACK_NETWORKS[context.family].removesuffix("/128"))
    if context.localhost_traffic != "reject":
        rules = [rule(MatchIifname("lo", negate=True), Drop())]
        if context.localhost_traffic == "proxy-hold":
            address = MatchDaddr(LISTEN_ADDRESSES[context.family])
            rules += [
                rule(MatchSyn(negate=True), Return()),
                rule(MatchSocket(transparent=False), Return()),
                rule(MatchSocket(transparent=True), Return()),
                rule(address, Drop(), comment="wait until kproxy listens"),
            ]
        yield NftChain(names.LOCALHOST_PROXY, tuple(rules), "NodePorts that kproxy serves itself")
    count = (rule(MatchL4Proto(protocol), Count(names.rejected_counter(protocol))) for protocol in PROTOCOLS)
    yield NftChain(names.LOCALHOST_REJECT, (*count, rule(Reject())), "NodePorts are not available here")
    yield NftChain(names.LOCALHOST_CHECK, (rule(to_loopback, VerdictMap(NODE_PORT_KEY, names.LOCALHOST_NODE_PORTS)),))


def _base_chain(name: str, chain_type: str, hook: str, priority: int, *targets: str) -> NftChain:
    match_new = (CtStateNew(),) if chain_type == "filter" else ()  # the kernel runs nat chains only for new connections
    rules = tuple(rule(*match_new, Jump(target)) for target in targets)
    return NftChain(name, rules, hook=NftHook(chain_type, hook, priority))  # type: ignore[arg-type]  # always valid literals


def _services(context: Context) -> Iterator[NftRule]:
    mark = SetMark(context.masquerade_mark)
    to_cluster_ip = Lookup((KeyField.DESTINATION,), names.CLUSTER_IPS)
    from_outside = local_traffic_match(context, negate=True)
    if context.masquerade_all:
        yield rule(to_cluster_ip, mark, comment="masquerade all traffic to ClusterIPs")
    elif from_outside is not None:
        comment = "masquerade traffic to ClusterIPs from outside of the cluster"
        yield rule(to_cluster_ip, from_outside, mark, comment=comment)
    yield rule(VerdictMap(SERVICE_KEY, names.SERVICE_IPS))
    yield from _node_port_rules(context, names.SERVICE_NODE_PORTS)


def _node_port_rules(context: Context, verdict_map: str) -> tuple[NftRule, ...]:
    """Return the rule that looks up NodePorts.

    If NodePort addresses are configured, the rule matches only packets to these addresses. Otherwise it matches packets
    to all local addresses except loopback addresses.
    """
    lookup = VerdictMap(NODE_PORT_KEY, verdict_map)
    if context.node_port_addresses is not None:
        return (rule(Lookup((KeyField.DESTINATION,), names.NODE_PORT_IPS), lookup),)
    loopback = "::1" if context.family is Family.IPV6 else "127.0.0.0/8"
    return (rule(MatchDaddr(loopback, negate=True), FibLocal(KeyField.DESTINATION), lookup),)


def _cluster_ips_check(context: Context) -> Iterator[NftRule]:
    """Yield the rules that reject packets to unused ports of ClusterIPs and drop packets to unassigned ClusterIPs.

    Packets to this node's own addresses are neither rejected nor dropped, so that a Service or ServiceCIDR that
    contains such an address does not make the node's servers unreachable. If a ServiceCIDR overlaps with the network of
    the nodes, connections to a Service may have an endpoint in the range, such as the API server. They are not dropped.
    """
    elsewhere = FibLocal(KeyField.DESTINATION, negate=True)
    in_use = Lookup((KeyField.DESTINATION,), names.CLUSTER_IPS)
    yield rule(in_use, elsewhere, Reject(), comment="no such port of this ClusterIP")
    for cidr in context.service_cidrs:
        if cidr.endswith("/0"):
            continue  # misconfigured: the rule would drop all new connections that the node forwards or opens
        yield rule(MatchDaddr(cidr), CtStatusDnat(), Return(), comment="the address is that of an endpoint")
        yield rule(MatchDaddr(cidr), elsewhere, Drop(), comment="no Service has this ClusterIP")


def _masquerading(context: Context) -> tuple[NftRule, ...]:
    mark = context.masquerade_mark
    return (
        rule(MatchMark(mark), XorMark(mark), Masquerade()),
        rule(CtStatusDnat(), Lookup(_CONNECTION_KEY, names.HAIRPINS), Masquerade()),
    )
