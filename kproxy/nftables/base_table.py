"""What the table holds whatever the Services are: its sets and maps, and the chains that packets enter it by."""

from __future__ import annotations

from collections.abc import Iterator

from kproxy.model.context import Context
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.ruleset import (
    CtStateNew,
    CtStatusDnat,
    Drop,
    FibLocal,
    Go,
    KeyField,
    Lookup,
    MapValue,
    Masquerade,
    MatchDaddr,
    MatchIifname,
    MatchMark,
    MatchSaddr,
    NftChain,
    NftHook,
    NftRule,
    NftSet,
    Reject,
    SetMark,
    Statement,
    VerdictMap,
    XorMark,
    rule,
)

TABLE_COMMENT = "rules for kube-proxy"
SERVICE = (KeyField.DESTINATION, KeyField.PROTOCOL, KeyField.PORT)
"""What a frontend with an address of its own goes by."""
NODE_PORT = (KeyField.PROTOCOL, KeyField.PORT)
"""What a NodePort goes by."""
_CONNECTION = (KeyField.SOURCE, KeyField.DESTINATION, KeyField.PROTOCOL, KeyField.PORT)
SETS = (
    NftSet(names.CLUSTER_IPS, (KeyField.DESTINATION,), comment="ClusterIPs in use"),
    NftSet(names.NODE_PORT_IPS, (KeyField.DESTINATION,), comment="addresses that answer to NodePorts"),
    NftSet(names.HAIRPINS, _CONNECTION, comment="endpoints of this node, as clients of themselves"),
    NftSet(names.FIREWALL_IPS, SERVICE, MapValue.VERDICT, "frontends that only some sources may use"),
    NftSet(names.NO_ENDPOINT_SERVICES, SERVICE, MapValue.VERDICT, "frontends without endpoints"),
    NftSet(names.NO_ENDPOINT_NODE_PORTS, NODE_PORT, MapValue.VERDICT, "NodePorts without endpoints"),
    NftSet(names.SERVICE_IPS, SERVICE, MapValue.VERDICT, "ClusterIPs, external IPs and load balancer IPs"),
    NftSet(names.SERVICE_NODE_PORTS, NODE_PORT, MapValue.VERDICT, "NodePorts"),
    NftSet(
        names.SERVICE_ENDPOINTS, (*SERVICE, KeyField.NUMBER), MapValue.ENDPOINT, "endpoints of a frontend, numbered"
    ),
    NftSet(names.SERVICE_LOCAL_ENDPOINTS, (*SERVICE, KeyField.NUMBER), MapValue.ENDPOINT, "those of them on this node"),
    NftSet(
        names.NODE_PORT_ENDPOINTS, (*NODE_PORT, KeyField.NUMBER), MapValue.ENDPOINT, "endpoints of a NodePort, numbered"
    ),
    NftSet(
        names.NODE_PORT_LOCAL_ENDPOINTS, (*NODE_PORT, KeyField.NUMBER), MapValue.ENDPOINT, "those of them on this node"
    ),
)
"""The sets and maps that are always there."""
_BEFORE_TRANSLATION = -110
_TRANSLATION = -100
_FILTER = 0
_SOURCE_TRANSLATION = 100


def local_traffic_match(context: Context, *, inside: bool) -> Statement | None:
    """Return what holds for packets of this node's pods (or for all others); None if they cannot be told apart."""
    local = context.local_traffic
    if local.cidr:
        return MatchSaddr(local.cidr, inside)
    if local.interface or local.interface_prefix:
        return MatchIifname(local.interface or local.interface_prefix, bool(local.interface_prefix), inside)
    return None


def base_chains(context: Context) -> tuple[NftChain, ...]:
    """Return the chains that do not depend on any Service, those first that others go to.

    Destinations are checked before they are translated (source ranges), and those that nobody translated after that
    (no endpoints); kube-proxy's table, whose order of hooks this is, does both.
    """
    return (
        NftChain("firewall-check", (rule(VerdictMap(SERVICE, names.FIREWALL_IPS)),)),
        NftChain("service-endpoints-check", (rule(VerdictMap(SERVICE, names.NO_ENDPOINT_SERVICES)),)),
        NftChain("nodeport-endpoints-check", _to_node_ports(context, names.NO_ENDPOINT_NODE_PORTS)),
        NftChain("cluster-ips-check", tuple(_check_cluster_ips(context))),
        NftChain("services", tuple(_services(context))),
        NftChain("masquerading", _masquerading(context)),
        NftChain(names.REJECT, (rule(Reject()),), "for frontends without any endpoint"),
        _base("filter-prerouting-pre-dnat", "filter", "prerouting", _BEFORE_TRANSLATION, "firewall-check"),
        _base("filter-output-pre-dnat", "filter", "output", _BEFORE_TRANSLATION, "firewall-check"),
        _base("filter-input", "filter", "input", _FILTER, "nodeport-endpoints-check", "service-endpoints-check"),
        _base("filter-forward", "filter", "forward", _FILTER, "service-endpoints-check", "cluster-ips-check"),
        _base("filter-output", "filter", "output", _FILTER, "service-endpoints-check", "cluster-ips-check"),
        _base("nat-prerouting", "nat", "prerouting", _TRANSLATION, "services"),
        _base("nat-output", "nat", "output", _TRANSLATION, "services"),
        _base("nat-postrouting", "nat", "postrouting", _SOURCE_TRANSLATION, "masquerading"),
    )


def _base(name: str, kind: str, hook: str, priority: int, *targets: str) -> NftChain:
    new = (CtStateNew(),) if kind == "filter" else ()  # chains of type nat see nothing else
    rules = tuple(rule(*new, Go(target, back=True)) for target in targets)
    return NftChain(name, rules, hook=NftHook(kind, hook, priority))  # type: ignore[arg-type]  # literals of the calls above


def _services(context: Context) -> Iterator[NftRule]:
    mark = SetMark(context.masquerade_mark)
    to_cluster_ip = Lookup((KeyField.DESTINATION,), names.CLUSTER_IPS)
    outside = local_traffic_match(context, inside=False)
    if context.masquerade_all:
        yield rule(to_cluster_ip, mark, comment="masquerade all traffic to ClusterIPs")
    elif outside is not None:
        yield rule(to_cluster_ip, outside, mark, comment="masquerade traffic to ClusterIPs from outside of the cluster")
    yield rule(VerdictMap(SERVICE, names.SERVICE_IPS))
    yield from _to_node_ports(context, names.SERVICE_NODE_PORTS)


def _to_node_ports(context: Context, verdicts: str) -> tuple[NftRule, ...]:
    """Return the rule for packets to NodePorts: to chosen addresses, or to any of this node's but loopback."""
    decide = VerdictMap(NODE_PORT, verdicts)
    if context.node_port_addresses is not None:
        return (rule(Lookup((KeyField.DESTINATION,), names.NODE_PORT_IPS), decide),)
    loopback = "::1" if context.family is Family.IPV6 else "127.0.0.0/8"
    return (rule(MatchDaddr(loopback, inside=False), FibLocal(KeyField.DESTINATION), decide),)


def _check_cluster_ips(context: Context) -> Iterator[NftRule]:
    """Yield the rules for what is sent to ClusterIPs, but to none of their ports, and to addresses yet to be given."""
    in_use = Lookup((KeyField.DESTINATION,), names.CLUSTER_IPS)
    yield rule(in_use, Reject(), comment="no such port of this ClusterIP")
    for cidr in context.service_cidrs:
        if cidr.endswith("/0"):
            continue  # no cluster gives away all addresses there are, and this would cut the node off from them
        yield rule(MatchDaddr(cidr), Drop(), comment="no Service has this ClusterIP")


def _masquerading(context: Context) -> tuple[NftRule, ...]:
    mark = context.masquerade_mark
    return (
        rule(MatchMark(mark), XorMark(mark), Masquerade()),
        rule(CtStatusDnat(), Lookup(_CONNECTION, names.HAIRPINS), Masquerade()),
    )
