"""The grammar of one rule as `iptables-save` prints it: tokens to options.

The tables below are all of what a Kubernetes service proxy writes. Any other token is an `UnknownRuleError`,
because a rule that is read half is read wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import TypeAlias

from msgspec import Struct, field

from kproxy.simulate.packet import PacketState, UnknownRuleError

Match: TypeAlias = Callable[[PacketState], bool]
_STATES = frozenset({"NEW", "ESTABLISHED", "RELATED", "INVALID", "DNAT"})
_MARK = re.compile(r"(0x[0-9a-f]+)(?:/(0x[0-9a-f]+))?")
_ALL_BITS = 0xFFFFFFFF


def negate(match: Match) -> Match:
    """Return the match that `!` before an option makes of it."""
    return lambda passage: not match(passage)


def masked(text: str) -> tuple[int, int]:
    """Return value and mask of a mark such as `0x4000/0x4000`; without a mask, all bits count."""
    found = _MARK.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"{text} is not a mark")
    return int(found[1], 16), int(found[2], 16) if found[2] else _ALL_BITS


def _within(text: str) -> tuple[int, int]:
    try:
        network = ip_network(text)
    except ValueError:
        raise UnknownRuleError(f"{text} is not a network") from None
    return int(network.network_address), int(network.netmask)


def _source(text: str) -> Match:
    network, mask = _within(text)
    return lambda passage: passage.source & mask == network


def _destination(text: str) -> Match:
    network, mask = _within(text)
    return lambda passage: passage.destination & mask == network


def _interface(text: str) -> Match:
    """Match the name, or with a `+` at its end what it begins with. A packet that came in by none has the name ""."""
    if text.endswith("+"):
        prefix = text.removesuffix("+")
        return lambda passage: passage.interface.startswith(prefix)
    return lambda passage: passage.interface == text


def _protocol(text: str) -> Match:
    if text not in ("tcp", "udp", "sctp"):
        raise UnknownRuleError(f"protocol {text} is not known")
    wanted = text.upper()
    return lambda passage: passage.packet.protocol == wanted


def _port(text: str) -> Match:
    """Match one port, or a range such as `30000:30015`."""
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or text.endswith(":"):
        raise UnknownRuleError(f"{text} is not a port or a range of ports")
    low, high = int(first), int(last or first)
    return lambda passage: low <= passage.port <= high


def _local_source(text: str) -> Match:
    _only_local(text)
    return lambda passage: passage.is_local(passage.source)


def _local_destination(text: str) -> Match:
    _only_local(text)
    return lambda passage: passage.is_local(passage.destination)


def _only_local(text: str) -> None:
    if text != "LOCAL":
        raise UnknownRuleError(f"address type {text} is not known")


def _mark(text: str) -> Match:
    value, mask = masked(text)
    return lambda passage: passage.mark & mask == value


def _state(text: str) -> Match:
    states = frozenset(text.split(","))
    if not states <= _STATES:
        raise UnknownRuleError(f"connection state {text} is not known")
    translated = "DNAT" in states
    return lambda passage: passage.packet.state in states or (translated and bool(passage.target))


MATCHES: dict[str, Callable[[str], Match]] = {
    "-s": _source,
    "-d": _destination,
    "-i": _interface,
    "-p": _protocol,
    "--dport": _port,
    "--src-type": _local_source,
    "--dst-type": _local_destination,
    "--mark": _mark,
    "--ctstate": _state,
}
"""By option, the maker of the match from the option's argument; raises `UnknownRuleError`."""
_BASE = {"-s": 1, "-d": 1, "-i": 1, "-p": 1}
_MODULES = {
    "tcp": {"--dport": 1},
    "udp": {"--dport": 1},
    "sctp": {"--dport": 1},
    "comment": {"--comment": 1},
    "addrtype": {"--dst-type": 1, "--src-type": 1},
    "mark": {"--mark": 1},
    "conntrack": {"--ctstate": 1},
    "statistic": {"--mode": 1, "--probability": 1},
    "recent": {"--rcheck": 0, "--set": 0, "--seconds": 1, "--reap": 0, "--name": 1, "--mask": 1, "--rsource": 0},
    "nfacct": {"--nfacct-name": 1},
}
TARGETS = {
    "ACCEPT": {},
    "DROP": {},
    "RETURN": {},
    "REJECT": {"--reject-with": 1},
    "MARK": {"--set-xmark": 1},
    "MASQUERADE": {"--random-fully": 0},
    "DNAT": {"--to-destination": 1},
}
"""The built-in targets. Like the modules above, with how many arguments each of their options takes."""
_NEGATABLE = frozenset({"-s", "-d", "-i", "--mark", "--ctstate"})
_REQUIRED = {
    "comment": ("--comment",),
    "mark": ("--mark",),
    "conntrack": ("--ctstate",),
    "statistic": ("--mode", "--probability"),
    "recent": ("--name", "--mask", "--rsource"),
    "nfacct": ("--nfacct-name",),
    "-j REJECT": ("--reject-with",),
    "-j MARK": ("--set-xmark",),
    "-j DNAT": ("--to-destination",),
}
_ONLY = {
    "--mode": ("random",),
    "--mask": ("255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    "--reject-with": ("icmp-port-unreachable", "icmp6-port-unreachable"),
}
"""Options that are understood with these arguments only."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


class RuleOptions(Struct):
    """A rule's options: by name, whether `!` stands before it, and its argument ("" if it takes none)."""

    found: dict[str, tuple[bool, str]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    target: str = ""

    def value(self, name: str) -> str:
        """Return an option's argument, "" if the option is not there."""
        return self.found.get(name, (False, ""))[1]


def read_options(text: str) -> RuleOptions:
    """Read what follows `-A CHAIN`. A target that is not built in is taken for a chain."""
    options = RuleOptions()
    known = _BASE
    negated = False
    tokens = iter(_TOKEN.findall(text))
    for word in tokens:
        if word == "!" and not negated:
            negated = True
            continue
        if word == "-m" and not negated:
            known = _read_module(options, tokens)
        elif word == "-j" and not negated and not options.target:
            options.target = _argument(word, tokens)
            known = TARGETS.get(options.target, {})
        else:
            _read_option(options, known, word, negated, tokens)
        negated = False
    if negated:
        raise UnknownRuleError("nothing after !")
    _check(options)
    return options


def _read_module(options: RuleOptions, tokens: Iterator[str]) -> dict[str, int]:
    module = _argument("-m", tokens)
    if module not in _MODULES:
        raise UnknownRuleError(f"-m {module} is not known")
    if module in options.modules:
        raise UnknownRuleError(f"-m {module} stands twice")
    options.modules.append(module)
    return _MODULES[module]


def _read_option(options: RuleOptions, known: dict[str, int], name: str, negated: bool, tokens: Iterator[str]) -> None:
    arguments = known.get(name, _BASE.get(name))
    if arguments is None or (negated and name not in _NEGATABLE):
        raise UnknownRuleError(f"{'! ' if negated else ''}{name} is not known here")
    if name in options.found:
        raise UnknownRuleError(f"{name} stands twice")
    value = _argument(name, tokens) if arguments else ""
    if value not in _ONLY.get(name, (value,)):
        raise UnknownRuleError(f"{name} {value} is not known")
    options.found[name] = (negated, value)


def _argument(name: str, tokens: Iterator[str]) -> str:
    value = next(tokens, None)
    if value is None:
        raise UnknownRuleError(f"{name} lacks its argument")
    return value[1:-1] if value.startswith('"') else value


def _check(options: RuleOptions) -> None:
    """Refuse combinations whose parts are known but not what they mean together."""
    found = options.found
    for owner in (*options.modules, f"-j {options.target}"):
        for name in _REQUIRED.get(owner, ()):
            if name not in found:
                raise UnknownRuleError(f"{owner} without {name} is not known")
    for module in options.modules:
        if module in ("tcp", "udp", "sctp") and found.get("-p") != (False, module):
            raise UnknownRuleError(f"-m {module} without -p {module} is not known")
    if "recent" in options.modules:
        if ("--rcheck" in found) == ("--set" in found):
            raise UnknownRuleError("-m recent is known with either --rcheck or --set")
        if "--set" in found and "statistic" in options.modules:
            raise UnknownRuleError("--set by chance is not known")


EVALUATED = ("nat", "filter")
"""The tables whose rules are evaluated. Others may be in a dump as long as they hold no rules."""
_CHAIN = re.compile(r":(\S+) (ACCEPT|DROP|-)(?: \[\d+:\d+\])?")
_RULE = re.compile(r"(?:\[\d+:\d+\] )?-A (\S+)(?: (.*))?")
_SOCKET = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+)|\[([0-9a-f:.]+)\]):(\d+)")


class SimulatedRule(Struct, frozen=True):
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


class SavedChainRules(Struct):
    """A chain's rules, and what becomes of a packet at its end; the policy is "" for chains that are not built in."""

    policy: str
    rules: list[SimulatedRule] = field(default_factory=list)


class SavedRules(Struct):
    """The tables nat and filter, and for every list of recent sources the endpoints that their rules lead to."""

    tables: dict[str, dict[str, SavedChainRules]]
    lists: dict[str, set[str]] = field(default_factory=dict)


def read_dump(text: str) -> SavedRules:
    """Return what `iptables-save` printed; raises `UnknownRuleError` at whatever has no known meaning."""
    dump = SavedRules({name: {} for name in EVALUATED})
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            table = _read_line(dump, table, line.strip())
        except UnknownRuleError as error:
            raise UnknownRuleError(f"line {number}: {error}: {line.strip()}") from None
    _check_targets(dump)
    return dump


def _read_line(dump: SavedRules, table: str, line: str) -> str:
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
        chains[found[1]] = SavedChainRules("" if found[2] == "-" else found[2])
        return table
    found = _RULE.fullmatch(line)
    if not found or table not in EVALUATED or found[1] not in chains:
        raise UnknownRuleError(f"not a rule of a chain of {' or '.join(EVALUATED)}")
    rule = _compile(read_options(found[2] or ""))
    chains[found[1]].rules.append(rule)
    if rule.remembers:
        dump.lists.setdefault(rule.remembers, set()).add(rule.socket)
    return table


def _check_targets(dump: SavedRules) -> None:
    for chains in dump.tables.values():
        for name, chain in chains.items():
            for rule in chain.rules:
                if rule.target and rule.target not in TARGETS and rule.target not in chains:
                    raise UnknownRuleError(f"chain {name}: -j {rule.target} is no chain and no known target")


def _compile(options: RuleOptions) -> SimulatedRule:
    matches = []
    for name, (negated, argument) in options.found.items():
        if name in MATCHES:
            match = MATCHES[name](argument)
            matches.append(negate(match) if negated else match)
    recent = options.value("--name")
    address, port = _socket(options.value("--to-destination"))
    value, mask = masked(options.value("--set-xmark") or "0x0/0x0")
    return SimulatedRule(
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
