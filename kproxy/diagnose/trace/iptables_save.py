"""Read the output of `iptables-save` or `ip6tables-save` as a program. Pure.

Matches and targets whose result does not follow from the packet and the rules are unknown: they stay in the program
with a reason, and only the walk decides whether they matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.diagnose.trace.flow import ALL_BITS, Bits, Flow, TraceFacts, Truth
from kproxy.diagnose.trace.program import (
    Action,
    Base,
    ChainKey,
    Check,
    Decision,
    Hook,
    Program,
    Rule,
    RuleSource,
    Way,
    always,
    change,
    decide,
    negate,
    never_known,
    unknown_action,
)
from kproxy.model.types import Family

_CHAIN = re.compile(r":(\S+) (\S+)(?: \[\d+:\d+\])?")
_RULE = re.compile(r"(?:\[\d+:\d+\] )?-A (\S+) ?(.*)")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_ENDPOINT = re.compile(r"(?:\[?([0-9a-fA-F:.]+?)\]?)?(?::(\d+))?")
_HOOKS: dict[str, Hook] = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
_NAT_PRIORITIES = {"PREROUTING": -100, "OUTPUT": -100, "INPUT": 100, "POSTROUTING": 100}
IPTABLES_TABLES = ("raw", "mangle", "nat", "filter", "security")

_NO_ARGUMENT = {
    "--syn", "--set", "--rcheck", "--update", "--remove", "--reap", "--rttl", "--rsource", "--rdest", "--random-fully",
    "--random", "--persistent", "--limit-iface-in", "--limit-iface-out", "--physdev-is-in", "--physdev-is-out",
    "--physdev-is-bridged", "--invert", "--validmark", "--loose", "--accept-local", "--notrack", "--save-mark",
    "--restore-mark", "--clamp-mss-to-pmtu", "--transparent", "--nowildcard", "--restore-skmark", "--strict",
    "--next", "--return-nomatch", "--ahres", "--fragres", "--fragfirst", "--fragmore", "--fraglast", "--rt-0-res",
    "--rt-0-not-strict", "--socket-exists", "--log-tcp-sequence", "--log-tcp-options", "--log-ip-options", "--log-uid",
    "--log-macdecode", "--queue-bypass", "--queue-cpu-fanout", "--checksum-fill", "--ecn-tcp-remove", "--kerneltz",
    "--contiguous", "--exist", "--map-set-placeholder", "--sack-perm", "--timestamp", "--timestart-placeholder", "-f",
    "--ashort", "--soft", "--hard", "--hashlimit-rate-match",
}  # fmt: skip
"""The options without an argument. `--tcp-flags` and `--match-set` have two arguments, all others one."""
_CONTINUING = {
    "LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "TCPMSS", "TOS", "DSCP", "CHECKSUM", "CLASSIFY", "TTL", "HL", "SECMARK",
    "CONNSECMARK", "TEE", "SET", "IDLETIMER", "LED", "RATEEST", "ECN", "TCPOPTSTRIP", "ACCOUNT", "NOTRACK", "CT",
    "SYSLOG",
}  # fmt: skip
"""The targets after which the packet continues with the next rule, with its address, port and mark unchanged."""
_INERT_MODULES = {"comment", "tcp", "udp", "sctp", "multiport", "nfacct"}
_EVALUATED = {
    *_INERT_MODULES, "addrtype", "mark", "connmark", "conntrack", "state", "statistic", "recent", "iprange",
    "pkttype", "icmp", "icmp6", "ah", "esp",
}  # fmt: skip

Match: TypeAlias = Callable[[Flow, TraceFacts], Truth]


class _Option(Struct):
    """An option of a rule with its arguments, and the module or target to which it belongs."""

    name: str
    arguments: tuple[str, ...]
    negated: bool
    owner: str

    @property
    def text(self) -> str:
        return " ".join([*(["!"] if self.negated else []), self.name, *self.arguments])


class _Options(Struct):
    """The options of a rule. `goes` is true for `-g`."""

    options: list[_Option] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    target: str = ""
    goes: bool = False

    def value(self, name: str, owner: str = "") -> str:
        """Return the first argument of an option, or "" if the rule does not have it."""
        return next(
            (" ".join(each.arguments) for each in self.options if each.name == name and owner in ("", each.owner)), ""
        )

    def has(self, name: str) -> bool:
        """Return whether the rule has an option."""
        return any(each.name == name for each in self.options)


def is_iptables_save(text: str) -> bool:
    """Return whether a text looks like the output of iptables-save."""
    return bool(re.search(r"^\*[a-z]+$", text, re.MULTILINE) and re.search(r"^COMMIT$", text, re.MULTILINE))


def family_of_save(text: str) -> Family | None:
    """Return the IP family of a dump: that of its addresses, or of the program that made it. None if neither tells."""
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            if "ip6tables-save" in line:
                return Family.IPV6
            continue
        if found := re.search(r"(?:-[sd]|--to-destination|--to-source) \[?([0-9a-fA-F:.]+)", line):
            address = found[1]
            return Family.IPV6 if address.count(":") > 1 else Family.IPV4
        if "icmp6-" in line or "ipv6-icmp" in line:
            return Family.IPV6
        if "icmp-" in line or "-p icmp" in line:
            return Family.IPV4
    return Family.IPV4 if "iptables-save" in text else None


def read_iptables_save(text: str, family: Family) -> Program:
    """Return the program of a dump. Lines that are not rules, chains or tables become notes.

    The two variants of iptables have separate tables, both of which the kernel runs. Only iptables-nft names its
    variant in the first line.
    """
    owner = "ip6tables" if family is Family.IPV6 else "iptables"
    if "# Generated by " in text and "(nf_tables)" not in text:
        owner += "-legacy"
    program = Program()
    table = ""
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#") or line == "COMMIT":
            continue
        if line.startswith("*"):
            table = line[1:]
        elif found := _CHAIN.fullmatch(line):
            _add_chain(program, (owner, table, found[1]), found[2])
        elif found := _RULE.fullmatch(line):
            _add_rule(program, (owner, table, found[1]), found[2], family)
        else:
            program.notes.append(f"{owner}: this line is not understood: {line[:80]}")
    return program


def _add_chain(program: Program, key: ChainKey, policy: str) -> None:
    program.chains[key] = []
    _, table, chain = key
    if policy == "-" or chain not in _HOOKS:
        return
    kind = "nat" if table == "nat" else "filter"
    priority = _NAT_PRIORITIES.get(chain, 0) if table == "nat" else _PRIORITIES.get(table, 0)
    program.bases.append(Base(key, kind, _HOOKS[chain], priority, policy == "DROP"))  # type: ignore[arg-type]


def _add_rule(program: Program, key: ChainKey, text: str, family: Family) -> None:
    owner, table, chain = key
    rules = program.chains.setdefault(key, [])
    options = _parse(text)
    source = RuleSource(owner, table, chain, f"-A {chain} {text}", options.value("--comment"), number=len(rules) + 1)
    if endpoint := options.value("--to-destination"):
        program.endpoints.add(endpoint)
    try:
        statements = (*_checks(options, family), *_actions(options, family))
    except ValueError:
        statements = (unknown_action(text),)
    rules.append(Rule(source, statements))


def _parse(text: str) -> _Options:
    found = _Options()
    owner, negated = "", False
    tokens = iter(_TOKEN.findall(text))
    for token in tokens:
        if token in ("!",):
            negated = True
            continue
        if token in ("-m", "--match"):
            owner = next(tokens, "")
            found.modules.append(owner)
        elif token in ("-j", "-g", "--jump", "--goto"):
            owner = found.target = next(tokens, "")
            found.goes = token in ("-g", "--goto")
        else:
            count = 0 if token in _NO_ARGUMENT else 2 if token in ("--tcp-flags", "--match-set") else 1
            if token in ("--ecn-tcp-cwr", "--ecn-tcp-ece"):
                count = 0
            arguments = tuple(_unquoted(next(tokens, "")) for _ in range(count))
            found.options.append(_Option(token, arguments, negated, owner))
        negated = False
    return found


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


# Checks.


def _checks(options: _Options, family: Family) -> list[Check | Action]:
    found: list[Check | Action] = []
    late: list[Check | Action] = []
    for module in dict.fromkeys(options.modules):
        if module not in _EVALUATED:
            own = " ".join(each.text for each in options.options if each.owner == module)
            found.append(Check(never_known, f"-m {module} {own}".strip()))
    for option in options.options:
        if option.owner == options.target or (option.owner and option.owner not in _EVALUATED):
            continue
        check = _check(option, family)
        if check:
            found.append(check)
    if "icmp" in options.modules or "icmp6" in options.modules:
        found.append(Check(lambda *_: False, "-m icmp"))
    if "statistic" in options.modules:
        late.append(_statistic(options))
    if "recent" in options.modules:
        late.extend(_recent(options))
    return found + late


def _check(option: _Option, family: Family) -> Check | None:
    """Return the check of an option, or None if it does not restrict the packets."""
    if option.name in _SKIPPED or option.owner in ("recent", "statistic"):
        return None
    argument = " ".join(option.arguments)
    if option.name in ("-i", "-o", "--in-interface", "--out-interface"):
        return _interface_check(option, incoming=option.name in ("-i", "--in-interface"))
    parse = _PARSERS.get(f"{option.owner} {option.name}") or _PARSERS.get(option.name)
    try:
        test = parse(argument, family) if parse else None
    except ValueError:
        test = None
    if option.name in ("--dst-type", "--src-type") and argument == "LOCAL":
        return _local_check(option)
    if test is None:
        return Check(never_known, option.text)
    return Check(_negated(test) if option.negated else test, option.text)


def _negated(test: Match) -> Match:
    return lambda flow, facts: negate(test(flow, facts))


def _interface_check(option: _Option, *, incoming: bool) -> Check:
    name = option.arguments[0] if option.arguments else ""
    return interface_check(
        name[:-1] + "*" if name.endswith("+") else name, option.text, incoming=incoming, negated=option.negated
    )


def interface_check(pattern: str, text: str, *, incoming: bool, negated: bool) -> Check:
    """Return the check that the input or output interface has a name, or a prefix followed by `*`."""

    def test(flow: Flow, _: TraceFacts) -> Truth:
        found = (flow.iif if incoming else flow.oif).matches(pattern)
        return negate(found) if negated else found

    def assume(flow: Flow, value: bool) -> Flow:
        fits = value is not negated
        if incoming:
            return replace(flow, iif=flow.iif.assume(pattern, fits=fits))
        return replace(flow, oif=flow.oif.assume(pattern, fits=fits))

    return Check(test, text, assume)


def _local_check(option: _Option) -> Check:
    return local_check(option.text, of_source=option.name == "--src-type", negated=option.negated)


def local_check(text: str, *, of_source: bool, negated: bool) -> Check:
    """Return the check that the source or destination is an address of the node."""

    def test(flow: Flow, facts: TraceFacts) -> Truth:
        found = facts.is_local(flow, flow.source if of_source else flow.destination)
        return negate(found) if negated else found

    def assume(flow: Flow, value: bool) -> Flow:
        address = flow.source if of_source else flow.destination
        return replace(flow, local=flow.local | {(address, value is not negated)})

    return Check(test, text, assume)


def _network(argument: str, _: Family) -> tuple[tuple[int, int], ...]:
    networks = [ip_network(each, strict=False) for each in argument.split(",")]
    return tuple((int(each.network_address), int(each.netmask)) for each in networks)


def _source(argument: str, family: Family) -> Match:
    networks = _network(argument, family)
    return lambda flow, _: any(flow.source & mask == network for network, mask in networks)


def _destination(argument: str, family: Family) -> Match:
    networks = _network(argument, family)
    return lambda flow, _: (
        None if flow.redirected else any(flow.destination & mask == network for network, mask in networks)
    )


def _protocol(argument: str, _: Family) -> Match | None:
    names = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "ipv6-icmp": 58, "icmpv6": 58, "esp": 50, "ah": 51}
    names |= {"gre": 47, "igmp": 2, "udplite": 136, "dccp": 33, "ipencap": 4, "ipip": 4, "ipv6": 41, "vrrp": 112}
    if argument == "all":
        return always
    number = names.get(argument.lower())
    if number is None:
        number = int(argument)
    return lambda flow, _: flow.protocol_number == number


def _ports(argument: str) -> tuple[tuple[int, int], ...]:
    ranges = []
    for each in argument.split(","):
        low, separator, high = each.partition(":")
        ranges.append((int(low or 0), int(high or 0xFFFF) if separator else int(low)))
    return tuple(ranges)


def _destination_port(argument: str, _: Family) -> Match:
    ranges = _ports(argument)
    return lambda flow, _: None if flow.port < 0 else any(low <= flow.port <= high for low, high in ranges)


def _source_port_truth(flow: Flow, ranges: tuple[tuple[int, int], ...]) -> Truth:
    if flow.source_port is not None:
        port = flow.source_port
        return any(low <= port <= high for low, high in ranges)
    return True if any(low == 0 and high == 0xFFFF for low, high in ranges) else None


def _source_port(argument: str, _: Family) -> Match:
    ranges = _ports(argument)
    return lambda flow, _: _source_port_truth(flow, ranges)


def _either_port(argument: str, _: Family) -> Match:
    ranges = _ports(argument)
    return lambda flow, _: (
        True if any(low <= flow.port <= high for low, high in ranges) else _source_port_truth(flow, ranges)
    )


def _mark_parts(argument: str) -> tuple[int, int]:
    value, _, mask = argument.partition("/")
    return int(value, 0), int(mask, 0) if mask else ALL_BITS


def _states(argument: str, _: Family) -> Match:
    states = {each.lower() for each in argument.split(",")}
    known = {"new", "established", "related", "untracked", "invalid", "dnat", "snat"}
    if not states <= known:
        raise ValueError(argument)
    return lambda flow, _: (
        flow.state in states or ("dnat" in states and bool(flow.dnat)) or ("snat" in states and bool(flow.snat))
    )


def _statuses(argument: str, _: Family) -> Match:
    statuses = {each.lower() for each in argument.split(",")}

    def test(flow: Flow, _: TraceFacts) -> Truth:
        established = flow.state == "established"
        present = {"assured", "confirmed", "seen_reply"} if established else set()
        if statuses & present:
            return True
        return None if "expected" in statuses and established else "none" in statuses and not established

    return test


def _address_type(argument: str, *, of_source: bool) -> Match | None:
    kinds = set(argument.split(","))

    def test(flow: Flow, facts: TraceFacts) -> Truth:
        address = flow.source if of_source else flow.destination
        multicast = ip_address(_packed(flow, address)).is_multicast
        if not of_source and flow.redirected:
            return False
        if kinds == {"MULTICAST"}:
            return multicast
        limited = flow.family is Family.IPV4 and address == ALL_BITS
        if kinds == {"BROADCAST"}:
            return True if limited else None if not of_source and _may_be_broadcast(flow, facts, address) else False
        return None

    return test if kinds <= {"MULTICAST", "BROADCAST"} else None


def _packed(flow: Flow, address: int) -> bytes:
    return address.to_bytes(16 if flow.family is Family.IPV6 else 4, "big")


def _may_be_broadcast(flow: Flow, facts: TraceFacts, address: int) -> bool:
    """Return whether an address can be the broadcast address of a network of the node."""
    if flow.family is Family.IPV6 or flow.protocol != "UDP" or facts.is_local(flow, address) is True:
        return False
    return address not in facts.foreign_addresses and address & 1 == 1


def _iprange(argument: str, *, of_source: bool) -> Match:
    low, high = (int(ip_address(each)) for each in argument.split("-"))
    if of_source:
        return lambda flow, _: low <= flow.source <= high
    return lambda flow, _: None if flow.redirected else low <= flow.destination <= high


def _mark(argument: str, _: Family) -> Match:
    value, mask = _mark_parts(argument)
    return lambda flow, _: flow.mark.masked_equals(mask, value)


def _connection_mark(argument: str, _: Family) -> Match:
    value, mask = _mark_parts(argument)
    return lambda flow, _: flow.connection_mark.masked_equals(mask, value)


def _original_destination(argument: str, family: Family) -> Match:
    networks = _network(argument, family)
    return lambda flow, _: any(flow.original[0] & mask == network for network, mask in networks)


def _original_port(argument: str, _: Family) -> Match:
    ranges = _ports(argument)
    return lambda flow, _: any(low <= flow.original[1] <= high for low, high in ranges)


def _tcp_flags(argument: str, _: Family) -> Match:
    mask, _space, wanted = argument.partition(" ")
    if mask == "NONE":
        return lambda flow, _: flow.protocol == "TCP"
    examined = {"FIN", "SYN", "RST", "PSH", "ACK", "URG"} if mask == "ALL" else set(mask.split(","))
    expected: set[str] = set() if wanted == "NONE" else examined if wanted == "ALL" else set(wanted.split(","))

    def test(flow: Flow, _: TraceFacts) -> Truth:
        if flow.state == "established" or flow.entry == "established":
            return {"SYN", "ACK"} & examined == expected if flow.reply else None
        return {"SYN"} & examined == expected

    return test


_SKIPPED = {"--comment", "--nfacct-name", "--icmp-type", "--icmpv6-type", "-4", "-6"}
_PARSERS: dict[str, Callable[[str, Family], Match | None]] = {
    "-s": _source,
    "--source": _source,
    "-d": _destination,
    "--destination": _destination,
    "-p": _protocol,
    "--protocol": _protocol,
    "--dport": _destination_port,
    "--dports": _destination_port,
    "--sport": _source_port,
    "--sports": _source_port,
    "--ports": _either_port,
    "mark --mark": _mark,
    "connmark --mark": _connection_mark,
    "--ctstate": _states,
    "--state": _states,
    "--ctstatus": _statuses,
    "--ctdir": lambda argument, _: lambda flow, _: flow.reply is (argument == "REPLY"),
    "--ctorigdst": _original_destination,
    "--ctorigdstport": _original_port,
    "--ctproto": _protocol,
    "--src-range": lambda argument, _: _iprange(argument, of_source=True),
    "--dst-range": lambda argument, _: _iprange(argument, of_source=False),
    "--src-type": lambda argument, _: _address_type(argument, of_source=True),
    "--dst-type": lambda argument, _: _address_type(argument, of_source=False),
    "--pkt-type": lambda argument, _: (lambda *_: True) if argument == "unicast" else (lambda *_: False),
    "--tcp-flags": _tcp_flags,
    "--syn": lambda _, family: _tcp_flags("FIN,SYN,RST,ACK SYN", family),
    "-f": lambda _, __: lambda *_: False,
}
"""For each option, the function that returns its condition, or None if it is not supported.

It raises `ValueError` for an argument that it does not understand.
"""


def _statistic(options: _Options) -> Action:
    if options.value("--mode") == "random":
        probability = _float(options.value("--probability"))
    else:
        every = _float(options.value("--every"))
        probability = 1 / every if every else None
    if any(each.name in ("--probability", "--every") and each.negated for each in options.options):
        probability = None if probability is None else 1 - probability

    def run(flow: Flow, _: TraceFacts) -> tuple[Way, ...]:
        if probability == 1:
            return (Way(flow),)
        rest = None if probability is None else 1 - probability
        return (Way(flow, probability=probability), Way(flow, matched=False, probability=rest))

    return Action(run, "-m statistic", changes=False)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _recent(options: _Options) -> list[Check | Action]:
    name = options.value("--name", "recent") or "DEFAULT"
    if options.has("--set"):
        return [change(lambda flow: replace(flow, affinity=True))]
    text = " ".join(["-m recent", *(each.text for each in options.options if each.owner == "recent")])
    exact = options.value("--mask", "recent") in ("", "255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")

    def test(flow: Flow, facts: TraceFacts) -> Truth:
        if facts.recent is None or not exact or options.has("--hitcount") or options.has("--rttl"):
            return None
        found = flow.source in facts.recent.get(name, ())
        return None if found and facts.recent_may_have_expired and options.has("--seconds") else found

    negated = any(each.negated for each in options.options if each.name in ("--rcheck", "--update"))
    return [Check(_negated(test) if negated else test, text)]


# Targets.


def _actions(options: _Options, family: Family) -> list[Check | Action]:
    target = options.target
    if not target or (target in _CONTINUING and not _untracks(options)):
        return []
    if target in ("ACCEPT", "DROP", "RETURN"):
        return [decide(Decision(target.lower()))]  # type: ignore[arg-type]
    if target in _TARGETS:
        return [_TARGETS[target](options, family)]
    if target in _CONTINUING:
        return [change(lambda flow: replace(flow, entry="untracked"))]
    if target.isupper() and target in _UNPREDICTABLE:
        return [unknown_action(f"-j {target}")]
    return [decide(Decision("goto" if options.goes else "jump", target))]


def _untracks(options: _Options) -> bool:
    return options.target == "NOTRACK" or (options.target == "CT" and options.has("--notrack"))


_UNPREDICTABLE = {
    "NFQUEUE", "QUEUE", "TPROXY", "SYNPROXY", "CLUSTERIP", "NETMAP", "HMARK", "DNPT", "SNPT", "STEAL", "TARPIT", "SAME",
}  # fmt: skip


def _reject(options: _Options, family: Family) -> Action:
    default = "icmp6-port-unreachable" if family is Family.IPV6 else "icmp-port-unreachable"
    return decide(Decision("reject", detail=options.value("--reject-with") or default))


def _set_mark(options: _Options, _: Family) -> Action:
    for name in ("--set-xmark", "--set-mark", "--or-mark", "--and-mark", "--xor-mark"):
        text = options.value(name)
        if text:
            value, mask = _mark_parts(text)
            clear, flip = {
                "--set-xmark": (mask, value),
                "--set-mark": (mask | value, value),
                "--or-mark": (value, value),
                "--and-mark": (~value & ALL_BITS, 0),
                "--xor-mark": (0, value),
            }[name]
            return _mark_change(clear, flip)
    return unknown_action("-j MARK")


def _mark_change(clear: int, flip: int) -> Action:
    return change(lambda flow: replace(flow, mark=flow.mark.change(clear, flip)))


def _connmark(options: _Options, _: Family) -> Action:
    text = options.value("--set-xmark") or options.value("--set-mark")
    if text:
        value, mask = _mark_parts(text)
        return change(lambda flow: replace(flow, connection_mark=flow.connection_mark.change(mask, value)))
    packet = int(options.value("--nfmask") or hex(ALL_BITS), 0)
    connection = int(options.value("--ctmask") or hex(ALL_BITS), 0)
    if options.has("--save-mark"):
        return change(
            lambda flow: replace(flow, connection_mark=_copied(flow.connection_mark, connection, flow.mark, packet))
        )
    return change(lambda flow: replace(flow, mark=_copied(flow.mark, packet, flow.connection_mark, connection)))


def _copied(old: Bits, clear: int, other: Bits, mask: int) -> Bits:
    """Return a mark after `(old & ~clear) ^ (other & mask)`."""
    kept = Bits(old.value & ~clear, old.known | clear)
    known = kept.known & (other.known | ~mask & ALL_BITS)
    return Bits((kept.value ^ (other.value & mask)) & known, known)


def _masquerade(_: _Options, __: Family) -> Action:
    return Action(lambda flow, _: (Way(replace(flow, snat="masquerade", source_settled=True), Decision("accept")),))


def _dnat(options: _Options, _: Family) -> Action:
    text = options.value("--to-destination")
    found = _ENDPOINT.fullmatch(text)
    try:
        address = int(ip_address(found[1])) if found and found[1] else None
    except ValueError:
        found = None
    if not found:
        return unknown_action(f"-j DNAT --to-destination {text}")
    port = int(found[2]) if found[2] else None

    def run(flow: Flow, _: TraceFacts) -> tuple[Way, ...]:
        to = flow.destination if address is None else address
        return (Way(flow.translated(to, port or flow.port), Decision("accept")),)

    return Action(run)


def _snat(options: _Options, _: Family) -> Action:
    to = options.value("--to-source")
    return Action(lambda flow, _: (Way(replace(flow, snat=to or "?", source_settled=True), Decision("accept")),))


def _redirect(options: _Options, _: Family) -> Action:
    ports = options.value("--to-ports")

    def run(flow: Flow, _: TraceFacts) -> tuple[Way, ...]:
        return (redirection(flow, int(ports) if ports.isdecimal() else flow.port),)

    return Action(run, "-j REDIRECT")


def redirection(flow: Flow, port: int) -> Way:
    """Return the way of a packet that is redirected to this node.

    If the node itself sends it, the new address is loopback, otherwise an address of the input interface.
    """
    if flow.iif.name == "":
        return Way(flow.translated(1 if flow.family is Family.IPV6 else 0x7F000001, port), Decision("accept"))
    moved = replace(flow, port=port, dnat=f"this node:{port}", destination_settled=True, redirected=True)
    return Way(moved, Decision("accept"))


_TARGETS: dict[str, Callable[[_Options, Family], Action]] = {
    "REJECT": _reject,
    "MARK": _set_mark,
    "CONNMARK": _connmark,
    "MASQUERADE": _masquerade,
    "DNAT": _dnat,
    "SNAT": _snat,
    "REDIRECT": _redirect,
}
