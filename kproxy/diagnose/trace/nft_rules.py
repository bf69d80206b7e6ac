"""Read the objects of `nft -j list ruleset` as a program. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Any, TypeAlias

from msgspec.structs import replace

from kproxy.diagnose.trace.flow import ALL_BITS, Bits, Flow, TraceFacts, Truth
from kproxy.diagnose.trace.iptables_save import interface_check, local_check, redirection
from kproxy.diagnose.trace.nft_syntax import rule_text, statement_text
from kproxy.diagnose.trace.nft_values import Drawn, Found, Sets, compare, evaluate, look_up
from kproxy.diagnose.trace.program import (
    Action,
    Base,
    ChainKey,
    Check,
    Decision,
    Program,
    Rule,
    RuleSource,
    Way,
    change,
    decide,
    never_known,
    unknown_action,
)
from kproxy.model.types import Family

Json: TypeAlias = Any
_PRIORITY_NAMES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100, "out": 100}
_TRACED_FAMILIES = ("ip", "ip6", "inet", "netdev")
_UNEXPECTED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""The errors in expressions that do not have the expected form. Such expressions cannot be evaluated."""
_VERDICTS = ("accept", "drop", "return", "continue")
_NOTHING = {"counter", "log", "comment", "last", "flow", "dup", "ct helper", "ct timeout", "ct expectation", "secmark"}
"""The statements that neither change what later rules see nor decide about the packet."""


def read_nft(objects: Iterable[Json]) -> Program:
    """Return the program of a ruleset. Tables of the families arp and bridge become notes.

    The kernel does not run the chains of a dormant table.
    """
    program = Program()
    everything = list(objects)
    sets = _sets(everything)
    dormant: set[tuple[str, str]] = set()
    for named in sets.values():
        for found in named.values():
            program.endpoints.update(_endpoints(found.get("elem", [])))
    for entry in everything:
        if "table" in entry and entry["table"]["family"] not in _TRACED_FAMILIES:
            table = entry["table"]
            program.notes.append(f"table {table['family']} {table['name']} is not evaluated")
        elif "table" in entry and "dormant" in (entry["table"].get("flags") or ()):
            dormant.add((entry["table"]["family"], entry["table"]["name"]))
        elif "chain" in entry and entry["chain"]["family"] in _TRACED_FAMILIES:
            _add_chain(program, entry["chain"])
        elif "rule" in entry and entry["rule"]["family"] in _TRACED_FAMILIES:
            rule = entry["rule"]
            program.endpoints.update(_endpoints(rule["expr"]))
            _add_rule(program, rule, sets.get((rule["family"], rule["table"]), {}))
    program.bases = [base for base in program.bases if base.key[:2] not in dormant]
    return program


def _sets(objects: list[Json]) -> dict[tuple[str, str], dict[str, Json]]:
    """Return the sets and maps of each table by name."""
    sets: dict[tuple[str, str], dict[str, Json]] = {}
    for entry in objects:
        found = entry.get("set") or entry.get("map")
        if found:
            sets.setdefault((found["family"], found["table"]), {})[found["name"]] = found
    for entry in objects:
        if more := entry.get("element"):
            named = sets.get((more["family"], more["table"]), {}).get(more["name"])
            if named is not None:
                named.setdefault("elem", []).extend(more["elem"])
    return sets


def _endpoints(content: Json) -> Iterator[str]:
    """Yield the addresses with ports that are values of maps, or targets of DNAT."""
    if isinstance(content, list):
        if len(content) == 2 and isinstance(content[1], dict) and "concat" in content[1]:
            address, port = content[1]["concat"][:2]
            yield f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
        for each in content:
            yield from _endpoints(each)
    elif isinstance(content, dict):
        target = content.get("dnat")
        if isinstance(target, dict) and isinstance(target.get("addr"), str) and isinstance(target.get("port"), int):
            address, port = target["addr"], target["port"]
            yield f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        for each in content.values():
            yield from _endpoints(each)


def _add_chain(program: Program, chain: Json) -> None:
    key: ChainKey = (chain["family"], chain["table"], chain["name"])
    program.chains.setdefault(key, [])
    if "hook" not in chain:
        return
    hook, kind = chain["hook"], "nat" if chain["type"] == "nat" else "filter"
    devices = chain.get("dev", "")
    for device in devices if isinstance(devices, list) else [devices]:
        if hook in ("ingress", "prerouting", "input", "forward", "output", "postrouting"):
            priority = priority_number(chain.get("prio", 0))
            program.bases.append(Base(key, kind, hook, priority, chain.get("policy") == "drop", device))  # type: ignore[arg-type]
        else:
            program.notes.append(f"chain {' '.join(key)} at hook {hook} is not evaluated")


def priority_number(priority: Json) -> int:
    """Return a priority as a number: `dstnat - 10` is -110."""
    if isinstance(priority, int):
        return priority
    found = re.fullmatch(r"(\w+)?\s*([+-])?\s*(\d+)?", str(priority).strip())
    if not found:
        return 0
    start = _PRIORITY_NAMES.get(found[1], 0) if found[1] and not found[1].isdecimal() else int(found[1] or 0)
    offset = int(found[3] or 0)
    return start - offset if found[2] == "-" else start + offset


def _add_rule(program: Program, rule: Json, sets: Sets) -> None:
    key: ChainKey = (rule["family"], rule["table"], rule["chain"])
    rules = program.chains.setdefault(key, [])
    comment = rule.get("comment", "")
    text = rule.get("text") or rule_text(rule["expr"], comment)
    source = RuleSource(*key, text, comment, rule.get("handle", 0), len(rules) + 1)
    statements: list[Check | Action] = []
    for position, statement in enumerate(rule["expr"]):
        later = rule["expr"][position + 1 :]
        try:
            statements.extend(_statement(statement, sets, has_verdict=bool(later)))
        except _UNEXPECTED:
            statements.append(unknown_action(text))
    rules.append(Rule(source, tuple(statements)))


def _statement(statement: Json, sets: Sets, *, has_verdict: bool) -> list[Check | Action]:
    ((kind, content),) = list(statement.items())[:1]
    if kind in _NOTHING:
        return []
    if kind in _VERDICTS:
        return [decide(Decision(kind))]
    if kind in ("jump", "goto"):
        return [decide(Decision(kind, content["target"]))]
    if kind in _STATEMENTS:
        return [_STATEMENTS[kind](content, sets)]
    return _unknown_statement(kind, content, statement, has_verdict=has_verdict)


def _unknown_statement(kind: str, content: Json, statement: Json, *, has_verdict: bool) -> list[Check | Action]:
    """Return the effect of a statement that cannot be evaluated: a condition at best, otherwise anything."""
    text = statement_text(statement)
    if kind == "xt":
        return _xt(content, text, has_verdict=has_verdict)
    is_condition = statement["known_verdict"] if kind == "unparsed" else kind in ("limit", "quota", "ct count", "meter")
    return [Check(never_known, text)] if is_condition else [unknown_action(text)]


def _xt(content: Json, text: str, *, has_verdict: bool) -> list[Check | Action]:
    """Return the effect of a match or target of iptables, of which nft shows only the name."""
    kind, name = (content or {}).get("type", ""), (content or {}).get("name", "")
    if kind == "match" and name == "comment":
        return []
    if kind == "match" or (not kind and has_verdict):
        return [Check(never_known, text)]
    if kind == "target" and name in _XT_TARGETS:
        return _XT_TARGETS[name]
    return [unknown_action(text)]


# Matches.


def _match(content: Json, sets: Sets) -> Check:
    left, right = content["left"], content["right"]
    operator = content.get("op", "in")
    text = statement_text({"match": content})
    negated = operator == "!="
    if isinstance(left, dict) and isinstance(right, str) and not right.startswith("@"):
        key = left.get("meta", {}).get("key", "") if "meta" in left else ""
        if key in ("iifname", "iif", "oifname", "oif"):
            return interface_check(right, text, incoming=key.startswith("iif"), negated=negated)
        fib = left.get("fib")
        if fib and fib["result"] == "type" and right == "local" and _only_address(fib["flags"]):
            return local_check(text, of_source="saddr" in fib["flags"], negated=negated)
    if isinstance(left, dict) and "numgen" in left:
        return Check(never_known, text)
    if isinstance(left, dict) and left.get("socket", {}).get("key") == "transparent" and right == 0:
        return local_check(text, of_source=False, negated=negated)  # assume that a program listens
    return Check(_comparison(left, operator, right, sets), text)


def _only_address(flags: Json) -> bool:
    return flags in ("saddr", "daddr", ["saddr"], ["daddr"])


def _comparison(left: Json, operator: str, right: Json, sets: Sets) -> Callable[[Flow, TraceFacts], Truth]:
    """Return the test of a comparison. A comparison in an unexpected form is unknown."""

    def test(flow: Flow, facts: TraceFacts) -> Truth:
        try:
            return compare(evaluate(left, flow, facts), operator, right, sets)
        except _UNEXPECTED:
            return None

    return test


def _random_match(content: Json, sets: Sets) -> Check | Action:
    left = content["left"]
    if not (isinstance(left, dict) and "numgen" in left):
        return _match(content, sets)
    drawn = Drawn(left["numgen"]["mod"], left["numgen"].get("offset", 0) or 0)
    numbers = range(drawn.offset, drawn.offset + drawn.modulus)
    fitting = [compare(number, content.get("op", "in"), content["right"], sets) for number in numbers]
    if None in fitting:
        return Check(never_known, statement_text({"match": content}))
    share = sum(map(bool, fitting)) / drawn.modulus
    if share in (0.0, 1.0):
        return Check(lambda *_: bool(share), statement_text({"match": content}))
    return Action(
        lambda flow, _: (Way(flow, probability=share), Way(flow, matched=False, probability=1 - share)), changes=False
    )


# Actions.


def _vmap(content: Json, sets: Sets) -> Action:
    key, data = content["key"], content["data"]
    reason = statement_text({"vmap": content})

    def run(flow: Flow, facts: TraceFacts) -> tuple[Way, ...]:
        ways = []
        every = _look_up(key, data, flow, facts, sets)
        for found in every:
            after = _assume_key(flow, key, found, every)
            if found.data is None:
                ways.append(Way(after, matched=False, probability=found.probability))
            else:
                ways.append(Way(after, _verdict(found.data), probability=found.probability, note=found.comment))
        return tuple(ways)

    return Action(run, reason, changes=False)


def _look_up(key: Json, data: Json, flow: Flow, facts: TraceFacts, sets: Sets) -> list[Found]:
    """Return the possible results of a lookup. One in an unexpected form can have any result."""
    try:
        return look_up(evaluate(key, flow, facts), data, sets)
    except _UNEXPECTED:
        return [Found(None, None), Found({"unknown": None}, None)]


def _assume_key(flow: Flow, key: Json, found: Found, every: list[Found]) -> Flow:
    """Return the packet under the assumption that a lookup by interface found this element, or none."""
    name = key.get("meta", {}).get("key", "") if isinstance(key, dict) and "meta" in key else ""
    if found.probability is not None or name not in ("iifname", "iif", "oifname", "oif"):
        return flow
    field = "iif" if name.startswith("iif") else "oif"
    interface = getattr(flow, field)
    if isinstance(found.key, str):
        interface = interface.assume(found.key, fits=True)
    else:
        for other in every:
            if isinstance(other.key, str):
                interface = interface.assume(other.key, fits=False)
    return replace(flow, **{field: interface})


def _verdict(data: Json) -> Decision:
    if not isinstance(data, dict):
        return Decision("unknown", detail=f"verdict {data}")
    ((kind, content),) = list(data.items())[:1]
    if kind in ("jump", "goto"):
        return Decision(kind, content["target"])
    return Decision(kind) if kind in _VERDICTS else Decision("unknown", detail=f"verdict {kind}")


def _mangle(content: Json, sets: Sets) -> Action:
    key, value = content["key"], content["value"]
    if key == {"meta": {"key": "mark"}} or (isinstance(key, dict) and key.get("ct", {}).get("key") == "mark"):
        field = "mark" if "meta" in key else "connection_mark"

        def run(flow: Flow, facts: TraceFacts) -> tuple[Way, ...]:
            return (Way(replace(flow, **{field: _mark_value(value, flow, facts)})),)

        return Action(run)
    if (
        isinstance(key, dict)
        and "payload" in key
        and key["payload"].get("field") in ("saddr", "daddr", "sport", "dport")
    ):
        return unknown_action(statement_text({"mangle": content}))
    del sets
    return change(lambda flow: flow)


def _mark_value(value: Json, flow: Flow, facts: TraceFacts) -> Bits:
    if isinstance(value, int):
        return Bits(value & ALL_BITS)
    if isinstance(value, str):
        try:
            return Bits(int(value, 0) & ALL_BITS)
        except ValueError:
            return Bits(0, 0)
    found = evaluate(value, flow, facts)
    return found if isinstance(found, Bits) else Bits(0, 0)


def _reject(content: Json, _: Sets) -> Action:
    kind = content or {}

    def run(flow: Flow, _: TraceFacts) -> tuple[Way, ...]:
        version = "icmp6" if flow.family is Family.IPV6 else "icmp"
        reset = kind.get("type") == "tcp reset"
        detail = "tcp-reset" if reset else f"{version}-{kind.get('expr', 'port-unreachable')}"
        return (Way(flow, Decision("reject", detail=detail)),)

    return Action(run, changes=False)


def _masquerade(_: Json, __: Sets) -> Action:
    return Action(lambda flow, _: (Way(replace(flow, snat="masquerade", source_settled=True), Decision("accept")),))


def _snat(content: Json, _: Sets) -> Action:
    to = content.get("addr") if isinstance(content.get("addr"), str) else "?"
    return Action(lambda flow, _: (Way(replace(flow, snat=to, source_settled=True), Decision("accept")),))


def _redirect(content: Json, _: Sets) -> Action:
    port = (content or {}).get("port")
    number = int(port) if isinstance(port, int) or (isinstance(port, str) and port.isdecimal()) else None
    if port is not None and number is None:
        return unknown_action(f"redirect to :{port}")
    return Action(lambda flow, _: (redirection(flow, number or flow.port),))


def _dnat(content: Json, sets: Sets) -> Action:
    address, port = content.get("addr"), content.get("port")
    reason = statement_text({"dnat": content})

    def run(flow: Flow, facts: TraceFacts) -> tuple[Way, ...]:
        ways = []
        for found in _targets(address, port, flow, facts, sets):
            if found.data is None:
                ways.append(Way(flow, matched=False, probability=found.probability))
                continue
            target = _target(found.data, port, flow)
            if target is None:
                unknown = Decision("unknown", detail=reason)
                ways.append(Way(flow, unknown, probability=found.probability))
            else:
                ways.append(Way(flow.translated(*target), Decision("accept"), probability=found.probability))
        return tuple(ways)

    return Action(run, reason)


def _targets(address: Json, port: Json, flow: Flow, facts: TraceFacts, sets: Sets) -> list[Found]:
    """Return the possible targets: an address, or an address and a port, as data of a map's element."""
    if isinstance(address, dict) and "map" in address:
        mapping = address["map"]
        return _look_up(mapping["key"], mapping["data"], flow, facts, sets)
    del port
    return [Found(address if address is not None else {"same": None})]


def _target(data: Json, port: Json, flow: Flow) -> tuple[int, int] | None:
    """Return the address and port of a target, or None if they are not known."""
    if port is not None and not isinstance(port, int):
        return None
    if isinstance(data, dict) and "same" in data:
        return (flow.destination, port) if port else None
    try:
        if isinstance(data, dict):
            address, port = data["concat"]
            return int(ip_address(address)), int(port)
        return int(ip_address(data)), port or flow.port
    except _UNEXPECTED:
        return None


def _set_update(content: Json, _: Sets) -> Action:
    if content.get("limited") or content.get("stmt"):
        return Action(
            lambda flow, _: (
                Way(flow, probability=None),
                Way(flow, matched=False, probability=None),
            ),
            statement_text({"set": content}),
        )
    source = content.get("elem") in ({"payload": {"protocol": each, "field": "saddr"}} for each in ("ip", "ip6"))
    return change(lambda flow: replace(flow, affinity=flow.affinity or source))


def _notrack(_: Json, __: Sets) -> Action:
    return change(lambda flow: replace(flow, entry="untracked"))


_STATEMENTS = {
    "match": _random_match,
    "vmap": _vmap,
    "mangle": _mangle,
    "reject": _reject,
    "masquerade": _masquerade,
    "snat": _snat,
    "dnat": _dnat,
    "redirect": _redirect,
    "set": _set_update,
    "notrack": _notrack,
}
_XT_TARGETS: dict[str, list[Check | Action]] = {
    **{name: [] for name in ("LOG", "NFLOG", "TRACE", "AUDIT", "TCPMSS", "TOS", "DSCP", "CHECKSUM")},
    "MASQUERADE": [_masquerade(None, {})],
    "REJECT": [decide(Decision("reject"))],
    "MARK": [change(lambda flow: replace(flow, mark=Bits(0, 0)))],
    "CONNMARK": [change(lambda flow: replace(flow, mark=Bits(0, 0), connection_mark=Bits(0, 0)))],
}
"""The targets of iptables whose effect is known without their options."""
