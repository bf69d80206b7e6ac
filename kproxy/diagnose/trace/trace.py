"""Trace a packet and its replies, and report the result. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from kproxy.diagnose.report import Report, ReportPart
from kproxy.diagnose.trace.flow import Bits, Flow, Interface, TraceFacts, number_of, socket_text
from kproxy.diagnose.trace.program import Program, RuleSource
from kproxy.diagnose.trace.result import Outcome
from kproxy.diagnose.trace.walk import Cause, Path, Step, TooManyWaysError, Walk, walk

Answer: TypeAlias = Literal["works", "broken", "unknown"]
_SERVICE = r"[a-z0-9][a-z0-9.-]*/[a-z0-9][a-z0-9.-]*(?::[a-z0-9.-]*)?"
_COMMENT = re.compile(rf'"?({_SERVICE})(?: (?:cluster IP|external IP|loadbalancer IP|has no .*))?"?')
_CHAIN = re.compile(r"(?:service|external|firewall)-[A-Z0-9]{8}-([^/]+)/([^/]+)/[^/]+/([^/]*)")
_SERVICE_CHAIN = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW|XLB)-")
_OWN_CHAINS = re.compile(r"KUBE-")
MAX_REPLIES = 20
"""Maximum number of endpoints whose replies are traced."""


class TracedRule(ReportPart, frozen=True, kw_only=True):
    """A rule: `family` is nft's name of its family, or `iptables`, `ip6tables`, `iptables-legacy`, `ip6tables-legacy`.

    `handle` is nft's, 0 if unknown.
    """

    family: str
    table: str
    chain: str
    number: int = 0
    handle: int = 0
    text: str = ""


class TraceStep(ReportPart, frozen=True, kw_only=True):
    """What a rule does to the packet at a hook. `service` is `namespace/name:port`, or "" if the rule tells none."""

    hook: str
    effect: str
    rule: TracedRule | None = None
    note: str = ""
    target: str = ""
    service: str = ""


class TraceOutcome(ReportPart, frozen=True, kw_only=True):
    """A possible outcome. `probability` is the least one that is certain; null in a property means unknown."""

    verdict: Literal["accepted", "dropped", "rejected", "unknown"]
    probability: float
    destination: str = ""
    node: str = ""
    translated: bool = False
    masqueraded: bool | None = False
    delivered: bool | None = None
    affinity: bool = False
    reject_with: str = ""


class TraceCondition(ReportPart, frozen=True, kw_only=True):
    """An assumption about something that cannot be evaluated: its index in `unknowns`, and the assumed way."""

    unknown: int
    way: str


class TracePath(ReportPart, frozen=True, kw_only=True):
    """One way of the packet: its steps, and its probability under the conditions that it assumes."""

    probability: float
    outcome: TraceOutcome
    steps: tuple[TraceStep, ...]
    conditions: tuple[TraceCondition, ...] = ()


class TraceUnknown(ReportPart, frozen=True, kw_only=True):
    """Something that cannot be evaluated and on which the result depends."""

    reason: str
    hook: str
    rule: TracedRule | None = None


class TraceReply(ReportPart, frozen=True, kw_only=True):
    """What happens to the replies of one endpoint on this node."""

    endpoint: str
    answer: Literal["works", "broken", "unknown"]
    steps: tuple[TraceStep, ...] = ()
    unknowns: tuple[TraceUnknown, ...] = ()


class TraceConnection(ReportPart, frozen=True, kw_only=True):
    """A connection that exists already: its entry in conntrack decides, not the rules."""

    client: str
    endpoint: str
    masqueraded: bool
    state: str = ""


class TraceLive(ReportPart, frozen=True, kw_only=True):
    """A real packet that the kernel has traced: whether one came, its verdict, and whether it went as predicted.

    `rules` are the rules that it has matched, in order. `agrees` is null if no packet came. `endpoint` is its
    destination after DNAT, "" if it was dropped. `masqueraded` comes from conntrack; it is null if conntrack does not
    tell. A packet that a rule rejects counts as dropped.
    """

    seen: bool
    verdict: Literal["accepted", "dropped"] | None = None
    endpoint: str = ""
    masqueraded: bool | None = None
    agrees: bool | None = None
    rules: tuple[TracedRule, ...] = ()


class PacketTrace(Report, frozen=True, kw_only=True):
    """The way of a packet through all tables of a node.

    `interface` is "" if the node itself sends the packet, null if unknown; `interfaceFromRoute` means that it is the
    one to which the route back to the source leads.
    `outcomes` have the probabilities that are certain; the rest up to 1 is `unknownProbability`, and it can be any of
    `possible`, depending on `unknowns`. `paths` are all ways that lead to different outcomes.
    """

    source: str
    destination: str
    protocol: str
    interface: str | None
    interface_from_route: bool = False
    answer: Literal["works", "broken", "unknown"]
    summary: str
    service: str = ""
    outcomes: tuple[TraceOutcome, ...] = ()
    unknown_probability: float = 0.0
    possible: tuple[TraceOutcome, ...] = ()
    unknowns: tuple[TraceUnknown, ...] = ()
    paths: tuple[TracePath, ...] = ()
    truncated: bool = False
    replies: tuple[TraceReply, ...] = ()
    connections: tuple[TraceConnection, ...] = ()
    live: TraceLive | None = None
    notes: tuple[str, ...] = ()


class Question(Struct, frozen=True):
    """What is asked, besides the packet: names for people.

    `nodes` maps addresses to node names, `reachable` are addresses that need no Service: those of Pods and nodes.
    """

    facts: TraceFacts
    nodes: Mapping[str, str] = {}
    reachable: frozenset[str] = frozenset()
    source_name: str = ""
    interface_from_route: bool = False
    connections: tuple[TraceConnection, ...] = ()
    notes: tuple[str, ...] = ()


def trace(program: Program, flow: Flow, question: Question) -> PacketTrace:
    """Trace a packet and the replies to it."""
    builder = _Builder(program, flow, question)
    try:
        found = walk(program, question.facts, flow)
    except TooManyWaysError:
        return builder.too_many()
    return builder.report(found)


class _Found(Struct, frozen=True):
    """What the summary is about."""

    outcomes: tuple[TraceOutcome, ...]
    possible: tuple[TraceOutcome, ...]
    unknown: float
    service: str
    paths: tuple[TracePath, ...]


class _Builder:
    def __init__(self, program: Program, flow: Flow, question: Question) -> None:
        self._program = program
        self._flow = flow
        self._question = question
        self._common = {
            "source": question.source_name,
            "destination": socket_text(flow.family, flow.destination, flow.port),
            "protocol": flow.protocol,
            "interface": flow.iif.name,
            "interface_from_route": question.interface_from_route,
            "connections": question.connections,
            "notes": (*program.notes, *question.notes),
        }

    def too_many(self) -> PacketTrace:
        summary = "unknown from here: too many rules on the way cannot be evaluated"
        return PacketTrace(**self._common, answer="unknown", summary=summary)  # type: ignore[arg-type]

    def report(self, found: Walk) -> PacketTrace:
        """Return the report of a finished walk."""
        result = found.result
        numbers = sorted(result.causes)
        position = {number: index for index, number in enumerate(numbers)}
        paths = tuple(self._path(path, position) for path in found.paths)
        service = next((step.service for path in paths for step in path.steps if step.service), "")
        outcomes = tuple(self._outcome(each, share) for each, share in _sorted(result.known.items()))
        possible = tuple(self._outcome(each, 0.0) for each in sorted(result.possible, key=repr))
        unknowns = tuple(_unknown(found.causes[number]) for number in numbers)
        replies = self._replies([each for each in result.known if each.verdict == "accepted"] + list(result.possible))
        answer = self._answer(outcomes, possible, result.unknown)
        summary = self._summary(answer, _Found(outcomes, possible, result.unknown, service, paths))
        bad = next((each for each in replies if each.answer != "works"), None)
        if answer == "works" and bad is not None:
            answer = bad.answer
            manner = "dropped" if bad.answer == "broken" else "perhaps dropped"
            summary += f", but the replies from {bad.endpoint} are {manner} on their way back"
        return PacketTrace(
            **self._common,  # type: ignore[arg-type]
            answer=answer,
            summary=summary,
            service=service,
            outcomes=outcomes,
            unknown_probability=round(result.unknown, 6),
            possible=possible,
            unknowns=unknowns,
            paths=paths,
            truncated=found.truncated,
            replies=replies,
        )

    def _path(self, path: Path, position: Mapping[int, int]) -> TracePath:
        return TracePath(
            probability=round(path.probability, 6),
            outcome=self._outcome(path.outcome, path.probability),
            steps=tuple(map(_step, path.steps)),
            conditions=tuple(
                TraceCondition(unknown=position[number], way=way)
                for number, way in path.conditions
                if number in position
            ),
        )

    def _outcome(self, outcome: Outcome, share: float) -> TraceOutcome:
        address = outcome.destination.rpartition(":")[0].strip("[]")
        return TraceOutcome(
            verdict=outcome.verdict,
            probability=round(share, 6),
            destination=outcome.destination,
            node=self._question.nodes.get(address, ""),
            translated=outcome.translated,
            masqueraded=outcome.masqueraded,
            delivered=outcome.delivered,
            affinity=outcome.affinity,
            reject_with=outcome.reject_with,
        )

    def _class(self, outcome: TraceOutcome) -> Answer:
        if outcome.verdict == "unknown":
            return "unknown"
        if outcome.verdict != "accepted":
            return "broken"
        if outcome.translated or outcome.destination in self._program.endpoints:
            return "works"
        address = outcome.destination.rpartition(":")[0].strip("[]")
        return "works" if address in self._question.reachable else "broken"

    def _answer(self, outcomes: Iterable[TraceOutcome], possible: Iterable[TraceOutcome], unknown: float) -> Answer:
        known = {self._class(each) for each in outcomes}
        every = known | {self._class(each) for each in possible} if unknown else known
        if every in ({"works"}, {"broken"}):
            return every.pop()
        return "broken" if "broken" in known else "unknown"

    # Replies.

    def _replies(self, outcomes: Iterable[Outcome]) -> tuple[TraceReply, ...]:
        """Trace the replies of the endpoints that can be reached."""
        replies: dict[str, TraceReply] = {}
        for outcome in outcomes:
            reached = self._class(self._outcome(outcome, 0.0)) == "works"
            if reached and outcome.destination not in replies and len(replies) < MAX_REPLIES:
                reply = self._reply(outcome)
                if reply is not None:
                    replies[outcome.destination] = reply
        return tuple(replies.values())

    def _reply(self, outcome: Outcome) -> TraceReply | None:
        """Trace the replies of an endpoint: from this node itself, from elsewhere, or both if that is not known."""
        if outcome.delivered is not None:
            return self._reply_from(outcome, from_node=outcome.delivered)
        elsewhere, here = self._reply_from(outcome, from_node=False), self._reply_from(outcome, from_node=True)
        if elsewhere is None or here is None or elsewhere.answer == here.answer:
            return elsewhere
        return TraceReply(
            endpoint=outcome.destination,
            answer="unknown",
            steps=(elsewhere if here.answer == "works" else here).steps,
            unknowns=(*elsewhere.unknowns, *here.unknowns),
        )

    def _reply_from(self, outcome: Outcome, *, from_node: bool) -> TraceReply | None:
        flow, facts = self._flow, self._question.facts
        address, _, port = outcome.destination.rpartition(":")
        try:
            source = number_of(address.strip("[]"))
        except ValueError:
            return None
        iif = Interface("") if from_node else Interface(facts.interface_to(source))
        undone = bool(outcome.masqueraded) and not from_node
        if flow.iif.name == "" and from_node:
            return TraceReply(endpoint=outcome.destination, answer="works")
        start = Flow(
            family=flow.family,
            protocol=flow.protocol,
            source=source,
            source_port=int(port),
            destination=flow.source,
            port=flow.source_port or -1,
            iif=iif,
            entry="established",
            reply=True,
            connection_mark=Bits(0, 0),
            local=frozenset() if flow.iif.name == "" else frozenset({(flow.source, False)}),
            redirected=undone,
            restored=(flow.source, flow.source_port or -1) if undone else None,
            original=flow.original,
            destination_settled=True,
            source_settled=True,
        )
        try:
            found = walk(self._program, facts, start, max_paths=16)
        except TooManyWaysError:
            return TraceReply(endpoint=outcome.destination, answer="unknown")
        verdicts = {each.verdict for each in found.result.known}
        unsure = bool(found.result.unknown) or "unknown" in verdicts
        answer: Answer = "works" if verdicts == {"accepted"} and not unsure else "unknown" if unsure else "broken"
        return TraceReply(
            endpoint=outcome.destination,
            answer=answer,
            steps=tuple(map(_step, found.paths[0].steps)) if found.paths else (),
            unknowns=tuple(_unknown(found.causes[number]) for number in sorted(found.result.causes)),
        )

    # Sentences.

    def _summary(self, answer: Answer, found: _Found) -> str:
        unsure = found.unknown or any(each.verdict == "unknown" for each in found.outcomes)
        if not unsure:
            return "; ".join(self._parts(found))
        if answer == "works":
            return f"every new connection reaches an endpoint{_of(found.service)}; unknown from here: which one"
        if answer == "unknown":
            return "unknown from here"
        if any(self._class(each) == "works" for each in (*found.outcomes, *found.possible)):
            return "some new connections do not reach an endpoint; the rest is unknown from here"
        return "no new connection reaches an endpoint; unknown from here: how it ends"

    def _parts(self, found: _Found) -> list[str]:
        parts = []
        total = {"works": 0.0, "none": 0.0, "dropped": 0.0, "rejected": 0.0}
        for outcome in found.outcomes:
            kind = outcome.verdict if outcome.verdict != "accepted" else self._class(outcome)
            total["none" if kind == "broken" else kind] += outcome.probability
        endpoints = [each for each in found.outcomes if self._class(each) == "works"]
        if total["works"]:
            which = endpoints[0].destination if len(endpoints) == 1 else f"one of {len(endpoints)} endpoints"
            reach = _verb(total["works"], "reaches", "reach")
            parts.append(f"{_share(total['works'])} {reach} {which}{_of(found.service)}")
        if total["none"]:
            where = next(
                each for each in found.outcomes if each.verdict == "accepted" and self._class(each) == "broken"
            )
            to = "the node itself gets the packet" if where.delivered else "the packet is sent there unchanged"
            manner = "" if total["none"] > 1 - 1e-4 else f"{_share(total['none'])} are not translated: "
            parts.append(f"{manner}no rule of a Service translates {where.destination}: {to}")
        for verdict in ("dropped", "rejected"):
            if share := total[verdict]:
                blame = self._blame(verdict, found.paths)
                parts += [f"{_share(share)} {_verb(share, 'is', 'are')} {verdict}{blame}"]
        return parts

    def _blame(self, verdict: str, paths: tuple[TracePath, ...]) -> str:
        """Say whether the rule that ends the connection comes after DNAT, and whose it is."""
        path = next((each for each in paths if each.outcome.verdict == verdict and each.steps), None)
        if path is None or path.steps[-1].rule is None:
            return ""
        after = " after DNAT" if path.outcome.translated else ""
        rule, note = path.steps[-1].rule, path.steps[-1].service
        if is_own(rule):
            reason = f": {note} has no usable endpoint or does not admit the client" if note else ""
            return f"{after}, by a rule of the service proxy{reason}"
        what = "the policy of a chain" if path.steps[-1].effect == "policy-drop" else "a rule"
        return f"{after}, by {what} that is not kproxy's"


def is_own(rule: TracedRule) -> bool:
    """Return whether a rule is one of kproxy or kube-proxy, not of another program."""
    if rule.family.startswith(("iptables", "ip6tables")):
        return bool(_OWN_CHAINS.match(rule.chain)) or " KUBE-" in rule.text
    return rule.table == "kube-proxy" or bool(_OWN_CHAINS.match(rule.chain))


def _share(share: float) -> str:
    return "every new connection" if share > 1 - 1e-4 else f"{percent(share)} of new connections"


def percent(share: float) -> str:
    """Return a probability as text: `33%`, or `0.4%` if it is small."""
    return f"{share * 100:.0f}%" if share >= 0.01 else f"{share * 100:.1f}%"


def _verb(share: float, one: str, several: str) -> str:
    return one if share > 1 - 1e-4 else several


def _of(service: str) -> str:
    return f" of {service}" if service else ""


def _sorted(items: Iterable[tuple[Outcome, float]]) -> list[tuple[Outcome, float]]:
    def order(item: tuple[Outcome, float]) -> tuple[str, str, int]:
        outcome = item[0]
        address, _, port = outcome.destination.rpartition(":")
        try:
            return outcome.verdict, f"{number_of(address.strip('[]')):040}", int(port)
        except ValueError:
            return outcome.verdict, outcome.destination, 0

    return sorted(items, key=order)


def _rule(source: RuleSource | None) -> TracedRule | None:
    return None if source is None else traced_rule(source)


def traced_rule(source: RuleSource) -> TracedRule:
    """Return a rule as it is reported."""
    return TracedRule(
        family=source.family,
        table=source.table,
        chain=source.chain,
        number=source.number,
        handle=source.handle,
        text=source.text,
    )


_HOOKS = {"loop": "prerouting lo", "loop-input": "input lo", "route": "routing", "reroute": "routing"}


def _step(step: Step) -> TraceStep:
    return TraceStep(
        hook=_HOOKS.get(step.phase, step.phase),
        effect=step.effect,
        rule=_rule(step.source),
        note=step.note,
        target=step.target,
        service=_service(step),
    )


def _service(step: Step) -> str:
    """Return the Service to which a rule belongs, according to its comment, its element's comment, or the chain."""
    if step.source is None:
        return ""
    if step.effect in ("jump", "goto") and (found := _CHAIN.match(step.target)):
        return f"{found[1]}/{found[2]}" + (f":{found[3]}" if found[3] else "")
    deciding = step.effect in ("drop", "reject") and bool(_OWN_CHAINS.match(step.source.chain))
    by_element = step.note and (found := _COMMENT.fullmatch(step.note))
    if by_element and found:
        return found[1]
    comment = _COMMENT.fullmatch(step.source.comment)
    if comment and (_SERVICE_CHAIN.match(step.target) or deciding):
        return comment[1]
    return ""


def _unknown(cause: Cause) -> TraceUnknown:
    return TraceUnknown(reason=cause.reason, hook=_HOOKS.get(cause.phase, cause.phase), rule=_rule(cause.source))
