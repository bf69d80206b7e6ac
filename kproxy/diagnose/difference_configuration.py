"""The report of `kproxy diff --against-config`: what another configuration would change on this node. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kproxy.config.types import Config
from kproxy.diagnose.difference_objects import WrittenRules
from kproxy.diagnose.report import Report, ReportPart
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.localhost_node_ports import LISTEN_ADDRESSES

NOT_RULES = "changes no rules"
MEANINGS: Mapping[str, str] = {
    "mode": "all rules are written in the new mode, then those of the old mode are deleted",
    "hostnameOverride": "the node is another Node object: its zone, addresses, pod CIDRs and local endpoints count",
    "clusterCIDR": "decides which traffic to ClusterIPs comes from pods; the rest is masqueraded",
    "detectLocalMode": "decides how traffic from local pods is recognized; other traffic to ClusterIPs is masqueraded",
    "detectLocal.bridgeInterface": "traffic from this interface counts as traffic from local pods",
    "detectLocal.interfaceNamePrefix": "traffic from interfaces with this name prefix counts as traffic from pods",
    "nodePortAddresses": "decides on which addresses of the node NodePorts accept connections",
    "bindAddress": "only its IP family is used, as long as the Node has no address",
    "iptables.masqueradeBit": "the mark of packets to masquerade; must not be used by another program",
    "nftables.masqueradeBit": "the mark of packets to masquerade; must not be used by another program",
    "iptables.masqueradeAll": "if true, all traffic to ClusterIPs is masqueraded, so endpoints do not see the client",
    "nftables.masqueradeAll": "if true, all traffic to ClusterIPs is masqueraded, so endpoints do not see the client",
    "iptables.localhostNodePorts": "decides whether NodePorts accept connections to 127.0.0.1",
    "conntrack.tcpBeLiberal": "in iptables mode, true removes the rule that drops packets in state INVALID",
    "kproxy.iptablesDispatchThreshold": "splits large dispatch chains differently; the same connections work",
    "healthzBindAddress": "the address of /healthz, which load balancers may check",
    "metricsBindAddress": "the address of the metrics",
    "kproxy.controlSocket": "decides whether `kproxy status` and other commands can ask the daemon",
}
"""What the fields mean that change rules, or that other programs of the node depend on."""
_MODE_FIELDS = ("iptables.", "nftables.")


class FieldDifference(ReportPart, frozen=True, kw_only=True):
    """A field of the configuration that differs. Values are those of the file, as JSON.

    `changes_rules` tells whether the field can change rules in the new mode. `meaning` is one line.
    """

    field: str
    before: Any
    after: Any
    changes_rules: bool
    meaning: str


class ContextDifference(ReportPart, frozen=True, kw_only=True):
    """What is different in the rules of one IP family, on one line for each effect."""

    family: str
    effects: tuple[str, ...]


class ConfigurationDifference(Report, frozen=True, kw_only=True):
    """What another configuration would change on this node.

    `rules` is empty if no objects were given: it is then unknown how many rules change.
    """

    before: str
    after: str
    identical: bool
    fields: tuple[FieldDifference, ...]
    effects: tuple[ContextDifference, ...]
    rules: tuple[WrittenRules, ...] = ()


def field_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], new_mode: str
) -> tuple[FieldDifference, ...]:
    """Compare two configurations, given as the content of configuration files. `new_mode` is the effective mode."""
    old, new = dict(_flat(before)), dict(_flat(after))
    return tuple(
        FieldDifference(
            field=name,
            before=old.get(name),
            after=new.get(name),
            changes_rules=_changes_rules(name, new_mode),
            meaning=_meaning(name, new_mode),
        )
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    )


def context_effects(before: Context, after: Context) -> tuple[str, ...]:
    """Return what is different between the rules of two contexts of a family, one line for each effect.

    If a context has no `node_address`, the Node is unknown, or has no address of the family.
    """
    return tuple(_context_effects(before, after))


def mode_effects(before: Config, after: Config) -> tuple[str, ...]:
    """Return what a change of the mode means besides the rules."""
    if before.effective_mode == after.effective_mode:
        return ()
    if after.effective_mode == "nftables":
        return ("nftables mode has NodePorts on loopback addresses only if nodePortAddresses names them, for TCP",)
    return ("iptables mode takes longer to program many Services",)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and name != "featureGates":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _changes_rules(name: str, mode: str) -> bool:
    if name in {"healthzBindAddress", "metricsBindAddress", "kproxy.controlSocket"} or name not in MEANINGS:
        return False
    if name == "conntrack.tcpBeLiberal" or name.startswith("kproxy.iptables"):
        return mode == "iptables"
    return not name.startswith(_MODE_FIELDS) or name.startswith(f"{mode}.")


def _meaning(name: str, mode: str) -> str:
    if name.startswith(_MODE_FIELDS) and not name.startswith(f"{mode}."):
        return f"no effect in {mode} mode"
    return MEANINGS.get(name, NOT_RULES)


def _accepts_on_loopback(context: Context) -> bool:
    return context.localhost_node_ports or context.localhost_traffic in {"proxy", "proxy-hold"}


def _context_effects(before: Context, after: Context) -> Iterator[str]:
    if before.node_name != after.node_name:
        yield f"the node is {after.node_name} instead of {before.node_name}"
    if before.local_traffic != after.local_traffic:
        new, old = _local_text(after.local_traffic), _local_text(before.local_traffic)
        yield f"local pods are recognized by {new} instead of {old}"
    if before.masquerade_mark != after.masquerade_mark:
        yield f"packets to masquerade have the mark {after.masquerade_mark:#x} instead of {before.masquerade_mark:#x}"
    if before.masquerade_all != after.masquerade_all:
        now = "all traffic to ClusterIPs is" if after.masquerade_all else "only traffic from outside the cluster is"
        yield f"{now} masqueraded"
    if before.node_port_addresses != after.node_port_addresses:
        new, old = _addresses_text(after), _addresses_text(before)
        yield f"NodePorts accept connections to {new} instead of {old}"
    if _accepts_on_loopback(before) != _accepts_on_loopback(after):
        now = "also" if _accepts_on_loopback(after) else "no longer"
        yield f"NodePorts {now} accept connections to {LISTEN_ADDRESSES[after.family]}"
    if before.drop_invalid != after.drop_invalid:
        yield f"packets in conntrack state INVALID are {'dropped' if after.drop_invalid else 'no longer dropped'}"
    if before.node_address != after.node_address:
        new, old = after.node_address or "unknown", before.node_address or "unknown"
        yield f"the address of the node is {new} instead of {old}"
    if before.zone != after.zone:
        yield f"the zone of the node is {after.zone or 'unknown'} instead of {before.zone or 'unknown'}"


def _local_text(local: LocalTraffic) -> str:
    if local.cidr:
        return f"their addresses ({local.cidr})"
    if local.interface or local.interface_prefix:
        return f"their interface ({local.interface or local.interface_prefix + '*'})"
    return "nothing, so that no traffic to ClusterIPs counts as traffic from outside"


def _addresses_text(context: Context) -> str:
    if context.node_port_addresses is None:
        return "all local addresses"
    nothing = "no address" if context.node_address else "no address (that of the Node is unknown)"
    return ", ".join(context.node_port_addresses) or nothing
