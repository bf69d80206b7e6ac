"""The text of `kproxy trace` for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from textwrap import wrap
from typing import TypeAlias

from kproxy.cli.output import WIDTH, Style
from kproxy.diagnose.trace.trace import (
    PacketTrace,
    TracedRule,
    TraceLive,
    TraceOutcome,
    TracePath,
    TraceStep,
    TraceUnknown,
    is_own,
    percent,
)

Paint: TypeAlias = Callable[[str], str] | None
SHOWN_ENDPOINTS = 12
"""Maximum number of endpoints that are listed."""
SHOWN_UNKNOWNS = 6
_HOOK_WIDTH = 15
_GLUE = "\u00a0"
"""Stands for a space at which no line is broken."""
_HOOKS = (
    "ingress",
    "prerouting",
    "output",
    "routing",
    "input",
    "forward",
    "postrouting",
    "prerouting lo",
    "input lo",
)
"""The hooks in the order in which packets pass them."""
_COMMENT = re.compile(r' ?-m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+)')
_SILENT = {"matched", "jump", "goto", "return", "mark"}
_WORDS = {
    "drop": "DROPPED",
    "policy-drop": "DROPPED",
    "reject": "REJECTED",
    "accept": "accepted",
    "masquerade": "masqueraded: the receiver sees an address of this node",
    "notrack": "not tracked by conntrack",
    "affinity": "session affinity is recorded",
}


def trace_lines(trace: PacketTrace, style: Style) -> Iterator[str]:
    """Yield the lines of a trace."""
    title = " ".join([trace.protocol, "from", trace.source, "to", trace.destination])
    yield from _wrapped(title + _interface(trace), "", style.bold)
    for note in trace.notes:
        yield from _wrapped(f"note: {note}", "", style.warning)
    yield from _connections(trace)
    for number, (hook, text, paint) in enumerate(_events(trace, style), 1):
        lines = list(_wrapped(text, " " * (_HOOK_WIDTH + 4), paint))
        yield f"{number:>2} {hook:<{_HOOK_WIDTH}} {lines[0].lstrip()}"
        yield from lines[1:]
    yield from _unknowns(trace, style)
    paint = {"works": style.good, "broken": style.bad, "unknown": style.warning}[trace.answer]
    yield from _wrapped(f"Result: {trace.summary}.", "", paint)
    yield from _return_path(trace)
    if trace.live is not None:
        yield from _live(trace.live, style)


def _live(live: TraceLive, style: Style) -> Iterator[str]:
    if not live.seen:
        yield from _wrapped("Live: no packet of this connection came.", "", style.warning)
        return
    end = (f", to {live.endpoint}" if live.endpoint else "") + (", masqueraded" if live.masqueraded else "")
    if live.agrees:
        text = f"Live: a real packet was {live.verdict}, by the predicted rules ({len(live.rules)}){end}."
        yield from _wrapped(text, "", style.good)
        return
    yield from _wrapped(
        f"Live: a real packet was {live.verdict}{end}, not as predicted. It matched these rules:", "", style.bad
    )
    for rule in live.rules:
        yield from _wrapped(f"{_place(rule)}: {_quoted(rule)}", "    ", None)


def _interface(trace: PacketTrace) -> str:
    if trace.interface == "":
        return ", sent by the node"
    if not trace.interface:
        return ", received on an unknown interface"
    return f", received on {trace.interface}{' (where the route back leads)' if trace.interface_from_route else ''}"


def _connections(trace: PacketTrace) -> Iterator[str]:
    for connection in trace.connections[:SHOWN_ENDPOINTS]:
        masqueraded = ", masqueraded" if connection.masqueraded else ""
        state = f" ({connection.state.lower()})" if connection.state else ""
        text = f"conntrack: {connection.client} is connected to {connection.endpoint}{masqueraded}{state}"
        yield from _wrapped(text, "", None)
    if len(trace.connections) > SHOWN_ENDPOINTS:
        yield f"conntrack: {len(trace.connections) - SHOWN_ENDPOINTS} more connections"


# Steps.


def _events(trace: PacketTrace, style: Style) -> Iterator[tuple[str, str, Paint]]:
    """Yield the steps of all ways that matter to people: the hook, the text, and its color."""
    merged = _merged(trace.paths)
    translated = False
    for step, paths in merged:
        if step.effect == "dnat":
            if not translated:
                translated = True
                yield step.hook, _endpoints(trace), None
            continue
        text = _text(step)
        if not text:
            continue
        bad = step.effect in ("drop", "policy-drop", "reject")
        paint = style.bad if bad else style.warning if step.effect == "unknown" else None
        yield step.hook, text + _only(paths, trace.paths), paint


def _merged(paths: tuple[TracePath, ...]) -> list[tuple[TraceStep, list[TracePath]]]:
    """Merge the steps of all ways into one list, in an order that fits each of them."""
    order: list[object] = []
    steps: dict[object, TraceStep] = {}
    users: dict[object, dict[int, None]] = {}
    for number, path in enumerate(paths):
        at = -1
        for step in path.steps:
            if step.effect in _SILENT and not step.service:
                continue
            key = _key(step)
            if key in steps:
                at = max(at, order.index(key))
            else:
                at += 1
                order.insert(at, key)
                steps[key] = step
            users.setdefault(key, {})[number] = None
    merged = [(steps[key], [paths[number] for number in users[key]]) for key in order]
    return sorted(merged, key=lambda each: _HOOKS.index(each[0].hook))


def _key(step: TraceStep) -> object:
    return (step.hook, step.effect, step.rule, step.service) if step.effect != "dnat" else (step.hook, "dnat")


def _text(step: TraceStep) -> str:
    """Return what a step does, or "" for a step that people do not need to see."""
    rule = step.rule
    if rule is None or (step.effect == "accept" and is_own(rule)):
        return ""
    if step.effect in _SILENT:
        return f"{_place(rule)}: {step.service}" if step.service else ""
    if step.effect == "affinity" and is_own(rule):
        return "session affinity: the next connection of this client goes to the same endpoint"
    return f"{_place(rule)}: {_deed(step, rule)}"


def _deed(step: TraceStep, rule: TracedRule) -> str:
    """Return what a rule does, with its text unless the effect says it all."""
    word = f"the source becomes {step.note}" if step.effect == "snat" else _WORDS.get(step.effect, step.effect)
    service = f" ({step.service})" if step.service else ""
    if step.effect == "masquerade" and is_own(rule):
        return word
    if step.effect == "policy-drop":
        return f"policy drop{service}  {word}"
    if step.effect == "unknown":
        return f"{_quoted(rule)} cannot be evaluated" + (", but does not matter" if step.note == "same" else "")
    return f"{_quoted(rule)}{service}  {word}"


def _place(rule: TracedRule | None) -> str:
    """Return where a rule is: `inet firewalld filter_FORWARD, handle 41`."""
    if rule is None:
        return ""
    place = f"{rule.family} {rule.table} {rule.chain}"
    if rule.handle:
        return f"{place}, handle {rule.handle}"
    return f"{place}, rule {rule.number}" if rule.number else place


def _quoted(rule: TracedRule) -> str:
    text = rule.text
    if rule.family.startswith(("iptables", "ip6tables")):
        text = _COMMENT.sub("", text.removeprefix(f"-A {rule.chain} ")).strip()
    return f"`{text if len(text) <= 160 else text[:157] + '...'}`"


def _only(paths: list[TracePath], every: tuple[TracePath, ...]) -> str:
    """Say to which connections a step applies, if not to all."""
    if len(paths) == len(every):
        return ""
    conditional = any(path.conditions for path in every)
    if conditional:
        return "" if len({path.conditions for path in every}) == 1 else " (on one of the ways)"
    endpoints = {path.outcome.destination for path in paths if path.outcome.translated}
    if len(endpoints) == 1:
        return f" (only to {endpoints.pop()})"
    total = sum(path.probability for path in paths)
    return f" ({percent(total)} of connections)" if total < 1 - 1e-6 else ""


def _endpoints(trace: PacketTrace) -> str:
    shares: dict[tuple[str, str], float] = {}
    for outcome in trace.outcomes:
        if outcome.translated:
            key = (outcome.destination, outcome.node)
            shares[key] = shares.get(key, 0.0) + outcome.probability
    if trace.unknown_probability:
        every = (*trace.outcomes, *trace.possible)
        names = dict.fromkeys((each.destination, each.node) for each in every if each.translated)
        more = [f"{len(names) - SHOWN_ENDPOINTS} more endpoints"] if len(names) > SHOWN_ENDPOINTS else []
        shown = [_named(*each) for each in list(names)[:SHOWN_ENDPOINTS]] + more
        return f"DNAT to {'one of ' if len(names) > 1 else ''}{', '.join(shown)}"
    shown = [f"{percent(share)}{_GLUE}{_named(*key)}" for key, share in list(shares.items())[:SHOWN_ENDPOINTS]]
    more = [f"and {len(shares) - SHOWN_ENDPOINTS} more endpoints"] if len(shares) > SHOWN_ENDPOINTS else []
    return "DNAT to " + ", ".join([*shown, *more])


def _named(destination: str, node: str) -> str:
    return f"{destination}{_GLUE}({node})" if node else destination


# Unknown results and replies.


def _unknowns(trace: PacketTrace, style: Style) -> Iterator[str]:
    for number, unknown in enumerate(trace.unknowns[:SHOWN_UNKNOWNS]):
        yield from _wrapped(f"unknown: {unknown.hook}: {_reason(unknown)}", "", style.warning)
        for way, outcomes in _by_way(trace, number).items():
            yield from _wrapped(f"- if {way}: {_outcomes_text(outcomes)}", "    ", None)
    if len(trace.unknowns) > SHOWN_UNKNOWNS:
        yield f"unknown: {len(trace.unknowns) - SHOWN_UNKNOWNS} more rules"


def _reason(unknown: TraceUnknown) -> str:
    if unknown.rule is None:
        return unknown.reason
    quoted = _quoted(unknown.rule)
    reason = f"`{unknown.reason}`"
    return f"{_place(unknown.rule)}: " + (quoted if quoted == reason else f"{reason} in {quoted}")


def _by_way(trace: PacketTrace, number: int) -> dict[str, list[TraceOutcome]]:
    found: dict[str, list[TraceOutcome]] = {}
    for path in trace.paths:
        for condition in path.conditions:
            if condition.unknown == number:
                outcomes = found.setdefault(condition.way, [])
                if all(_fate(path.outcome) != _fate(each) for each in outcomes):
                    outcomes.append(path.outcome)
    return found


def _fate(outcome: TraceOutcome) -> tuple[str, str]:
    return outcome.verdict, outcome.destination if outcome.verdict == "accepted" else ""


def _outcomes_text(outcomes: list[TraceOutcome]) -> str:
    texts = [
        {"dropped": "DROPPED", "rejected": "REJECTED"}.get(each.verdict, "unknown")
        for each in outcomes
        if each.verdict != "accepted"
    ]
    for manner, translated in (("reaches", True), ("goes unchanged to", False)):
        names = [
            _named(each.destination, each.node)
            for each in outcomes
            if each.verdict == "accepted" and each.translated is translated
        ]
        more = [f"{len(names) - SHOWN_ENDPOINTS} more"] if len(names) > SHOWN_ENDPOINTS else []
        if names:
            texts.append(f"{manner} {' or '.join([*names[:SHOWN_ENDPOINTS], *more])}")
    return ", or ".join(texts)


def _return_path(trace: PacketTrace) -> Iterator[str]:
    reached = [each for each in trace.outcomes if each.verdict == "accepted" and each.translated]
    reasons: dict[str, str] = {}
    for reply in trace.replies:
        last = reply.steps[-1] if reply.steps else None
        if reply.answer == "broken" and last is not None:
            reasons.setdefault(f"{last.hook}: {_text(last)}", reply.endpoint)
        for unknown in reply.unknowns:
            reasons.setdefault(f"unknown: {unknown.hook}: {_reason(unknown)}", reply.endpoint)
    for reason, endpoint in list(reasons.items())[:SHOWN_UNKNOWNS]:
        yield from _wrapped(f"Replies from {endpoint}: {reason}", "", None)
    if not reached or trace.answer == "unknown":
        return
    masqueraded = {each.masqueraded for each in reached}
    if masqueraded == {True}:
        yield from _wrapped("Replies: return to this node, because connections are masqueraded.", "", None)
    elif masqueraded == {False} and trace.interface != "" and any(each.delivered is not True for each in reached):
        client = trace.source.split()[0]
        text = f"Replies: are sent to {client} itself, and must return through this node to be translated back."
        yield from _wrapped(text, "", None)


def _wrapped(text: str, indent: str, paint: Paint) -> Iterator[str]:
    lines = wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_on_hyphens=False,
        break_long_words=True,
    ) or [""]
    for line in (each.replace(_GLUE, " ") for each in lines):
        yield paint(line) if paint else line
