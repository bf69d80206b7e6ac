"""Follow a packet through all hooks of the kernel, rule by rule, on every way that it can take. Pure.

The ways form a graph. Its nodes are positions: a rule, with the packet as it is there. Ways that lead to the same
position with the same packet meet again, so a rule that cannot be evaluated costs nothing if it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, permutations, product
from typing import Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.trace.flow import NO_INTERFACE, Flow, Interface, TraceFacts, address_text, socket_text
from kproxy.diagnose.trace.program import Action, Base, ChainKey, Check, Decision, Hook, Program, Rule, RuleSource, Way
from kproxy.diagnose.trace.result import Outcome, Result, certain, either, mixture
from kproxy.model.types import Family

CONNTRACK_PRIORITY = -200
"""A chain of this priority or a lower one runs before connection tracking (NF_IP_PRI_CONNTRACK)."""
_NAT_PRIORITIES = {"prerouting": -100, "output": -100, "postrouting": 100, "input": 100}
"""For each hook, the priority at which the kernel runs all nat chains (enum nf_ip_hook_priorities)."""
_SELINUX = 225
MAX_POSITIONS = 20_000
"""Maximum number of positions that are examined. More of them mean that too many rules cannot be evaluated."""
MAX_DEPTH = 64
"""Maximum number of nested chains. The kernel allows 16 jumps."""
MAX_PERMUTED = 4
"""Maximum number of base chains with the same priority whose possible orders are all examined."""

Phase: TypeAlias = Literal[
    "ingress", "prerouting", "route", "input", "forward", "output", "reroute", "postrouting", "loop", "loop-input"
]
_HOOK_OF: dict[str, Hook] = {
    "ingress": "ingress",
    "prerouting": "prerouting",
    "input": "input",
    "forward": "forward",
    "output": "output",
    "postrouting": "postrouting",
    "loop": "prerouting",
    "loop-input": "input",
}
_NEXT: dict[Phase, Phase] = {
    "ingress": "prerouting",
    "prerouting": "route",
    "forward": "postrouting",
    "output": "reroute",
    "loop": "loop-input",
}
Effect: TypeAlias = Literal[
    "matched", "jump", "goto", "return", "accept", "policy-drop", "drop", "reject", "mark", "dnat", "masquerade",
    "snat", "notrack", "affinity", "unknown",
]  # fmt: skip


class Step(Struct, frozen=True):
    """Something that happens to the packet. `note` is the comment of a map's element, or what has changed.

    `target` is the chain of a jump.
    """

    phase: Phase
    effect: Effect
    source: RuleSource | None = None
    note: str = ""
    target: str = ""


class Position(Struct, frozen=True):
    """A place in the rules, and the packet there.

    `bases` are the numbers of the base chains that are left at this hook, None before the hook begins. `frames` are the
    places in nested chains: the chain, the next rule, and the next statement of that rule.
    """

    phase: Phase
    flow: Flow
    bases: tuple[int, ...] | None = None
    frames: tuple[tuple[ChainKey, int, int], ...] = ()


class Edge(Struct, frozen=True):
    """What follows: the probability (None if unknown), the steps, and the next position or the outcome."""

    target: Position | Outcome
    steps: tuple[Step, ...] = ()
    probability: float | None = 1.0
    label: str = ""


class Cause(Struct, frozen=True):
    """Why it is unknown which way the packet takes: the rule, if it is a rule, and what cannot be evaluated."""

    reason: str
    phase: Phase
    source: RuleSource | None = None


class Junction(Struct):
    """What follows a position. `cause` is the number of the cause if the way is unknown."""

    edges: tuple[Edge, ...]
    cause: int | None = None
    result: Result | None = None


class Path(Struct, frozen=True):
    """One way of the packet from the first hook to its outcome.

    `conditions` say which unknown conditions it assumes: the number of the cause, and the way in words.
    """

    probability: float
    steps: tuple[Step, ...]
    outcome: Outcome
    conditions: tuple[tuple[int, str], ...] = ()


class Walk(Struct):
    """A finished walk: the result, the causes of what is unknown, and the ways that lead to different outcomes."""

    result: Result
    causes: list[Cause]
    paths: list[Path]
    truncated: bool = False


class TooManyWaysError(Exception):
    """So many rules cannot be evaluated that following all ways is pointless."""


def walk(program: Program, facts: TraceFacts, flow: Flow, *, max_paths: int = 256) -> Walk:
    """Follow a packet. It begins at the first hook: `output` if its input interface is "", otherwise `prerouting`.

    Raises `TooManyWaysError`.
    """
    walker = _Walker(program, facts)
    if flow.iif.name == "":
        start = Position("output", replace(flow, oif=_route(facts, flow)))
    else:
        start = Position("ingress", flow)
    walker.explore(start)
    result = walker.nodes[start].result
    assert result is not None
    paths, truncated = walker.paths(start, max_paths)
    return Walk(result, walker.causes, paths, truncated)


class _Walker:
    """Explores the graph of positions."""

    def __init__(self, program: Program, facts: TraceFacts) -> None:
        self._program = program
        self._facts = facts
        self.nodes: dict[Position, Junction] = {}
        self.causes: list[Cause] = []
        self._cause_numbers: dict[Cause, int] = {}

    def explore(self, start: Position) -> None:
        """Find all positions and the result of each, without recursion: ways can be long."""
        stack = [start]
        while stack:
            position = stack[-1]
            node = self.nodes.get(position)
            if node is None:
                if len(self.nodes) >= MAX_POSITIONS:
                    raise TooManyWaysError
                node = self.nodes[position] = self._node(position)
                stack.extend(
                    edge.target
                    for edge in node.edges
                    if isinstance(edge.target, Position) and edge.target not in self.nodes
                )
                continue
            stack.pop()
            if node.result is None:
                node.result = self._result(node)

    def _result(self, node: Junction) -> Result:
        results = [self._result_of(edge.target) for edge in node.edges]
        if node.cause is not None:
            return either(results, node.cause)
        if len(results) == 1:
            return results[0]
        return mixture((edge.probability or 0.0, each) for edge, each in zip(node.edges, results, strict=True))

    def _result_of(self, target: Position | Outcome) -> Result:
        if isinstance(target, Outcome):
            return certain(target)
        return self.nodes[target].result or certain(Outcome("unknown"))  # without a result: a loop of chains

    def paths(self, start: Position, limit: int) -> tuple[list[Path], bool]:
        """Return the ways, without those that only repeat the result of another way, and whether some are missing."""
        found: list[Path] = []
        stack: list[tuple[Position | Outcome, float, tuple[Step, ...], tuple[tuple[int, str], ...], int]] = [
            (start, 1.0, (), (), 0)
        ]
        while stack:
            target, probability, steps, conditions, depth = stack.pop()
            if isinstance(target, Outcome):
                found.append(Path(probability, steps, target, conditions))
                if len(found) >= limit:
                    return found, bool(stack)
                continue
            node = self.nodes[target]
            edges = self._shown(node)
            for edge in reversed(edges):
                share = probability * (1.0 if edge.probability is None else edge.probability)
                assumed = conditions
                if node.cause is not None and len(edges) > 1:
                    assumed = (*conditions, (node.cause, edge.label))
                stack.append((edge.target, share, steps + edge.steps, assumed, depth + 1))
        return found, False

    def _shown(self, node: Junction) -> Sequence[Edge]:
        """Return the ways to show: all of them, or the last one if it does not matter which one it is."""
        if node.cause is None:
            return node.edges
        if node.result is not None and node.cause not in node.result.causes:
            best = node.edges[-1]
            cause = self.causes[node.cause]
            if cause.source is None:
                return [best]
            return [replace(best, steps=(Step(cause.phase, "unknown", cause.source, "same"), *best.steps))]
        return node.edges

    def _cause(self, cause: Cause) -> int:
        number = self._cause_numbers.setdefault(cause, len(self.causes))
        if number == len(self.causes):
            self.causes.append(cause)
        return number

    # Positions.

    def _node(self, position: Position) -> Junction:
        if position.frames:
            return self._in_chain(position)
        if position.phase in ("route", "reroute"):
            return self._routing(position)
        if position.bases is None:
            return self._begin_hook(position)
        return Junction((Edge(self._next_base(position)),))

    def _routing(self, position: Position) -> Junction:
        """Decide whether the packet is for this node."""
        flow = position.flow
        if position.phase == "reroute":
            return Junction((Edge(Position("postrouting", replace(flow, oif=_route(self._facts, flow)))),))
        local = self._facts.is_local(flow, flow.destination)
        to_node = Edge(Position("input", replace(flow, oif=NO_INTERFACE)), (), None, "it is an address of the node")
        onward = Edge(
            Position("forward", replace(flow, oif=_route(self._facts, flow))),
            (),
            None,
            "it is not an address of the node",
        )
        if local is not None:
            return Junction((replace(to_node if local else onward, probability=1.0),))
        address = flow.destination
        edges = tuple(
            replace(
                edge,
                target=replace(
                    edge.target, flow=replace(edge.target.flow, local=edge.target.flow.local | {(address, value)})
                ),
            )
            for edge, value in ((to_node, True), (onward, False))
            if isinstance(edge.target, Position)
        )
        reason = f"whether {address_text(flow.family, address)} is an address of the node"
        return Junction(edges, self._cause(Cause(reason, position.phase)))

    def _begin_hook(self, position: Position) -> Junction:
        hook = _HOOK_OF[position.phase]
        if position.phase == "ingress" and (devices := self._possible_devices(position.flow)):
            return self._by_device(position, devices)
        orders = self._orders(hook, position.flow)
        edges = tuple(Edge(replace(position, bases=order), (), None, self._order_text(order)) for order in orders)
        if len(edges) == 1:
            return Junction((replace(edges[0], probability=1.0),))
        return Junction(
            edges, self._cause(Cause(f"the order of base chains with the same priority at hook {hook}", position.phase))
        )

    def _possible_devices(self, flow: Flow) -> list[str]:
        """Return the devices with ingress chains of which it is unknown whether the packet arrives there."""
        devices = {base.device for base in self._program.bases if base.hook == "ingress"}
        return sorted(device for device in devices if flow.iif.matches(device) is None)

    def _by_device(self, position: Position, devices: list[str]) -> Junction:
        flow, edges = position.flow, []
        for device in devices:
            inside = replace(flow, iif=flow.iif.assume(device, fits=True))
            edges.append(Edge(replace(position, flow=inside), (), None, f"it arrives at {device}"))
            flow = replace(flow, iif=flow.iif.assume(device, fits=False))
        edges.append(Edge(replace(position, flow=flow), (), None, "it arrives elsewhere"))
        return Junction(tuple(edges), self._cause(Cause("at which interface the packet arrives", "ingress")))

    def _order_text(self, order: tuple[int, ...]) -> str:
        return "order: " + ", ".join(" ".join(self._program.bases[number].key) for number in order)

    def _orders(self, hook: Hook, flow: Flow) -> list[tuple[int, ...]]:
        """Return the possible orders of the base chains at a hook."""
        chosen = [(_order(base), number) for number, base in enumerate(self._program.bases) if _sees(base, hook, flow)]
        chosen.sort()
        groups = [[number for _, number in group] for _, group in groupby(chosen, key=lambda pair: pair[0])]
        choices = []
        for group in groups:
            matters = 1 < len(group) <= MAX_PERMUTED and any(
                self._changes(self._program.bases[each].key) for each in group
            )
            choices.append(list(permutations(group)) if matters else [tuple(group)])
        return [tuple(number for part in order for number in part) for order in product(*choices)]

    def _changes(self, chain: ChainKey) -> bool:
        """Return whether the table of a base chain has rules that change packets."""
        family, table, _ = chain
        return any(
            isinstance(statement, Action) and statement.changes
            for key, rules in self._program.chains.items()
            if key[0] == family and key[1] == table
            for rule in rules
            for statement in rule.statements
        )

    def _next_base(self, position: Position) -> Position | Outcome:
        """Return the position at the beginning of the next base chain, or at the next hook."""
        flow, bases = position.flow, position.bases or ()
        while bases:
            base = self._program.bases[bases[0]]
            flow = _tracked(flow, position.phase, _order(base)[0])
            if _runs(base, position.phase, flow) and self._program.chains.get(base.key):
                return replace(position, flow=flow, bases=bases, frames=((base.key, 0, 0),))
            if base.drops and _runs(base, position.phase, flow):
                return replace(position, flow=flow, bases=bases, frames=((base.key, 0, 0),))
            bases = bases[1:]
        return self._after_hook(position.phase, _tracked(flow, position.phase, _SELINUX))

    def _after_hook(self, phase: Phase, flow: Flow) -> Position | Outcome:
        if phase in _NEXT:
            return Position(_NEXT[phase], flow)
        if phase == "postrouting" and flow.iif.name == "" and self._facts.is_local(flow, flow.destination):
            return Position("loop", replace(flow, iif=Interface("lo"), oif=NO_INTERFACE))
        return self._accepted(flow, phase)

    def _accepted(self, flow: Flow, phase: Phase) -> Outcome:
        destination = flow.dnat or socket_text(flow.family, flow.destination, flow.port)
        return Outcome(
            "accepted",
            destination,
            translated=bool(flow.dnat),
            masqueraded=bool(flow.snat),
            source=flow.snat if flow.snat not in ("masquerade", "?") else "",
            delivered=phase in ("input", "loop-input"),
            affinity=flow.affinity,
        )

    # Rules.

    def _in_chain(self, position: Position) -> Junction:
        chain, index, statement = position.frames[-1]
        rules = self._program.chains.get(chain, [])
        while index < len(rules):
            node = self._rule(position, rules[index], chain, index, statement)
            if node is not None:
                return node
            index, statement = index + 1, 0
        if len(position.frames) > 1:
            return Junction((Edge(replace(position, frames=position.frames[:-1])),))
        return self._end_of_base(position, ())

    def _end_of_base(self, position: Position, steps: tuple[Step, ...]) -> Junction:
        assert position.bases
        base = self._program.bases[position.bases[0]]
        if base.drops:
            step = Step(position.phase, "policy-drop", RuleSource(*base.key, "policy drop"))
            return Junction((Edge(self._ended(position.flow, "dropped"), (*steps, step)),))
        return Junction((Edge(self._next_base(replace(position, bases=position.bases[1:], frames=())), steps),))

    def _ended(self, flow: Flow, verdict: Literal["dropped", "rejected", "unknown"], reject: str = "") -> Outcome:
        destination = flow.dnat or socket_text(flow.family, flow.destination, flow.port)
        return Outcome(
            verdict, destination, bool(flow.dnat), reject, bool(flow.snat), delivered=False, affinity=flow.affinity
        )

    def _rule(self, position: Position, rule: Rule, chain: ChainKey, index: int, first: int) -> Junction | None:
        """Return what follows if a rule concerns the packet, or None if it does not match."""
        flow, statements = position.flow, rule.statements
        at = first
        unknown: list[Check] = []
        while at < len(statements) and isinstance(statements[at], Check):
            check = statements[at]
            assert isinstance(check, Check)
            truth = check.test(flow, self._facts)
            if truth is False:
                return None
            if truth is None:
                unknown.append(check)
            at += 1
        after = (*position.frames[:-1], (chain, index + 1, 0))
        if unknown:
            return self._split(position, rule, (chain, index, at), after, unknown)
        if at == len(statements):
            step = Step(position.phase, "matched", rule.source)
            return Junction((Edge(replace(position, frames=after), (step,)),))
        action = statements[at]
        assert isinstance(action, Action)
        edges = [self._edge(position, rule, (chain, index, at + 1), way) for way in action.run(flow, self._facts)]
        if len(edges) == 1:
            return Junction((replace(edges[0], probability=1.0),))
        if any(edge.probability is None for edge in edges):
            cause = self._cause(Cause(action.reason, position.phase, rule.source))
            return Junction(tuple(replace(edge, probability=None) for edge in edges), cause)
        return Junction(tuple(edges))

    def _split(
        self,
        position: Position,
        rule: Rule,
        then: tuple[ChainKey, int, int],
        after: tuple[tuple[ChainKey, int, int], ...],
        unknown: list[Check],
    ) -> Junction:
        """Follow both ways after conditions that cannot be evaluated."""
        matching = missing = position.flow
        for check in unknown:
            matching = check.assume(matching, True)
        if len(unknown) == 1:
            missing = unknown[0].assume(missing, False)
        inside = (*position.frames[:-1], then)
        reason = " and ".join(dict.fromkeys(check.text for check in unknown if check.text))
        edges = (
            Edge(replace(position, flow=matching, frames=inside), (), None, "the rule matches"),
            Edge(replace(position, flow=missing, frames=after), (), None, "the rule does not match"),
        )
        return Junction(edges, self._cause(Cause(reason, position.phase, rule.source)))

    def _edge(self, position: Position, rule: Rule, then: tuple[ChainKey, int, int], way: Way) -> Edge:
        """Return what follows one way after an action."""
        chain, index, _ = then
        outer = position.frames[:-1]
        after = (*outer, (chain, index + 1, 0))
        moved = replace(position, flow=way.flow)
        if not way.matched:
            return Edge(replace(moved, frames=after), (), way.probability, "the rule does not match")
        steps = _changes_as_steps(position, way, rule.source)
        if way.decision is None:
            if then[2] < len(rule.statements):
                return Edge(replace(moved, frames=(*outer, then)), steps, way.probability, "the rule matches")
            if not steps:  # for example, it sets a mark that is set already
                steps = (Step(position.phase, "matched", rule.source),)
            return Edge(replace(moved, frames=after), steps, way.probability, "the rule matches")
        target, more = self._decided(moved, way.decision, rule.source, after, way.note)
        label = _decision_text(way.decision)
        if any(step.effect in ("dnat", "masquerade", "snat") for step in steps):
            more = ()
        return Edge(target, (*steps, *more), way.probability, label)

    def _decided(
        self,
        position: Position,
        decision: Decision,
        source: RuleSource,
        after: tuple[tuple[ChainKey, int, int], ...],
        note: str,
    ) -> tuple[Position | Outcome, tuple[Step, ...]]:
        if decision.action in ("jump", "goto"):
            return self._jump(position, decision, source, after, note)
        if decision.action == "return":
            return self._returned(position, Step(position.phase, "return", source, note))
        if decision.action == "continue":
            return replace(position, frames=after), (Step(position.phase, "matched", source, note),)
        step = Step(position.phase, _EFFECTS[decision.action], source, note or decision.detail)
        if decision.action == "accept":
            assert position.bases
            return self._next_base(replace(position, bases=position.bases[1:], frames=())), (step,)
        verdict = _VERDICTS[decision.action]
        return self._ended(position.flow, verdict, decision.detail if verdict == "rejected" else ""), (step,)

    def _returned(self, position: Position, step: Step) -> tuple[Position | Outcome, tuple[Step, ...]]:
        outer = position.frames[:-1]
        if outer:
            return replace(position, frames=outer), (step,)
        (edge,) = self._end_of_base(position, (step,)).edges
        return edge.target, edge.steps

    def _jump(
        self,
        position: Position,
        decision: Decision,
        source: RuleSource,
        after: tuple[tuple[ChainKey, int, int], ...],
        note: str,
    ) -> tuple[Position | Outcome, tuple[Step, ...]]:
        target = (source.family, source.table, decision.chain)
        if target not in self._program.chains or len(after) >= MAX_DEPTH:
            step = Step(position.phase, "unknown", source, f"-j {decision.chain} is neither a chain nor a known target")
            return self._ended(position.flow, "unknown"), (step,)
        effect: Effect = "goto" if decision.action == "goto" else "jump"
        frames = after[:-1] if effect == "goto" else after
        step = Step(position.phase, effect, source, note, decision.chain)
        return replace(position, frames=(*frames, (target, 0, 0))), (step,)


_EFFECTS: dict[str, Effect] = {"accept": "accept", "drop": "drop", "reject": "reject", "unknown": "unknown"}
_VERDICTS: dict[str, Literal["dropped", "rejected", "unknown"]] = {
    "drop": "dropped",
    "reject": "rejected",
    "unknown": "unknown",
}


def _decision_text(decision: Decision) -> str:
    if decision.action in ("jump", "goto"):
        return f"{decision.action} {decision.chain}"
    return "nobody can tell from here" if decision.action == "unknown" else decision.action


def _changes_as_steps(position: Position, way: Way, source: RuleSource) -> tuple[Step, ...]:
    """Return what an action has changed in the packet."""
    old, new, phase = position.flow, way.flow, position.phase
    steps = []
    if new.dnat != old.dnat or new.destination != old.destination:
        steps.append(Step(phase, "dnat", source, new.dnat))
    if new.snat != old.snat:
        effect: Effect = "masquerade" if new.snat == "masquerade" else "snat"
        steps.append(Step(phase, effect, source, new.snat if effect == "snat" else ""))
    if new.mark != old.mark:
        steps.append(Step(phase, "mark", source, f"0x{new.mark.value:x}"))
    if new.entry != old.entry:
        steps.append(Step(phase, "notrack", source))
    if new.affinity and not old.affinity:
        steps.append(Step(phase, "affinity", source))
    return tuple(steps)


def _order(base: Base) -> tuple[int, int]:
    """Return the key by which base chains are sorted: nat chains run together, in the order of their priorities."""
    if base.kind == "nat":
        return (_NAT_PRIORITIES.get(base.hook, base.priority), base.priority)
    return (base.priority, base.priority)


def _sees(base: Base, hook: Hook, flow: Flow) -> bool:
    if flow.family is Family.IPV4:
        families = ("iptables", "iptables-legacy", "ip")
    else:
        families = ("ip6tables", "ip6tables-legacy", "ip6")
    if base.hook != hook or base.key[0] not in (*families, "inet", "netdev"):
        return False
    return hook != "ingress" or flow.iif.matches(base.device) is not False


def _runs(base: Base, phase: Phase, flow: Flow) -> bool:
    """Return whether a base chain runs for the packet: nat chains only for new connections that have no NAT yet."""
    if base.kind != "nat":
        return True
    if flow.state != "new" or phase in ("loop", "loop-input"):
        return False
    return not (flow.source_settled if base.hook in ("postrouting", "input") else flow.destination_settled)


def _tracked(flow: Flow, phase: Phase, priority: int) -> Flow:
    """Return the packet before a chain of a priority: connection tracking may have seen it, and may have undone NAT."""
    if flow.state == "invalid" and phase in ("prerouting", "output") and priority > CONNTRACK_PRIORITY:
        flow = replace(flow, state=flow.entry)
    if flow.restored is not None and phase in ("prerouting", "output") and priority >= _NAT_PRIORITIES["prerouting"]:
        address, port = flow.restored
        flow = replace(flow, destination=address, port=port, restored=None, redirected=False)
    return flow


def _route(facts: TraceFacts, flow: Flow) -> Interface:
    """Return the output interface of a packet."""
    if facts.is_local(flow, flow.destination):
        return Interface("lo")
    return Interface(facts.interface_to(flow.destination))
