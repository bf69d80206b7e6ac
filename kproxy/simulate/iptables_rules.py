"""Parse the output of `iptables-save` into rules that can be simulated.

The constants below list all options and targets that a Kubernetes service proxy uses. Any other token raises
`UnknownRuleError`, because simulating only part of a rule would give wrong results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import TypeAlias

from msgspec import Struct, field

from kproxy.simulate.packet import PacketState, UnknownRuleError

SIMULATED_TABLES = ("nat", "filter")
"""The tables whose rules are simulated. A dump may contain other tables only if they have no rules."""

_CHAIN = re.compile(r":(\S+) (ACCEPT|DROP|-)(?: \[\d+:\d+\])?")
_RULE = re.compile(r"(?:\[\d+:\d+\] )?-A (\S+)(?: (.*))?")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_MARK = re.compile(r"(0x[0-9a-f]+)(?:/(0x[0-9a-f]+))?")
_ALL_BITS = 0xFFFFFFFF
_ENDPOINT = re.compile(r"(?:(\d+\.\d+\.\d+\.\d+)|\[([0-9a-f:.]+)\]):(\d+)")
_CONNECTION_STATES = frozenset({"NEW", "ESTABLISHED", "RELATED", "INVALID", "DNAT"})

_BASE_OPTIONS = {"-s": 1, "-d": 1, "-i": 1, "-p": 1}
"""The options that need no `-m`.

This mapping and the next two give the number of arguments that each option takes.
"""
_MODULE_OPTIONS = {
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
_TARGET_OPTIONS = {
    "ACCEPT": {},
    "DROP": {},
    "RETURN": {},
    "REJECT": {"--reject-with": 1},
    "MARK": {"--set-xmark": 1},
    "MASQUERADE": {"--random-fully": 0},
    "DNAT": {"--to-destination": 1},
}
"""The built-in targets and their options. Any other target must be a chain."""
_NEGATABLE_OPTIONS = frozenset({"-s", "-d", "-i", "--mark", "--ctstate"})
_REQUIRED_OPTIONS = {
    "-m comment": ("--comment",),
    "-m mark": ("--mark",),
    "-m conntrack": ("--ctstate",),
    "-m statistic": ("--mode", "--probability"),
    "-m recent": ("--name", "--mask", "--rsource"),
    "-m nfacct": ("--nfacct-name",),
    "-j REJECT": ("--reject-with",),
    "-j MARK": ("--set-xmark",),
    "-j DNAT": ("--to-destination",),
}
_SUPPORTED_VALUES = {
    "--mode": ("random",),
    "--mask": ("255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    "--reject-with": ("icmp-port-unreachable", "icmp6-port-unreachable"),
}
"""The supported values of some options. Other options may have any value."""

Match: TypeAlias = Callable[[PacketState], bool]


class SimulatedRule(Struct, frozen=True):
    """One rule.

    The rule matches a packet with `probability` if all `matches` are true and the list `recent_check`, if set, contains
    the packet's source. `recent_check` and `recent_set` are the names of the lists that `-m recent` uses with
    `--rcheck` and `--set`, or "". `counter` is the name of the nfacct object, or "".

    `target` is a built-in target, a chain of the same table, or "" for none. The other fields are arguments of targets:
    `endpoint` ("ip:port"), `address` and `port` belong to DNAT, `mark_value` and `mark_mask` to MARK, and `reject_with`
    to REJECT.
    """

    target: str
    matches: tuple[Match, ...]
    probability: float = 1.0
    recent_check: str = ""
    recent_set: str = ""
    counter: str = ""
    reject_with: str = ""
    endpoint: str = ""
    address: int = 0
    port: int = 0
    mark_value: int = 0
    mark_mask: int = 0


class SavedChainRules(Struct):
    """The rules of a chain and its policy, which is "" for user-defined chains."""

    policy: str
    rules: list[SimulatedRule] = field(default_factory=list)


class SavedRules(Struct):
    """The chains of each table, and the endpoints of each `-m recent` list.

    `affinity_endpoints` maps the name of each list to endpoints ("ip:port"). A list contains the clients that have
    session affinity to one of its endpoints.
    """

    tables: dict[str, dict[str, SavedChainRules]]
    affinity_endpoints: dict[str, set[str]] = field(default_factory=dict)


class RuleOptions(Struct):
    """The options of a rule.

    `found` maps the name of each option to a pair: whether the option is negated, and its argument ("" for none).
    `modules` are the arguments of `-m`; `target` is the argument of `-j`.
    """

    found: dict[str, tuple[bool, str]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    target: str = ""

    def value(self, name: str) -> str:
        """Return the argument of an option, or "" if the rule lacks the option or the option has no argument."""
        return self.found.get(name, (False, ""))[1]


def parse_dump(text: str) -> SavedRules:
    """Parse the output of `iptables-save`. Raises `UnknownRuleError` for anything that is not supported."""
    rules = SavedRules({name: {} for name in SIMULATED_TABLES})
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            table = _parse_line(rules, table, line.strip())
        except UnknownRuleError as error:
            raise UnknownRuleError(f"line {number}: {error}: {line.strip()}") from None
    _check_targets(rules)
    return rules


def _parse_line(rules: SavedRules, table: str, line: str) -> str:
    """Add one line of the dump to `rules`. Return the table to which the next line belongs, or "" outside of tables."""
    if not line or line.startswith("#"):
        return table
    if line.startswith("*"):
        rules.tables.setdefault(line[1:], {})
        return line[1:]
    if line == "COMMIT":
        return ""
    chains = rules.tables.get(table)
    if chains is None:
        raise UnknownRuleError("line outside of a table")
    if found := _CHAIN.fullmatch(line):
        chains[found[1]] = SavedChainRules("" if found[2] == "-" else found[2])
        return table
    found = _RULE.fullmatch(line)
    if not found or table not in SIMULATED_TABLES or found[1] not in chains:
        raise UnknownRuleError(f"expected a rule of an existing chain in table {' or '.join(SIMULATED_TABLES)}")
    rule = _make_rule(_parse_options(found[2] or ""))
    chains[found[1]].rules.append(rule)
    if rule.recent_set:
        rules.affinity_endpoints.setdefault(rule.recent_set, set()).add(rule.endpoint)
    return table


def _check_targets(rules: SavedRules) -> None:
    for chains in rules.tables.values():
        for name, chain in chains.items():
            for rule in chain.rules:
                if rule.target and rule.target not in _TARGET_OPTIONS and rule.target not in chains:
                    raise UnknownRuleError(f"chain {name}: -j {rule.target} is neither a chain nor a supported target")


def _make_rule(options: RuleOptions) -> SimulatedRule:
    matches = []
    for name, (negated, argument) in options.found.items():
        if name in _MATCH_PARSERS:
            match = _MATCH_PARSERS[name](argument)
            matches.append(_negate(match) if negated else match)
    recent = options.value("--name")
    endpoint = options.value("--to-destination")
    address, port = _parse_endpoint(endpoint) if endpoint else (0, 0)
    mark_value, mark_mask = _parse_mark(options.value("--set-xmark") or "0x0/0x0")
    return SimulatedRule(
        options.target,
        tuple(matches),
        probability=_parse_probability(options.value("--probability") or "1"),
        recent_check=recent if "--rcheck" in options.found else "",
        recent_set=recent if "--set" in options.found else "",
        counter=options.value("--nfacct-name"),
        reject_with=options.value("--reject-with"),
        endpoint=endpoint,
        address=address,
        port=port,
        mark_value=mark_value,
        mark_mask=mark_mask,
    )


# Options.


def _parse_options(text: str) -> RuleOptions:
    """Parse the part of a rule that follows `-A CHAIN`."""
    options = RuleOptions()
    known = _BASE_OPTIONS
    negated = False
    tokens = iter(_TOKEN.findall(text))
    for name in tokens:
        if name == "!" and not negated:
            negated = True
            continue
        if name == "-m" and not negated:
            known = _parse_module(options, tokens)
        elif name == "-j" and not negated:
            if options.target:
                raise UnknownRuleError("duplicate option -j")
            options.target = _parse_argument(name, tokens)
            known = _TARGET_OPTIONS.get(options.target, {})
        else:
            _parse_option(options, known, name, negated, tokens)
        negated = False
    if negated:
        raise UnknownRuleError("expected an option after !")
    _check_options(options)
    return options


def _parse_module(options: RuleOptions, tokens: Iterator[str]) -> dict[str, int]:
    """Parse the argument of `-m`. Return the options of that module."""
    module = _parse_argument("-m", tokens)
    if module not in _MODULE_OPTIONS:
        raise UnknownRuleError(f"unsupported option -m {module}")
    if module in options.modules:
        raise UnknownRuleError(f"duplicate option -m {module}")
    options.modules.append(module)
    return _MODULE_OPTIONS[module]


def _parse_option(options: RuleOptions, known: dict[str, int], name: str, negated: bool, tokens: Iterator[str]) -> None:
    arguments = known.get(name, _BASE_OPTIONS.get(name))
    if arguments is None or (negated and name not in _NEGATABLE_OPTIONS):
        raise UnknownRuleError(f"unsupported option {'! ' if negated else ''}{name}")
    if name in options.found:
        raise UnknownRuleError(f"duplicate option {name}")
    value = _parse_argument(name, tokens) if arguments else ""
    if value not in _SUPPORTED_VALUES.get(name, (value,)):
        raise UnknownRuleError(f"unsupported option {name} {value}")
    options.found[name] = (negated, value)


def _parse_argument(name: str, tokens: Iterator[str]) -> str:
    value = next(tokens, None)
    if value is None:
        raise UnknownRuleError(f"{name} requires an argument")
    return value[1:-1] if value.startswith('"') else value


def _check_options(options: RuleOptions) -> None:
    """Raise `UnknownRuleError` if a required option is missing or a combination of options is not supported."""
    found = options.found
    for owner in (*(f"-m {module}" for module in options.modules), f"-j {options.target}"):
        for name in _REQUIRED_OPTIONS.get(owner, ()):
            if name not in found:
                raise UnknownRuleError(f"{owner} requires {name}")
    for module in options.modules:
        if module in ("tcp", "udp", "sctp") and found.get("-p") != (False, module):
            raise UnknownRuleError(f"-m {module} requires -p {module}")
    if "recent" in options.modules:
        if ("--rcheck" in found) == ("--set" in found):
            raise UnknownRuleError("-m recent requires either --rcheck or --set")
        if "--set" in found and "statistic" in options.modules:
            raise UnknownRuleError("unsupported combination of -m recent --set with -m statistic")


# Values and matches.


def _parse_mark(text: str) -> tuple[int, int]:
    """Parse a mark such as `0x4000/0x4000`. Return the value and the mask. The default mask has all bits set."""
    found = _MARK.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"invalid mark {text}")
    return int(found[1], 16), int(found[2], 16) if found[2] else _ALL_BITS


def _parse_network(text: str) -> tuple[int, int]:
    """Parse a CIDR. Return the network address and the netmask."""
    try:
        network = ip_network(text)
    except ValueError:
        raise UnknownRuleError(f"invalid network {text}") from None
    return int(network.network_address), int(network.netmask)


def _parse_endpoint(text: str) -> tuple[int, int]:
    found = _ENDPOINT.fullmatch(text)
    if not found:
        raise UnknownRuleError(f"invalid address and port {text}")
    return int(ip_address(found[1] or found[2])), int(found[3])


def _parse_probability(text: str) -> float:
    try:
        probability = float(text)
    except ValueError:
        probability = -1.0
    if not 0.0 <= probability <= 1.0:
        raise UnknownRuleError(f"invalid probability {text}")
    return probability


def _negate(match: Match) -> Match:
    return lambda state: not match(state)


def _match_source(text: str) -> Match:
    network, mask = _parse_network(text)
    return lambda state: state.source & mask == network


def _match_destination(text: str) -> Match:
    network, mask = _parse_network(text)
    return lambda state: state.destination & mask == network


def _match_interface(text: str) -> Match:
    """Match the name of the input interface. An argument that ends with `+` is a prefix of the name.

    The name is "" for packets that the node itself sends, and "lo" once such a packet comes back in through `lo`.
    """
    if text.endswith("+"):
        prefix = text.removesuffix("+")
        return lambda state: state.interface.startswith(prefix)
    return lambda state: state.interface == text


def _match_protocol(text: str) -> Match:
    if text not in ("tcp", "udp", "sctp"):
        raise UnknownRuleError(f"unsupported protocol {text}")
    protocol = text.upper()
    return lambda state: state.packet.protocol == protocol


def _match_port(text: str) -> Match:
    """Match one destination port, or a range of ports such as `30000:30015`."""
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or text.endswith(":"):
        raise UnknownRuleError(f"invalid port or port range {text}")
    low, high = int(first), int(last or first)
    return lambda state: low <= state.port <= high


def _match_local_source(text: str) -> Match:
    _check_address_type(text)
    return lambda state: state.is_local(state.source)


def _match_local_destination(text: str) -> Match:
    _check_address_type(text)
    return lambda state: state.is_local(state.destination)


def _check_address_type(text: str) -> None:
    if text != "LOCAL":
        raise UnknownRuleError(f"unsupported address type {text}")


def _match_mark(text: str) -> Match:
    value, mask = _parse_mark(text)
    return lambda state: state.mark & mask == value


def _match_connection_state(text: str) -> Match:
    states = frozenset(text.split(","))
    if not states <= _CONNECTION_STATES:
        raise UnknownRuleError(f"unsupported connection state {text}")
    dnat = "DNAT" in states
    return lambda state: state.packet.conntrack_state in states or (dnat and bool(state.endpoint))


_MATCH_PARSERS: dict[str, Callable[[str], Match]] = {
    "-s": _match_source,
    "-d": _match_destination,
    "-i": _match_interface,
    "-p": _match_protocol,
    "--dport": _match_port,
    "--src-type": _match_local_source,
    "--dst-type": _match_local_destination,
    "--mark": _match_mark,
    "--ctstate": _match_connection_state,
}
"""For each option that becomes a `Match`, the function that parses its argument.

The functions raise `UnknownRuleError` if the argument is invalid or not supported.
"""
