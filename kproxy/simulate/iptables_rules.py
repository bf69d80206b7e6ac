"""Reading `iptables-save` output into rules that can be evaluated."""

from __future__ import annotations

import re
from ipaddress import ip_address

from msgspec import Struct, field

from kproxy.simulate.iptables_matches import MATCHES, Match, masked, negate
from kproxy.simulate.iptables_options import TARGETS, Options, read_options
from kproxy.simulate.packet import UnknownRuleError

EVALUATED = ("nat", "filter")
"""The tables whose rules are evaluated. Others may be in a dump as long as they hold no rules."""

_CHAIN = re.compile(r":(\S+) (ACCEPT|DROP|-)(?: \[\d+:\d+\])?")
_RULE = re.compile(r"(?:\[\d+:\d+\] )?-A (\S+)(?: (.*))?")
_SOCKET = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+)|\[([0-9a-f:.]+)\]):(\d+)")


class Rule(Struct, frozen=True):
    """One rule: it hits when all `matches` hold and `affinity` is "" or a list with the source, by chance `chance`.

    `target` is a chain of the same table, a built-in target, or "" for a rule without consequence. `socket`,
    `address` and `port` are for DNAT, `value` and `mask` for MARK, `reply` is for REJECT. `counter` is the name of an
    nfacct object, `remembers` that of the list to which `recent --set` adds the source.
    """

    target: str
    matches: tuple[Match, ...]
    chance: float = 1.0
    affinity: str = ""
    remembers: str = ""
    counter: str = ""
    reply: str = ""
    socket: str = ""
    address: int = 0
    port: int = 0
    value: int = 0
    mask: int = 0


class Chain(Struct):
    """A chain's rules, and what becomes of a packet at its end; the policy is "" for chains that are not built in."""

    policy: str
    rules: list[Rule] = field(default_factory=list)


class Dump(Struct):
    """The tables nat and filter, and for every list of recent sources the endpoints that their rules lead to."""

    tables: dict[str, dict[str, Chain]]
    lists: dict[str, set[str]] = field(default_factory=dict)


def read_dump(text: str) -> Dump:
    """Return what `iptables-save` printed; raises `UnknownRuleError` at whatever has no known meaning."""
    dump = Dump({name: {} for name in EVALUATED})
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            table = _read_line(dump, table, line.strip())
        except UnknownRuleError as error:
            raise UnknownRuleError(f"line {number}: {error}: {line.strip()}") from None
    _check_targets(dump)
    return dump


def _read_line(dump: Dump, table: str, line: str) -> str:
    """Take in one line; return the table that the next line belongs to."""
    if not line or line.startswith("#"):
        return table
    if line.startswith("*"):
        dump.tables.setdefault(line[1:], {})
        return line[1:]
    if line == "COMMIT":
        return ""
    chains = dump.tables.get(table)
    if chains is None:
        raise UnknownRuleError("outside of a table")
    if found := _CHAIN.fullmatch(line):
        chains[found[1]] = Chain("" if found[2] == "-" else found[2])
        return table
    found = _RULE.fullmatch(line)
    if not found or table not in EVALUATED or found[1] not in chains:
        raise UnknownRuleError(f"not a rule of a chain of {' or '.join(EVALUATED)}")
    rule = _compile(read_options(found[2] or ""))
    chains[found[1]].rules.append(rule)
    if rule.remembers:
        dump.lists.setdefault(rule.remembers, set()).add(rule.socket)
    return table


def _check_targets(dump: Dump) -> None:
    for chains in dump.tables.values():
        for name, chain in chains.items():
            for rule in chain.rules:
                if rule.target and rule.target not in TARGETS and rule.target not in chains:
                    raise UnknownRuleError(f"chain {name}: -j {rule.target} is no chain and no known target")


def _compile(options: Options) -> Rule:
    matches = []
    for name, (negated, argument) in options.found.items():
        if name in MATCHES:
            match = MATCHES[name](argument)
            matches.append(negate(match) if negated else match)
    recent = options.value("--name")
    address, port = _socket(options.value("--to-destination"))
    value, mask = masked(options.value("--set-xmark") or "0x0/0x0")
    return Rule(
        options.target,
        tuple(matches),
        chance=_chance(options.value("--probability")),
        affinity=recent if "--rcheck" in options.found else "",
        remembers=recent if "--set" in options.found else "",
        counter=options.value("--nfacct-name"),
        reply=options.value("--reject-with"),
        socket=options.value("--to-destination"),
        address=address,
        port=port,
        value=value,
        mask=mask,
    )


def _socket(text: str) -> tuple[int, int]:
    if not text:
        return 0, 0
    found = _SOCKET.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"{text} is not an address with a port")
    return int(ip_address(found[1] or found[2])), int(found[3])


def _chance(text: str) -> float:
    if not text:
        return 1.0
    try:
        chance = float(text)
    except ValueError:
        chance = -1.0
    if not 0.0 <= chance <= 1.0:
        raise UnknownRuleError(f"{text} is not a probability")
    return chance
