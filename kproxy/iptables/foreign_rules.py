"""Rules of other tools in the built-in chains: which of them keep packets away from kproxy's rules. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from ipaddress import ip_network
from typing import TypeAlias

from msgspec import Struct

from kproxy.iptables.base_rules import EnsuredRule
from kproxy.iptables.names import FILTER_FIREWALL, ChainName

_ENDING_TARGETS = frozenset(
    {"ACCEPT", "DROP", "REJECT", "RETURN", "QUEUE", "NFQUEUE"}
    | {"DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP", "TPROXY", "MIRROR"}
)
"""Targets after which a packet does not reach the next rule of the chain."""
_KUBELET_JUMP = f" -j {FILTER_FIREWALL.name}"
_MAX_DEPTH = 4
"""How many jumps are followed to find out whether a chain ends the evaluation for every packet."""
_UNCONDITIONAL = re.compile(r"-A \S+ (?:-m comment --comment (?:\"(?:[^\"\\]|\\.)*\"|\S+) )*-([jg]) (\S+)")
ReadChain: TypeAlias = Callable[[ChainName], Sequence[str]]
"""Returns the rules of a chain, as `iptables-save` prints them."""


class ForeignMatch(Struct, frozen=True):
    """The destinations of a rule that ends evaluation for some packets.

    `network` is the destination network, or "" for any destination. `protocol` and `ports` are the transport protocol
    and the range of destination ports; they are "" and None if the rule does not match a port.
    """

    network: str
    protocol: str
    ports: tuple[int, int] | None


def ends_evaluation(rule: str, table: str, read: ReadChain, depth: int = 0) -> bool:
    """Return whether no packet reaches the rule after this one.

    That is the case if the rule has no match and its target ends the evaluation, or if it jumps to a chain that
    contains such a rule. `read` is called only for jumps without a match. It must return no rules for a target that is
    not a chain.
    """
    match = _UNCONDITIONAL.match(rule)
    if match is None:
        return False
    target = match[2]
    if match[1] == "g" or target in _ENDING_TARGETS:
        return True
    return depth < _MAX_DEPTH and _never_returns(read(ChainName(table, target)), table, read, depth + 1)


def _never_returns(rules: Iterable[str], table: str, read: ReadChain, depth: int) -> bool:
    """Return whether a chain ends the evaluation for every packet, so that no packet returns to the calling chain."""
    for rule in rules:
        if rule.endswith(" -j RETURN") or " -g " in rule:
            return False
        if ends_evaluation(rule, table, read, depth):
            return True
    return False


def group_by_chain(ensured: Iterable[EnsuredRule]) -> dict[ChainName, list[EnsuredRule]]:
    """Return kproxy's rules in chains that other tools use, too, by chain."""
    by_chain: dict[ChainName, list[EnsuredRule]] = {}
    for rule in ensured:
        by_chain.setdefault(rule.chain, []).append(rule)
    return by_chain


def first_blocking_rule(rules: Sequence[str], ensured: Sequence[EnsuredRule], read: ReadChain) -> int:
    """Return the index of the first rule after which no packet goes on, or the number of rules if there is none.

    `rules` are the rules of a chain, and `ensured` are kproxy's rules in it; these never count.
    """
    table = ensured[0].chain.table
    blocking = (
        index
        for index, rule in enumerate(rules)
        if not any(own.is_satisfied_by(rule) for own in ensured) and ends_evaluation(rule, table, read)
    )
    return next(blocking, len(rules))


def restore_commands(rules: Sequence[str], ensured: Sequence[EnsuredRule], blocked_from: int) -> list[str]:
    """Return the commands that restore kproxy's rules in a chain that other tools use, too. There may be none.

    `rules` are the rules of the chain, and `ensured` are kproxy's rules, in order. Missing rules are inserted: before
    the next rule of kproxy, otherwise after the previous one, otherwise at the top. kproxy's rules from the index
    `blocked_from` are moved before it. Rules that occur twice are deleted once.
    """
    if not ensured:
        return []
    chain = ensured[0].chain.name
    present = [next((rule for rule in rules if each.is_satisfied_by(rule)), None) for each in ensured]
    remaining = list(rules)
    deleted: list[str] = []
    for each, rule in zip(ensured, present, strict=True):
        extra = remaining.count(each.text) - 1
        for _ in range(extra):
            index = remaining.index(each.text)
            remaining.pop(index)
            deleted.append(each.text)
            blocked_from -= index < blocked_from
        if rule is not None and blocked_from <= remaining.index(rule):
            remaining.remove(rule)
            deleted.append(rule)
    commands = [f"-D{rule.removeprefix('-A')}" for rule in deleted]
    existing = [rule if rule in remaining else None for rule in present]
    for index, each in enumerate(ensured):
        if existing[index] is None:
            position = _position(remaining, existing, index)
            remaining.insert(position, each.text)
            existing[index] = each.text
            commands.append(f"-I {chain} {position + 1} {each.rule}")
    return commands


def _position(rules: Sequence[str], existing: Sequence[str | None], index: int) -> int:
    """Return where in the chain the rule with this index in `existing` belongs, relative to those that exist.

    The kubelet's jump to KUBE-FIREWALL only counts if it is the first rule. It may follow rules of other tools, and
    these must not precede kproxy's rules.
    """
    later = next((rule for rule in existing[index + 1 :] if rule is not None), None)
    if later is not None and not later.endswith(_KUBELET_JUMP):
        return rules.index(later)
    for earlier in reversed(existing[:index]):
        if earlier is not None and (rules[0] == earlier or not earlier.endswith(_KUBELET_JUMP)):
            return rules.index(earlier) + 1
    return 0


def conditional_match(rule: str) -> ForeignMatch | None:
    """Return which destinations a rule that ends evaluation applies to.

    Return None if the rule does not end evaluation, or if it matches neither a destination address nor a port.
    """
    try:
        words = shlex.split(rule)
    except ValueError:
        return None
    options: dict[str, str] = {}
    negated = False
    iterator = iter(words[2:])
    for word in iterator:
        if word == "!":
            negated = True
        elif word == "--comment":
            next(iterator, "")
            negated = False
        elif word.startswith("-"):
            if word in {"-d", "-p", "--dport", "-j"} and not negated:
                options[word] = next(iterator, "")
            negated = False
    if options.get("-j") not in _ENDING_TARGETS or not options.keys() & {"-d", "--dport"}:
        return None
    low, _, high = options.get("--dport", "").partition(":")
    ports = (int(low), int(high or low)) if low.isdigit() and (high or low).isdigit() else None
    return ForeignMatch(options.get("-d", ""), options.get("-p", "") if ports else "", ports)


class Frontends(Struct, frozen=True):
    """The destinations of Services: addresses as integers, and ports of this node by protocol."""

    addresses: Collection[int]
    node_ports: Collection[tuple[str, int]]

    def are_matched_by(self, match: ForeignMatch) -> bool:
        """Return whether a rule applies to packets for at least one of the destinations."""
        if match.network:
            network = ip_network(match.network, strict=False)
            first, last = int(network.network_address), int(network.broadcast_address)
            return any(first <= address <= last for address in self.addresses)
        if match.ports is None:
            return False
        low, high = match.ports
        return any(protocol == match.protocol and low <= port <= high for protocol, port in self.node_ports)
