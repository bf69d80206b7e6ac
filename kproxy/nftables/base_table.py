"""What the table holds whatever the Services are: its sets and maps, and the chains that packets enter it by."""

from __future__ import annotations

from collections.abc import Iterator

from kproxy.model.context import Context
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.ruleset import (
    Chain,
    Decide,
    Destination,
    Drop,
    Field,
    Go,
    Hook,
    Interface,
    IsIn,
    IsLocal,
    IsMarked,
    IsNew,
    IsTranslated,
    Mark,
    Masquerade,
    Reject,
    Rule,
    Set,
    Source,
    Statement,
    Unmark,
    Value,
    rule,
)

TABLE_COMMENT = "rules for kube-proxy"
SERVICE = (Field.DESTINATION, Field.PROTOCOL, Field.PORT)
"""What a frontend with an address of its own goes by."""
NODE_PORT = (Field.PROTOCOL, Field.PORT)
"""What a NodePort goes by."""
_CONNECTION = (Field.SOURCE, Field.DESTINATION, Field.PROTOCOL, Field.PORT)
SETS = (
    Set(names.CLUSTER_IPS, (Field.DESTINATION,), comment="ClusterIPs in use"),
    Set(names.NODE_PORT_IPS, (Field.DESTINATION,), comment="addresses that answer to NodePorts"),
    Set(names.HAIRPINS, _CONNECTION, comment="endpoints of this node, as clients of themselves"),
    Set(names.FIREWALL_IPS, SERVICE, Value.VERDICT, "frontends that only some sources may use"),
    Set(names.NO_ENDPOINT_SERVICES, SERVICE, Value.VERDICT, "frontends without endpoints"),
    Set(names.NO_ENDPOINT_NODE_PORTS, NODE_PORT, Value.VERDICT, "NodePorts without endpoints"),
    Set(names.SERVICE_IPS, SERVICE, Value.VERDICT, "ClusterIPs, external IPs and load balancer IPs"),
    Set(names.SERVICE_NODE_PORTS, NODE_PORT, Value.VERDICT, "NodePorts"),
    Set(names.SERVICE_ENDPOINTS, (*SERVICE, Field.NUMBER), Value.ENDPOINT, "endpoints of a frontend, numbered"),
    Set(names.SERVICE_LOCAL_ENDPOINTS, (*SERVICE, Field.NUMBER), Value.ENDPOINT, "those of them on this node"),
    Set(names.NODE_PORT_ENDPOINTS, (*NODE_PORT, Field.NUMBER), Value.ENDPOINT, "endpoints of a NodePort, numbered"),
    Set(names.NODE_PORT_LOCAL_ENDPOINTS, (*NODE_PORT, Field.NUMBER), Value.ENDPOINT, "those of them on this node"),
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
        return Source(local.cidr, inside)
    if local.interface or local.interface_prefix:
        return Interface(local.interface or local.interface_prefix, bool(local.interface_prefix), inside)
    return None


def base_chains(context: Context) -> tuple[Chain, ...]:
    """Return the chains that do not depend on any Service, those first that others go to.

    Destinations are checked before they are translated (source ranges), and those that nobody translated after that
    (no endpoints); kube-proxy's table, whose order of hooks this is, does both.
    """
    return (
        Chain("firewall-check", (rule(Decide(SERVICE, names.FIREWALL_IPS)),)),
        Chain("service-endpoints-check", (rule(Decide(SERVICE, names.NO_ENDPOINT_SERVICES)),)),
        Chain("nodeport-endpoints-check", _to_node_ports(context, names.NO_ENDPOINT_NODE_PORTS)),
        Chain("cluster-ips-check", tuple(_check_cluster_ips(context))),
        Chain("services", tuple(_services(context))),
        Chain("masquerading", _masquerading(context)),
        Chain(names.REJECT, (rule(Reject()),), "for frontends without any endpoint"),
        _base("filter-prerouting-pre-dnat", "filter", "prerouting", _BEFORE_TRANSLATION, "firewall-check"),
        _base("filter-output-pre-dnat", "filter", "output", _BEFORE_TRANSLATION, "firewall-check"),
        _base("filter-input", "filter", "input", _FILTER, "nodeport-endpoints-check", "service-endpoints-check"),
        _base("filter-forward", "filter", "forward", _FILTER, "service-endpoints-check", "cluster-ips-check"),
        _base("filter-output", "filter", "output", _FILTER, "service-endpoints-check", "cluster-ips-check"),
        _base("nat-prerouting", "nat", "prerouting", _TRANSLATION, "services"),
        _base("nat-output", "nat", "output", _TRANSLATION, "services"),
        _base("nat-postrouting", "nat", "postrouting", _SOURCE_TRANSLATION, "masquerading"),
    )


def _base(name: str, kind: str, hook: str, priority: int, *targets: str) -> Chain:
    new = (IsNew(),) if kind == "filter" else ()  # chains of type nat see nothing else
    rules = tuple(rule(*new, Go(target, back=True)) for target in targets)
    return Chain(name, rules, hook=Hook(kind, hook, priority))  # type: ignore[arg-type]  # literals of the calls above


def _services(context: Context) -> Iterator[Rule]:
    mark = Mark(context.masquerade_mark)
    to_cluster_ip = IsIn((Field.DESTINATION,), names.CLUSTER_IPS)
    outside = local_traffic_match(context, inside=False)
    if context.masquerade_all:
        yield rule(to_cluster_ip, mark, comment="masquerade all traffic to ClusterIPs")
    elif outside is not None:
        yield rule(to_cluster_ip, outside, mark, comment="masquerade traffic to ClusterIPs from outside of the cluster")
    yield rule(Decide(SERVICE, names.SERVICE_IPS))
    yield from _to_node_ports(context, names.SERVICE_NODE_PORTS)


def _to_node_ports(context: Context, verdicts: str) -> tuple[Rule, ...]:
    """Return the rule for packets to NodePorts: to chosen addresses, or to any of this node's but loopback."""
    decide = Decide(NODE_PORT, verdicts)
    if context.node_port_addresses is not None:
        return (rule(IsIn((Field.DESTINATION,), names.NODE_PORT_IPS), decide),)
    loopback = "::1" if context.family is Family.IPV6 else "127.0.0.0/8"
    return (rule(Destination(loopback, inside=False), IsLocal(Field.DESTINATION), decide),)


def _check_cluster_ips(context: Context) -> Iterator[Rule]:
    """Yield the rules for what is sent to ClusterIPs, but to none of their ports, and to addresses yet to be given."""
    in_use = IsIn((Field.DESTINATION,), names.CLUSTER_IPS)
    yield rule(in_use, Reject(), comment="no such port of this ClusterIP")
    for cidr in context.service_cidrs:
        if cidr.endswith("/0"):
            continue  # no cluster gives away all addresses there are, and this would cut the node off from them
        yield rule(Destination(cidr), Drop(), comment="no Service has this ClusterIP")


def _masquerading(context: Context) -> tuple[Rule, ...]:
    mark = context.masquerade_mark
    return (
        rule(IsMarked(mark), Unmark(mark), Masquerade()),
        rule(IsTranslated(), IsIn(_CONNECTION, names.HAIRPINS), Masquerade()),
    )
