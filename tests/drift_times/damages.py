"""The kinds of damage that other programs do to kproxy's rules: the command of each, and what proves its repair.

Commands are shell scripts with names in angle brackets, which `Names` replaces. `<iptables>`, `<restore>` and `<nft>`
are the programs, under names that tell their commits from those of kproxy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Proof: TypeAlias = Literal["rules", "connection"]

_NAME = re.compile(r"<([a-z0-9_]+)>")


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    `parts` are the parts of the rules that it changes: `<table> <chain>` in iptables mode; `chain ...`, `set ...` or
    `element <set> { <key> }` in nftables mode; or "all". With proof "rules", it is repaired when the rules are the same
    as before; with "connection", when connections to the Service succeed, because a rule of another tool remains.
    `service` is the Service whose names the command contains: "plain" stands for one of several equal ones. `variant`
    is "nft" if the damage needs iptables-nft. `leaves` are parts that belong to the other tool and remain. `undo` is a
    command that removes what remains.
    """

    name: str
    command: str
    parts: tuple[str, ...]
    service: str = "plain"
    proof: Proof = "rules"
    variant: str = ""
    undo: str = ""
    leaves: tuple[str, ...] = ()


def fill(text: str, names: Mapping[str, str]) -> str:
    """Replace the names in angle brackets. Raises `KeyError` for an unknown one."""
    return _NAME.sub(lambda found: names[found[1]], text)


def _restore(table: str, *lines: str, flags: str = "--noflush") -> str:
    """Return a script that runs several iptables commands as one transaction."""
    text = "\n".join((f"*{table}", *lines, "COMMIT", ""))
    return f"<restore> {flags} <<'END'\n{text}END"


def _flushes(table: str, *chains: str, service: str = "plain") -> Iterator[Damage]:
    for chain in chains:
        name = f"flush {chain} of table {table}" + (f", {service} Service" if service != "plain" else "")
        yield Damage(name, f"<iptables> -t {table} -F {chain}", (f"{table} {chain}",), service)


_JUMPS = {
    "nat": (("PREROUTING", "KUBE-SERVICES"), ("OUTPUT", "KUBE-SERVICES"), ("POSTROUTING", "KUBE-POSTROUTING")),
    "filter": (
        ("FORWARD", "KUBE-FORWARD"),
        ("FORWARD", "KUBE-SERVICES"),
        ("FORWARD", "KUBE-EXTERNAL-SERVICES"),
        ("FORWARD", "KUBE-PROXY-FIREWALL"),
        ("INPUT", "KUBE-NODEPORTS"),
        ("OUTPUT", "KUBE-SERVICES"),
    ),
}


def _iptables() -> Iterator[Damage]:
    for table in ("nat", "filter", "mangle"):
        chain = f"{table} KUBE-PROXY-CANARY"
        yield Damage(f"delete the canary of table {table}", f"<iptables> -t {table} -X KUBE-PROXY-CANARY", (chain,))
    for table in ("nat", "filter"):
        yield Damage(f"flush table {table}", f"<iptables> -t {table} -F", ("all",))
        yield Damage(f"flush table {table} and delete its chains", _restore(table, "-F", "-X"), ("all",))
        yield Damage(f"restore an empty table {table}", _restore(table, flags=""), ("all",))
        script = f"<save> -t {table} | grep -v -e ' <svc>' -e '<svc> ' -e ' <no_endpoints>' | <restore>"
        yield Damage(f"restore an older table {table}", script, ("all",))
        for owner, target in _JUMPS[table]:
            command = f"<iptables> -t {table}"
            script = f"{command} -S {owner} | grep -e '-j {target}$' | sed 's|^-A|{command} -D|' | sh -e"
            yield Damage(f"delete the jump from {owner} to {target} in table {table}", script, (f"{table} {owner}",))
    yield from _flushes("nat", "PREROUTING", "POSTROUTING", "KUBE-SERVICES", "KUBE-NODEPORTS")
    yield from _flushes("nat", "KUBE-MARK-MASQ", "KUBE-POSTROUTING")
    yield from _flushes("filter", "FORWARD", "KUBE-SERVICES", "KUBE-FORWARD")
    yield from _flushes("filter", "KUBE-PROXY-FIREWALL", "KUBE-EXTERNAL-SERVICES")
    yield from _flushes("nat", "<svc>", "<sep1>")
    yield from _flushes("nat", "<ext>", "<fw>", "<svl>", "<svc>", "<sep1>", service="full")
    in_service, in_endpoint = ("nat <svc>",), ("nat <sep1>",)
    delete_service = _restore("nat", "-D<rule>", "-F <svc>", "-X <svc>")
    yield Damage(
        "delete a Service's chain and the rule that jumps to it", delete_service, ("nat <dispatch>", "nat <svc>")
    )
    delete_endpoint = _restore("nat", "-D <svc> 2", "-F <sep1>", "-X <sep1>")
    yield Damage(
        "delete an endpoint's chain and the rule that jumps to it", delete_endpoint, (*in_service, *in_endpoint)
    )
    flush_both = _restore("nat", "-F <svc>", "-F <sep1>", "-F <sep2>")
    yield Damage("flush all chains of a Service at once", flush_both, (*in_service, *in_endpoint, "nat <sep2>"))
    yield Damage(
        "rename a Service's chain",
        "<iptables> -t nat -E <svc> STOLEN",
        (*in_service, "nat <dispatch>"),
        undo="<iptables> -t nat -F STOLEN; <iptables> -t nat -X STOLEN",
        leaves=("nat STOLEN",),
    )
    for number, what in ((1, "the masquerade rule"), (2, "the first endpoint"), (3, "the last endpoint")):
        yield Damage(f"delete {what} from a Service's chain", f"<iptables> -t nat -D <svc> {number}", in_service)
    yield Damage("delete the DNAT rule of an endpoint", "<iptables> -t nat -D <sep1> 2", in_endpoint)
    replace = "<iptables> -t nat -R <sep1> 2 -p tcp -j DNAT --to-destination <other_socket>"
    yield Damage("replace the destination of an endpoint", replace, in_endpoint)
    yield Damage("replace an endpoint of a Service by RETURN", "<iptables> -t nat -R <svc> 2 -j RETURN", in_service)
    yield Damage("insert RETURN into a Service's chain", "<iptables> -t nat -I <svc> -j RETURN", in_service)
    yield Damage("insert ACCEPT into an endpoint's chain", "<iptables> -t nat -I <sep1> -j ACCEPT", in_endpoint)
    yield Damage("append a rule to a Service's chain", "<iptables> -t nat -A <svc> -j RETURN", in_service)
    swap = _restore("nat", "-D <svc> 3", "-I <svc> 2 -j <sep2>")
    yield Damage("move a rule within a Service's chain", swap, in_service)
    yield Damage("delete a rule for session affinity", "<iptables> -t nat -D <svl> 1", ("nat <svl>",), "full")
    yield Damage("delete a Service's rule from KUBE-SERVICES", _restore("nat", "-D<rule>"), ("nat <dispatch>",))
    redirect = _restore("nat", "-D<rule>", "-I <dispatch> 1 -d <ip> -p tcp -m tcp --dport 80 -j <other_svc>")
    yield Damage("point a Service's rule to another Service", redirect, ("nat <dispatch>",))
    yield Damage(
        "delete the rule of a NodePort", _restore("nat", "-D<node_port_rule>"), ("nat KUBE-NODEPORTS",), "full"
    )
    yield Damage(
        "delete the rejection of a Service without endpoints",
        _restore("filter", "-D<reject_rule>"),
        ("filter <reject_dispatch>",),
    )
    insert = "<iptables> -t nat -I KUBE-SERVICES -j RETURN"
    yield Damage("insert RETURN into KUBE-SERVICES", insert, ("nat KUBE-SERVICES",))
    insert = "<iptables> -t nat -I KUBE-POSTROUTING -j RETURN"
    yield Damage("insert RETURN into KUBE-POSTROUTING", insert, ("nat KUBE-POSTROUTING",))
    replace = "<iptables> -t nat -R KUBE-MARK-MASQ 1 -j MARK --set-xmark 0x1/0x1"
    yield Damage("replace the mark in KUBE-MARK-MASQ", replace, ("nat KUBE-MARK-MASQ",))
    insert = "<iptables> -t filter -I KUBE-FORWARD -j DROP"
    yield Damage("insert DROP into KUBE-FORWARD", insert, ("filter KUBE-FORWARD",))
    insert, undo = (
        "; ".join(f"<iptables> -t nat -{flag} {each} -j RETURN" for each in ("OUTPUT", "PREROUTING")) for flag in "ID"
    )
    chains = ("nat OUTPUT", "nat PREROUTING")
    yield Damage("insert RETURN before the jumps to KUBE-SERVICES", insert, chains, proof="connection", undo=undo)
    yield Damage("nft flush ruleset", "<nft> flush ruleset", ("all",), variant="nft")
    for table in ("nat", "filter", "mangle"):
        yield Damage(f"nft delete table {table}", f"<nft> delete table <family> {table}", ("all",), variant="nft")
    flush = "<nft> flush chain <family> nat <svc>"
    yield Damage("nft flush a Service's chain", flush, in_service, variant="nft")
    insert = "<nft> insert rule <family> nat <svc> meta cpu 0-1023 return"
    # iptables-save then prints no rule of the table at all.
    yield Damage("nft insert a rule that iptables cannot print", insert, ("all",), variant="nft")
    dormant = "<nft> 'add table <family> nat { flags dormant; }'"
    # Only nft prints the flag.
    yield Damage("nft make table nat dormant", dormant, ("all",), proof="connection", variant="nft")


_TABLE = "<family> kube-proxy"
_ELEMENTS = {
    "service-ips": "<ip> . tcp . 80",
    "service-endpoints": "<ip> . tcp . 80 . 0",
    "cluster-ips": "<ip>",
    "nodeport-ips": "<node_ip>",
    "no-endpoint-services": "<no_endpoints_ip> . tcp . 80",
    "service-nodeports": "tcp . <port>",
    "nodeport-endpoints": "tcp . <port> . 0",
    "firewall-ips": "<load_balancer_ip> . tcp . 80",
    "hairpin-connections": "<pod1> . <pod1> . tcp . 8080",
}
"""The sets and maps with the key of one element of each."""

_SETS = ("cluster-ips", "nodeport-ips", "hairpin-connections")
_SERVICE_OF = {"service-nodeports": "node", "nodeport-endpoints": "node", "firewall-ips": "full"}
_STRAYS = {
    "service-ips": "<stray_ip> . tcp . 80 : goto reject-chain",
    "service-endpoints": "<stray_ip> . tcp . 80 . 0 : <pod1> . 8080",
    "cluster-ips": "<stray_ip>",
    "no-endpoint-services": "<ip> . tcp . 80 : goto reject-chain",
}
_CHAINS = (
    *("services", "masquerading", "reject-chain", "firewall-check"),
    *("service-endpoints-check", "nodeport-endpoints-check", "cluster-ips-check"),
    *("filter-prerouting-pre-dnat", "filter-output-pre-dnat", "filter-input", "filter-forward", "filter-output"),
    *("nat-prerouting", "nat-output", "nat-postrouting", "service-any-2"),
)


def _set_part(name: str, key: str = "") -> str:
    """Return the part for an element, or for a whole set or map."""
    return f"element {name} {{ {key} }}" if key else f"set {name}"


def _elements() -> Iterator[Damage]:
    for name, key in _ELEMENTS.items():
        service = _SERVICE_OF.get(name, "plain")
        part = _set_part(name, key)
        yield Damage(
            f"delete an element of {name}", f"<nft> 'delete element {_TABLE} {name} {{ {key} }}'", (part,), service
        )
        kind = "set" if name in _SETS else "map"
        yield Damage(f"flush {name}", f"<nft> flush {kind} {_TABLE} {name}", (_set_part(name), part), service)
    for name, element in _STRAYS.items():
        part = _set_part(name, element.partition(" : ")[0])
        yield Damage(f"add an element to {name}", f"<nft> 'add element {_TABLE} {name} {{ {element} }}'", (part,))
    changed = {"service-ips": "goto reject-chain", "service-endpoints": "<other_pod> . 9"}
    for name, value in changed.items():
        key = _ELEMENTS[name]
        script = f"delete element {_TABLE} {name} {{ {key} }}; add element {_TABLE} {name} {{ {key} : {value} }}"
        yield Damage(f"replace an element of {name}", f"<nft> '{script}'", (_set_part(name, key),))
    flushed = ("set cluster-ips", "map service-ips", "map service-endpoints")
    script = "; ".join(f"flush {kind} {_TABLE} {name}" for kind, name in (each.split() for each in flushed))
    parts = tuple(_set_part(name, _ELEMENTS[name]) for name in ("cluster-ips", "service-ips", "service-endpoints"))
    yield Damage(
        "flush three sets at once",
        f"<nft> '{script}'",
        (*parts, "set cluster-ips", "set service-ips", "set service-endpoints"),
    )


def _nftables() -> Iterator[Damage]:
    yield Damage("flush ruleset", "<nft> flush ruleset", ("all",))
    yield Damage("delete the table", f"<nft> delete table {_TABLE}", ("all",))
    yield Damage("flush the table", f"<nft> flush table {_TABLE}", ("all",))
    yield Damage("make the table dormant", f"<nft> 'add table {_TABLE} {{ flags dormant; }}'", ("all",))
    missing = (
        f"delete element {_TABLE} cluster-ips {{ <ip> }}; delete element {_TABLE} service-ips {{ <ip> . tcp . 80 }}"
    )
    script = f"(echo 'delete table {_TABLE}'; <nft> list table {_TABLE}; echo '{missing}') >old; <nft> -f old"
    yield Damage("restore an older table", script, ("all",))
    drop = f"flush table {_TABLE}; delete map {_TABLE} service-endpoints"
    yield Damage("delete a map and all rules", f"<nft> '{drop}'", ("all",))
    yield from _elements()
    for chain in _CHAINS:
        yield Damage(f"flush chain {chain}", f"<nft> flush chain {_TABLE} {chain}", (f"chain {chain}",))
    for chain in ("<svc>", "<local>", "<external>", "<firewall>", "<endpoint>"):
        yield Damage(
            f"flush chain {chain} of a Service", f"<nft> flush chain {_TABLE} {chain}", (f"chain {chain}",), "full"
        )
    remove = f"flush chain {_TABLE} nat-output; delete chain {_TABLE} nat-output"
    yield Damage("delete base chain nat-output", f"<nft> '{remove}'", ("chain nat-output",))
    again = f"add chain {_TABLE} nat-output {{ type nat hook output priority 50; }}"
    again += f"; add rule {_TABLE} nat-output jump services"
    yield Damage("change the priority of nat-output", f"<nft> '{remove}; {again}'", ("chain nat-output",))
    for chain, policy in (("filter-forward", "drop"), ("nat-prerouting", "drop")):
        script = f"<nft> 'add chain {_TABLE} {chain} {{ policy {policy}; }}'"
        yield Damage(f"change the policy of {chain}", script, (f"chain {chain}",))
    handle = "$(<nft> -a list chain <family> kube-proxy {0} | grep -o 'handle [0-9]*' | tail -1)"
    for chain in ("service-any-2", "services", "masquerading"):
        where = handle.format(chain)
        yield Damage(f"delete a rule of {chain}", f"<nft> delete rule {_TABLE} {chain} {where}", (f"chain {chain}",))
        yield Damage(
            f"replace a rule of {chain}", f"<nft> replace rule {_TABLE} {chain} {where} counter", (f"chain {chain}",)
        )
    for chain in ("nat-output", "services", "service-any-2"):
        yield Damage(f"insert return into {chain}", f"<nft> insert rule {_TABLE} {chain} return", (f"chain {chain}",))
    yield Damage(
        "insert drop into filter-forward", f"<nft> insert rule {_TABLE} filter-forward drop", ("chain filter-forward",)
    )
    yield Damage(
        "append a rule to masquerading", f"<nft> add rule {_TABLE} masquerading accept", ("chain masquerading",)
    )
    script = f"delete element {_TABLE} service-ips {{ <ip> . tcp . 80 }}; flush chain {_TABLE} <svc>"
    yield Damage(
        "flush a Service's chain and delete its element",
        f"<nft> '{script}'",
        ("chain <svc>", "element service-ips { <ip> . tcp . 80 }"),
        "full",
    )
    yield Damage("add a chain", f"<nft> add chain {_TABLE} stray", ("chain stray",))
    yield Damage("add a set", f"<nft> 'add set {_TABLE} stray {{ type ipv4_addr; }}'", ("set stray",))


IPTABLES = tuple(_iptables())
NFTABLES = tuple(_nftables())


def damages(mode: str) -> tuple[Damage, ...]:
    """Return the kinds for `nftables`, `iptables-nft` or `iptables-legacy`."""
    if mode == "nftables":
        return NFTABLES
    return tuple(each for each in IPTABLES if each.variant != "nft" or mode == "iptables-nft")
